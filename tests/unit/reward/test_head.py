import pytest
import torch

from dina_rl.backbones.base import Features
from dina_rl.reward.head import CrossAttention, FiLMAdapter, RewardHead
from dina_rl.seeding import generator


def normal(*shape: int, key: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator("head", key, *shape))


def features(batch: int = 2, taps: int = 2, width: int = 16) -> Features:
    return Features(
        visual=tuple(normal(batch, 6, width, key=tap) for tap in range(taps)),
        text=tuple(normal(batch, 3, width, key=10 + tap) for tap in range(taps)),
        time_embedding=normal(batch, width, key=99),
    )


def test_published_checkpoint_fits() -> None:
    """Keys, shapes and totals of rm_head.pt (reference/data_and_rewards.md 4.1 and 3.1)."""
    with torch.device("meta"):
        head = RewardHead(1536, num_taps=3, num_queries=4, num_heads=8)
    state = head.state_dict()
    assert len(state) == 87
    assert sum(tensor.numel() for tensor in state.values()) == 139_296_003
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["query_tokens"] == (1, 4, 1536)
    for side in ("visual", "text"):
        assert shapes[f"agg_{side}.weight"] == (1536, 1152)
        for tap in range(3):
            prefix = f"layer_adapters_{side}.{tap}"
            assert shapes[f"{prefix}.layer_embed"] == (1, 1, 1536)
            assert shapes[f"{prefix}.cond_mlp.0.weight"] == (3072, 1536)
            assert shapes[f"{prefix}.cond_mlp.2.weight"] == (3072, 3072)
            assert shapes[f"{prefix}.proj.weight"] == (384, 1536)
    projections = ("to_q", "to_k_vis", "to_v_vis", "to_out.0")
    for name in [f"attn1.{p}" for p in (*projections, "to_k_text", "to_v_text")] + [f"attn2.{p}" for p in projections]:
        assert shapes[f"{name}.weight"] == (1536, 1536)
        assert shapes[f"{name}.bias"] == (1536,)
    for name in ("attn1.norm_q", "attn1.norm_v", "attn1.norm_t", "attn2.norm_q", "attn2.norm_v", "norm_ff"):
        assert shapes[f"{name}.weight"] == (1536,)
    for name in ("attn1.gate_vis", "attn1.gate_text"):
        assert shapes[f"{name}.0.weight"] == (1536, 1536)
        assert shapes[f"{name}.2.weight"] == (1, 1536)
    assert shapes["ff.0.weight"] == (6144, 1536)
    assert shapes["ff.2.weight"] == (1536, 6144)
    assert shapes["head.weight"] == (1, 1536)


def test_film_starts_without_modulation() -> None:
    adapter, tokens = FiLMAdapter(8, token_width=8, time_width=8), normal(2, 5, 8)
    expected = adapter.proj(tokens + adapter.layer_embed)
    torch.testing.assert_close(adapter(tokens, normal(2, 8, key=1)), expected)
    torch.testing.assert_close(adapter(tokens, normal(2, 8, key=2)), expected)


def test_film_shifts_and_scales_by_the_time_embedding() -> None:
    adapter, tokens, time = FiLMAdapter(8, token_width=8, time_width=8), normal(2, 5, 8), normal(2, 8, key=1)
    torch.nn.init.normal_(adapter.cond_mlp[-1].weight, generator=generator("film"))
    gamma, beta = adapter.cond_mlp(time)[:, None].chunk(2, -1)
    expected = adapter.proj(tokens * (1 + gamma) + beta + adapter.layer_embed)
    torch.testing.assert_close(adapter(tokens, time), expected)
    assert not torch.allclose(adapter(tokens, time), adapter(tokens, 2 * time))


