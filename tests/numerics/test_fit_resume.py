"""A fit that is saved and continued from the file is the uninterrupted fit, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest

from dina_rl.backbones.registry import open_backbone
from dina_rl.checkpoint import load_tensors, save_tensors
from dina_rl.config import FitConfig
from dina_rl.data.stores.units import TrainingBatch
from dina_rl.reward.fit import RewardFit, fit
from dina_rl.reward.model import LatentRewardModel
from tests.tensors import assert_same_tensors
from tests.tiny_reward import TINY_REWARD, fit_batch

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
