"""The grid's measure on pictures whose grid is known, and the penalty on crops of latents."""

import math

import pytest
import torch

from dina_rl.backbones.codec import LatentGrid
from dina_rl.config import GridConfig, PipelineConfig, RewardsConfig
from dina_rl.runtime import open_pipeline
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.grid import GridScorer, grid_energy
from dina_rl.scorers.registry import open_scorers
from dina_rl.shapes.grammar import prompts, spec_tensor
from dina_rl.shapes.render import render

PERIOD = 8
SD35 = LatentGrid(path="sd35", channels=16, patch=2, pixels=8)


@pytest.fixture(scope="module")
def rendered():
    """Clean pictures of the miniature world, with room for an artifact [B, 3, 32, 32]."""
    images = render(spec_tensor(prompts("dev")), torch.Generator().manual_seed(0))
    return 0.1 + 0.8 * images.double()


def lines(size):
    """One dark pixel at each token's edge."""
    at = (torch.arange(size) % PERIOD == 0).double()
    return torch.maximum(at[:, None], at)


def checkers(size):
    at = torch.arange(size) // (PERIOD // 2)
    return ((at[:, None] + at) % 2).double()


def wave(size):
    return torch.sin(2 * math.pi * torch.arange(size).double() / PERIOD).expand(size, size)


