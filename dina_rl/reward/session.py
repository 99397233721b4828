"""A fit from its first step to its saved weights, on one of its ranks: steps, curves, held-out accuracy, best and last.

The Ray Train worker and the fit without Ray run this same function. In the run directory it writes
    fit.jsonl      {step, loss, accuracy, ...} every few steps, {step, held_out: {set: accuracies}} at evaluations;
                   steps that a crash undid stand there twice
    tensorboard/   the same curves, and as texts the configuration and the result
    reward/        the averaged weights at the end, what `load_reward` reads
    reward_best/   those that ranked most pairs of the first held-out set right (absent without `fit.evaluate_every`)
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from dina_rl.backbones.base import TextEncoder
from dina_rl.config import FitRun
from dina_rl.config.fitting import OWN_TEST
from dina_rl.data.encode import SKIPPED_FILE
from dina_rl.data.stores.latents import LatentStore, PairStore
from dina_rl.data.stores.open import open_store
from dina_rl.data.stores.order import evaluation_batches
from dina_rl.data.stores.units import TrainingBatch
from dina_rl.errors import RunStopped
from dina_rl.eventfile import EventFile
from dina_rl.markdown import grid, settings
from dina_rl.reward.checkpoint import save_reward
from dina_rl.reward.fit import REWARD, RewardFit, StepReport, fit
from dina_rl.reward.held_out import pairwise_accuracy, score_pairs, store_ceiling
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.outcome import LOG_FILE, Accuracies, FitResult, Outcome
from dina_rl.runtime import image_size
from dina_rl.storage import writing
from dina_rl.textfiles import read_text

TENSORBOARD = "tensorboard"
REWARD_BEST = "reward_best"
LOG_EVERY = 10


class Ranks(Protocol):
    """The ranks that share a fit. `mean` and `gather` are collectives: every rank calls them."""

    rank: int
    world_size: int

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor of equal shape."""
        ...

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's CPU tensor; they may differ in length."""
        ...


class OneRank:
    """A fit in one process."""

    rank = 0
    world_size = 1

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        return [values]


