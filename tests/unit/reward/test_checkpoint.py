import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from dina_rl.backbones.registry import open_backbone
from dina_rl.config import PictureScorerConfig, PipelineConfig
from dina_rl.fingerprint import pipeline_fingerprint
from dina_rl.reward.checkpoint import CARD_FILE, HEAD_FILE, load_reward, read_card, save_reward
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.revision import pipeline_revision
from dina_rl.scoring import NoiseKey, open_scorer
from tests.tiny_reward import PROMPTS, TINY_REWARD, latents, stirred_model


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path):
    return open_backbone(tiny_pipeline, max_sequence_length=8)


@pytest.fixture
def saved(backbone, tiny_pipeline: Path, tmp_path: Path) -> tuple[LatentRewardModel, Path]:
    model = stirred_model(backbone)
    save_reward(model, tmp_path / "reward", pipeline=PipelineConfig(path=str(tiny_pipeline)))
    return model, tmp_path / "reward"


@pytest.mark.parametrize("frozen_backbone", [False, True])
def test_round_trip_gives_identical_scores(backbone, tiny_pipeline, tmp_path, frozen_backbone: bool) -> None:
    config = TINY_REWARD.model_copy(update={"lora": None}) if frozen_backbone else TINY_REWARD
    model = stirred_model(backbone, config)
    save_reward(model, tmp_path / "reward", pipeline=PipelineConfig(path=str(tiny_pipeline)))
    assert (tmp_path / "reward" / "backbone_lora").exists() != frozen_backbone
    loaded = load_reward(tmp_path / "reward", backbone)
    prompt = backbone.load_text_encoder()(PROMPTS)
    with torch.no_grad():
        scores = [m.score_clean(latents(3, 0), prompt, (0.2, 0.5), latents(3, 1)) for m in (model, loaded)]
    assert torch.equal(*scores)


def test_loaded_model_is_frozen(backbone, saved) -> None:
    loaded = load_reward(saved[1], backbone)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_files_have_the_published_names(saved) -> None:
    model, directory = saved
    assert set(load_file(directory / HEAD_FILE)) == set(model.head.state_dict())
    adapter = load_file(directory / "backbone_lora" / "adapter_model.safetensors")
    assert "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight" in adapter
    assert "base_model.model.transformer_blocks.1.attn2.to_out.0.lora_B.weight" in adapter
    assert len(adapter) == 2 * (3 * 8 + 2 * 4)
    peft = json.loads((directory / "backbone_lora" / "adapter_config.json").read_text())
    assert (peft["r"], peft["lora_alpha"], peft["peft_type"]) == (4, 8, "LORA")


def test_stock_peft_reads_the_adapter(backbone, saved, tiny_pipeline) -> None:
    from peft import PeftModel

    model, directory = saved
    transformer = SD3Transformer2DModel.from_pretrained(tiny_pipeline, subfolder="transformer")
    transformer.transformer_blocks = transformer.transformer_blocks[:3]
    adapted = PeftModel.from_pretrained(transformer, str(directory / "backbone_lora"))
    name = "transformer_blocks.1.attn.to_v.lora_B.default.weight"
    expected = model.truncated.get_parameter(name)
    assert expected.abs().sum() > 0
    assert torch.equal(adapted.base_model.model.get_parameter(name), expected)


def test_card_says_what_it_was_fitted_on(saved, tiny_pipeline) -> None:
    card = read_card(saved[1])
    assert (card.pipeline, card.max_sequence_length, card.width) == (str(tiny_pipeline), 8, 128)
    assert card.reward == TINY_REWARD


def test_the_card_says_which_weights_the_backbone_had(saved, tiny_pipeline) -> None:
    card = read_card(saved[1])
    assert card.revision == pipeline_revision(str(tiny_pipeline))
    assert card.fingerprint == pipeline_fingerprint(str(tiny_pipeline))
    assert (card.dtype, card.image_size, card.buckets) == ("float32", (32, 32), None)


def test_a_card_of_version_1_still_loads(backbone, saved, tiny_pipeline) -> None:
    model, directory = saved
    card = json.loads((directory / CARD_FILE).read_text())
    kept = ("format", "pipeline", "max_sequence_length", "width", "reward")
    (directory / CARD_FILE).write_text(json.dumps({name: card[name] for name in kept} | {"version": 1}))
    assert torch.equal(load_reward(directory, backbone).head.head.weight, model.head.head.weight)
    with pytest.raises(ValueError, match="does not say its image size; give height and width"):
        open_scorer(directory)
    sized = open_scorer(PictureScorerConfig(path=str(directory), height=32, width=32))
    assert sized.score_latents(latents(1), PROMPTS[:1], [NoiseKey(group=(0,), member=0)]).isfinite().all()


def test_saving_again_replaces(backbone, saved, tiny_pipeline) -> None:
    model, directory = saved
    with torch.no_grad():
        model.head.head.bias.fill_(7.0)
    save_reward(model, directory, pipeline=PipelineConfig(path=str(tiny_pipeline)))
    assert load_reward(directory, backbone).head.head.bias.item() == 7.0
    assert [path.name for path in directory.parent.iterdir()] == ["reward"]  # nothing temporary is left


def test_missing_directory(backbone, tmp_path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_reward(tmp_path / "nowhere", backbone)


def test_another_backbone_width(backbone, saved) -> None:
    card = json.loads((saved[1] / CARD_FILE).read_text())
    (saved[1] / CARD_FILE).write_text(json.dumps(card | {"width": 1536}))
    with pytest.raises(ValueError, match=r"width 1536 .* width 128"):
        load_reward(saved[1], backbone)


@pytest.mark.parametrize(
    "damage", [{"version": 4}, {"format": "other"}, {"width": "wide"}, {"surprise": 1}, {"reward": {"tap": [1]}}]
)
def test_foreign_card(backbone, saved, damage: dict) -> None:
    card = json.loads((saved[1] / CARD_FILE).read_text())
    (saved[1] / CARD_FILE).write_text(json.dumps(card | damage))
    with pytest.raises(ValueError, match="not a reward model of this format"):
        load_reward(saved[1], backbone)


@pytest.mark.parametrize("file", [HEAD_FILE, "backbone_lora/adapter_model.safetensors"])
def test_broken_weights(backbone, saved, file: str) -> None:
    (saved[1] / file).write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="cannot be read|is broken"):
        load_reward(saved[1], backbone)
    (saved[1] / file).unlink()
    with pytest.raises(ValueError, match="cannot be read|is broken"):
        load_reward(saved[1], backbone)
