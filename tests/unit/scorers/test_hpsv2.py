"""HPSv2's released layout against a tower of its own kind, and what does not fit it."""

import pytest
import torch

from dina_rl.config import IMAGE_SCORERS
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.registry import check_image_scorer, open_image_scorer
from tests.tiny_clip import EDGE, save_tiny_clip
from tests.tiny_open_clip import PROMPTS, normalised, pictures, save_hps, taught, tokenize


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The CLIP model that was fine-tuned: of it the sizes, the tokenizer and the image processor are read."""
    return str(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Where both releases lie; the second is the first with another projection."""
    directory, model = tmp_path_factory.mktemp("hps"), taught()
    save_hps(model, directory / "HPS_v2_compressed.pt")
    state = model.state_dict()
    torch.save({"state_dict": state | {"visual.proj": -state["visual.proj"]}}, directory / "HPS_v2.1_compressed.pt")
    return directory


def section(clip, path, name="hpsv2"):
    return IMAGE_SCORERS[name](path=str(path), processor=clip)


@pytest.fixture(scope="module")
def scorer(clip, released):
    return open_image_scorer(section(clip, released), device="cpu")


def scores(scorer, images, prompts):
    return scorer(images, Conditions.of_images(prompts))


def test_scores_are_the_cosines_of_open_clips_towers(scorer):
    expected = taught().cosines(normalised(pictures()), tokenize(PROMPTS))
    for shift in range(4):
        prompts = PROMPTS[shift:] + PROMPTS[:shift]
        diagonal = expected[torch.arange(4), torch.arange(4).roll(-shift)]
        torch.testing.assert_close(scores(scorer, pictures(), prompts), diagonal, rtol=1e-4, atol=1e-5)


def test_a_picture_prefers_its_own_prompt(scorer):
    own, foreign = (scores(scorer, pictures(), prompts) for prompts in (PROMPTS, PROMPTS[1:] + PROMPTS[:1]))
    assert (own > foreign + 0.3).all()


def test_the_two_releases_are_two_files_of_one_place(clip, released, scorer):
    second = open_image_scorer(section(clip, released, "hpsv2_1"), device="cpu")
    torch.testing.assert_close(scores(second, pictures(), PROMPTS), -scores(scorer, pictures(), PROMPTS))
    named = section(clip, released / "HPS_v2.1_compressed.pt")
    assert torch.equal(
        scores(open_image_scorer(named, device="cpu"), pictures(), PROMPTS), scores(second, pictures(), PROMPTS)
    )


def test_a_score_is_its_own_alone_in_whole_or_reduced_and_has_a_gradient(scorer):
    images = torch.rand(3, 3, EDGE + 9, EDGE + 4, generator=torch.Generator().manual_seed(0))
    images = (images * 255).byte()
    whole = images.float().div(255).requires_grad_()
    together = scores(scorer, whole, PROMPTS[:3])
    (gradient,) = torch.autograd.grad(together.sum(), whole)
    assert gradient.isfinite().all()
    assert gradient.abs().sum((1, 2, 3)).min() > 0
    for row in range(3):
        alone = scores(scorer, scorer.reduce(images[row])[None], PROMPTS[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["logit_scale", "visual.transformer.resblocks.1.attn.in_proj_bias", "ln_final.weight"])
def test_a_missing_tensor_is_named(clip, tmp_path, name):
    state = {key: tensor for key, tensor in taught().state_dict().items() if key != name}
    torch.save({"state_dict": state}, tmp_path / "hps.pt")
    with pytest.raises(ValueError, match=r"hps.pt does not fit the model: \d tensors missing: [\w.]+") as refusal:
        check_image_scorer(section(clip, tmp_path / "hps.pt"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["extra.weight", "transformer.resblocks.0.ls_1.weight", "transformer.resblocks.9.ln_1.bias"]
)
def test_a_tensor_that_is_left_over_is_named(clip, tmp_path, name):
    torch.save({"state_dict": {**taught().state_dict(), name: torch.zeros(16)}}, tmp_path / "hps.pt")
    for refuses in (check_image_scorer, lambda config: open_image_scorer(config, device="cpu")):
        with pytest.raises(ValueError, match="1 tensors unknown"):
            refuses(section(clip, tmp_path / "hps.pt"))


def test_what_is_no_release_is_refused_in_one_line(clip, tmp_path):
    torch.save(taught().state_dict(), tmp_path / "bare.pt")
    torch.save({"state_dict": taught()}, tmp_path / "module.pt")
    (tmp_path / "text.pt").write_text("nothing")
    for name, message in {
        "bare.pt": "is not a state dict of tensors under 'state_dict'",
        "module.pt": "holds more than a state dict of tensors",
        "text.pt": "damaged or holds more",
        "nowhere.pt": "nowhere.pt does not exist; give HPS_v2_compressed.pt",
        "": "HPS_v2_compressed.pt does not exist",
    }.items():
        with pytest.raises(ValueError, match=message) as refusal:
            check_image_scorer(section(clip, tmp_path / name))
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="CLIP model .* cannot be read"):
        check_image_scorer(section(str(tmp_path), tmp_path))