def run_fit(
    progress: RewardFit,
    batches: Iterable[TrainingBatch],
    encoder: TextEncoder,
    store: PairStore,
    run: FitRun,
    run_dir: Path,
    *,
    ranks: Ranks | None = None,
    forward: nn.Module | None = None,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    save_checkpoint: Callable[[RewardFit], None] = lambda progress: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Outcome:
    """All steps from `progress.step` on, evaluations and saved weights included.

    Args:
        batches, forward, no_sync: see `fit`.
        store: of the training pairs.
        save_checkpoint: called by the first rank every `fit.checkpoint_every` steps.
        on_step: called by this rank after every step.

    Raises:
        RunStopped: a gradient is not finite, or storage refuses what the first rank writes; every rank raises it.
    """
    config = run.fit
    ranks = OneRank() if ranks is None else ranks
    sets = HeldOutSets(store, config.held_out)
    sizes = None if store.buckets == (image_size(run.pipeline, progress.model.backbone),) else store.buckets
    pictures = store.info.pictures if isinstance(store, LatentStore) else None
    writer = FirstRank(ranks)
    log = FitLog(run, run_dir, first_step=progress.step, writer=writer)

    def save(model: LatentRewardModel, name: str) -> None:
        place = run_dir / name
        writer.write(lambda: save_reward(model, place, pipeline=run.pipeline, buckets=sizes, pictures=pictures))

    def evaluate() -> Accuracies:
        """Accuracies of the averaged weights now; the best so far, by the first set's single level, are saved."""
        with progress.averaged_weights() as model:
            held_out = sets.measure(model, encoder, run, ranks)
            log.add_held_out(progress.step, held_out)
            accuracy = held_out[sets.first]["accuracy_single"]
            if config.evaluate_every and accuracy > progress.best_accuracy:
                progress.best_step, progress.best_accuracy = progress.step, accuracy
                save(model, REWARD_BEST)
        return held_out

    begin, evaluating, pairs = perf_counter(), 0.0, 0
    for report in fit(
        progress, batches, encoder, seed=run.seed, forward=forward, no_sync=no_sync, world_size=ranks.world_size
    ):
        pairs += report.pairs
        log.add(report)
        on_step(report)
        if progress.step == config.steps:
            continue  # evaluated and saved below
        if config.evaluate_every and progress.step % config.evaluate_every == 0:
            since = perf_counter()
            evaluate()
            evaluating += perf_counter() - since
        if progress.step % config.checkpoint_every == 0:  # after the evaluation: its best belongs to the state
            writer.write(lambda: save_checkpoint(progress))
            writer.agree()
    assert progress.step == config.steps, f"the data ended at step {progress.step} of {config.steps}"
    fit_seconds = perf_counter() - begin - evaluating
    with progress.averaged_weights() as model:
        save(model, REWARD)
    held_out = evaluate()
    log.close(held_out)
    writer.agree()
    return Outcome(
        held_out=held_out,
        best_step=progress.best_step if config.evaluate_every else None,
        best_accuracy_single=progress.best_accuracy if config.evaluate_every else None,
        pairs_per_second=pairs / fit_seconds,
        fit_seconds=fit_seconds,
    )


def result_of(
    outcome: Outcome,
    run: FitRun,
    run_dir: Path,
    store: PairStore,
    *,
    encode_seconds: float,
    total_seconds: float,
) -> FitResult:
    """The whole job's result from its training's outcome."""
    skipped = run_dir / SKIPPED_FILE
    sets = HeldOutSets(store, run.fit.held_out)
    first = sets.stores[sets.first]
    return FitResult(
        **outcome.held_out[sets.first],
        held_out=outcome.held_out,
        best_step=outcome.best_step,
        best_accuracy_single=outcome.best_accuracy_single,
        label_ceiling=store_ceiling(first) if isinstance(first, LatentStore) else None,
        train_pairs=len(store.pairs("train")),
        test_pairs=len(first.pairs("test")),
        skipped=len(read_text(skipped).splitlines()) if skipped.is_file() else 0,
        steps=run.fit.steps,
        pairs_per_second=outcome.pairs_per_second,
        encode_seconds=encode_seconds,
        fit_seconds=outcome.fit_seconds,
        total_seconds=total_seconds,
        reward=str(run_dir / REWARD),
    )


class HeldOutSets:
    """The pairs that a fit is measured on: the test pairs of its own store where it has any, then `fit.held_out`'s."""

    def __init__(self, own: PairStore, config: Mapping[str, str]) -> None:
        further = {name: open_store(Path(directory)) for name, directory in config.items()}
        self.stores = ({OWN_TEST: own} if len(own.pairs("test")) else {}) | further
        self.first = next(iter(self.stores))

    def measure(self, model: LatentRewardModel, encoder: TextEncoder, run: FitRun, ranks: Ranks) -> Accuracies:
        """Pairwise accuracy on every set at the single level and with the ensemble; each rank scores its share."""
        levels = {"accuracy_single": (run.reward.single_level,), "accuracy_ensemble": run.reward.ensemble_levels}
        accuracies: Accuracies = {}
        for name, store in self.stores.items():
            table = store.pairs("test")
            shares = evaluation_batches(
                table.bucket, batch_size=run.fit.evaluation_batch_size, rank=ranks.rank, world_size=ranks.world_size
            )
            accuracies[name] = {}
            for kind, noise_levels in levels.items():
                batches = (store.batch(table, index) for index in shares)
                scores = torch.empty(2, 0)  # of a rank that has no share in a small set
                if shares:
                    scores = torch.stack(score_pairs(model, batches, encoder, levels=noise_levels, seed=run.seed))
                chosen, rejected = torch.cat(ranks.gather(scores), dim=1)
                accuracies[name][kind] = pairwise_accuracy(chosen, rejected)
        return accuracies


class FirstRankStopped(RunStopped):
    """On the other ranks: the first says why."""


class FirstRank:
    """Writes on the first rank. The others wait for it in collectives, so what stops it is told in one."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._stopped: RunStopped | None = None

    def write(self, action: Callable[[], None]) -> None:
        """Do it on the first rank, unless something has stopped that already."""
        if self.ranks.rank or self._stopped is not None:
            return
        try:
            action()
        except RunStopped as stopped:
            self._stopped = stopped

    def agree(self) -> None:
        """Called by all ranks: it is a collective.

        Raises:
            RunStopped: the first rank was stopped.
        """
        self.check(float(self.ranks.mean(torch.tensor(self.trouble))))

    @property
    def trouble(self) -> float:
        """What ranks share with their means: 0 as long as nothing has stopped this one."""
        return float(self._stopped is not None)

    def check(self, trouble: float) -> None:
        """Raises RunStopped where the ranks' mean `trouble` says so."""
        if self._stopped is not None:
            raise self._stopped
        if trouble:
            raise FirstRankStopped("the first rank cannot write")


class FitLog:
    """Means over ranks and over `LOG_EVERY` steps: TensorBoard scalars and lines of `fit.jsonl`, written by rank 0."""

    def __init__(self, run: FitRun, run_dir: Path, *, first_step: int, writer: FirstRank) -> None:
        self._steps = run.fit.steps
        self._writer = writer
        self._file = run_dir / LOG_FILE
        self._reports: list[StepReport] = []
        self._since = perf_counter()
        self._page: EventFile | None = None
        writer.write(lambda: self._open(run_dir / TENSORBOARD, first_step + 1))
        self._text("config", settings(run), first_step)

    def add(self, report: StepReport) -> None:
        """Called by all ranks after every step: it is a collective.

        Raises:
            RunStopped: something has stopped the first rank.
        """
        self._reports.append(report)
        if report.step % LOG_EVERY and report.step != self._steps:
            return
        means = torch.tensor([[r.loss, r.accuracy] for r in self._reports]).mean(0)
        shared = torch.cat([means, torch.tensor([self._writer.trouble])])
        loss, accuracy, trouble = self._writer.ranks.mean(shared).tolist()
        self._writer.check(trouble)
        now = perf_counter()
        scalars = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": sum(r.grad_norm for r in self._reports) / len(self._reports),
            "learning_rate": report.learning_rate,
            "pairs_per_second": sum(r.pairs for r in self._reports) / (now - self._since),
        }
        self._reports, self._since = [], now
        self._write(report.step, scalars, scalars)

    def add_held_out(self, step: int, held_out: Accuracies) -> None:
        scalars = {f"{name}_{kind}": value for name, kinds in held_out.items() for kind, value in kinds.items()}
        self._write(step, scalars, {"held_out": held_out})
        self._since = perf_counter()  # evaluations do not count as steps

    def close(self, result: Accuracies) -> None:
        kinds = list(next(iter(result.values())))
        rows = [[name, *(f"{values[kind]:.4f}" for kind in kinds)] for name, values in result.items()]
        self._text("result", grid(["held-out set", *kinds], rows), self._steps)
        self._writer.write(lambda: self._with_page(EventFile.close))

    def _open(self, directory: Path, purge_step: int) -> None:
        self._page = EventFile(directory, purge_step)

    def _with_page(self, act: Callable[[EventFile], None]) -> None:
        assert self._page is not None, "the first rank opens it, and writes nothing after it could not"
        act(self._page)

    def _text(self, tag: str, text: str, step: int) -> None:
        self._writer.write(lambda: self._with_page(lambda page: page.write(lambda to: to.add_text(tag, text, step))))

    def _write(self, step: int, scalars: dict[str, float], line: Mapping[str, object]) -> None:
        def add(to: SummaryWriter) -> None:
            for name, value in scalars.items():
                to.add_scalar(f"reward/{name}", value, step)

        def write(page: EventFile) -> None:
            page.write(add)
            with writing(self._file), self._file.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")

        self._writer.write(lambda: self._with_page(write))
