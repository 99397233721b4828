"""A fit on latent stores made before: what is refused before anything starts, and with which line."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dina_rl.config import FitConfig, FitRun
from dina_rl.data.stores.latents import LatentStore, StoredPair
from dina_rl.reward.inputs import check_fit_inputs, unseen_pairs
from dina_rl.runtime import open_pipeline
from tests.tiny_reward import TINY_REWARD, write_preferences, write_store


@pytest.fixture
def run(tiny_pipeline: Path, tmp_path: Path) -> FitRun:
    write_store(tmp_path / "store", str(tiny_pipeline), train=(2, 2), test=(1, 1))
    return FitRun(latents=tmp_path / "store", pipeline={"path": str(tiny_pipeline)}, reward=TINY_REWARD)


def checked(run: FitRun, **values: object) -> FitRun:
    run = FitRun.model_validate(run.model_dump() | values)
    return check_fit_inputs(run, open_pipeline(run.pipeline))


def test_paths_become_absolute(run: FitRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = {"path": os.path.relpath(run.pipeline.path)}
    ready = checked(run, latents="store", fit={"held_out": {"again": "store"}}, pipeline=relative)
    sizes = {"height": 32, "width": 32, "max_sequence_length": 8}
    assert ready.pipeline == run.pipeline.model_copy(update=sizes)
    assert ready.latents == tmp_path / "store"
    assert ready.fit.held_out == {"again": str(tmp_path / "store")}


def test_no_store(run: FitRun, tmp_path: Path) -> None:
    for values in ({"latents": tmp_path / "nowhere"}, {"fit": {"held_out": {"far": str(tmp_path / "nowhere")}}}):
        with pytest.raises(ValueError, match="nowhere does not exist"):
            checked(run, **values)


def test_unfinished_store(run: FitRun, tmp_path: Path) -> None:
    next((tmp_path / "store").glob("pairs-test*")).unlink()
    with pytest.raises(ValueError, match="store is not complete"):
        checked(run)


def test_latents_of_another_pipeline(run: FitRun) -> None:
    with pytest.raises(ValueError, match="was made with pipeline .*, this run's is shapes"):
        checked(run, pipeline={"path": "shapes"})


def test_latents_of_another_shape(run: FitRun, tmp_path: Path) -> None:
    file = tmp_path / "store" / "store.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"latent_shapes": [[4, 8, 8], [4, 8, 4]]}))
    with pytest.raises(ValueError, match=r"of shape \(4, 8, 8\) of 32x32 images, .* makes \(16, 8, 8\)"):
        checked(run)


def test_stores_without_the_pairs_that_are_needed(run: FitRun, tmp_path: Path) -> None:
    path = str(run.pipeline.path)
    write_store(tmp_path / "training", path, train=(2, 1), test=(0, 0))
    write_store(tmp_path / "test", path, train=(0, 0), test=(1, 1))
    for name, missing in (("training", "test"), ("test", "train")):
        with pytest.raises(ValueError, match=f"{name} has no {missing} pairs"):
            checked(run, latents=tmp_path / name)
    held_out = {"fit": {"held_out": {"other": str(tmp_path / "test")}}}
    checked(run, **held_out)
    checked(run, latents=tmp_path / "training", **held_out)  # measured on the other store alone
    with pytest.raises(ValueError, match="training has no test pairs"):
        checked(run, fit={"held_out": {"other": str(tmp_path / "training")}})
    with pytest.raises(ValueError, match="dataset.test is None"):
        checked(run, latents=None, dataset={"test": None})


def test_sizes_that_get_no_step_are_named(run: FitRun, tmp_path: Path) -> None:
    store = write_store(tmp_path / "uneven", str(run.pipeline.path), train=(50, 1), test=(1, 1))
    short = run.model_copy(update={"fit": FitConfig(steps=10, batch_size=2)})
    lines = ["1 training pairs of size 32x16 are not seen: too few for one of 10 steps"]
    assert unseen_pairs(short, store) == lines
    assert unseen_pairs(run.model_copy(update={"fit": FitConfig(steps=26, batch_size=2)}), store) == []


def test_soft_labels_that_are_missing(run: FitRun, tmp_path: Path) -> None:
    line = "fit.labels soft: {} of 4 training pairs in .*store have no probability; label them with jobs.label"
    with pytest.raises(ValueError, match=line.format(4)):
        checked(run, fit={"labels": "soft"})
    store = LatentStore(tmp_path / "store")
    pairs = [StoredPair(pair_id=n, chosen=2 * n, rejected=2 * n + 1, prompt="p", probability=0.9) for n in range(4)]
    store.write_pairs("train", [*pairs[:3], replace(pairs[3], probability=None)])
    with pytest.raises(ValueError, match=line.format(1)):
        checked(run, fit={"labels": "soft"})
    store.write_pairs("train", pairs)
    checked(run, fit={"labels": "soft"})


def test_soft_labels_that_a_set_lacks_are_missed_before_it_is_encoded(tiny_pipeline: Path, tmp_path: Path) -> None:
    write_preferences(tmp_path / "set", train=2, test=1)
    run = FitRun(dataset={"path": str(tmp_path / "set")}, pipeline={"path": str(tiny_pipeline)}, reward=TINY_REWARD)
    with pytest.raises(ValueError, match="record 0 of split train of .*set has no probability; label the set"):
        checked(run, fit={"labels": "soft"})
