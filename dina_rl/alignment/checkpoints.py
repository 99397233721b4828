"""What a run keeps on disk to go on from: its last checkpoints, and the best that it has been.

checkpoints/iteration_000010/    state.safetensors (the learner's), state.json (history, seconds), SHA256SUMS
best/                            weights.safetensors, state.safetensors where the watch may go back, SHA256SUMS
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired  # typing's own cannot be read from a file before Python 3.12

import torch
from safetensors import SafetensorError
from typing_extensions import TypedDict

from dina_rl.alignment.history import Entry, checked
from dina_rl.checkpoint import load_part, load_tensors, save_tensors
from dina_rl.kept import STATE_FILE, Kept, number_of
from dina_rl.storage import NothingWhole, check_there, patiently, remove_leftovers
from dina_rl.sums import check_sums, read_sums, sha256, write_sums
from dina_rl.textfiles import read_record
from dina_rl.types import PolicyWeights, Weights

RECORD_FILE, WEIGHTS_FILE = "state.json", "weights.safetensors"
KEPT = 2
"""Checkpoints that stay where nobody says otherwise (`checkpoint_keep`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptWeights:
    """Trained weights that a run keeps, and which they are."""

    title: str
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run after some iterations."""

    iteration: int  # how many are done
    state: dict[str, torch.Tensor]  # of the learner
    history: list[Entry]
    seconds: dict[str, float]  # spent so far, by stage


class _Record(TypedDict):
    history: list[Entry]
    seconds: NotRequired[dict[str, float]]  # whoever asks for the history alone does without


class Checkpoints:
    """Under `checkpoints/` and `best/` of a run directory; every file or directory appears whole or not at all.

    What is written can be found whole or broken by its sums. While storage is away a write is tried again for minutes
    (`patiently`).
    """

    def __init__(self, run_dir: Path, *, keep: int = KEPT) -> None:
        # Before version 0.2 they were called step_*.
        self._run_dir = run_dir
        self._kept = Kept(run_dir / "checkpoints", keep=keep, name="iteration", digits=6, former=["step"])
        self._best = run_dir / "best"

    def check(self) -> None:
        """Find out before anything starts whether there is something to go on from; `last` then need not.

        Raises:
            NothingWhole: there are checkpoints, and all of them are broken.
        """
        self._kept.newest(_record, STATE_FILE, RECORD_FILE)

    def last(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; of one that is not a line tells.

        Raises:
            NothingWhole: there are checkpoints, and all of them are broken.
        """
        return self._kept.newest(_checkpoint, STATE_FILE, RECORD_FILE)

    def done(self) -> int:
        """Iterations behind the newest checkpoint that is whole, 0 without one. Loads no weights.

        Raises:
            NothingWhole: there are checkpoints, and all of them are broken.
        """
        return self._kept.newest(number_of, STATE_FILE, RECORD_FILE) or 0

    def history(self) -> list[Entry]:
        """That of the newest checkpoint where it is whole. Reads no weights."""
        return self._kept.newest(_history, RECORD_FILE) or []

    def weights(self, which: str) -> KeptWeights:
        """The trained weights `best`, `last`, `average` or of a checkpoint's iteration: see `ExportRun.which`.

        Raises:
            ValueError: the run does not keep them, or they are broken.
        """
        if which == "best":
            file = self._best / WEIGHTS_FILE
            if not file.is_file():
                raise ValueError(f"{file} does not exist: the run has measured nothing yet")
            try:
                best = self.best_weights()
            except NothingWhole as broken:
                raise ValueError(str(broken)) from broken
            return KeptWeights(title=f"best weights, averaged, after {best.version} updates", tensors=best.tensors)
        kept = {number_of(directory): directory for directory in self._kept.all()}
        if not kept:
            raise ValueError(f"{self._kept.root} holds no checkpoint yet")
        number = int(which) if which.isdigit() else max(kept)
        if number not in kept:
            raise ValueError(f"{self._kept.root} keeps no checkpoint {number}: there are {', '.join(map(str, kept))}")
        part = "policy/" if which == "last" else "ema/"
        title = f"weights after iteration {number}, {'as trained' if which == 'last' else 'averaged'}"
        try:
            check_sums(kept[number], [STATE_FILE])
            return KeptWeights(title=title, tensors=load_part(kept[number] / STATE_FILE, part))
        except (OSError, ValueError, SafetensorError) as error:
            others = ", ".join(str(each) for each in kept if each != number)
            hint = f"; there are also {others} (which)" if others else ""
            raise ValueError(f"{kept[number]} is broken ({' '.join(str(error).split())}){hint}") from error

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep it beside those before it; the oldest goes.

        Raises:
            StorageFailed: storage has no room, or stays away; the others are whole.
        """
        record = {"iteration": checkpoint.iteration, "seconds": checkpoint.seconds, "history": checkpoint.history}
        text = json.dumps(record, indent=2) + "\n"

        def write() -> None:
            check_there(self._run_dir)
            self._kept.save(checkpoint.iteration, checkpoint.state, {RECORD_FILE: text})

        patiently(write)

    def keep_best_weights(self, weights: Weights) -> None:
        """Raises StorageFailed as `save`."""
        self._keep_best(WEIGHTS_FILE, {"version": torch.tensor(weights.version), **weights.tensors})

    def best_weights(self) -> PolicyWeights:
        """The averaged weights that were best in golden on the dev prompts.

        Raises:
            NothingWhole: they are broken.
        """
        tensors = self._read_best(WEIGHTS_FILE)
        return PolicyWeights(version=int(tensors.pop("version")), tensors=tensors)

    def keep_best_state(self, state: dict[str, torch.Tensor]) -> None:
        """Keep the learner's whole state as that of the best measurement. Raises StorageFailed as `save`."""
        self._keep_best(STATE_FILE, state)

    def best_state(self) -> dict[str, torch.Tensor]:
        """Raises NothingWhole where it is broken."""
        return self._read_best(STATE_FILE)

    def _keep_best(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """A process that is killed between the file and its sum goes on from before both, and writes them again."""

        def write() -> None:
            check_there(self._run_dir)
            remove_leftovers(self._best, name)
            save_tensors(self._best / name, tensors, lasting=True)
            write_sums(self._best, {**read_sums(self._best), name: sha256(self._best / name)})

        patiently(write)

    def _read_best(self, name: str) -> dict[str, torch.Tensor]:
        try:
            check_sums(self._best, [name])
            return load_tensors(self._best / name)
        except (OSError, ValueError, SafetensorError) as error:
            why = " ".join(str(error).split())
            raise NothingWhole(f"{self._best / name} is broken ({why}), and there is no other") from error


def _checkpoint(directory: Path) -> Checkpoint:
    record = _record(directory)
    state = load_tensors(directory / STATE_FILE)
    return Checkpoint(iteration=number_of(directory), state=state, history=record["history"], seconds=record["seconds"])


def _record(directory: Path) -> _Record:
    record = read_record(_Record, directory / RECORD_FILE)
    checked(record["history"])
    return record


def _history(directory: Path) -> list[Entry]:
    return _record(directory)["history"]
