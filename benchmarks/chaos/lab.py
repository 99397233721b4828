"""A cluster of several nodes on this machine, and attempts at a small run on it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from ray._private.node import Node  # Ray's test cluster is made of these, and has no other name for them
from ray.cluster_utils import Cluster

from benchmarks.digests import digest_of
from benchmarks.loop import REWARD
from benchmarks.untrained import save_untrained
from dina_rl.checkpoint import write_text
from dina_rl.config import PipelineConfig
from dina_rl.textfiles import parse_yaml, read_text

WORKERS = 2  # nodes beside the head's, on which no actor finds room
CPUS = 4  # of each: the actors of the run fit on one
STORE_BYTES = 128 * 2**20
LIMIT_S = 600.0  # longest attempt
POLL_S, POLLS = 0.02, 15

SMOKE = Path(__file__).parents[2] / "configs" / "local_smoke.yaml"
OF_ALIGNMENT = ("iterations", "rollout", "grpo", "learner", "golden")
"""What of the smoke run is the alignment's."""
FEWER = {
    "rollout": {"prompts_per_iteration": 4, "group_size": 4, "groups_per_call": 1},
    "learner": {"micro_batch_size": 4},
    "golden": {"dev_samples": 8, "test_samples": 8, "guidances": [2.0], "aligned_guidances": [2.0], "batch_size": 8},
}
"""Of the smoke run's samples: a trial is mostly the start of processes."""
WORKERS_OF_RUN = {
    "rollout_workers": 1,
    "scorers": 1,
    "learner_ranks": 2,
    "cpus_per_actor": 1,
    "snapshot_every": 2,
    "call_timeout_s": 30,
    "start_timeout_s": 200,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What a run ends with."""

    history: str
    weights: str  # digest of the exported ones


class Lab:
    """The cluster, which is mended between trials, and where runs are kept.

    Args:
        full: share of the machine's memory past which Ray kills workers of every node; None: Ray's own.
    """

    def __init__(self, directory: Path, *, full: float | None = None) -> None:
        self.directory = directory
        self._full = full
        self._cluster: Cluster | None = None
        save_untrained(directory / "reward", PipelineConfig(), REWARD)
        smoke = parse_yaml(read_text(SMOKE))
        values = {name: smoke[name] for name in OF_ALIGNMENT}
        for name, fewer in FEWER.items():
            values[name] |= fewer
        values |= {
            "checkpoint_every": 3,
            "rewards": {"dina": {"path": str(directory / "reward")}},
            "workers": WORKERS_OF_RUN,
        }
        write_text(directory / "run.yaml", yaml.safe_dump(values))

    def mend(self) -> None:
        """All nodes are there."""
        cluster = self._cluster
        if cluster is None or cluster.head_node is None or not all_alive(cluster.head_node):
            self.shutdown()
            head = {
                "num_cpus": 0,
                "object_store_memory": STORE_BYTES,
                "include_dashboard": False,
                "_system_config": {} if self._full is None else {"memory_usage_threshold": self._full},
            }
            cluster = self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for node in [*cluster.worker_nodes]:
            if not all_alive(node):
                cluster.remove_node(node, allow_graceful=False)
        while len(cluster.worker_nodes) < WORKERS:
            self.add_node()

    def add_node(self) -> None:
        self.cluster.add_node(num_cpus=CPUS, object_store_memory=STORE_BYTES)

    @property
    def cluster(self) -> Cluster:
        assert self._cluster is not None, "mend() makes it"
        return self._cluster

    def shutdown(self) -> None:
        if self._cluster is not None:
            self._cluster.shutdown()
            self._cluster = None

    @contextmanager
    def attempt(self, run_dir: Path, *, resume: bool) -> Iterator["Attempt"]:
        """The run as its user starts it, ended with the block."""
        log = run_dir.with_suffix(".log")
        command = [sys.executable, "-m", "jobs.align", "--config", str(self.directory / "run.yaml")]
        command += ["--run-dir", str(run_dir), *(["--resume"] if resume else [])]
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env=os.environ | {"RAY_ADDRESS": self.cluster.address}
            )
        attempt = Attempt(process, log)
        try:
            yield attempt
        finally:
            process.kill()
            process.wait()


class Attempt:
    """One process of the run's driver."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self.log = log
        self.began = time.monotonic()

    def wait(self) -> int | None:
        """Its exit code; None: it did not end within the limit."""
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return None

    def until(self, *titles: str, seconds: float = LIMIT_S) -> psutil.Process | None:
        """A worker process that is seen to do what a title says, as Ray names them.

        None: the run ended first, or none was seen for so long.
        """
        end = min(self.began + LIMIT_S, time.monotonic() + seconds)
        while self.process.poll() is None and time.monotonic() < end:
            seen = workers()  # to list them is dear
            for _ in range(POLLS):
                for process in seen:
                    if title_of(process).startswith(titles):
                        return process
                time.sleep(POLL_S)
        return None

    def sleep(self, seconds: float) -> bool:
        """Whether the run still goes on after so long."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def said(self) -> str:
        return read_text(self.log)


def all_alive(node: Node) -> bool:
    """Whether none of the node's processes is gone."""
    return not node.dead_processes()


def workers() -> list[psutil.Process]:
    """Of the cluster's nodes, which are children of this process."""
    return psutil.Process().children(recursive=True)


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def numbers(run_dir: Path) -> Numbers:
    """Of a run that has ended."""
    (file,) = (run_dir / "adapter").glob("*.safetensors")
    return Numbers(history=read_text(run_dir / "history.jsonl"), weights=digest_of(file))
