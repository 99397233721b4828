"""A run across two hosts against the same run on one: `python -m benchmarks.two_hosts`, as root on Linux with iproute2.

The hosts are network namespaces of this machine with a cable (a veth pair) between them. Each has its own address, its
own loopback and, mounted over, its own /dev/shm and /tmp/ray; beyond that they see the same files, as nodes with shared
storage do, and the same processors. Nothing else of the network is there: what assumes one host finds nobody. On each
runs one Ray node, token and all, with one logical GPU and so few CPUs that both are needed; `python -m dina_rl.local`
joins at the first. The run on one host has a Ray node with the GPUs and CPUs of both. Numbers and weights must be the
same to the last bit.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from pydantic import BaseModel, ConfigDict

from benchmarks.digests import digest_of
from dina_rl.cli import fail, load
from dina_rl.config.base import Positive
from dina_rl.markdown import grid
from dina_rl.textfiles import read_text

NETWORK = "198.18.0"  # of the range that RFC 2544 sets aside for benchmarks
PORT = 6379
INTERFACE = "eth0"
CPUS = 3  # of a node: two for its worker of the fit, one for Ray Data
GPUS = 1
LOOK_EVERY_S = 2.0
WEIGHTS = ("fit/reward", "align/adapter")
TIMES = ("seconds", "peak_rss_bytes", "images_per_second", "versions")
ROOT = Path(__file__).parents[1]


class BenchmarkRun(BaseModel):
    """Two hosts against one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Path = ROOT / "configs" / "local_smoke.yaml"
    """configuration of `dina_rl.local`"""
    run_dir: Path = Path("runs/two_hosts")
    """where both runs go, in `one` and `two`; not below /tmp/ray or /dev/shm, which the hosts do not share"""
    timeout_s: Positive = 3600
    """longest run"""


@dataclass(slots=True)
class Host:
    """A network namespace, and what was seen of it."""

    namespace: str
    address: str
    actors: set[str] = field(default_factory=set)
    received_mib: float = 0.0

    def command(self, *words: str) -> list[str]:
        """`words` as a process of this host, with nothing of another's in shared memory."""
        private = "mount -t tmpfs none /dev/shm && mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray"
        return ["ip", "netns", "exec", self.namespace, "sh", "-c", f'{private} && exec "$@"', "sh", *words]

    def look(self) -> None:
        """Note which actors and tasks are here, by the titles of Ray's processes, and what came by cable until now."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                title = re.match(r"ray::(\w+)", " ".join(process.cmdline()))
                if title and not title[1].startswith("IDLE"):
                    self.actors.add(title[1])
        (link,) = json.loads(ip("-n", self.namespace, "-s", "-j", "link", "show", "dev", INTERFACE))
        self.received_mib = link["stats64"]["rx"]["bytes"] / 2**20

    def processes(self) -> list[psutil.Process]:
        found = ip("netns", "pids", self.namespace).split()
        with suppress(psutil.NoSuchProcess):
            return [psutil.Process(int(pid)) for pid in found]
        return self.processes()  # one has just ended


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Joined by a cable; whatever runs in them, and they, are gone after the block."""
    made = [Host(f"dina-rl-{os.getpid()}-{number}", f"{NETWORK}.{number}") for number in (1, 2)]
    try:
        for host in made:
            ip("netns", "add", host.namespace)
            ip("-n", host.namespace, "link", "set", "lo", "up")
        first, second = (host.namespace for host in made)
        ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for host in made:
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            ip("-n", host.namespace, "link", "set", INTERFACE, "up")
        yield made
    finally:
        for host in made:
            if host.namespace in ip("netns", "list"):
                _end(host.processes())
                ip("netns", "del", host.namespace)


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=20)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def cluster(on: Sequence[Host], nodes_each: int, logs: Path, environment: dict[str, str]) -> Iterator[None]:
    """Ray on these hosts, the head on the first; `nodes_each` times the resources of a node."""
    node = ["--block", "--disable-usage-stats", "--object-store-memory=300000000"]
    node += [f"--num-cpus={CPUS * nodes_each}", f"--num-gpus={GPUS * nodes_each}"]
    ray, running = str(Path(sys.executable).parent / "ray"), []
    try:
        for number, host in enumerate(on):
            place = ("--head", f"--port={PORT}", "--include-dashboard=false") if number == 0 else ()
            address = () if number == 0 else (f"--address={on[0].address}:{PORT}",)
            log = logs / f"ray-{number}.log"
            started = [ray, "start", *place, *address, f"--node-ip-address={host.address}", *node]
            with log.open("wb") as output:
                running.append(
                    subprocess.Popen(host.command(*started), env=environment, stdout=output, stderr=subprocess.STDOUT)
                )
            _wait_for("Ray runtime started", log, running[-1])
        yield
    finally:
        _end([psutil.Process(process.pid) for process in running if process.poll() is None])


