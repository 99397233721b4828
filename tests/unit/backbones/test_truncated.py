"""The feature extractor against hooks on the stock full transformer."""

import pytest
import torch

from dina_rl.backbones.base import Backbone
from dina_rl.seeding import normal
from tests.families import HEIGHT, WIDTH, Family, watch

# For Z-Image 45, 19 and 46 tokens with the chat around them: padded to 64, 32 and 64.
PROMPTS = ("a small red circle on blue", "", "a large green cross on red")
TAPS = (1, 2)


def latents(backbone: Backbone, count: int) -> torch.Tensor:
    return normal((count, *backbone.latent_shape(HEIGHT, WIDTH)), "latents")


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[::2]], ids=["mixed lengths", "equal lengths"])
def test_taps_are_the_block_outputs_of_the_full_transformer(family: Family, backbone: Backbone, prompts) -> None:
    transformer = backbone.load_transformer()
    prompt = backbone.load_text_encoder()(prompts)
    x, sigma = latents(backbone, len(prompts)), torch.tensor([0.05, 0.4, 1.0])[: len(prompts)]
    blocks = [watch(block) for block in transformer.get_submodule(family.blocks)]
    time = watch(transformer.get_submodule(family.time_embedder))
    with torch.no_grad():
        features = backbone.features(backbone.truncated(backbone.load_transformer(), 2), x, sigma, prompt, TAPS)
        backbone.velocity(transformer, x, sigma, prompt)
    for tap, visual, text in zip(TAPS, features.visual, features.text, strict=True):
        (output,) = blocks[tap - 1]
        if family.name == "z_image":
            image, caption = output.split([visual.shape[1], text.shape[1]], 1)
        else:
            caption, image = output
        assert torch.equal(visual, image)
        tokens = torch.ones(text.shape[:2], dtype=torch.bool) if features.text_mask is None else features.text_mask
        assert torch.equal(text[tokens], caption[tokens])
    assert torch.equal(features.time_embedding, time[0])
    assert features.visual[0].shape[2] == features.text[0].shape[2] == backbone.width
    assert features.time_embedding.shape == (len(prompts), backbone.time_width)


def test_blocks_with_two_outputs_can_be_tapped_and_no_others(backbone: Backbone) -> None:
    transformer = backbone.load_transformer()
    assert backbone.truncated(transformer, backbone.last_tap)
    for depth in (0, backbone.last_tap + 1):
        with pytest.raises(ValueError, match=f"blocks 1 to {backbone.last_tap}"):
            backbone.truncated(transformer, depth)


def test_nothing_after_the_last_tap_is_kept(family: Family, backbone: Backbone) -> None:
    transformer = backbone.load_transformer()
    truncated = backbone.truncated(transformer, 1)
    assert len(truncated.get_submodule(family.blocks)) == 1
    kept = {name for name, _ in truncated.named_parameters()}
    first, every = f"{family.blocks}.0.", f"{family.blocks}."
    before = {name for name, _ in transformer.named_parameters() if not name.startswith(family.after_blocks)}
    assert kept == {name for name in before if name.startswith(first) or not name.startswith(every)}


def test_a_truncated_transformer_shares_nothing_with_the_generator(family: Family, backbone: Backbone) -> None:
    transformer = backbone.load_transformer()
    generator = {parameter.data_ptr() for parameter in transformer.parameters()}
    assert generator.isdisjoint(p.data_ptr() for p in backbone.truncated(transformer, 2).parameters())


def test_padding_and_batch_mates_change_no_feature(backbone: Backbone) -> None:
    truncated, text = backbone.truncated(backbone.load_transformer(), 2), backbone.load_text_encoder()
    prompt, x, sigma = text(PROMPTS), latents(backbone, 3), torch.tensor([0.1, 0.5, 0.9])
    for row in range(3):
        one = slice(row, row + 1)
        with torch.no_grad():
            together = backbone.features(truncated, x, sigma, prompt, TAPS)
            alone = backbone.features(truncated, x[one], sigma[one], prompt.select(one), TAPS)
        assert len(together.visual) == len(together.text) == len(TAPS)
        for ours, other in zip(together.visual, alone.visual, strict=True):
            torch.testing.assert_close(ours[one], other, rtol=1e-5, atol=1e-5)
        for ours, other in zip(together.text, alone.text, strict=True):
            torch.testing.assert_close(ours[one, : other.shape[1]], other, rtol=1e-5, atol=1e-5)
            if together.text_mask is not None:
                assert together.text_mask[row].sum() == other.shape[1]
