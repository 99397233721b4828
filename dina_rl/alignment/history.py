"""What happened in an alignment run, in order: every iteration, every measurement, every alarm of the watch.

How long it took stands in a file of its own: a run that is done again has the same history, and other seconds.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # typing's own cannot be read from a file before Python 3.12

from dina_rl.checkpoint import write_json, write_text
from dina_rl.errors import shown
from dina_rl.textfiles import parse_json, read_record, read_text
from dina_rl.types import Point

FILE, SECONDS_FILE = "history.jsonl", "seconds.json"

Entry = dict[str, object]
"""`kind` (iteration, measurement, diverged, drifted), `iteration` (how many are done), and what there is to say."""


class _Measured(TypedDict):
    """What is read of a measurement; versions differ in the rest."""

    golden: float
    proxy: float
    proxy_std: float


class _Drifted(TypedDict):
    probe: str


def checked(entries: object) -> list[Entry]:
    """Entries as a file has them. Raises ValueError where they are none."""
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ValueError("its entries are no objects")
    for entry in entries:
        kind, at = entry.get("kind"), entry.get("iteration", entry.get("step"))
        if not isinstance(kind, str) or type(at) is not int:
            raise ValueError(f"an entry has no kind or no iteration: {shown(entry)}")
        wanted = {"measurement": _Measured, "drifted": _Drifted}.get(kind)
        if wanted is not None:
            TypeAdapter(wanted).validate_python(entry, strict=True)  # its error is a ValueError
    return entries


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

    def measured(self, done: int) -> bool:
        """Whether the curves have a point after `done` iterations."""
        return any(point["iteration"] == done for point in self.points())

    def iterations(self) -> list[dict[str, float]]:
        """What was reported of each iteration, its scorers' part aside."""
        return [
            {name: value for name, value in entry.items() if isinstance(value, int | float)}
            for entry in self._of("iteration")
        ]

    def alarms(self) -> list[int]:
        """The iterations at which the watch called the run diverged and acted on it."""
        return [cast(int, entry["iteration"]) for entry in self._of("diverged")]

    def drifts(self) -> dict[str, int]:
        """The iteration at which each probe was called drifted, by its tag."""
        return {cast(str, entry["probe"]): cast(int, entry["iteration"]) for entry in self._of("drifted")}

    def save(self, run_dir: Path) -> None:
        write_text(run_dir / FILE, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def _of(self, kind: str) -> list[Entry]:
        return [entry for entry in self.entries if entry["kind"] == kind]


def read_history(run_dir: Path) -> History:
    """That of a run as its directory has it now; empty before the first measurement.

    Raises:
        ValueError: it cannot be read.
    """
    history, file = History(), run_dir / FILE
    try:
        text = read_text(file) if file.is_file() else ""
        history.restore(checked([parse_json(line) for line in text.split("\n") if line]))
    except ValueError as error:
        raise ValueError(f"{file} holds no history; was it edited?") from error
    return history


def write_seconds(run_dir: Path, seconds: Mapping[int, float]) -> None:
    """Keep how long the run had worked at each measurement, by its iteration."""
    write_json(run_dir / SECONDS_FILE, seconds)


def read_seconds(run_dir: Path) -> dict[int, float]:
    """What `write_seconds` wrote; empty of a version that did not.

    Raises:
        ValueError: it cannot be read.
    """
    file = run_dir / SECONDS_FILE
    try:
        return read_record(dict[int, float], file) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} holds no seconds; was it edited?") from error


def gain(value: float, base: float, spread: float) -> float:
    """How far `value` lies over the base, in the base's standard deviations over samples.

    A base without a spread, as of a judge's win rate over itself, lends none: then it is the plain difference.
    """
    return (value - base) / spread if spread > 1e-6 else value - base