def _wait_for(line: str, log: Path, process: subprocess.Popen[bytes], timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while line not in read_text(log):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Ray did not start: {read_text(log)[-2000:]}")
        time.sleep(0.5)


def carry_out(run: BenchmarkRun, on: Sequence[Host], run_dir: Path) -> float:
    """The preset on a cluster of these hosts; returns its seconds.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    with TemporaryDirectory(dir=run_dir.parent) as scratch:
        token = Path(scratch) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        # Where others use the cores too, Ray's 30 s are short, and its actors, nicer by 15, would come after all else.
        environment = {"RAY_raylet_start_wait_time_s": "300", "RAY_worker_niceness": "0"} | os.environ
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        with cluster(on, 2 // len(on), Path(scratch), environment):
            job = [sys.executable, "-m", "dina_rl.local", "--config", str(run.preset), "--run-dir", str(run_dir)]
            job += ["--workers.gpus", str(2 * GPUS), "--fit.cpus-per-worker", str(CPUS - 1)]
            environment |= {"RAY_ADDRESS": f"{on[0].address}:{PORT}"}
            begin = time.monotonic()
            # The head's shared memory, where its store lies, is what a driver on it sees: it joins by that process.
            (head,) = (each.pid for each in on[0].processes() if each.name() == "raylet")
            entered = ["nsenter", "--target", str(head), "--mount", "--net", f"--wd={ROOT}", *job]
            with subprocess.Popen(entered, env=environment) as process:
                try:
                    while process.poll() is None:
                        if time.monotonic() - begin > run.timeout_s:
                            raise RuntimeError(f"no end within {run.timeout_s} s")
                        for host in on:
                            host.look()
                        time.sleep(LOOK_EVERY_S)
                finally:
                    process.terminate()
            if process.returncode:
                raise RuntimeError(f"dina_rl.local ended with {process.returncode}")
            return time.monotonic() - begin


def outcome(run_dir: Path) -> dict[str, object]:
    """What must not depend on where the work was done: the summary's numbers, and digests of all weights."""
    summary = json.loads(read_text(run_dir / "summary.json"))
    files = [file for place in WEIGHTS for file in sorted((run_dir / place).rglob("*.safetensors"))]
    return {key: value for key, value in summary.items() if key not in TIMES} | {
        str(file.relative_to(run_dir)): digest_of(file) for file in files
    }


def report(seconds: dict[str, float], seen: dict[str, list[Host]]) -> str:
    rows = [
        [name, host.address, ", ".join(sorted(host.actors)), f"{host.received_mib:.0f}", f"{seconds[name]:.0f}"]
        for name, each in seen.items()
        for host in each
    ]
    return grid(["run", "host", "what ran there", "received, MiB", "seconds"], rows)


def main(argv: Sequence[str]) -> None:
    run = load(BenchmarkRun, argv, program="python -m benchmarks.two_hosts")
    missing = [tool for tool in ("ip", "nsenter") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        fail(f"needs root, for network namespaces{''.join(f', and {tool}' for tool in missing)}")
    run_dir = run.run_dir.expanduser().resolve()
    if run_dir.exists():
        fail(f"run_dir {run_dir} is there already")
    run_dir.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the namespaces go
    seconds: dict[str, float] = {}
    seen: dict[str, list[Host]] = {}
    for name, count in (("two", 2), ("one", 1)):
        with two_hosts() as made:
            seen[name] = made[:count]
            seconds[name] = carry_out(run, seen[name], run_dir / name)
    one, two = outcome(run_dir / "one"), outcome(run_dir / "two")
    print("\n" + report(seconds, seen))
    others = [key for key in one if one[key] != two.get(key)] + [key for key in two if key not in one]
    if others:
        print(f"differ: {', '.join(others)}")
        raise SystemExit(1)
    print(f"the same to the last bit: {', '.join(one)}")


if __name__ == "__main__":
    main(sys.argv[1:])
