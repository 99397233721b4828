"""The README's cluster path: `ray start --head`, token authentication on, `ray job submit` of the alignment job."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dina_rl.config import LoRAConfig, PipelineConfig, RewardModelConfig
from dina_rl.reward.checkpoint import save_reward
from dina_rl.reward.model import LatentRewardModel
from dina_rl.runtime import open_pipeline

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
# Outside of 10002 to 19999, where Ray puts its workers. The agent has a port of its own: every Ray on a machine wants
# the same one, and a cluster whose agent did not get it takes no jobs.
PORT, DASHBOARD, AGENT = 26379, 28265, 28266
SUBMIT = "-- python -m jobs.align --config configs/shapes_flow_grpo_fast.yaml"
SHORT = (
    "--iterations 1 --golden.dev-samples 8 --golden.test-samples 8 --golden.guidances 2 --golden.aligned-guidances 2 "
    "--rollout.prompts-per-iteration 2 --rollout.group-size 4 --rollout.num-steps 4 --learner.micro-batch-size 2"
)

pytestmark = pytest.mark.timeout(600)


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
    """Environment of a client of a Ray cluster of our own that demands a token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, timeout=60, capture_output=True)
    scratch = tempfile.mkdtemp(prefix="ray-")  # Ray's socket paths must stay short
    start = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={PORT}", "--num-cpus=4"]
    start += [f"--dashboard-port={DASHBOARD}", f"--dashboard-agent-listen-port={AGENT}"]
    start += [f"--temp-dir={scratch}", "--object-store-memory=200000000"]
    log = home / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(start, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for_dashboard(environment, head, log)
        yield environment
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(scratch, ignore_errors=True)


def wait_for_dashboard(environment, head, log):
    deadline = time.monotonic() + 240  # a loaded machine takes its time
    # A job, not a look at the list: the server answers before it has an agent that can start one.
    command = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{DASHBOARD}", "--", "true"]
    while (tried := subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)).returncode:
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"no job server: {tried.stderr[-2000:]}\n{log.read_text()}"
        time.sleep(1)


def submit(environment, *more):
    command = [
        RAY,
        "job",
        "submit",
        "--address",
        f"http://127.0.0.1:{DASHBOARD}",
        "--working-dir",
        ".",
        *SUBMIT.split(),
    ]
    return subprocess.run(
        [*command, *more], env=environment, cwd=ROOT, timeout=280, capture_output=True, text=True, check=False
    )


def test_a_submitted_job_aligns_and_an_uninvited_client_is_refused(cluster, home):
    stranger = cluster | {"RAY_AUTH_MODE": "disabled"}
    refused = submit(stranger, *SHORT.split())
    assert refused.returncode != 0
    assert "401" in refused.stdout + refused.stderr or "nauthor" in refused.stdout + refused.stderr

    done = submit(cluster, *SHORT.split())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run_dir = home / "dina_rl" / "shapes_flow_grpo_fast"
    assert (run_dir / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert "tensorboard --logdir" in done.stdout
    (size,) = re.findall(r"submitted with \d+ files, (\S+) MiB", done.stdout)
    assert float(size) < 10, "only what a job needs"

    lost = submit(cluster, "--run-dir", "runs/lost")
    assert lost.returncode != 0
    assert "run_dir runs/lost is relative: in a submitted job" in lost.stdout + lost.stderr
