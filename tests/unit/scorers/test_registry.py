"""What every scorer of images owes the rest: a plan without a network, and what it is made from."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from dina_rl.config import IMAGE_SCORERS, PictureScorerConfig
from dina_rl.evaluation.named_scorers import named_scorer
from dina_rl.scorers.registry import (
    check_image_scorer,
    empty_image_scorer,
    image_scorer_bytes,
    image_scorer_inputs,
    open_image_scorer,
)
from tests.tiny_clip import save_tiny_clip
from tests.tiny_open_clip import save_hps, taught

CLIP_H, CLIP_L = 986_109_441, 427_616_513
PARAMETERS = {"hpsv2": CLIP_H, "hpsv2_1": CLIP_H, "aesthetic": CLIP_L, "mps": CLIP_H + 4 * 2 * 14_813_184}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_scorer_is_planned_without_a_network(name):
    empty = empty_image_scorer(IMAGE_SCORERS[name]())
    assert sum(parameter.numel() for parameter in empty.model.parameters()) == PARAMETERS[name]
    empty.look()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A released file in a working directory, and the same in the hub's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache/models--xswu--HPSv2/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(COMMIT)
    save_hps(taught(), snapshot / "HPS_v2_compressed.pt")
    save_hps(taught(), tmp_path / "here.pt")
    save_tiny_clip(tmp_path / "clip")
    return tmp_path


def test_a_hub_id_is_read_from_the_cache_and_known_by_its_commit(world):
    config = IMAGE_SCORERS["hpsv2"](processor="clip")
    check_image_scorer(config)
    open_image_scorer(config, device="cpu")
    weights, _ = image_scorer_inputs(config)
    assert weights.parts == {"content": COMMIT}
    (file,) = world.glob("cache/*/snapshots/*/*")
    assert image_scorer_bytes(config) == file.stat().st_size
    other = IMAGE_SCORERS["hpsv2_1"](processor="clip")
    assert image_scorer_bytes(other) is None
    with pytest.raises(
        ValueError, match=r"HPS_v2.1_compressed.pt of xswu/HPSv2 is neither a local file nor can be read"
    ):
        check_image_scorer(other)


def test_a_file_is_known_by_its_content_and_by_an_absolute_path(world):
    config = IMAGE_SCORERS["hpsv2"](path="here.pt", processor="clip")
    before, _ = image_scorer_inputs(config)
    assert image_scorer_bytes(config) == Path("here.pt").stat().st_size
    torch.save({}, "here.pt")
    after, _ = image_scorer_inputs(config)
    assert None not in (before.parts["content"], after.parts["content"])
    assert before.parts != after.parts
    save_hps(taught(), world / "here.pt")
    named = named_scorer("hps", PictureScorerConfig(kind="hpsv2", path="here.pt", processor="clip"))
    assert (named.config.path, named.config.processor) == (str(world / "here.pt"), str(world / "clip"))
    assert named.backbone == "CLIP"
