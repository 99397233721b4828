"""What a run keeps on disk to go on from: its last two checkpoints, and the best that it has been."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from dina_rl.alignment.history import Entry
from dina_rl.checkpoint import load_tensors, replaced_directory, save_tensors, write_json
from dina_rl.textfiles import read_text
from dina_rl.types import PolicyWeights, Weights

KEPT = 2


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
        done = record["iteration"] if "iteration" in record else record["step"]  # its name before version 0.2
        state = load_tensors(found[-1] / "state.safetensors")
        return Checkpoint(iteration=done, state=state, history=record["history"], seconds=record["seconds"])

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
        return sorted((file.parent for file in found), key=lambda directory: int(directory.name.rpartition("_")[2]))
