"""The reward model's fit from a preference set to its result, given who encodes and who takes the steps.

    check -> encode what is not encoded -> train -> result

In one process and on Ray it is this same job; `Training` has a version for each, as `EncodeWork` has.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch

from dina_rl.backbones.base import Backbone
from dina_rl.checkpoint import write_json
from dina_rl.config import FitConfig, FitRun
from dina_rl.data.encode import EncodeWork
from dina_rl.data.stores.latents import LatentStore
from dina_rl.data.stores.open import open_store
from dina_rl.data.stores.order import fit_order
from dina_rl.data.stores.units import Units, fit_units
from dina_rl.reward.fit import rate_factor
from dina_rl.reward.inputs import (
    check_fit_inputs,
    check_labels,
    encode_missing,
    fit_inputs,
    training_latents,
    unseen_pairs,
    without_embeddings,
)
from dina_rl.reward.outcome import METRICS_FILE, FitResult, Outcome, read_result
from dina_rl.reward.session import result_of
from dina_rl.run_directory import run_directory
from dina_rl.runtime import open_pipeline


class Training(Protocol):
    """Who takes the steps, on one rank or many."""

    def train(self, run: FitRun, latents: Path, run_dir: Path) -> Outcome:
        """`run_fit` on the encoded pairs at `latents`, from its last checkpoint on if it keeps any.

        Raises:
            RunStopped: a gradient is not finite.
        """
        ...


FitWork = tuple[EncodeWork, Training]


def fit_reward(run: FitRun, open_work: Callable[[Backbone], FitWork]) -> FitResult:
    """The whole job: encode what is not encoded, fit, save, measure. A finished run returns what it found.

    Args:
        open_work: who encodes and who trains, given the pipeline; asked once the inputs are found right.

    Raises:
        ValueError: mistakes in the inputs or a used run directory, found before anything starts; too many unreadable
            images, found while encoding.
        RunStopped: a gradient is not finite.
    """
    begin = perf_counter()
    backbone = open_pipeline(run.pipeline)
    run = check_fit_inputs(run, backbone)
    done = partial(_finished, run)
    grows = {"fit.steps": partial(why_not_longer, run, run.run_dir.expanduser().resolve())}
    with run_directory(
        run, run.run_dir, resume=run.resume, may_grow=grows, inputs=fit_inputs(run), finished=done
    ) as run_dir:
        if done(run_dir):
            return read_result(run_dir / METRICS_FILE)
        return _fit(run, run_dir, backbone, open_work(backbone), begin)


def _finished(run: FitRun, run_dir: Path) -> bool:
    """Whether the fit in a directory has measured what it reached, the last thing it does, after as many steps."""
    file = run_dir / METRICS_FILE
    return file.is_file() and read_result(file).steps >= run.fit.steps


def why_not_longer(run: FitRun, run_dir: Path, before: int) -> str | None:
    """What speaks against making the fit of `before` steps in a directory the longer `run`; None: nothing.

    What is done must be what the longer fit would have done.
    """
    shorter = run.fit.model_copy(update={"steps": before})
    if any(rate_factor(step, shorter) != rate_factor(step, run.fit) for step in range(before)):
        return f"with fit.decay_start {run.fit.decay_start:g} a step's learning rate depends on how many there are"
    if run.fit.evaluate_every and before % run.fit.evaluate_every:
        return f"its last evaluation was at no multiple of fit.evaluate_every ({run.fit.evaluate_every})"
    latents = training_latents(run, run_dir)
    store = open_store(latents) if latents.is_dir() else None
    encoded = store is not None and (not isinstance(store, LatentStore) or store.complete())
    if store is None or not encoded:
        return None
    units = fit_units(store.pairs("train"), run.fit.batch_of)
    if not _same_order(units, store.latent_shapes, run, shorter):
        return "its pairs have several sizes, whose order depends on how many steps there are"
    return None


def _same_order(units: Units, latent_shapes: Sequence[tuple[int, int, int]], run: FitRun, shorter: FitConfig) -> bool:
    orders = (fit_order(units, latent_shapes, fit, seed=run.seed).batches for fit in (shorter, run.fit))
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*orders, strict=False))


def _fit(run: FitRun, run_dir: Path, backbone: Backbone, work: FitWork, begin: float) -> FitResult:
    """The job once its inputs are found right, timed from `begin` on."""
    encoding, training = work
    encode_missing(run, run_dir, backbone, encoding)
    latents = training_latents(run, run_dir)
    store = open_store(latents)
    check_labels(latents, store.pairs("train"), run)
    notes = unseen_pairs(run, store) + without_embeddings(run, latents)
    print("".join(f"{line}\n" for line in notes), end="", flush=True)
    encode_seconds = perf_counter() - begin
    outcome = training.train(run, latents, run_dir)
    result = result_of(
        outcome,
        run,
        run_dir,
        store,
        encode_seconds=encode_seconds,
        total_seconds=perf_counter() - begin,
    )
    write_json(run_dir / METRICS_FILE, asdict(result))
    return result
