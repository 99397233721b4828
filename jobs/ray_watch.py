"""A watch over Ray itself, in a thread: a driver that has lost it learns of that late, in pages, or not at all.

Without the raylet of its node Ray ends the process within two seconds, without the head's GCS after a minute, and says
nothing of the run. Here it ends before that, with one line that says how to go on. Its files are whole: they are
written so.
"""

import os
import shlex
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import ray

from dina_rl.cli import EXIT_RAY_LOST

LOOK_EVERY_S = 0.25
ANSWER_S = 5.0  # longest wait for a connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A process of Ray's that a driver cannot do without."""

    name: str
    host: str
    port: int
    patience_s: float  # how long it may be away
    here: bool = False  # on this machine, where one that is busy still has its port, and one that is gone has not

    def answers(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=ANSWER_S).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            return self.here
        return True


def parts() -> list[Part]:
    """Of the Ray that this process has joined. A GCS that keeps its state elsewhere comes back within Ray's minute."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    here = ray.get_runtime_context().get_node_id()
    (node,) = [each for each in ray.nodes() if each["NodeID"] == here]
    return [
        Part(
            name="the raylet of this node",
            host=node["NodeManagerAddress"],
            port=node["NodeManagerPort"],
            patience_s=0.0,
            here=True,
        ),
        Part(name="the GCS of the head node", host=host.strip("[]"), port=int(port), patience_s=45.0),
    ]


def watch(run_dir: Path) -> None:
    """From now on this process ends where Ray does, with the command that continues the run in `run_dir`."""
    threading.Thread(target=_look, args=(parts(), run_dir), name="ray-watch", daemon=True).start()


def _look(watched: list[Part], run_dir: Path) -> None:
    seen = dict.fromkeys((part.name for part in watched), time.monotonic())
    while True:
        time.sleep(LOOK_EVERY_S)
        if not ray.is_initialized():
            return
        for part in watched:
            if part.answers():
                seen[part.name] = time.monotonic()
            elif time.monotonic() - seen[part.name] > part.patience_s and ray.is_initialized():
                _end(part, run_dir)


def _end(part: Part, run_dir: Path) -> None:
    command = ["python", *sys.orig_argv[1:]]
    if "--resume" not in command:
        command.append("--resume")
    print(
        f"\nerror: Ray is lost: {part.name} at {part.host}:{part.port} does not answer any more. "
        f"What {run_dir} holds is whole; where Ray runs again, continue with: {shlex.join(command)}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_RAY_LOST)  # anything gentler would ask Ray
