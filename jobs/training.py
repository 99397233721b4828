"""The fit by Ray Train: `Training` over workers of their own, fed by Ray Data, that continue after a crash."""

from dataclasses import dataclass
from pathlib import Path

from ray.data import Dataset
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch.config import TorchConfig, _TorchBackend
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.result import Result
from ray.train.v2.torch.torch_trainer import TorchTrainer

from actors.network import meet_over_the_nodes_network
from dina_rl.config import FitRun
from dina_rl.errors import RunStopped
from dina_rl.loading import announce
from dina_rl.reward.outcome import LOG_FILE, Outcome
from jobs.cluster import visible_gpus
from jobs.pair_stream import ordered, pair_dataset
from jobs.progress import FollowedSteps

TRAIN = "train"
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """A worker's answer in place of an `Outcome`: the fit cannot go on."""

    reason: str


class _Backend(_TorchBackend):
    """Ray Train's own, whose ranks also find each other where a machine's name stands for its loopback address."""

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        worker_group.execute(meet_over_the_nodes_network)
        super().on_start(worker_group, backend_config)


class NodesTorch(TorchConfig):
    """Ray Train's process group, formed over the network of Ray's nodes."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


class RayTraining:
    """`Training` by Ray Train. Ray must be initialised."""

    def train(self, run: FitRun, latents: Path, run_dir: Path) -> Outcome:
        from dina_rl.reward.inputs import loads  # here: Ray Train's controller imports this module, and needs no models

        announce(f"{run.fit.num_workers} workers", loads(run, latents))
        with FollowedSteps(run_dir / LOG_FILE, steps=run.fit.steps, description="fit reward"):
            result = _trainer(run, run_dir, latents).fit()
        assert isinstance(result, Result)
        if isinstance(result.return_value, Stopped):
            raise RunStopped(result.return_value.reason)
        assert isinstance(result.return_value, Outcome)
        return result.return_value


def _trainer(run: FitRun, run_dir: Path, latents: Path) -> TorchTrainer:
    fit = run.fit
    train_dir = run_dir / TRAIN

    def remaining_pairs() -> Dataset:
        # Ray Train calls this for every group of workers it starts: after a crash the data continue at the checkpoint.
        return pair_dataset(run, latents, first_step=_checkpointed_step(train_dir))

    def on_worker() -> Outcome | Stopped:
        # Imported here: see above. It takes seconds of CPU.
        from jobs.fit_worker import fit_on_worker

        try:
            return fit_on_worker(run, latents=latents, run_dir=run_dir)
        except RunStopped as stopped:  # on all ranks; an error Ray Train would retry, `max_failures` times in vain
            return Stopped(reason=str(stopped))

    resources = {"CPU": fit.cpus_per_worker} | ({"GPU": fit.gpus_per_worker} if fit.gpus_per_worker else {})
    return TorchTrainer(
        on_worker,
        torch_config=NodesTorch(),
        scaling_config=ScalingConfig(
            num_workers=fit.num_workers, use_gpu=fit.gpus_per_worker > 0, resources_per_worker=resources
        ),
        # The same name and path as before: Ray Train finds the checkpoints of the run it continues.
        run_config=RunConfig(
            name=TRAIN,
            storage_path=str(run_dir),
            failure_config=FailureConfig(max_failures=fit.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env=visible_gpus(fit.gpus_per_worker),
        ),
        datasets={"train": remaining_pairs},
        dataset_config=ordered(),
    )


def _checkpointed_step(train_dir: Path) -> int:
    """Steps behind the checkpoint that Ray Train will hand to the workers; 0 without one."""
    if not (train_dir / RAY_SNAPSHOT).exists():
        return 0
    checkpoint = Result.from_path(str(train_dir)).checkpoint
    return 0 if checkpoint is None else int(Path(checkpoint.path).name.removeprefix("step_"))
