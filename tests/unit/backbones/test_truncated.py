from pathlib import Path

import pytest
import torch
from torch import nn

from dina_rl.backbones.registry import open_backbone
from tests.tiny_reward import PROMPTS, latents

TAPS = (1, 2, 3)


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path):
    return open_backbone(tiny_pipeline, max_sequence_length=8)


def test_taps_are_the_block_outputs_of_the_full_transformer(backbone) -> None:
    transformer = backbone.load_transformer()
    prompt = backbone.load_text_encoder()(PROMPTS)
    x, sigma = latents(3, 0), torch.tensor([0.05, 0.4, 1.0])
    seen = {}

    def watch(number: int, block: nn.Module) -> None:
        block.register_forward_hook(lambda _module, _inputs, output: seen.update({number: output}))

    for number, block in enumerate(transformer.transformer_blocks, start=1):
        watch(number, block)
    transformer.time_text_embed.register_forward_hook(lambda _m, _i, output: seen.update(time=output))
    with torch.no_grad():
        features = backbone.features(backbone.truncated(backbone.load_transformer(), 3), x, sigma, prompt, TAPS)
        backbone.velocity(transformer, x, sigma, prompt)
    for tap, visual, text in zip(TAPS, features.visual, features.text, strict=True):
        expected_text, expected_visual = seen[tap]
        assert torch.equal(visual, expected_visual)
        assert torch.equal(text, expected_text)
    assert torch.equal(features.time_embedding, seen["time"])


def test_nothing_after_the_last_tap_is_kept(backbone) -> None:
    transformer = backbone.load_transformer()
    truncated = backbone.truncated(transformer, 2)
    assert len(truncated.transformer_blocks) == 2
    kept = {name for name, _ in truncated.named_parameters()}
    assert not any(name.startswith(("norm_out", "proj_out", "transformer_blocks.2")) for name in kept)
    assert any(name.startswith("norm_out") for name, _ in transformer.named_parameters())


@pytest.mark.parametrize("num_blocks", [0, 4, 5])
def test_blocks_without_a_text_output_are_refused(backbone, num_blocks: int) -> None:
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        backbone.truncated(backbone.load_transformer(), num_blocks)