def test_film_projects_tokens_of_another_width_first() -> None:
    adapter, tokens, time = FiLMAdapter(8, token_width=12, time_width=5), normal(2, 5, 12), normal(2, 5, key=1)
    torch.nn.init.normal_(adapter.cond_mlp[-1].weight, generator=generator("film"))
    plain = FiLMAdapter(8, token_width=8, time_width=5)
    plain.load_state_dict({name: t for name, t in adapter.state_dict().items() if not name.startswith("proj_in")})
    torch.testing.assert_close(adapter(tokens, time), plain(adapter.proj_in(tokens), time))


def test_masked_text_is_as_good_as_absent() -> None:
    """Also where a sample's levels lie side by side, each with the same padding."""
    head, short = RewardHead(16, num_taps=2, num_queries=4, num_heads=2), features()
    padded = Features(
        visual=short.visual,
        text=tuple(torch.cat([t, normal(2, 2, 16, key=20)], 1) for t in short.text),
        time_embedding=short.time_embedding,
        text_mask=(torch.arange(5) < 3).expand(2, -1),
    )
    torch.testing.assert_close(head(padded), head(short))
    torch.testing.assert_close(head(padded, num_levels=2), head(short, num_levels=2))


def test_gates_start_at_one_half() -> None:
    gated = CrossAttention(8, 2, text=True, gated=True)
    plain = CrossAttention(8, 2, text=True, gated=False)
    plain.load_state_dict({name: t for name, t in gated.state_dict().items() if "gate" not in name})
    with torch.no_grad():  # out(h / 2) = h / 2 without a bias
        gated.to_out[0].bias.zero_()
        plain.to_out[0].bias.zero_()
    queries, visual, text = normal(2, 4, 8), normal(2, 6, 8), normal(2, 3, 8)
    update = gated(queries, visual, text) - queries
    torch.testing.assert_close(2 * update, plain(queries, visual, text) - queries)


def test_attention_is_softmax_over_each_stream_then_summed() -> None:
    block = CrossAttention(8, 2, text=True, gated=False)
    queries, visual, text = normal(1, 4, 8), normal(1, 6, 8), normal(1, 3, 8)

    def stream(tokens: torch.Tensor, key: torch.nn.Linear, value: torch.nn.Linear) -> torch.Tensor:
        query = block.to_q(block.norm_q(queries))
        parts = []
        for head in range(2):
            span = slice(4 * head, 4 * head + 4)
            weights = (query[..., span] @ key(tokens)[..., span].transpose(1, 2) / 4**0.5).softmax(-1)
            parts.append(weights @ value(tokens)[..., span])
        return torch.cat(parts, -1)

    attended = stream(block.norm_v(visual), block.to_k_vis, block.to_v_vis)
    attended = attended + stream(block.norm_t(text), block.to_k_text, block.to_v_text)
    torch.testing.assert_close(block(queries, visual, text), queries + block.to_out(attended))


def test_one_score_per_sample_and_samples_do_not_mix() -> None:
    head, both = RewardHead(16, num_taps=2, num_queries=4, num_heads=2), features()
    second = Features(
        visual=tuple(v[1:] for v in both.visual),
        text=tuple(t[1:] for t in both.text),
        time_embedding=both.time_embedding[1:],
    )
    scores = head(both)
    assert scores.shape == (2,)
    torch.testing.assert_close(scores[1:], head(second))


def test_levels_are_concatenated_per_sample() -> None:
    """Rows (sample 0 level 0, sample 0 level 1): doubling a level changes nothing, as attention averages values."""
    head, single = RewardHead(16, num_taps=2, num_queries=4, num_heads=2), features()
    doubled = Features(
        visual=tuple(v.repeat_interleave(2, 0) for v in single.visual),
        text=tuple(t.repeat_interleave(2, 0) for t in single.text),
        time_embedding=single.time_embedding.repeat_interleave(2, 0),
    )
    torch.testing.assert_close(head(doubled, num_levels=2), head(single))


def test_width_must_divide() -> None:
    with pytest.raises(ValueError, match=r"num_heads \(3\)"):
        RewardHead(16, num_taps=1, num_queries=1, num_heads=3)
