"""The fit by Ray Train: `Training` over workers of their own, fed by Ray Data, that continue after a crash."""

from collections.abc import Mapping
from pathlib import Path

from ray.data import Dataset
from ray.exceptions import RayError, RayTaskError
from ray.train.v2._internal.exceptions import RayTrainError  # of a worker that does not answer; it has no other name
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.api.result import Result
from ray.train.v2.torch.torch_trainer import TorchTrainer

from actors.placement import resources, wait_for_room
from dina_rl.config import FitRun
from dina_rl.errors import RunStopped, WorkLost
from dina_rl.loading import announce
from dina_rl.reward.checkpoints import TRAIN, FitCheckpoints
from dina_rl.reward.outcome import LOG_FILE, Outcome
from dina_rl.storage import writing
from jobs.anew import anew_where_lost
from jobs.cluster import resources_of, visible_gpus
from jobs.pair_stream import ordered, pair_dataset
from jobs.progress import FollowedSteps
from jobs.told import FATAL
from jobs.train_ranks import MeetingRanks

FOR_DATA = {"CPU": 1.0}
"""What Ray Data's tasks, which read the latents, need beside the workers: without it they never begin."""


class EndsAtOnce(UserCallback):
    """What a worker says that ends a job ends the fit: Ray Train would build the group `max_failures` times in vain.

    One worker may be alone in saying so, with the others in a collective, so it cannot be an answer: all are killed.
    """

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, Exception]) -> None:
        """Called by Ray Train's controller; what is raised here it does not try again."""
        for error in worker_exceptions.values():
            if isinstance(error, FATAL):
                raise error


class RayTraining:
    """`Training` by Ray Train. Ray must be initialised."""

    def train(self, run: FitRun, latents: Path, run_dir: Path) -> Outcome:
        """The same.

        Raises:
            ValueError, RunStopped: what the fit reads is broken, or it cannot go on; or more workers were lost than
                `fit.max_failures`, or there was no room for them within `fit.start_timeout_s`.
        """
        from dina_rl.reward.inputs import loads  # here: Ray Train's controller imports this module, and needs no models

        _checkpointed_step(run, run_dir)  # before anything starts, where none is whole
        wait_for_room([resources_of(run.fit)] * run.fit.num_workers + [FOR_DATA], run.fit.start_timeout_s)
        announce(f"{run.fit.num_workers} workers", loads(run, latents))
        with (
            writing(run_dir / TRAIN),  # Ray Train tries its storage before anything else
            FollowedSteps(run_dir / LOG_FILE, steps=run.fit.steps, description="fit reward", around=_around),
        ):
            # Ray Train replaces lost workers, but not what serves them: there it ends.
            result = anew_where_lost(
                lambda: _ended(_trainer(run, run_dir, latents), run.fit.max_failures),
                times=run.fit.max_failures,
                setting="fit.max_failures",
                goes_on=lambda: "the fit goes on from its last checkpoint",
            )
        assert isinstance(result.return_value, Outcome)
        return result.return_value


def _ended(trainer: TorchTrainer, max_failures: int) -> Result:
    """Its result, or in our words why there is none. An error of the program stays Ray's."""
    try:
        result = trainer.fit()
    except ControllerError as failed:
        if isinstance(failed.controller_failure, FATAL):
            raise failed.controller_failure from None
        if isinstance(failed.controller_failure, RayError) and not isinstance(failed.controller_failure, RayTaskError):
            why = str(failed.controller_failure).strip().partition("\n")[0]
            raise WorkLost(f"Ray Train ended with what it had on a lost node: {why}") from failed
        raise
    except WorkerGroupError as failed:
        # When a worker is lost the others' collectives fail too: one loss among the errors tells what it was.
        ranks = [rank for rank, error in failed.worker_failures.items() if isinstance(error, RayTrainError)]
        if ranks:
            raise RunStopped(
                f"the fit's workers were lost {max_failures + 1} times (fit.max_failures), last rank {ranks[0]}"
            ) from failed
        raise
    assert isinstance(result, Result)
    return result


def _trainer(run: FitRun, run_dir: Path, latents: Path) -> TorchTrainer:
    fit = run.fit

    def remaining_pairs() -> Dataset:
        # Ray Train calls this for every group of workers it starts: after a crash the data continue at the checkpoint.
        return pair_dataset(run, latents, first_step=_checkpointed_step(run, run_dir))

    def on_worker() -> Outcome | None:
        # Imported here: see above. It takes seconds of CPU.
        from dina_rl.reward.session import FirstRankStopped
        from jobs.fit_worker import fit_on_worker

        try:
            return fit_on_worker(run, latents=latents, run_dir=run_dir)
        except FirstRankStopped:
            return None  # what the first rank raises ends the fit, whichever is heard of first

    return TorchTrainer(
        on_worker,
        torch_config=MeetingRanks(),
        scaling_config=ScalingConfig(
            num_workers=fit.num_workers, use_gpu=fit.gpus_per_worker > 0, resources_per_worker=resources_of(fit)
        ),
        run_config=RunConfig(  # checkpoints are our own: Ray Train's copies appear bit by bit, and without sums
            name=TRAIN,
            storage_path=str(run_dir),
            failure_config=FailureConfig(max_failures=fit.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[EndsAtOnce()],
            worker_runtime_env=visible_gpus(fit.gpus_per_worker),
        ),
        datasets={"train": remaining_pairs},
        dataset_config=ordered(),
    )


def _around() -> str:
    try:
        return resources()
    except RayError as error:
        return f"the cluster does not answer ({type(error).__name__})"


def _checkpointed_step(run: FitRun, run_dir: Path) -> int:
    """Steps behind the checkpoint that the workers will find; 0 without one. Raises NothingWhole if all are broken."""
    return FitCheckpoints(run_dir, keep=run.fit.checkpoint_keep).last_step()
