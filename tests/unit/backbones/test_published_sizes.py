"""Parameter counts at the published sizes, on the meta device: nothing is allocated."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dina_rl.backbones.lora import add_lora, trainable
from dina_rl.backbones.registry import open_backbone
from dina_rl.reward.head import RewardHead
from tests.true_sizes import PUBLISHED, write_pipeline


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_reward_model_has_the_published_sizes(tmp_path: Path, name: str) -> None:
    published = PUBLISHED[name]
    backbone = open_backbone(write_pipeline(tmp_path, published))
    transformer = backbone.empty_transformer()
    assert count(transformer) == published.parameters
    assert backbone.latent_shape(1024, 1024) == (16, 128, 128)

    truncated = backbone.truncated(transformer, published.taps[-1])
    assert count(truncated) == published.truncated
    assert {parameter.device.type for parameter in truncated.parameters()} == {"meta"}

    add_lora(truncated, rank=published.lora_rank, alpha=1.0, targets=backbone.lora_targets, seed=0)
    assert sum(parameter.numel() for parameter in trainable(truncated).values()) == published.lora

    with torch.device("meta"):
        head = RewardHead(
            published.head_width or backbone.width,
            token_width=backbone.width,
            time_width=backbone.time_width,
            num_taps=len(published.taps),
            num_queries=4,
            num_heads=8,
        )
    assert count(head) == published.head
