"""Fixtures that several test directories share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Before anything imports torch, and inherited by xdist's workers, Ray's and all other processes that a test starts.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
# Where both cores are busy Ray's 30 s are short, and its actors, which it makes nicer by 15, would come after all else.
os.environ.update(RAY_raylet_start_wait_time_s="120", RAY_worker_niceness="0")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test and its fixtures run as the processes of a run do, whatever a job called by an earlier test has set.

    One thread: the models are so small that two spend their time waiting for each other.
    """
    from dina_rl.runtime import configure_process  # here: xdist's controller runs no test and needs no torch

    configure_process(threads=1)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One Ray instance of this worker's own for the whole session.

    Its CPUs and GPUs are logical. Nothing of it is shared: `local` joins no other, the ports are free ones, and its
    directory bears the process' id.
    """
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,  # no more than that many workers at once import what a task needs
        num_gpus=4,
        object_store_memory=256 * 1024**2,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised miniature SD3.5 in the on-disk format of the real one."""
    from dina_rl.shapes.pipeline import build_pipeline

    directory = tmp_path_factory.mktemp("pipeline") / "tiny"
    build_pipeline(0).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised miniature FLUX.1-dev on disk."""
    from tests.tiny_pipelines import save_tiny_flux

    directory = tmp_path_factory.mktemp("flux") / "tiny"
    save_tiny_flux(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised miniature Z-Image-Turbo on disk."""
    from tests.tiny_pipelines import save_tiny_z_image

    directory = tmp_path_factory.mktemp("z_image") / "tiny"
    save_tiny_z_image(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> Path:
    """A randomly initialised DiNa-LRM on `tiny_pipeline`, as fit_reward would have saved it."""
    from dina_rl.config import LoRAConfig, PipelineConfig, RewardModelConfig
    from dina_rl.reward.checkpoint import save_reward
    from dina_rl.reward.model import LatentRewardModel
    from dina_rl.runtime import open_pipeline

    pipeline = PipelineConfig(path=str(tiny_pipeline))
    config = RewardModelConfig(taps=(1, 2), num_heads=4, lora=LoRAConfig(rank=4, alpha=8))
    directory = tmp_path_factory.mktemp("reward") / "tiny"
    save_reward(LatentRewardModel(open_pipeline(pipeline), config, seed=0), directory, pipeline=pipeline)
    return directory
