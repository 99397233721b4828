"""What happened in an alignment run, in order: every iteration, every measurement, every alarm of the watch."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from dina_rl.checkpoint import write_text
from dina_rl.types import Point

FILE = "history.jsonl"

Entry = dict[str, object]
"""`kind` (iteration, measurement, diverged), `iteration` (how many are done), and what there is to say."""


class History:
    """Entries in memory, and their file."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, kind: str, iteration: int, values: Mapping[str, object]) -> None:
        self.entries.append({"kind": kind, "iteration": iteration, **values})

    def restore(self, entries: Iterable[Entry]) -> None:
        """Take up the entries of a checkpoint. Before version 0.2 an iteration was called a step."""
        self.entries[:] = [
            {("iteration" if key == "step" else key): value for key, value in e.items()} for e in entries
        ]

    def points(self) -> list[Point]:
        """The measured points of the curves, in order."""
        return cast(list[Point], self._of("measurement"))

    def iterations(self) -> list[dict[str, float]]:
        """What was reported of each iteration, its scorers' part aside."""
        return [
            {name: value for name, value in entry.items() if isinstance(value, int | float)}
            for entry in self._of("iteration")
        ]

    def alarms(self) -> list[int]:
        """The iterations at which the watch called the run diverged and acted on it."""
        return [cast(int, entry["iteration"]) for entry in self._of("diverged")]

    def save(self, run_dir: Path) -> None:
        write_text(run_dir / FILE, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def _of(self, kind: str) -> list[Entry]:
        return [entry for entry in self.entries if entry["kind"] == kind]
