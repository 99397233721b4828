"""Waits for what others do."""

import time
from collections.abc import Callable


def wait_until(done: Callable[[], bool], *, seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < give_up, f"not within {seconds:g} s"
        time.sleep(0.01)
