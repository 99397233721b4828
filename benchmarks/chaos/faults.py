"""What goes wrong, where and when: a name for the table, and a strike at a running attempt."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from ray._private.node import Node

from benchmarks.chaos.lab import LIMIT_S, Attempt, Lab, workers

STARTING = (
    "RolloutActor.open",
    "ScorerActor.open",
    "LearnerActor.__init__",
    "LearnerActor.join",
    "LearnerActor.build",
)
WORKING = (
    "RolloutActor.rollout",
    "RolloutActor.load_weights",
    "RolloutActor.evaluate",
    "ScorerActor.score",
    "ScorerActor.score_evaluation",
    "LearnerActor.update",
    "LearnerActor.offer",
    "LearnerActor.take",
)
"""What Ray calls the actors' processes, at the start and in each stage."""
LOOP = "RolloutActor.rollout"
FULL = 0.8  # of the machine's memory, whoever has it: past it Ray kills workers of every node until it is less
ACTORS = ("ray::RolloutActor", "ray::ScorerActor", "ray::LearnerActor")
PATIENCE_S = 1.0
FILLING_S, CHUNK_BYTES = 30.0, 2**27


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When somebody does what `title` says, at once, or so many seconds into the loop.

    Some of it is done in no time: where it is not seen for a while, any actor's moment is as good.
    """

    title: str
    into_loop_s: float | None

    def __str__(self) -> str:
        return self.title + ("" if self.into_loop_s is None else f" from {self.into_loop_s:.1f} s of the loop on")

    def come(self, attempt: Attempt) -> psutil.Process | None:
        """The process that does it; None: the run ended before."""
        if self.into_loop_s is not None and (
            attempt.until(f"ray::{LOOP}") is None or not attempt.sleep(self.into_loop_s)
        ):
            return None
        patience_s = LIMIT_S if self.into_loop_s is None else PATIENCE_S
        return attempt.until(f"ray::{self.title}", seconds=patience_s) or attempt.until(*ACTORS)


class Missed(Exception):
    """Nothing came of a strike."""


Strike = Callable[[psutil.Process, Attempt, Lab], None]  # the process that was at work


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One of the things that go wrong."""

    name: str
    moment: Moment

    def strike(self, attempt: Attempt, lab: Lab) -> bool:
        """Whether its moment came, and it struck."""
        process = self.moment.come(attempt)
        if process is None:
            return False
        try:
            FAULTS[self.name](process, attempt, lab)
        except (psutil.NoSuchProcess, Missed):
            return False
        return True


def draw(rng: random.Random, names: list[str], loop_s: float) -> Fault:
    """One of `names`, while the actors start (a third), or in a loop that usually takes `loop_s` seconds."""
    name = rng.choice(names)
    if rng.random() < 1 / 3:
        return Fault(name=name, moment=Moment(title=rng.choice(STARTING), into_loop_s=None))
    into_loop_s = rng.uniform(0, 0.8 * loop_s)
    return Fault(name=name, moment=Moment(title=rng.choice(WORKING), into_loop_s=into_loop_s))


def _signal_actor(number: signal.Signals) -> Strike:
    return lambda process, attempt, lab: process.send_signal(number)


def _signal_driver(number: signal.Signals) -> Strike:
    return lambda process, attempt, lab: attempt.process.send_signal(number)


def _lose_node(process: psutil.Process, attempt: Attempt, lab: Lab) -> None:
    """The one that the process is on. Its actors end with it."""
    parent = process.parent()
    assert parent is not None, "actors are children of their raylet"
    parent.kill()


def _add_node(process: psutil.Process, attempt: Attempt, lab: Lab) -> None:
    lab.add_node()


def _fill_memory(process: psutil.Process, attempt: Attempt, lab: Lab) -> None:
    """Until Ray has killed somebody for it: whom it likes, not always this process."""
    there, filling = set(workers()), list[bytes]()
    give_up = time.monotonic() + FILLING_S
    while there <= set(workers()):
        if time.monotonic() > give_up:
            raise Missed
        if psutil.virtual_memory().percent < 100 * FULL + 1:
            filling.append(b"1" * CHUNK_BYTES)
        else:
            time.sleep(0.1)


def _kill_of_head(name: str) -> Strike:
    return lambda process, attempt, lab: os.kill(_pid(lab.cluster.head_node, name), signal.SIGKILL)


def _pid(node: Node | None, name: str) -> int:
    assert node is not None, "the lab is mended before each trial"
    pid: int = node.all_processes[name][0].process.pid
    return pid


FAULTS: dict[str, Strike] = {
    "actor killed": _signal_actor(signal.SIGKILL),
    "actor stopped (SIGSTOP)": _signal_actor(signal.SIGSTOP),
    "memory full": _fill_memory,
    "node lost": _lose_node,
    "node added": _add_node,
    "driver killed": _signal_driver(signal.SIGKILL),
    "driver asked to end (SIGTERM)": _signal_driver(signal.SIGTERM),
    "raylet of the driver's node killed": _kill_of_head("raylet"),
    "GCS killed": _kill_of_head("gcs_server"),
}
