"""The aesthetic predictor's released layout against its products written out, and what does not fit it."""

import pytest
import torch
from torch.nn import functional
from transformers import CLIPModel

from dina_rl.config import IMAGE_SCORERS
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.registry import check_image_scorer, open_image_scorer
from tests.tiny_clip import EDGE, save_tiny_clip
from tests.tiny_open_clip import normalised

SHAPES = {0: (1024, 8), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}  # 768 wide where CLIP is ViT-L/14


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))


@pytest.fixture(scope="module")
def state():
    draws = torch.Generator().manual_seed(0)
    layers = {}
    for place, shape in SHAPES.items():
        layers[f"layers.{place}.weight"] = torch.randn(shape, generator=draws) / shape[1] ** 0.5
        layers[f"layers.{place}.bias"] = torch.randn(shape[0], generator=draws)
    return layers


def section(clip, tmp_path, state):
    torch.save(state, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    return IMAGE_SCORERS["aesthetic"](path=str(tmp_path), processor=clip)


def scores(scorer, images):
    return scorer(images, Conditions.of_images(["whatever"] * len(images)))


def test_scores_are_the_products_written_out_each_its_own_alone_and_with_a_gradient(clip, tmp_path, state):
    scorer = open_image_scorer(section(clip, tmp_path, state), device="cpu")
    pixels = torch.randint(0, 256, (3, 3, EDGE, EDGE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = pixels.float().div(255).requires_grad_()
    found = scores(scorer, images)
    with torch.no_grad():
        seen = CLIPModel.from_pretrained(clip).get_image_features(pixel_values=normalised(images)).pooler_output
        hidden = seen / seen.norm(dim=1, keepdim=True)
        for place in SHAPES:
            hidden = functional.linear(hidden, state[f"layers.{place}.weight"], state[f"layers.{place}.bias"])
    torch.testing.assert_close(found, hidden[:, 0], rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01
    for row in range(3):
        reduced = scorer.reduce(pixels[row])[None]
        torch.testing.assert_close(scores(scorer, reduced), found[row : row + 1], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert gradient.abs().sum((1, 2, 3)).min() > 0


def test_missing_left_over_and_misshapen_tensors_are_named_in_one_line(clip, tmp_path, state):
    lacking = {name: tensor for name, tensor in state.items() if name != "layers.6.bias"}
    for wrong, message in (
        (lacking, "1 tensors missing: layers.6.bias"),
        (state | {"layers.1.weight": torch.zeros(3)}, "1 tensors unknown: layers.1.weight"),
        (
            state | {"layers.0.weight": torch.zeros(1024, 768)},
            r"1 tensors of another shape: layers.0.weight \[1024, 768\]",
        ),
    ):
        config = section(clip, tmp_path, wrong)
        for refuses in (check_image_scorer, lambda config: open_image_scorer(config, device="cpu")):
            with pytest.raises(ValueError, match=message) as refusal:
                refuses(config)
            assert "\n" not in str(refusal.value)
