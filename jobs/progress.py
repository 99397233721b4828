"""The driver's progress bar over steps that are taken elsewhere, read from the log file of the rank that takes them."""

import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from tqdm import tqdm

from dina_rl.loading import say
from dina_rl.textfiles import parse_json

POLL_S = 0.5
QUIET_S = 60.0
ASKING_S = 5.0
"""Longest wait at the end for an answer that is on its way."""


class FollowedSteps:
    """While open, a bar shows the steps that appear in a JSON-lines file of {step, loss, accuracy, ...}.

    Args:
        around: what is known of those who take the steps. A line tells it whenever none was taken for `quiet_s`,
            until all are.
    """

    def __init__(
        self, file: Path, *, steps: int, description: str, around: Callable[[], str], quiet_s: float = QUIET_S
    ) -> None:
        self._file = file
        self._steps = steps
        self._around = around
        self._quiet_s = quiet_s
        self._heard = monotonic()
        self._told = self._heard
        self._position = file.stat().st_size if file.exists() else 0  # a resumed run shows new lines only
        self._bar = tqdm(total=steps, desc=description, unit="step")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "FollowedSteps":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(ASKING_S)
        self._show_new()
        self._bar.close()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._show_new()
            now = monotonic()
            if self._bar.n < self._steps and now - max(self._heard, self._told) >= self._quiet_s:
                self._told = now
                say(f"no step for {now - self._heard:.0f} s; {self._around()}")

    def _show_new(self) -> None:
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._position)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]  # a line that is being written waits for the next look
        self._position += len(whole)
        if not whole:
            return
        self._heard = monotonic()
        steps = [entry for entry in map(parse_json, whole.splitlines()) if "loss" in entry]  # others are evaluations
        if not steps:
            return
        last = steps[-1]
        self._bar.set_postfix(loss=f"{last['loss']:.3f}", accuracy=f"{last['accuracy']:.3f}", refresh=False)
        self._bar.update(last["step"] - self._bar.n)
