"""A whole fit in this process, on encoded pairs of either kind."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dina_rl.config import FitRun
from dina_rl.data.images import READING
from dina_rl.data.stores.open import open_store
from dina_rl.reward.checkpoint import read_card
from dina_rl.reward.checkpoints import FitCheckpoints
from dina_rl.reward.fit import REWARD, RewardFit
from dina_rl.reward.inline import TrainingHere, training_batches
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.outcome import LOG_FILE, Outcome
from dina_rl.reward.session import REWARD_BEST, TENSORBOARD, run_fit
from dina_rl.runtime import open_pipeline
from tests.tensors import assert_same_tensors
from tests.tiny_preprocessed import write_part
from tests.tiny_reward import TINY_REWARD, write_store


def fitted(directory: Path, pipeline: Path, run_dir: Path, **fit: object) -> Outcome:
    config = {"steps": 5, "batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.5, **fit}
    run = FitRun(run_dir=run_dir, pipeline={"path": str(pipeline)}, reward=TINY_REWARD, fit=config)
    run_dir.mkdir()
    backbone, store = open_pipeline(run.pipeline), open_store(directory)
    return run_fit(
        RewardFit(LatentRewardModel(backbone, run.reward, seed=0), run.fit),
        training_batches(run, store),
        backbone.load_text_encoder(),
        store,
        run,
        run_dir,
    )


def held_out_lines(run_dir: Path) -> dict[int, dict]:
    lines = map(json.loads, (run_dir / LOG_FILE).read_text().splitlines())
    return {line["step"]: line["held_out"] for line in lines if "held_out" in line}


def test_the_authors_files_are_fitted_on_and_measured_on(tiny_pipeline: Path, tmp_path: Path) -> None:
    write_part(tmp_path / "authors" / "train" / "part_rank00.parquet", range(16))
    write_part(tmp_path / "authors" / "test" / "part_rank00.parquet", range(16, 21))
    outcome = fitted(tmp_path / "authors", tiny_pipeline, tmp_path / "run", evaluate_every=2)
    assert set(outcome.held_out) == {"test"}
    right = 5 * outcome.held_out["test"]["accuracy_single"]
    assert right == pytest.approx(round(right))  # of five test pairs
    assert set(held_out_lines(tmp_path / "run")) == {2, 4, 5}
    events = EventAccumulator(str(tmp_path / "run" / TENSORBOARD)).Reload()
    config, result = (events.Tensors(f"{tag}/text_summary")[-1] for tag in ("config", "result"))
    assert "  evaluate_every: 2\n" in config.tensor_proto.string_val[0].decode()
    accuracies = " | ".join(f"{value:.4f}" for value in outcome.held_out["test"].values())
    assert f"| test | {accuracies} |" in result.tensor_proto.string_val[0].decode()
    for name in (REWARD, REWARD_BEST):
        card = read_card(tmp_path / "run" / name)
        assert (card.buckets, card.pictures) == (((16, 48), (32, 32)), None)


def test_without_test_pairs_the_first_other_set_decides_what_is_best(tiny_pipeline: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "train", str(tiny_pipeline), train=(6, 6), test=(0, 0))
    held_out = {}
    for name in ("first", "second"):
        write_store(tmp_path / name, str(tiny_pipeline), train=(0, 0), test=(3, 2))
        held_out[name] = str(tmp_path / name)
    outcome = fitted(tmp_path / "train", tiny_pipeline, tmp_path / "run", evaluate_every=1, held_out=held_out)
    lines = held_out_lines(tmp_path / "run")
    assert list(outcome.held_out) == ["first", "second"]
    assert outcome.held_out == lines[5]
    assert outcome.best_accuracy_single == max(line["first"]["accuracy_single"] for line in lines.values())
    assert lines[outcome.best_step]["first"]["accuracy_single"] == outcome.best_accuracy_single
    assert (tmp_path / "run" / REWARD_BEST / "head.safetensors").is_file()


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_without_periodic_evaluation_only_the_last_weights_are_kept(
    tiny_pipeline: Path, tmp_path: Path, ema_decay: float
) -> None:
    store = write_store(tmp_path / "store", str(tiny_pipeline), train=(6, 6), test=(2, 1))
    outcome = fitted(store.directory, tiny_pipeline, tmp_path / "run", ema_decay=ema_decay)
    assert (outcome.best_step, outcome.best_accuracy_single) == (None, None)
    assert set(held_out_lines(tmp_path / "run")) == {5}
    assert not (tmp_path / "run" / REWARD_BEST).exists()
    assert load_file(tmp_path / "run" / REWARD / "head.safetensors")
    card = read_card(tmp_path / "run" / REWARD)
    assert card.pictures == READING
    assert "upright" in READING
    assert "transparency on white" in READING


def test_a_fit_goes_on_from_its_last_whole_checkpoint(tiny_pipeline: Path, tmp_path: Path, capsys) -> None:
    """In this process; its last checkpoint is broken, so that a step more is done again."""
    store = write_store(tmp_path / "store", str(tiny_pipeline), train=(6, 6), test=(2, 1))
    fit = {"steps": 5, "batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.5, "checkpoint_every": 1}
    run = FitRun(run_dir=tmp_path, pipeline={"path": str(tiny_pipeline)}, reward=TINY_REWARD, fit=fit)
    training = TrainingHere(open_pipeline(run.pipeline))
    whole = training.train(run, store.directory, tmp_path)
    weights = load_file(tmp_path / REWARD / "head.safetensors")
    kept = sorted((tmp_path / "train").iterdir())
    assert [each.name for each in kept] == ["step_00000003", "step_00000004"]
    state = kept[1] / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    resumed = training.train(run, store.directory, tmp_path)
    assert f"{kept[1]} is broken (state.safetensors does not hold what was written)" in capsys.readouterr().err
    assert resumed.held_out == whole.held_out
    assert_same_tensors(load_file(tmp_path / REWARD / "head.safetensors"), weights)
    assert FitCheckpoints(tmp_path, keep=2).last_step() == 4
