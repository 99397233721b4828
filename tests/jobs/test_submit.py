"""The README's cluster path: `ray start --head`, token authentication on, `ray job submit` of the alignment job."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pytest

from dina_rl.config import LoRAConfig, PipelineConfig, RewardModelConfig
from dina_rl.reward.checkpoint import save_reward
from dina_rl.reward.model import LatentRewardModel
from dina_rl.runtime import open_pipeline

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
ALIGN = ("python", "-m", "jobs.align", "--config", "configs/shapes_flow_grpo_fast.yaml")
SHORT = (
    *("--iterations", "1", "--rollout.prompts-per-iteration", "2", "--rollout.group-size", "4"),
    *("--rollout.num-steps", "4", "--learner.micro-batch-size", "2", "--golden.dev-samples", "8"),
    *("--golden.test-samples", "8", "--golden.guidances", "2", "--golden.aligned-guidances", "2"),
    *("--workers.rollout-workers", "1", "--workers.scorers", "1", "--workers.learner-ranks", "1"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The environment of a client, and where jobs are handed in."""

    environment: dict[str, str]
    address: str


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, above 10002 to 19999, where Ray puts its workers, and below those the system hands out.

    One is the agent's: every Ray on a machine wants the same, and a cluster whose agent did not get it takes no jobs.
    """

    def free(port: int) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", port)) != 0

    return list(islice(filter(free, random.sample(range(20_000, 32_000), 100)), count))


@pytest.fixture
def home(tmp_path):
    """A user's home with a reward model where the config looks for it."""
    pipeline = PipelineConfig()
    config = RewardModelConfig(taps=(1, 2), num_heads=4, lora=LoRAConfig(rank=2, alpha=4))
    model = LatentRewardModel(open_pipeline(pipeline), config, seed=0)
    save_reward(model, tmp_path / "dina_rl" / "shapes_reward" / "reward", pipeline=pipeline)
    return tmp_path


@pytest.fixture
def cluster(home):
    """A Ray cluster of our own that demands a token."""
    kept = ("RAY_raylet_start_wait_time_s", "RAY_worker_niceness")  # as conftest sets them
    environment = {name: value for name, value in os.environ.items() if name in kept or not name.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, timeout=60, capture_output=True)
    scratch = tempfile.mkdtemp(prefix="ray-")  # Ray's socket paths must stay short
    start = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=4"]
    port, dashboard, agent = free_ports(3)
    start += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    start += [f"--temp-dir={scratch}", "--object-store-memory=200000000"]
    log = home / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(start, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        ours = Cluster(environment=environment, address=f"http://127.0.0.1:{dashboard}")
        wait_for_dashboard(ours, head, log)
        yield ours
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(scratch, ignore_errors=True)


def wait_for_dashboard(cluster: Cluster, head: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 240  # a loaded machine takes its time
    # A job, not a look at the list: the server answers before it has an agent that can start one.
    while (tried := submit(cluster, "true")).returncode:
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"no job server: {tried.stderr[-2000:]}\n{log.read_text()}"
        time.sleep(1)


def submit(cluster: Cluster, *command: str) -> subprocess.CompletedProcess:
    """`command` as a job in this project's directory, to its end."""
    return subprocess.run(
        [RAY, "job", "submit", "--address", cluster.address, "--working-dir", ".", "--", *command],
        env=cluster.environment,
        cwd=ROOT,
        timeout=280,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_submitted_job_aligns_and_an_uninvited_client_is_refused(cluster, home):
    stranger = replace(cluster, environment=cluster.environment | {"RAY_AUTH_MODE": "disabled"})
    refused = submit(stranger, *ALIGN, *SHORT)
    assert refused.returncode != 0
    assert "401" in refused.stdout + refused.stderr or "nauthor" in refused.stdout + refused.stderr

    done = submit(cluster, *ALIGN, *SHORT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run_dir = home / "dina_rl" / "shapes_flow_grpo_fast"
    assert (run_dir / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert "tensorboard --logdir" in done.stdout
    (size,) = re.findall(r"submitted with \d+ files, (\S+) MiB", done.stdout)
    assert float(size) < 10, "only what a job needs"

    lost = submit(cluster, *ALIGN, "--run-dir", "runs/lost")
    assert lost.returncode != 0
    assert "failed with exit code 2" in lost.stdout
    (said,) = {line for line in lost.stdout.splitlines() if line.startswith(("error", "Traceback"))}  # Ray repeats it
    assert said.startswith("error: run_dir runs/lost is relative: in a submitted job")
