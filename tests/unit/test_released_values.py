"""Presets of released code have its values, those too that they leave to our defaults."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from dina_rl.backbones.lora import trainable
from dina_rl.backbones.trained import make_trainable
from dina_rl.cli import read_yaml
from dina_rl.config import AlignRun
from tests.sources import CONFIGS, OFFICIAL

ROWS = [(preset, key, value, source) for preset, table in OFFICIAL.items() for key, (value, source) in table.items()]


def load(preset: str) -> AlignRun:
    return AlignRun.model_validate(read_yaml(CONFIGS / f"{preset}.yaml"))


@pytest.mark.parametrize(("preset", "key", "value", "source"), ROWS)
def test_a_preset_of_released_code_has_its_value(preset: str, key: str, value: object, source: str) -> None:
    found: object = load(preset)
    for name in key.split("."):
        found = dict(found)[name]
    assert found == value, source


def test_every_preset_of_released_code_is_compared() -> None:
    assert {file.stem for file in CONFIGS.glob("sd35m_*official_code*.yaml")} == set(OFFICIAL)


def test_the_released_adapter_has_its_published_size() -> None:
    """On the eight projections of `attn`, and on none of `attn2`."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    make_trainable(transformer, load("sd35m_refl_official_code").learner.lora, targets=(), seed=0)
    assert sum(parameter.numel() for parameter in trainable(transformer).values()) == 18_776_064
