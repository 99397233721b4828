"""PickScore and CLIPScore against the stock processor and model, and their gradients."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from dina_rl.alignment.golden import open_metric
from dina_rl.config import IMAGE_SCORERS, CLIPScoreConfig, GoldenConfig
from dina_rl.scorers.clip import check_clip, open_clip_scorer
from dina_rl.scorers.clip_input import CLIPInput
from dina_rl.scorers.registry import open_image_scorer
from tests.tiny_clip import EDGE, save_tiny_clip
from tests.tiny_open_clip import PROMPTS as WORDS
from tests.tiny_open_clip import pictures, save_as_clip, taught

PROMPTS = ("a small red circle on blue", "a large green square on black", "a small red circle on blue")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = str(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))
    return CLIPScoreConfig(path=path, processor=path)


@pytest.fixture(scope="module")
def taught_clip(tmp_path_factory):
    return str(save_as_clip(taught(), tmp_path_factory.mktemp("clip") / "taught"))


@pytest.fixture(scope="module")
def pixels():
    """Smooth pictures [3, 40, 32, 3] uint8, wider than high, so that they are both resized and cropped."""
    rows, columns = np.meshgrid(np.linspace(0, 3, 40), np.linspace(0, 2, 32), indexing="ij")
    waves = [np.sin(k + rows[..., None] * (k + 1) + columns[..., None] * np.arange(1, 4)) for k in range(3)]
    return ((np.stack(waves) + 1) * 127).astype(np.uint8)


def as_images(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def stock_scores(clip, pixels, learned_scale):
    """The published snippet: processor on PIL images, normalised embeddings, their product."""
    model = CLIPModel.from_pretrained(clip.path).eval()
    processor = CLIPImageProcessorPil.from_pretrained(clip.processor)
    images = processor([Image.fromarray(each) for each in pixels], return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(clip.processor)(
        list(PROMPTS), padding="max_length", truncation=True, max_length=8, return_tensors="pt"
    )
    seen = model.get_image_features(**images).pooler_output
    read = model.get_text_features(**tokens).pooler_output
    cosine = (seen / seen.norm(dim=-1, keepdim=True) * read / read.norm(dim=-1, keepdim=True)).sum(-1)
    return model.logit_scale.exp() * cosine if learned_scale else cosine


@pytest.mark.parametrize("learned_scale", [True, False], ids=["pickscore", "clip_score"])
def test_scores_are_those_of_the_stock_processor_and_model(clip, pixels, learned_scale):
    ours = open_clip_scorer(clip, learned_scale=learned_scale, device="cpu").score(as_images(pixels), PROMPTS)
    expected = stock_scores(clip, pixels, learned_scale)
    assert expected.std() > 1e-3 * expected.abs().max(), "the pictures must be told apart"
    torch.testing.assert_close(ours, expected, rtol=0.01, atol=0.01 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["pickscore", "clip_score"])
def test_a_picture_prefers_its_own_prompt(taught_clip, name):
    scorer = open_image_scorer(IMAGE_SCORERS[name](path=taught_clip, processor=taught_clip), device="cpu")
    own, foreign = (scorer.score(pictures(), words) for words in (WORDS, WORDS[1:] + WORDS[:1]))
    assert (own > foreign).all()
    turned = scorer.score(pictures().roll(1, 0), WORDS)
    assert (own > turned).all()


def test_the_score_has_the_gradient_of_its_finite_differences(clip, pixels):
    scorer = open_clip_scorer(clip, learned_scale=True, device="cpu")
    images = (0.25 + as_images(pixels) / 2).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(images, PROMPTS).sum(), images)
    direction = 0.2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = scorer.score(images + direction, PROMPTS).sum() - scorer.score(images - direction, PROMPTS).sum()
    assert slope.item() / 0.4 == pytest.approx(gradient.norm().item(), rel=0.02)


def test_as_golden_metric_it_returns_plain_numbers(clip, pixels):
    metric = open_metric(GoldenConfig(scorer="pickscore", path=clip.path, processor=clip.processor))
    scores = metric(as_images(pixels), PROMPTS)
    ours = open_clip_scorer(clip, learned_scale=True, device="cpu").score(as_images(pixels), PROMPTS)
    assert scores.values == pytest.approx(ours.tolist())
    assert {type(value) for value in scores.values} == {float}


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="CLIP model .*nowhere.* cannot be read"):
        check_clip(str(tmp_path / "nowhere"), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_are_missing_or_left_over_are_named(clip, tmp_path, change):
    shutil.copytree(clip.path, tmp_path / "clip")
    weights = tmp_path / "clip/model.safetensors"
    state = load_file(weights)
    counted = {"text_model.embeddings.position_ids": torch.arange(8)[None]}  # which published files may have
    save_file(state | counted, weights, {"format": "pt"})
    open_image_scorer(CLIPScoreConfig(path=str(tmp_path / "clip"), processor=clip.processor), device="cpu")
    name = "text_projection.weight"
    if change == "missing":
        del state[name]
    else:
        name = "extra.weight"
        state[name] = torch.ones(2)
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=f"does not fit: 1 tensors {change}: {name}"):
        open_image_scorer(CLIPScoreConfig(path=str(tmp_path / "clip"), processor=clip.processor), device="cpu")


@pytest.mark.parametrize("size", [(40, 32), (24, 24), (100, 300), (23, 61)])
def test_a_reduced_picture_scores_as_the_whole(clip, size):
    given = CLIPInput(clip.processor, device="cpu")
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = pixels.permute(2, 0, 1)
    reduced = given.reduce(pixels)
    assert reduced.shape == (3, EDGE, EDGE)
    whole, cut = (given.pixels(image[None]) for image in (pixels.float() / 255, reduced))
    assert torch.equal(whole, cut)


@pytest.mark.parametrize("size", [(2, 51), (51, 2), (1, 40), (3, 70)])
def test_the_ends_of_a_strip_go_before_it_is_resized(clip, size):
    given = CLIPInput(clip.processor, device="cpu")
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(given.reduce(pixels), given.cropped(pixels[None].float() / 255)[0])
    assert given.reduce(torch.zeros(3, 1, 200_000, dtype=torch.uint8)).shape == (3, EDGE, EDGE)
