"""What a run keeps on disk to go on from: its last two checkpoints, and the best that it has been."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from dina_rl.alignment.history import Entry
from dina_rl.checkpoint import load_part, load_tensors, replaced_directory, save_tensors, write_json
from dina_rl.textfiles import read_text
from dina_rl.types import PolicyWeights, Weights

KEPT = 2


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


class Checkpoints:
    """Under `checkpoints/` and `best/` of a run directory; every file or directory appears whole or not at all."""

    def __init__(self, run_dir: Path) -> None:
        self._root = run_dir / "checkpoints"
        self._best_weights = run_dir / "best" / "weights.safetensors"
        self._best_state = run_dir / "best" / "state.safetensors"

    def last(self) -> Checkpoint | None:
        """The newest checkpoint."""
        found = self._directories()
        if not found:
            return None
        record = json.loads(read_text(found[-1] / "state.json"))
        state = load_tensors(found[-1] / "state.safetensors")
        done = _iteration(found[-1])
        return Checkpoint(iteration=done, state=state, history=record["history"], seconds=record["seconds"])

    def done(self) -> int:
        """Iterations behind the newest checkpoint, 0 without one. Reads no weights."""
        return max(map(_iteration, self._directories()), default=0)

    def history(self) -> list[Entry]:
        """That of the newest checkpoint. Reads no weights."""
        found = self._directories()
        entries: list[Entry] = json.loads(read_text(found[-1] / "state.json"))["history"] if found else []
        return entries

    def weights(self, which: str) -> KeptWeights:
        """The trained weights `best`, `last`, `average` or of a checkpoint's iteration: see `ExportRun.which`.

        Raises:
            ValueError: the run does not keep them.
        """
        if which == "best":
            if not self._best_weights.is_file():
                raise ValueError(f"{self._best_weights} does not exist: the run has measured nothing yet")
            best = self.best_weights()
            return KeptWeights(title=f"best weights, averaged, after {best.version} updates", tensors=best.tensors)
        kept = {_iteration(directory): directory for directory in self._directories()}
        if not kept:
            raise ValueError(f"{self._root} holds no checkpoint yet")
        number = int(which) if which.isdigit() else max(kept)
        if number not in kept:
            raise ValueError(f"{self._root} keeps no checkpoint {number}: there are {', '.join(map(str, kept))}")
        part = "policy/" if which == "last" else "ema/"
        title = f"weights after iteration {number}, {'as trained' if which == 'last' else 'averaged'}"
        return KeptWeights(title=title, tensors=load_part(kept[number] / "state.safetensors", part))

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep it beside the one before it; older ones go."""
        with replaced_directory(self._root / f"iteration_{checkpoint.iteration:06d}") as writing:
            save_tensors(writing / "state.safetensors", checkpoint.state)
            record = {
                "iteration": checkpoint.iteration,
                "seconds": checkpoint.seconds,
                "history": checkpoint.history,
            }
            write_json(writing / "state.json", record)
        for old in self._directories()[:-KEPT]:
            shutil.rmtree(old)

    def keep_best_weights(self, weights: Weights) -> None:
        save_tensors(self._best_weights, {"version": torch.tensor(weights.version), **weights.tensors})

    def best_weights(self) -> PolicyWeights:
        """The averaged weights that were best in golden on the dev prompts."""
        tensors = load_tensors(self._best_weights)
        return PolicyWeights(version=int(tensors.pop("version")), tensors=tensors)

    def keep_best_state(self, state: dict[str, torch.Tensor]) -> None:
        """Keep the learner's whole state as that of the best measurement."""
        save_tensors(self._best_state, state)

    def best_state(self) -> dict[str, torch.Tensor]:
        return load_tensors(self._best_state)

    def _directories(self) -> list[Path]:
        """Oldest first. Before version 0.2 they were called step_*."""
        found = [*self._root.glob("iteration_*/state.json"), *self._root.glob("step_*/state.json")]
        return sorted((file.parent for file in found), key=_iteration)


def _iteration(directory: Path) -> int:
    """How many iterations are behind a checkpoint."""
    return int(directory.name.rpartition("_")[2])
