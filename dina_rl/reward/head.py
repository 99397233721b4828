"""The scoring head: FiLM adapters, value-gated Q-Former, scalar (paper section 4.2, Eq. 11 and 13).

Parameter names, shapes and arithmetic are those of the published checkpoint `liuhuohuo/DiNa-LRM-SD35M-12layers`
(`rm_head.pt`), so that its tensors load as they are; `proj_in`, which it has not, is named as in the released code's
FLUX and Z-Image heads. Shapes: B samples, M tapped blocks, N tokens, K noise levels, Q queries, W width, D width of the
backbone's tokens, T width of its timestep embedding (for SD3 all three are one).
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from dina_rl.backbones.base import Features


class FiLMAdapter(nn.Module):
    """Features of one block, modulated by the timestep embedding and projected. Starts without modulation."""

    def __init__(self, width: int, *, token_width: int, time_width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(token_width, width) if token_width != width else None
        self.layer_embed = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.cond_mlp = nn.Sequential(nn.Linear(time_width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.proj = nn.Linear(width, width // 4)
        _zero(self.cond_mlp[-1])

    def forward(self, tokens: torch.Tensor, time_embedding: torch.Tensor) -> torch.Tensor:
        """tokens [B, N, D] and the raw time_embedding [B, T] -> [B, N, W / 4]."""
        if self.proj_in is not None:
            tokens = self.proj_in(tokens)
        gamma, beta = self.cond_mlp(time_embedding)[:, None].chunk(2, dim=-1)
        projected: torch.Tensor = self.proj(tokens * (1 + gamma) + beta + self.layer_embed)
        return projected


class CrossAttention(nn.Module):
    """Residual cross-attention of the queries; visual and text tokens have a softmax each, and the two are summed.

    With `gated`, each context token scales its own value by a sigmoid gate, 0.5 at the start.
    """

    def __init__(self, width: int, num_heads: int, *, text: bool, gated: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = nn.RMSNorm(width)
        self.norm_v = nn.RMSNorm(width)
        self.norm_t = nn.RMSNorm(width) if text else None
        self.to_q = nn.Linear(width, width)
        self.to_k_vis = nn.Linear(width, width)
        self.to_v_vis = nn.Linear(width, width)
        self.to_k_text = nn.Linear(width, width) if text else None
        self.to_v_text = nn.Linear(width, width) if text else None
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.gate_vis = _gate(width) if gated else None
        self.gate_text = _gate(width) if gated and text else None

    def forward(
        self,
        queries: torch.Tensor,
        visual: torch.Tensor,
        text: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """queries [B, Q, W], visual [B, Nv, W], text [B, Nt, W] -> [B, Q, W]; text_mask [B, Nt] is True at tokens."""
        query = self.to_q(self.norm_q(queries))
        visual = self.norm_v(visual)
        attended = self._attend(query, self.to_k_vis(visual), _gated(self.to_v_vis(visual), visual, self.gate_vis))
        if text is not None:
            assert self.norm_t is not None
            assert self.to_k_text is not None
            assert self.to_v_text is not None
            text = self.norm_t(text)
            value = _gated(self.to_v_text(text), text, self.gate_text)
            attended = attended + self._attend(query, self.to_k_text(text), value, text_mask)
        residual: torch.Tensor = self.to_out(attended)
        return queries + residual

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        mask = None if mask is None else mask[:, None, None]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class RewardHead(nn.Module):
    """Backbone features -> one score per sample.

    Args:
        width: W, of the head.
        token_width: D, of the backbone's tokens; None: W.
        time_width: T, of the backbone's timestep embedding; None: W.
        num_taps: M, tapped blocks.

    Raises:
        ValueError: `width` does not divide by 4 and by `num_heads`.
    """

    def __init__(
        self,
        width: int,
        *,
        num_taps: int,
        num_queries: int,
        num_heads: int,
        token_width: int | None = None,
        time_width: int | None = None,
    ) -> None:
        super().__init__()
        if width % num_heads or width % 4:
            raise ValueError(f"reward.num_heads ({num_heads}) and 4 must divide the head's width ({width})")
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, width) * 0.02)
        widths = {"token_width": token_width or width, "time_width": time_width or width}
        self.layer_adapters_visual = nn.ModuleList(FiLMAdapter(width, **widths) for _ in range(num_taps))
        self.layer_adapters_text = nn.ModuleList(FiLMAdapter(width, **widths) for _ in range(num_taps))
        self.agg_visual = nn.Linear(num_taps * (width // 4), width)
        self.agg_text = nn.Linear(num_taps * (width // 4), width)
        self.attn1 = CrossAttention(width, num_heads, text=True, gated=True)
        self.attn2 = CrossAttention(width, num_heads, text=False, gated=False)
        self.norm_ff = nn.RMSNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 1)

    def forward(self, features: Features, *, num_levels: int = 1) -> torch.Tensor:
        """Scores [B] (Eq. 11).

        With K = `num_levels` > 1 the rows of `features` are B samples at K noise levels each, a sample's levels side by
        side [B * K, ...]; a sample's modulated tokens are concatenated (Eq. 13) and the queries attend to all of them
        at once.
        """
        visual = _fuse(self.layer_adapters_visual, self.agg_visual, features.visual, features.time_embedding)
        text = _fuse(self.layer_adapters_text, self.agg_text, features.text, features.time_embedding)
        visual = visual.reshape(-1, num_levels * visual.shape[1], visual.shape[2])  # [B, K * Nv, W]
        text = text.reshape(-1, num_levels * text.shape[1], text.shape[2])
        queries = self.query_tokens.expand(len(visual), -1, -1)
        mask = None if features.text_mask is None else features.text_mask.reshape(text.shape[:2])
        queries = self.attn1(queries, visual, text, mask)
        queries = self.attn2(queries, visual)
        queries = queries + self.ff(self.norm_ff(queries))
        scores: torch.Tensor = self.head(queries)
        return scores.mean(dim=1).squeeze(-1)


def _fuse(
    adapters: nn.ModuleList, aggregate: nn.Linear, taps: Sequence[torch.Tensor], time_embedding: torch.Tensor
) -> torch.Tensor:
    """Tokens of M blocks [B, N, D] each -> one sequence [B, N, W]; fp32 whatever the backbone's dtype."""
    time_embedding = time_embedding.float()
    adapted = [adapter(tap.float(), time_embedding) for adapter, tap in zip(adapters, taps, strict=True)]
    fused: torch.Tensor = aggregate(torch.cat(adapted, dim=-1))
    return fused.float()  # autocast makes it bfloat16, for which RMSNorm's fp32 weights have no fused kernel


def _gate(width: int) -> nn.Sequential:
    gate = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
    _zero(gate[-1])
    return gate


def _gated(value: torch.Tensor, tokens: torch.Tensor, gate: nn.Sequential | None) -> torch.Tensor:
    return value if gate is None else value * torch.sigmoid(gate(tokens))


def _zero(linear: nn.Module) -> None:
    assert isinstance(linear, nn.Linear)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
