"""The published layout: a synthetic checkpoint with every tensor of the real one at its name, small, there and back."""

import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dina_rl.backbones.base import Features
from dina_rl.backbones.registry import open_backbone
from dina_rl.config import (
    DiNaScorerConfig,
    LoRAConfig,
    PictureScorerConfig,
    PipelineConfig,
    RewardModelConfig,
    ThurstoneConfig,
)
from dina_rl.reward.checkpoint import load_reward, read_card
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.published import save_published
from dina_rl.reward.thurstone import comparison_variance, preference_probability
from dina_rl.scorers.dina import open_dina
from dina_rl.scoring import NoiseKey, open_scorer
from dina_rl.seeding import generator
from jobs.align import preflight
from tests.tensors import assert_same_tensors
from tests.tiny_reward import PROMPTS, latents
from tests.tiny_run import tiny_run

WIDTH, RANK, BLOCKS = 32, 4, 12

RELEASED = {
    "model": {
        "model_type": "thurstone",
        "backbone_model_id": "stabilityai/stable-diffusion-3.5-medium",
        "num_transformer_layers": 12,
        "freeze_backbone": False,
        "use_ema": True,
        "ema_decay": 0.995,
        "use_lora": True,
        "use_text_features": True,
        "lora_config": {"r": RANK, "lora_alpha": 2 * RANK, "init_lora_weights": "gaussian"},
        "use_logistic": False,
        "visual_head_idx": [4, 8, 12],
        "text_head_idx": [4, 8, 12],
        "use_t_embed": True,
        "reward_head": {
            "use_proj_in": False,
            "width": -1,
            "out_dim": 1,
            "num_queries": 4,
            "num_attn_heads": 8,
            "dropout": 0.0,
        },
    },
    "training": {
        "mixed_precision": "bf16",
        "learning_rate": "5e-5",
        "t_weighting_scheme": "uniform",
        "t_weighting_scheme_param": 0.0,
        "add_noise": True,
    },
    "data": {"train": {"base_batch_size": 4}},
    "paths": {"run_name": "SD35M-Thurstone-12layers"},
    "logging": {"eval_frac": 1000},
    "system": {"seed": 42},
}


