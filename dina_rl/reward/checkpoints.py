"""What a fit keeps on disk to go on from, with Ray or without: its last checkpoints, with the sums of their files.

train/step_00000500/    state.safetensors (weights, averages, optimizer, steps), SHA256SUMS
"""

from pathlib import Path

import torch

from dina_rl.checkpoint import load_tensors
from dina_rl.kept import STATE_FILE, Kept, number_of
from dina_rl.storage import check_there, patiently

TRAIN = "train"


class FitCheckpoints:
    """Under `train/` of a fit's run directory. One rank writes; all may read."""

    def __init__(self, run_dir: Path, *, keep: int) -> None:
        self._run_dir = run_dir
        self._kept = Kept(run_dir / TRAIN, keep=keep, name="step", digits=8)

    def last_step(self) -> int:
        """Steps behind the newest checkpoint that is whole, 0 without one; of one that is not a line tells.

        Raises:
            NothingWhole: there are checkpoints, and all of them are broken.
        """
        return self._kept.newest(number_of, STATE_FILE) or 0

    def load(self, step: int) -> dict[str, torch.Tensor]:
        """The state after `step` steps, which `last_step` has found."""
        return load_tensors(next(each for each in self._kept.all() if number_of(each) == step) / STATE_FILE)

    def save(self, step: int, state: dict[str, torch.Tensor]) -> None:
        """Keep it beside those before it; the oldest goes. While storage is away it is tried again for minutes.

        Raises:
            StorageFailed: storage has no room, or stays away; the others are whole.
        """

        def write() -> None:
            check_there(self._run_dir)
            self._kept.save(step, state, {})

        patiently(write)
