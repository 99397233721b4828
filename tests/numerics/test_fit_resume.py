"""A fit that is saved and continued from the file is the uninterrupted fit, bit for bit."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dina_rl.backbones.registry import open_backbone
from dina_rl.checkpoint import load_tensors, save_tensors
from dina_rl.config import FitConfig, FitRun
from dina_rl.data.stores.units import TrainingBatch
from dina_rl.reward.checkpoints import FitCheckpoints
from dina_rl.reward.fit import RewardFit, fit
from dina_rl.reward.inline import fit_inline
from dina_rl.reward.model import LatentRewardModel
from dina_rl.storage import StorageFailed
from tests.full_disk import full, mounted
from tests.tensors import assert_same_tensors
from tests.tiny_reward import TINY_REWARD, fit_batch, write_store

CONFIG = FitConfig(steps=8, batch_size=4, learning_rate=1e-3, warmup_steps=2, decay_start=0.5, ema_decay=0.9)


def bucketed_batch(step: int) -> TrainingBatch:
    """4 pairs of square latents in even steps, 8 of half their width in odd ones."""
    if step % 2 == 0:
        return fit_batch(4, step)
    batch = fit_batch(8, step)
    return replace(batch, latents=batch.latents[..., :4].contiguous())


@pytest.mark.parametrize(
    "portions",
    [{}, {"micro_batch_size": 3}, {"micro_batch_size": 1, "gradient_checkpointing": True, "autocast": True}],
    ids=["whole batches", "accumulated", "checkpointed and in bfloat16"],
)
def test_resumed_fit_equals_uninterrupted(tiny_pipeline: Path, tmp_path: Path, portions: dict) -> None:
    config = CONFIG.model_copy(update=portions)
    backbone = open_backbone(tiny_pipeline, max_sequence_length=8)
    encoder = backbone.load_text_encoder()

    def fresh(seed: int) -> RewardFit:
        return RewardFit(LatentRewardModel(backbone, TINY_REWARD, seed=seed), config)

    def run(progress: RewardFit, stop: int) -> list[float]:
        batches = (bucketed_batch(step) for step in range(progress.step, stop))
        return [report.loss for report in fit(progress, batches, encoder, seed=1)]

    whole = fresh(0)
    losses = run(whole, 8)
    first = fresh(0)
    losses_before = run(first, 5)
    first.best_step, first.best_accuracy = whole.best_step, whole.best_accuracy = 4, 0.7
    save_tensors(tmp_path / "state.safetensors", first.state())
    resumed = fresh(9)  # other initial weights: everything that matters must come from the file
    resumed.load_state(load_tensors(tmp_path / "state.safetensors"))
    assert losses_before + run(resumed, 8) == losses
    assert_same_tensors(resumed.state(), whole.state())


def test_a_fit_whose_disk_fills_goes_on_where_there_is_room(tiny_pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    """It is full when the second checkpoint is written: the fit goes on from the first."""
    store = write_store(tmp_path / "store", str(tiny_pipeline), train=(8, 0), test=(2, 0))
    whole = FitRun(
        run_dir=tmp_path / "whole",
        pipeline={"path": str(tiny_pipeline)},
        latents=store.directory,
        reward=TINY_REWARD,
        fit={
            "steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "checkpoint_every": 1,
            "checkpoint_keep": 1,  # the small disk has room for one, and for the one that is being written
            "num_workers": 1,
        },
    )
    expected = fit_inline(whole)
    save, saved = FitCheckpoints.save, []
    with mounted(tmp_path / "disk") as disk, ExitStack() as filled:

        def fill_first(checkpoints: FitCheckpoints, step: int, state: dict) -> None:
            if step == 2:
                filled.enter_context(full(disk))
            save(checkpoints, step, state)
            saved.append(step)

        monkeypatch.setattr(FitCheckpoints, "save", fill_first)
        run = whole.model_copy(update={"run_dir": disk / "run"})
        with pytest.raises(StorageFailed, match="No space left on device"):
            fit_inline(run)
        assert saved == [1]
        filled.close()
        monkeypatch.setattr(FitCheckpoints, "save", save)
        found = fit_inline(run.model_copy(update={"resume": True}))
        assert _numbers(asdict(found)) == _numbers(asdict(expected))
        for file in Path(expected.reward).rglob("*.safetensors"):
            again = Path(found.reward) / file.relative_to(expected.reward)
            assert_same_tensors(load_tensors(again), load_tensors(file))


def _numbers(result: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in result.items() if not name.endswith(("seconds", "per_second", "reward"))}