def head_shapes() -> dict[str, tuple[int, ...]]:
    """rm_head.pt, as documented."""
    linears = {f"ff.{index}": size for index, size in ((0, (4 * WIDTH, WIDTH)), (2, (WIDTH, 4 * WIDTH)))}
    linears["head"] = (1, WIDTH)
    shapes = {"query_tokens": (1, 4, WIDTH), "norm_ff.weight": (WIDTH,)}
    for side in ("visual", "text"):
        linears[f"agg_{side}"] = (WIDTH, 3 * WIDTH // 4)
        for tap in range(3):
            prefix = f"layer_adapters_{side}.{tap}"
            shapes[f"{prefix}.layer_embed"] = (1, 1, WIDTH)
            linears[f"{prefix}.cond_mlp.0"] = (2 * WIDTH, WIDTH)
            linears[f"{prefix}.cond_mlp.2"] = (2 * WIDTH, 2 * WIDTH)
            linears[f"{prefix}.proj"] = (WIDTH // 4, WIDTH)
    for attention, text in (("attn1", True), ("attn2", False)):
        sides = ["vis", "text"] if text else ["vis"]
        shapes |= {f"{attention}.norm_{name}.weight": (WIDTH,) for name in ("q", "v", *(["t"] if text else []))}
        names = ["to_q", "to_out.0", *(f"to_{part}_{side}" for part in "kv" for side in sides)]
        linears |= {f"{attention}.{name}": (WIDTH, WIDTH) for name in names}
    for side in ("vis", "text"):
        linears |= {f"attn1.gate_{side}.0": (WIDTH, WIDTH), f"attn1.gate_{side}.2": (1, WIDTH)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def adapter_shapes() -> dict[str, tuple[int, ...]]:
    """adapter_model.safetensors: attn and attn2 of blocks 0 to 11."""
    visual = ("to_q", "to_k", "to_v", "to_out.0")
    text = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    modules = [f"attn.{name}" for name in visual + text] + [f"attn2.{name}" for name in visual]
    prefix = "base_model.model.transformer_blocks"
    names = [f"{prefix}.{block}.{module}" for block in range(BLOCKS) for module in modules]
    sides = {"lora_A": (RANK, WIDTH), "lora_B": (WIDTH, RANK)}
    return {f"{name}.{side}.weight": shape for name in names for side, shape in sides.items()}


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: (0.1 * torch.randn(shape, generator=generator(name))).to(dtype) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, tiny_pipeline):
    """The miniature SD3.5 with 14 blocks, the first 13 with dual attention, as in SD3.5-medium."""
    directory = tmp_path_factory.mktemp("deep") / "pipeline"
    shutil.copytree(tiny_pipeline, directory)
    config = dict(SD3Transformer2DModel.load_config(directory, subfolder="transformer"))
    config |= {
        "num_layers": 14,
        "dual_attention_layers": tuple(range(13)),
        "num_attention_heads": 4,
        "attention_head_dim": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel.from_config(config | {"caption_projection_dim": WIDTH})
    transformer.save_pretrained(directory / "transformer")
    return open_backbone(directory, max_sequence_length=8)


@pytest.fixture
def published(tmp_path) -> Path:
    """As the released code saves it: the head in bfloat16, bare LoRA targets."""
    directory = tmp_path / "published"
    lora = directory / "checkpoint" / "backbone_lora"
    lora.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(RELEASED, indent=4))
    torch.save(random_tensors(head_shapes(), torch.bfloat16), directory / "checkpoint" / "rm_head.pt")
    save_file(random_tensors(adapter_shapes(), torch.float32), lora / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
        "bias": "none",
        "use_dora": False,
        "rank_pattern": {},
    }
    (lora / "adapter_config.json").write_text(json.dumps(adapter))
    return directory


def head_file(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "checkpoint" / "rm_head.pt", weights_only=True)


def adapter_file(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "checkpoint" / "backbone_lora" / "adapter_model.safetensors")


def scores(model: LatentRewardModel, backbone) -> torch.Tensor:
    prompt = backbone.load_text_encoder()(PROMPTS)
    with torch.no_grad():
        return model.score_clean(latents(3, 0), prompt, (0.2, 0.5), latents(3, 1))


def test_every_tensor_survives_the_way_there_and_back(backbone, published, tmp_path):
    assert (len(head_shapes()), len(adapter_shapes())) == (87, 288)
    model = load_reward(published, backbone)
    save_published(model, tmp_path / "again", pipeline=PipelineConfig(path=backbone.path))
    for file in (head_file, adapter_file):
        before, after = file(published), file(tmp_path / "again")
        assert_same_tensors(after, {name: tensor.float() for name, tensor in before.items()})
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    kept = {key: value for key, value in RELEASED["model"].items() if key not in ("use_ema", "ema_decay")}
    assert again["model"] == kept | {"backbone_model_id": backbone.path}
    assert torch.equal(scores(load_reward(tmp_path / "again", backbone), backbone), scores(model, backbone))


def test_the_model_is_the_one_built_by_hand(backbone, published):
    config = RewardModelConfig(lora=LoRAConfig(rank=RANK, alpha=2 * RANK))
    by_hand = LatentRewardModel(backbone, config, seed=1)
    with torch.no_grad():
        for name, tensor in head_file(published).items():
            by_hand.head.get_parameter(name).copy_(tensor)
        for name, tensor in adapter_file(published).items():
            name = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
            by_hand.truncated.get_parameter(name).copy_(tensor)
    loaded = load_reward(published, backbone)
    assert torch.equal(scores(loaded, backbone), scores(by_hand, backbone))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_the_card_says_what_the_released_code_does(published):
    card = read_card(published)
    assert card.pipeline == "stabilityai/stable-diffusion-3.5-medium"
    assert (card.width, card.max_sequence_length, card.dtype) == (WIDTH, 128, "bfloat16")
    assert (card.reward.taps, card.reward.num_queries, card.reward.num_heads) == ((4, 8, 12), 4, 8)
    assert card.reward.lora == LoRAConfig(rank=RANK, alpha=2 * RANK)
    assert card.reward.timestep.distribution == "uniform"
    assert len(card.buckets) == 13


@pytest.mark.parametrize("model_type", ["thurstone", "thurstone-constant"])
def test_the_released_likelihood_is_ours_at_the_cards_values(published, model_type):
    released = json.loads((published / "config.json").read_text())
    released["model"]["model_type"] = model_type
    (published / "config.json").write_text(json.dumps(released))
    thurstone = read_card(published).reward.thurstone
    margin, sigma = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64)
    of_one = 2 * sigma**2 + 0.05 if model_type == "thurstone" else torch.full_like(sigma, 0.5)
    expected = torch.distributions.Normal(0, 1).cdf(margin / (of_one + of_one + 1e-6).sqrt())
    torch.testing.assert_close(preference_probability(margin, comparison_variance(sigma, thurstone)), expected)


@pytest.mark.parametrize(
    ("scheme", "parameter", "expected"),
    [("constant", 0.3, {"fixed": 0.3}), ("logit_normal", "-0.5_1.5", {"mean": -0.5, "std": 1.5})],
)
def test_training_noise_levels(published, scheme, parameter, expected):
    released = json.loads((published / "config.json").read_text())
    released["training"] |= {"t_weighting_scheme": scheme, "t_weighting_scheme_param": parameter}
    (published / "config.json").write_text(json.dumps(released))
    timestep = read_card(published).reward.timestep
    assert {name: dict(timestep)[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("lora", "head_width"), [(None, 16), (LoRAConfig(rank=2, alpha=3), WIDTH), (LoRAConfig(rank=2, alpha=3), None)]
)
def test_a_model_of_ours_keeps_what_the_released_configuration_has_no_name_for(backbone, tmp_path, lora, head_width):
    config = RewardModelConfig(
        taps=(2, 5),
        num_heads=4,
        lora=lora,
        head_width=head_width,
        single_level=0.3,
        thurstone=ThurstoneConfig(sigma_u=0.4),
    )
    model = LatentRewardModel(backbone, config, seed=3)
    save_published(model, tmp_path / "ours", pipeline=PipelineConfig(path=backbone.path))
    assert (tmp_path / "ours" / "checkpoint" / "backbone_lora").exists() == (lora is not None)
    card = read_card(tmp_path / "ours")
    assert (card.reward, card.pipeline, card.max_sequence_length) == (config, backbone.path, 8)
    assert card.revision.startswith("files:")
    assert torch.equal(scores(load_reward(tmp_path / "ours", backbone), backbone), scores(model, backbone))
    foreign = json.loads((tmp_path / "ours" / "config.json").read_text())
    del foreign["dina_rl"]  # as a reader without our section sees it
    (tmp_path / "ours" / "config.json").write_text(json.dumps(foreign))
    card = read_card(tmp_path / "ours")
    assert (card.reward.lora, card.width) == (lora, WIDTH)
    assert card.reward.head_width == (16 if head_width == 16 else None)
    assert math.isclose(card.reward.thurstone.sigma_u**2, 0.05, rel_tol=1e-4)
    load_reward(tmp_path / "ours", backbone)


def test_every_place_that_takes_a_reward_directory_takes_it(backbone, published):
    scorer = open_scorer(PictureScorerConfig(path=str(published), height=32, width=32), pipeline=backbone.path)
    assert (scorer.config.levels, scorer.card.max_sequence_length) == ((0.4,), 128)
    keys = [NoiseKey(group=(prompt,), member=0) for prompt in PROMPTS]
    assert scorer.score_latents(latents(3), PROMPTS, keys).isfinite().all()  # in bfloat16, as published
    dina = open_dina(DiNaScorerConfig(path=str(published)), backbone)
    assert torch.equal(scores(dina.model, backbone), scores(load_reward(published, backbone), backbone))


def test_alignment_takes_it_on_a_named_pipeline_at_its_own_text_length(backbone, published, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    unnamed = tiny_run(tmp_path, Path(backbone.path), published)
    with pytest.raises(ValueError, match=r"3.5-medium .* \(reward model .* name a copy as rewards\.dina\.pipeline\)$"):
        preflight(unnamed)
    rewards = {"dina": {"path": str(published), "pipeline": backbone.path}}
    run = tiny_run(tmp_path, Path(backbone.path), published, rewards=rewards)
    with pytest.raises(ValueError, match=r"width 32 and 128 text tokens; .* has 32 and 8"):
        preflight(run)
    preflight(run.model_copy(update={"pipeline": PipelineConfig(path=backbone.path, max_sequence_length=128)}))


def test_a_hub_id_is_read_from_the_cache(backbone, published, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789" * 4
    cache = tmp_path / "cache" / "models--someone--Reward-12layers"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(published, cache / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_card("someone/Reward-12layers") == read_card(published)
    with pytest.raises(ValueError, match="someone/Other does not exist: neither a local directory nor a hub id"):
        read_card("someone/Other")


class Bomb:
    """What a foreign pickle may hold."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(backbone, published, tmp_path, legacy):
    file = published / "checkpoint" / "rm_head.pt"
    if legacy:
        file.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    else:
        torch.save({**head_file(published), "more": Bomb(tmp_path / "exploded")}, file)
    with pytest.raises(ValueError, match=r"rm_head\.pt is damaged or holds more than a state dict") as refusal:
        load_reward(published, backbone)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "exploded").exists()


def test_missing_unknown_and_misshapen_tensors_are_named(backbone, published):
    head = head_file(published)
    del head["attn1.gate_vis.0.weight"]
    head |= {"extra": torch.zeros(1), "head.bias": torch.zeros(2)}
    torch.save(head, published / "checkpoint" / "rm_head.pt")
    expected = (
        r"1 tensors missing: attn1\.gate_vis\.0\.weight; 1 tensors unknown: extra; "
        r"1 tensors of another shape: head\.bias \[2\] instead of \[1\]"
    )
    with pytest.raises(ValueError, match=expected):
        load_reward(published, backbone)


def test_missing_adapter_tensors_are_named(backbone, published):
    file = published / "checkpoint" / "backbone_lora" / "adapter_model.safetensors"
    adapter = {name: tensor for name, tensor in adapter_file(published).items() if ".11.attn2" not in name}
    save_file(adapter, file)
    with pytest.raises(
        ValueError, match=r"8 tensors missing: transformer_blocks\.11\.attn2\.\S+lora_A\.weight, .*, \.\.\."
    ):
        load_reward(published, backbone)


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04 half a zip"])
def test_a_broken_head_is_one_line(backbone, published, content):
    (published / "checkpoint" / "rm_head.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"rm_head\.pt (cannot be read|is damaged)") as refusal:
        load_reward(published, backbone)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"model_type": "bt"}, "model_type bt is not supported"),
        ("model", {"use_logistic": True}, "use_logistic"),
        ("model", {"use_lora": False}, "fully fine-tuned backbone"),
        ("model", {"text_head_idx": [4, 8]}, r"text taps \[4, 8\] other than the visual"),
        ("model", {"num_transformer_layers": 13}, "13 layers read at"),
        ("model", {"reward_head": {"use_proj_in": True}}, "a projection to the same width"),
        ("model", {"visual_head_idx": None}, "model.visual_head_idx Input should be a valid tuple"),
        ("training", {"add_noise": False}, "add_noise false is not supported"),
        ("training", {"t_weighting_scheme": "beta"}, "t_weighting_scheme beta is not supported"),
        ("training", {"t_weighting_scheme": "constant", "t_weighting_scheme_param": "x"}, "t_weighting_scheme_param"),
    ],
)
def test_what_cannot_be_expressed_is_refused(published, section, change, message):
    released = json.loads((published / "config.json").read_text())
    released[section] |= change
    (published / "config.json").write_text(json.dumps(released))
    with pytest.raises(ValueError, match=message):
        read_card(published)


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"alpha_pattern": {"to_q": 4}}, {"peft_type": "LOHA"}, {"r": None}]
)
def test_an_adapter_of_another_kind_is_refused(published, change):
    file = published / "checkpoint" / "backbone_lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read_card(published)


@pytest.mark.parametrize("exported", [False, True])
def test_stock_diffusers_and_peft_make_the_same_of_the_directory(backbone, published, tmp_path, exported):
    model = load_reward(published, backbone)
    directory = published
    if exported:
        directory = tmp_path / "again"
        save_published(model, directory, pipeline=PipelineConfig(path=backbone.path))
    transformer = backbone.load_transformer()
    transformer.transformer_blocks = transformer.transformer_blocks[:BLOCKS]
    tapped = []
    for tap in (4, 8, 12):
        transformer.transformer_blocks[tap - 1].register_forward_hook(lambda _, inputs, outputs: tapped.append(outputs))
    adapted = PeftModel.from_pretrained(transformer, str(directory / "checkpoint" / "backbone_lora")).eval()
    assert sum("lora_" in name for name in adapted.state_dict()) == 288
    noisy, t, prompt = latents(3), torch.tensor([0.1, 0.4, 0.8]), backbone.load_text_encoder()(PROMPTS)
    with torch.no_grad():
        adapted(noisy, prompt.embeds, prompt.pooled, 1000 * t)
        features = Features(
            visual=tuple(visual for _, visual in tapped),
            text=tuple(text for text, _ in tapped),
            time_embedding=transformer.time_text_embed(1000 * t, prompt.pooled),
        )
        torch.testing.assert_close(model.head(features), model.score(noisy, t, prompt))
