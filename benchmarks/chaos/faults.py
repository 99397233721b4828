"""What goes wrong, where and when: a name for the table, and a strike at a running attempt."""

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil
from ray._private.node import Node

from benchmarks.chaos.lab import Attempt, Lab

ACTORS = {
    "rollout actor": (
        "RolloutActor.__init__",
        "RolloutActor.rollout",
        "RolloutActor.load_weights",
        "RolloutActor.evaluate",
    ),
    "scorer": ("ScorerActor.__init__", "ScorerActor.score", "ScorerActor.score_evaluation"),
    "learner rank": (
        "LearnerActor.__init__",
        "LearnerActor.join",
        "LearnerActor.build",
        "LearnerActor.update",
        "LearnerActor.state",
        "LearnerActor.offer",
    ),
}
"""Titles of their processes at the start and in each stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One of the things that go wrong."""

    name: str
    moment: str
    strike: Callable[[Attempt, Lab], bool]  # whether it found something to strike


def draw(rng: random.Random, usual_s: float) -> Fault:
    """Any of them, at any moment of a run that usually takes `usual_s` seconds."""
    name = rng.choice(sorted(FAULTS))
    return FAULTS[name](name, rng, usual_s)


def _of_process(number: signal.Signals) -> Callable[[str, random.Random, float], Fault]:
    def make(name: str, rng: random.Random, usual_s: float) -> Fault:
        actor = rng.choice(sorted(ACTORS))
        title = rng.choice(ACTORS[actor])
        wait_s = rng.choice((0.0, rng.uniform(0, usual_s / 2)))

        def strike(attempt: Attempt, lab: Lab) -> bool:
            process = attempt.until(f"ray::{title}") if attempt.sleep(wait_s) else None
            if process is None:
                return False
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
            return True

        return Fault(
            name=name, moment=f"{title} {'at once' if wait_s == 0 else f'after {wait_s:.0f} s'}", strike=strike
        )

    return make


def _at_any_time(strike: Callable[[Attempt, Lab], None]) -> Callable[[str, random.Random, float], Fault]:
    def make(name: str, rng: random.Random, usual_s: float) -> Fault:
        wait_s = rng.uniform(0, usual_s)

        def after(attempt: Attempt, lab: Lab) -> bool:
            if not attempt.sleep(wait_s):
                return False
            strike(attempt, lab)
            return True

        return Fault(name=name, moment=f"after {wait_s:.0f} s", strike=after)

    return make


def _lose_node(attempt: Attempt, lab: Lab) -> None:
    """The one on which more of the actors are."""
    busy = max(lab.cluster.worker_nodes, key=lambda node: len(psutil.Process(_raylet(node)).children()))
    _kill(_raylet(busy))


def _add_node(attempt: Attempt, lab: Lab) -> None:
    lab.add_node()


def _kill_raylet_of_driver(attempt: Attempt, lab: Lab) -> None:
    _kill(_raylet(lab.cluster.head_node))


def _kill_gcs(attempt: Attempt, lab: Lab) -> None:
    _kill(_process(lab.cluster.head_node, "gcs_server"))


def _raylet(node: Node | None) -> int:
    return _process(node, "raylet")


def _process(node: Node | None, name: str) -> int:
    assert node is not None, "the lab is mended before each trial"
    pid: int = node.all_processes[name][0].process.pid
    return pid


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _signal_driver(number: signal.Signals) -> Callable[[Attempt, Lab], None]:
    return lambda attempt, lab: attempt.process.send_signal(number)


FAULTS: dict[str, Callable[[str, random.Random, float], Fault]] = {
    "actor killed": _of_process(signal.SIGKILL),
    "actor stopped (SIGSTOP)": _of_process(signal.SIGSTOP),
    "node lost": _at_any_time(_lose_node),
    "node added": _at_any_time(_add_node),
    "driver killed": _at_any_time(_signal_driver(signal.SIGKILL)),
    "driver asked to end (SIGTERM)": _at_any_time(_signal_driver(signal.SIGTERM)),
    "raylet of the driver's node killed": _at_any_time(_kill_raylet_of_driver),
    "GCS killed": _at_any_time(_kill_gcs),
}
