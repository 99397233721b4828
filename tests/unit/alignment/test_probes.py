"""Probes: what they say of pictures, when a drift is an alarm, and that no reward is made of them."""

import json

import pytest
import torch
from transformers import CLIPModel

from dina_rl.alignment.history import History
from dina_rl.alignment.probes import open_probes
from dina_rl.alignment.watch import DriftWatch, drifted
from dina_rl.cli import load
from dina_rl.config import AlignRun, PipelineConfig, ProbesConfig
from dina_rl.runtime import open_pipeline
from dina_rl.scorers.clip import open_zero_shot, text_length
from dina_rl.scorers.clip_input import CLIPInput
from dina_rl.scorers.grid import grid_energy
from dina_rl.scorers.mixture import weighted_sum
from dina_rl.types import ProbeReadings
from jobs.align import check_grid
from tests.tiny_clip import save_tiny_clip

WORDS = ("a small red circle on blue", "a large green ring on black", "a large white cross on red")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny"))


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def config_of(clip, **changes):
    pairs = {"first": {"text": WORDS[0], "against": WORDS[1]}, "last": {"text": WORDS[-1], "against": WORDS[0]}}
    return ProbesConfig.model_validate({"path": clip, "processor": clip, "pairs": pairs, **changes})


def test_a_probability_is_the_softmax_over_both_texts(clip, images):
    """Of the stock model's own logits."""
    found = open_zero_shot(config_of(clip).model, [WORDS[:2], WORDS[1:]], device="cpu")(images)
    model, given = CLIPModel.from_pretrained(clip).eval(), CLIPInput(clip, device="cpu")
    with torch.no_grad():
        logits = model(pixel_values=given.pixels(images), **given.tokens(WORDS, text_length(model))).logits_per_image
    assert logits.std(1).min() > 1e-3, "texts must be told apart"
    expected = torch.stack([logits[:, :2].softmax(-1)[:, 0], logits[:, 1:].softmax(-1)[:, 0]], 1)
    torch.testing.assert_close(found, expected)


def test_readings_are_numbers_by_the_tags_of_their_curves(clip, images, tiny_pipeline):
    backbone = open_pipeline(PipelineConfig(path=str(tiny_pipeline)))
    both = open_probes(config_of(clip), backbone)(images)
    assert list(both.values) == ["probes/first", "probes/last", "guard/grid"]
    assert both.values["guard/grid"] == tuple(grid_energy(images, 8).tolist())
    assert all(len(values) == 3 and all(type(each) is float for each in values) for values in both.values.values())
    alone = open_probes(ProbesConfig(path="/nowhere"), backbone)(images)
    assert list(alone.values) == ["guard/grid"], "without pairs no model is read"


def test_no_reward_is_made_of_readings():
    readings = ProbeReadings(values={"dina": (0.5, 0.5)})
    with pytest.raises(ValueError, match="a reward is made of tensors"):
        weighted_sum(AlignRun().rewards, readings)
    with pytest.raises(ValueError, match="a reward is made of tensors"):
        weighted_sum(AlignRun().rewards, readings.values)


FALLING, RISING = [0.4, 0.5, 0.48, 0.45], [0.4, 0.5, 0.6, 0.7]
DRIFTS = {
    "up": ([0.2, 0.25, 0.4, 0.5], FALLING, False, True),
    "down": ([0.6, 0.55, 0.4, 0.3], FALLING, False, True),
    "down where only up counts": ([0.6, 0.55, 0.4, 0.3], FALLING, True, False),
    "it moved while golden rose": ([0.2, 0.5, 0.52, 0.5], FALLING, False, False),
    "it comes back to the base's": ([0.2, 0.5, 0.2, 0.25], FALLING, False, False),
    "golden rises with it": ([0.2, 0.25, 0.4, 0.5], RISING, False, False),
    "golden's best is the last but one": ([0.2, 0.25, 0.4, 0.5], [0.4, 0.5, 0.6, 0.5], False, False),
    "to and fro": ([0.4, 0.4, 0.6, 0.2], FALLING, False, False),
    "within the margin": ([0.2, 0.25, 0.29, 0.28], FALLING, False, False),
    "one measurement only": ([0.2, 0.2, 0.2, 0.5], FALLING, False, False),
    "too early to say": ([0.2, 0.5], [0.4, 0.3], False, False),
}


@pytest.mark.parametrize(("values", "golden", "rising", "expected"), DRIFTS.values(), ids=DRIFTS)
def test_a_drift_needs_golden_to_stand_still(values, golden, rising, expected):
    assert drifted(values, golden, patience=2, margin=0.1, rising=rising) is expected


def test_an_alarm_is_given_once_and_a_resumed_run_remembers_it():
    history = History()

    def measure(iteration, golden, grid):
        values = {"golden": golden, "probes": {"probes/x": 0.5, "guard/grid": grid}}
        history.add("measurement", iteration, values)
        resumed = History()
        resumed.restore(json.loads(json.dumps(history.entries)))
        said = DriftWatch(ProbesConfig(grid_margin=0.2), history).look()
        assert DriftWatch(ProbesConfig(grid_margin=0.2), resumed).look() == said
        return said

    assert [measure(*point) for point in ((0, 0.4, 0.0), (5, 0.5, 0.1), (10, 0.45, 0.5))] == [[], [], []]
    assert measure(15, 0.45, 0.6) == ["guard/grid drifts while golden does not rise: 0.000 at the base, 0.600 now"]
    assert measure(20, 0.44, 0.7) == []
    assert DriftWatch(ProbesConfig(), history).drifts == {"guard/grid": 15}
    assert DriftWatch(None, history).look() == []


def test_pairs_are_named_on_the_command_line_too(capsys):
    words = ["--probes.pairs.person.text", "a photo: people", "--probes.pairs.person.against", "a photo", "--plan"]
    (pair,) = load(AlignRun, words, program="x").probes.pairs.values()
    assert (pair.text, pair.against) == ("a photo: people", "a photo")
    with pytest.raises(SystemExit):
        load(AlignRun, ["--probes.no-grid"], program="x")
    assert "neither pairs nor the grid" in capsys.readouterr().err


@pytest.mark.parametrize("asks", [{"probes": {}}, {"rewards": {"grid": {}}}])
def test_pictures_too_small_for_their_grid_are_refused(tiny_pipeline, asks):
    values = {"pipeline": {"path": str(tiny_pipeline), "height": 32, "width": 24}, **asks}
    run = AlignRun.model_validate(values)
    with pytest.raises(ValueError, match="grid needs pictures of 32 pixels to a side, these have 32x24"):
        check_grid(run, open_pipeline(run.pipeline))
    check_grid(run.model_copy(update={"probes": None, "rewards": AlignRun().rewards}), open_pipeline(run.pipeline))