def pink(size, exponent):
    """Pictures [8, 3, size, size] whose amplitudes fall as a power of the frequency, as nature's do."""
    frequency = torch.fft.fftfreq(size, dtype=torch.float64)
    radius = torch.hypot(frequency[:, None], frequency)
    radius[0, 0] = 1
    white = torch.randn(8, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    picture = torch.fft.ifft2(torch.fft.fft2(white) / radius**exponent).real
    return 0.5 + 0.15 * picture / picture.std()


@pytest.mark.parametrize("pattern", [lines, checkers, wave])
def test_a_grid_raises_it_the_more_the_stronger_it_is(rendered, pattern):
    measured = [grid_energy(rendered + amplitude * pattern(32), PERIOD).mean().item()
                for amplitude in (0.0, 0.01, 0.02, 0.04, 0.08)]  # fmt: skip
    assert measured == sorted(measured)
    assert measured[-1] > measured[0] + 0.15


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_pictures_without_a_grid_have_none_however_sharp_they_are(exponent):
    natural = grid_energy(pink(64, exponent), PERIOD).mean()
    assert abs(natural) < 0.15
    assert grid_energy(pink(64, exponent) + 0.08 * lines(64), PERIOD).mean() > natural + 0.1


def test_renders_lie_near_none(rendered):
    """Edges of a figure in the middle are no power law; over many figures what they add is small."""
    assert abs(grid_energy(rendered, PERIOD).mean().item()) < 0.15


def test_only_the_grids_own_period_counts(rendered):
    other = torch.sin(2 * math.pi * torch.arange(32).double() / (PERIOD * 2 / 3)).expand(32, 32)
    assert grid_energy(rendered + 0.08 * other, PERIOD).mean() < grid_energy(rendered, PERIOD).mean()


def test_brightness_and_flat_pictures_do_not_count_nor_contrast_above_rounding(rendered):
    images = rendered + 0.04 * lines(32)
    energy = grid_energy(images, PERIOD)
    torch.testing.assert_close(grid_energy(images - 0.1, PERIOD), energy, rtol=0, atol=1e-9)
    natural = pink(64, 1.0) + 0.1 * lines(64)
    torch.testing.assert_close(grid_energy(natural / 2, PERIOD), grid_energy(natural, PERIOD), rtol=0, atol=0.1)
    flat = torch.rand(2, 3, 1, 1, dtype=torch.float64).expand(2, 3, 32, 32)
    assert grid_energy(flat, PERIOD).abs().max() < 1e-9


def test_a_colour_hides_no_grid(rendered):
    blue = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
    assert grid_energy(rendered + 0.1 * blue * lines(32), PERIOD).mean() > grid_energy(rendered, PERIOD).mean() + 0.1


def test_a_picture_smaller_than_a_tile_is_refused():
    with pytest.raises(ValueError, match="a picture of 24x32 pixels is smaller than the 32 that its grid of 8"):
        grid_energy(torch.zeros(1, 3, 24, 32), PERIOD)


def test_its_gradient_is_that_of_finite_differences(rendered):
    images = (rendered[:1] + 0.05 * lines(32)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grid_energy(x, PERIOD), images, fast_mode=True)


class Drawing:
    """A codec that draws a row as bright as its latent, on faint noise."""

    def __init__(self):
        self.decoded = []

    def decode(self, latents):
        self.decoded.append(latents)
        enlarged = latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
        noise = torch.rand(enlarged.shape[1:], dtype=enlarged.dtype, generator=torch.Generator().manual_seed(2))
        return 0.3 * enlarged * (torch.arange(enlarged.shape[2]) % 8 == 0).double()[:, None] + 0.1 * noise


def of_prompts(*texts):
    return Conditions.of_images(texts)


def test_crops_begin_at_tokens_and_are_decoded_with_their_surroundings():
    codec, config = Drawing(), GridConfig(crops=2, context=3, free=0.0)
    latents = torch.zeros(2, 16, 40, 24, dtype=torch.float64)
    latents[0, :, ::2] = 1  # every token has a line at its upper edge
    scores = GridScorer(config, codec, SD35)(latents, of_prompts("a", "b"))
    assert codec.decoded[0].shape == (4, 16, 14, 14)
    assert scores[0] < scores[1] - 0.3
    places = [place for text in "abcdefgh" for place in GridScorer(config, codec, SD35)._places(text, (40, 24))]
    starts = [(each.window.start * 8 + each.shown.start) for rows, columns in places for each in (rows, columns)]
    assert len(set(starts)) > 5, "other places for other prompts"
    assert all(start % 16 == 0 for start in starts)
    assert all(rows.window.stop <= 40 and columns.window.stop <= 24 for rows, columns in places)


def test_a_samples_score_is_its_own():
    """Whatever else is scored with it; the free part is not punished."""
    latents = torch.zeros(3, 16, 20, 20, dtype=torch.float64)
    latents[:, :, ::2] = torch.tensor([0.5, 1.0, 2.0]).double()[:, None, None, None]  # lines at tokens' upper edges
    scorer = GridScorer(GridConfig(free=0.0), Drawing(), SD35)
    together = scorer(latents, of_prompts("a", "b", "c"))
    assert together[0] > together[1] > together[2]
    torch.testing.assert_close(scorer(latents[1:2], of_prompts("b")), together[1:2])
    forgiving = GridScorer(GridConfig(free=50.0), Drawing(), SD35)
    assert (forgiving(latents, of_prompts("a", "b", "c")) == 0).all()
    with pytest.raises(ValueError, match="a latent of 6 to a side is smaller than the 8"):
        scorer(torch.rand(1, 16, 6, 20), of_prompts("a"))


def test_as_a_reward_it_is_the_whole_pictures_on_the_miniature(tiny_pipeline):
    """Crop and context cover it, so what is decoded is exact; with a gradient at the latents."""
    backbone = open_pipeline(PipelineConfig(path=str(tiny_pipeline)))
    rewards = RewardsConfig(dina=None, grid={"free": 0.0, "weight": 2.0}, clip_score={"path": "none"})
    scorer = open_scorers(rewards.model_copy(update={"clip_score": None}), PipelineConfig(), backbone)["grid"]
    fixed = torch.Generator().manual_seed(0)
    latents = torch.randn(4, *backbone.latent_shape(32, 32), generator=fixed).requires_grad_()
    scores = scorer(latents, of_prompts("a", "b", "c", "d"))
    with torch.no_grad():
        whole = grid_energy(backbone.load_codec().decode(latents), backbone.grid.period)
    torch.testing.assert_close(scores.detach(), -whole.clamp_min(0))
    (gradient,) = torch.autograd.grad(scores.sum(), latents)
    assert gradient[scores < 0].abs().amax() > 0


def test_a_grid_alone_is_no_reward():
    with pytest.raises(ValueError, match="no scorer is switched on"):
        RewardsConfig(dina=None, grid={})
