"""Settings of an export from an alignment run's directory."""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from dina_rl.config.base import Section

KEPT = ("best", "last", "average")


class ExportRun(Section):
    """Export weights that an alignment run keeps."""

    run_dir: Path = Path("runs/run")
    """directory of an alignment run, finished or not"""
    which: str = "best"
    """best: the averaged weights that were best in golden on the dev prompts; average: those of the last checkpoint,
    which a finished run has exported; last: the last checkpoint's own; or a checkpoint's iteration: its average"""
    out: Path | None = None
    """directory to write, empty or new; None: adapter_WHICH or transformer_WHICH in run_dir"""

    @model_validator(mode="after")
    def _which_is_kept(self) -> Self:
        if self.which not in KEPT and not (self.which.isascii() and self.which.isdigit()):
            raise ValueError(f"which: {self.which!r} is none of {', '.join(KEPT)}, nor an iteration")
        return self
