"""MPS: the pickle becomes tensors without being run, and they score as the released classes do."""

import os
import pickle
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from dina_rl.config import IMAGE_SCORERS
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.mps import CONDITION
from dina_rl.scorers.pickled import module_tensors
from dina_rl.scorers.registry import check_image_scorer, open_image_scorer
from jobs.convert_mps import main
from tests.tiny_clip import EDGE, save_tiny_clip
from tests.tiny_mps import save_mps, taught_mps
from tests.tiny_open_clip import PROMPTS, normalised, pictures


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny", activation="gelu"))


@pytest.fixture(scope="module")
def released(tmp_path_factory, clip):
    """The module, and the file that it was pickled to."""
    model = taught_mps(clip, tokens([CONDITION])[0])
    return model, save_mps(model, tmp_path_factory.mktemp("mps") / "MPS_overall_checkpoint.pth")


@pytest.fixture(scope="module")
def converted(released):
    file = released[1].with_name("mps.safetensors")
    main([str(released[1]), str(file)])
    return file


def tokens(prompts):
    """Padded by the tokenizer's own token, which MPS looks at too."""
    from transformers import AutoTokenizer

    from dina_rl.config.base import SHIPPED_PIPELINE

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_PIPELINE / "tokenizer")
    return tokenizer(list(prompts), padding="max_length", truncation=True, max_length=8, return_tensors="pt").input_ids


def section(clip, path):
    return IMAGE_SCORERS["mps"](path=str(path), processor=clip)


@pytest.fixture(scope="module")
def scorer(clip, converted):
    return open_image_scorer(section(clip, converted), device="cpu")


def scores(scorer, images, prompts):
    return scorer(images, Conditions.of_images(prompts))


def test_scores_are_those_of_the_released_classes_one_picture_at_a_time(scorer, released):
    model, condition = released[0].float(), tokens([CONDITION])[0]
    for prompts in (PROMPTS, PROMPTS[1:] + PROMPTS[:1]):
        expected = torch.stack(
            [model.score(*each, condition) for each in zip(normalised(pictures()), tokens(prompts), strict=True)]
        )
        torch.testing.assert_close(scores(scorer, pictures(), prompts), expected, rtol=1e-4, atol=1e-4)
    _, _, visible = scorer._texts(PROMPTS)
    assert 0 < visible.float().mean() < 1, "some words must be hidden"


def test_a_picture_prefers_its_own_prompt(scorer):
    own, foreign = (scores(scorer, pictures(), prompts) for prompts in (PROMPTS, PROMPTS[1:] + PROMPTS[:1]))
    assert (own > foreign).all()


def test_a_score_is_its_own_alone_in_whole_or_reduced_and_has_a_gradient(scorer):
    images = torch.randint(
        0, 256, (3, 3, EDGE, EDGE + 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    whole = images.float().div(255).requires_grad_()
    together = scores(scorer, whole, PROMPTS[:3])
    for row in range(3):
        alone = scores(scorer, scorer.reduce(images[row])[None], PROMPTS[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(together.sum(), whole)
    assert gradient.isfinite().all()
    assert gradient.abs().sum((1, 2, 3)).min() > 0


def test_converting_reads_every_tensor_and_runs_nothing(released, converted):
    model, file = released
    expected = {name: each for name, each in model.state_dict().items() if not name.endswith("position_ids")}
    found = load_file(converted)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)
    assert "trainer.models.clip_model" not in sys.modules


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_pickle_that_would_do_harm_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Linear(2, 2)
    module.trap = Trap()
    torch.save(module, tmp_path / "trap.pth")
    assert module_tensors(tmp_path / "trap.pth").keys() == {"weight", "bias"}
    assert not (tmp_path / "sprung").exists()


def test_what_is_no_released_mps_is_one_line(clip, converted, tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "linear.pth")
    (tmp_path / "text.pth").write_text("nothing")
    with zipfile.ZipFile(tmp_path / "short.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps([1, 2])[:-2])
    with zipfile.ZipFile(tmp_path / "list.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps([1, 2]))
    for words, message in (
        (["linear.pth", "out.safetensors"], "holds no MPS: none of its 2 tensors is called cross_model."),
        (["text.pth", "out.safetensors"], "cannot be read as a pickled module: File is not a zip file"),
        (["short.pth", "out.safetensors"], "short.pth cannot be read as a pickled module"),
        (["list.pth", "out.safetensors"], "list.pth holds no module with tensors"),
        (["nowhere.pth", "out.safetensors"], "No such file"),
        (["linear.pth", "out.pt"], "out.pt must end in .safetensors"),
        (["linear.pth"], "usage: python -m jobs.convert_mps"),
    ):
        with pytest.raises(SystemExit) as end:
            main([str(tmp_path / word) for word in words])
        assert end.value.code == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1
    state = load_file(converted)
    lacking = {name: each for name, each in state.items() if name != "cross_model.layers.3.1.fn.attn_out.weight"}
    for wrong, message in (
        (lacking, "1 tensors missing: cross_model.layers.3.1.attn_out.weight"),
        (state | {"model.extra": torch.zeros(1)}, "1 tensors unknown: model.extra"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=message):
            check_image_scorer(section(clip, tmp_path / "wrong.safetensors"))
    for name, problem in (("linear.pth", "is no safetensors file"), ("nowhere", "does not exist")):
        with pytest.raises(ValueError, match=rf"{problem}; python -m jobs.convert_mps makes it"):
            check_image_scorer(section(clip, tmp_path / name))
