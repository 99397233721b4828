"""One rank of the reward model's fit: what Ray Train runs on each of its workers."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import ray.train
import torch
from ray.train.torch import prepare_model
from torch import distributed
from torch.utils.tensorboard import SummaryWriter

from dina_rl.backbones.base import TextEncoder
from dina_rl.checkpoint import load_tensors, save_tensors
from dina_rl.config import FitConfig, FitRun
from dina_rl.data.latents import LatentStore
from dina_rl.data.pairs import PairBatch
from dina_rl.evaluation import pairwise_accuracy, score_pairs, store_ceiling
from dina_rl.reward.checkpoint import save_reward
from dina_rl.reward.fit import RewardFit, StepReport, fit
from dina_rl.reward.model import LatentRewardModel
from dina_rl.runtime import configure_process, open_pipeline
from jobs.pair_stream import pair_batches

STATE_FILE = "state.safetensors"
LOG_EVERY = 10
EVALUATION_BATCH = 64


def fit_on_worker(
    run: FitRun, *, latents: Path, log_file: Path, tensorboard: Path, reward: Path
) -> dict[str, float | None]:
    """Fit, save the averaged weights to `reward`, measure them on the test pairs. Returns the numbers.

    Continues from the checkpoint that Ray Train gives, if any.
    """
    configure_process(run.fit.threads_per_worker)
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    backbone = open_pipeline(run.pipeline)
    progress = RewardFit(LatentRewardModel(backbone, run.reward, seed=run.seed), run.fit)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            progress.load_state(load_tensors(Path(directory) / STATE_FILE))
    # Buffers are frozen position tables: equal everywhere, and large, so they are not broadcast at every forward.
    forward = prepare_model(progress.model, parallel_strategy_kwargs={"broadcast_buffers": False})
    encoder = backbone.load_text_encoder()
    store = LatentStore(latents)
    batches = pair_batches(
        ray.train.get_dataset_shard("train"),
        store.pairs("train").prompts,
        first_step=progress.step,
        share=run.fit.batch_size // ranks,
    )
    begin, first_step = perf_counter(), progress.step
    log = FitLog(run.fit, log_file, tensorboard, first_step=first_step, rank=rank)
    for report in fit(progress, batches, encoder, seed=run.seed, forward=forward):
        log.add(report)
        if report.step % run.fit.checkpoint_every == 0 and report.step < run.fit.steps:
            _save_checkpoint(progress, rank)
    assert progress.step == run.fit.steps, f"the data ended at step {progress.step} of {run.fit.steps}"
    fit_seconds = perf_counter() - begin
    with progress.averaged_weights() as model:
        if rank == 0:
            save_reward(model, reward, pipeline=run.pipeline)
        accuracy = _test_accuracy(model, encoder, store, run, rank, ranks)
    log.close(accuracy)
    pairs = (run.fit.steps - first_step) * run.fit.batch_size
    return {
        **accuracy,
        "label_ceiling": store_ceiling(store),
        "pairs_per_second": pairs / fit_seconds,
        "fit_seconds": fit_seconds,
    }


class FitLog:
    """Means over ranks and over `LOG_EVERY` steps: TensorBoard scalars and lines of `fit.jsonl`, written by rank 0."""

    def __init__(self, config: FitConfig, file: Path, tensorboard: Path, *, first_step: int, rank: int) -> None:
        self._steps = config.steps
        self._batch_size = config.batch_size
        self._file = file
        self._reports: list[StepReport] = []
        self._since = perf_counter()
        self._writer = SummaryWriter(str(tensorboard), purge_step=first_step + 1) if rank == 0 else None

    def add(self, report: StepReport) -> None:
        """Called by all ranks after every step: it is a collective."""
        self._reports.append(report)
        if report.step % LOG_EVERY and report.step != self._steps:
            return
        means = torch.tensor([[r.loss, r.accuracy] for r in self._reports], device=_device()).mean(0)
        distributed.all_reduce(means)
        loss, accuracy = (means / distributed.get_world_size()).tolist()
        now = perf_counter()
        scalars = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": sum(r.grad_norm for r in self._reports) / len(self._reports),
            "learning_rate": report.learning_rate,
            "pairs_per_second": self._batch_size * len(self._reports) / (now - self._since),
        }
        self._reports, self._since = [], now
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(f"reward/{name}", value, report.step)
            with self._file.open("a") as file:
                file.write(json.dumps({"step": report.step, **scalars}) + "\n")

    def close(self, accuracy: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in accuracy.items():
                self._writer.add_scalar(f"reward/test_{name}", value, self._steps)
            self._writer.close()


def _save_checkpoint(progress: RewardFit, rank: int) -> None:
    """Hand weights, averages, optimizer and step to Ray Train; all ranks meet here."""
    name = f"step_{progress.step:08d}"
    if rank != 0:
        ray.train.report({"step": progress.step}, checkpoint_dir_name=name)
        return
    with tempfile.TemporaryDirectory() as directory:
        save_tensors(Path(directory) / STATE_FILE, progress.state())
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": progress.step}, checkpoint=checkpoint, checkpoint_dir_name=name)


def _test_accuracy(
    model: LatentRewardModel, encoder: TextEncoder, store: LatentStore, run: FitRun, rank: int, ranks: int
) -> dict[str, float]:
    """Held-out pairwise accuracy at the single level and with the ensemble; each rank scores its share of the pairs."""
    table = store.pairs("test")

    def share() -> Iterator[PairBatch]:
        for index in torch.arange(rank, len(table), ranks).split(EVALUATION_BATCH):
            yield store.batch(table, index)

    result = {}
    levels = {"accuracy_single": (run.reward.single_level,), "accuracy_ensemble": run.reward.ensemble_levels}
    for name, noise_levels in levels.items():
        scores = score_pairs(model, share(), encoder, levels=noise_levels, seed=run.seed)
        gathered: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * ranks
        distributed.all_gather_object(gathered, scores)
        chosen, rejected = (torch.cat(side) for side in zip(*gathered, strict=True))
        result[name] = pairwise_accuracy(chosen, rejected)
    return result


def _device() -> torch.device:
    return ray.train.torch.get_device()
