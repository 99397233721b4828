"""Fit DiNa-LRM by Ray Train: `python -m jobs.fit_reward --config configs/shapes_reward.yaml`, also by `ray job submit`.

Run directory:
    config.yaml, versions.json   the resolved configuration
    skipped.jsonl                unusable records and why (absent if there are none)
    latents/                     the encoded images (jobs/encode.py); absent with --latents, a store that fits share
    latents/prompts/             the encoded prompts, with dataset.prompt_embeddings; a fit whose stores, the held-out
                                 ones too, all have theirs loads no text encoders
    train/                       Ray Train's own: checkpoints that a killed fit continues from with --resume
    tensorboard/, fit.jsonl      curves, those of the held-out sets among them
    reward/, reward_best/        the averaged weights, what `load_reward` reads: at the end, and at their best
    metrics.json                 FitResult, written last
On a cluster the run directory must lie on storage that all nodes share. With --inline the same fit runs in this one
process, without Ray and without checkpoints.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from dina_rl.checkpoint import open_run_dir, write_json
from dina_rl.cli import fail, interruptible, load
from dina_rl.config import FitRun
from dina_rl.data.stores.open import open_store
from dina_rl.errors import RunStopped
from dina_rl.reward.fit import METRICS_FILE, FitResult
from dina_rl.reward.inputs import (
    MAY_CHANGE,
    check_fit_inputs,
    encode_missing,
    training_latents,
    unseen_pairs,
    without_embeddings,
)
from dina_rl.reward.session import LOG_FILE, REWARD_BEST, Outcome, result_of
from dina_rl.runtime import configure_process, open_pipeline
from jobs.cluster import quiet_ray_data, start_ray, visible_gpus
from jobs.encode import DEFAULT_CONFIG, RayEncoding
from jobs.pair_stream import ordered, pair_dataset
from jobs.progress import FollowedSteps

TRAIN = "train"
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
STOPPED = "stopped"


def fit_reward_model(run: FitRun) -> FitResult:
    """The whole job: encode what is not encoded, fit, save, measure. Starts Ray unless it runs; a finished run returns
    what it found.

    Raises:
        ValueError: mistakes in the inputs or a used run directory, found before anything starts; too many unreadable
            images, found while encoding.
        RunStopped: a gradient is not finite.
    """
    begin = perf_counter()
    backbone = open_pipeline(run.pipeline)
    run = check_fit_inputs(run, backbone)
    run_dir = open_run_dir(run, run.run_dir, resume=run.resume, may_change=MAY_CHANGE)
    metrics_file = run_dir / METRICS_FILE
    if metrics_file.is_file():
        return FitResult(**json.loads(metrics_file.read_text()))
    start_ray()
    quiet_ray_data()
    encode_missing(run, run_dir, backbone, RayEncoding())
    latents = training_latents(run, run_dir)
    store = open_store(latents)
    notes = unseen_pairs(run, store) + without_embeddings(run, latents)
    print("".join(f"{line}\n" for line in notes), end="", flush=True)
    encode_seconds = perf_counter() - begin
    with FollowedSteps(run_dir / LOG_FILE, steps=run.fit.steps, description="fit reward"):
        returned = _trainer(run, run_dir, latents).fit().return_value
    if STOPPED in returned:
        raise RunStopped(returned[STOPPED])
    result = result_of(
        Outcome(**returned),
        run,
        run_dir,
        store,
        encode_seconds=encode_seconds,
        total_seconds=perf_counter() - begin,
    )
    write_json(metrics_file, asdict(result))
    return result


def _trainer(run: FitRun, run_dir: Path, latents: Path) -> TorchTrainer:
    fit = run.fit
    train_dir = run_dir / TRAIN

    def remaining_pairs():
        # Ray Train calls this for every group of workers it starts: after a crash the data continue at the checkpoint.
        return pair_dataset(run, latents, first_step=_checkpointed_step(train_dir))

    resources = {"CPU": fit.cpus_per_worker} | ({"GPU": fit.gpus_per_worker} if fit.gpus_per_worker else {})
    return TorchTrainer(
        _on_worker,
        train_loop_config={"run": run, "latents": latents, "run_dir": run_dir},
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


def _on_worker(arguments: dict) -> dict:
    # Imported here: the driver and Ray Train's controller need no models, and importing those takes seconds of CPU.
    from jobs.fit_worker import fit_on_worker

    try:
        return fit_on_worker(**arguments)
    except RunStopped as stopped:  # on all ranks; an error Ray Train would retry, `max_failures` times in vain
        return {STOPPED: str(stopped)}


def _checkpointed_step(train_dir: Path) -> int:
    """Steps behind the checkpoint that Ray Train will hand to the workers; 0 without one."""
    if not (train_dir / RAY_SNAPSHOT).exists():
        return 0
    checkpoint = Result.from_path(str(train_dir)).checkpoint
    return 0 if checkpoint is None else int(Path(checkpoint.path).name.removeprefix("step_"))


def main(argv: Sequence[str]) -> None:
    run = load(FitRun, argv, program="python -m jobs.fit_reward", default_config=DEFAULT_CONFIG)
    try:
        with interruptible(run.run_dir):
            if run.inline:
                from dina_rl.reward.inline import fit_inline

                configure_process(run.fit.threads_per_worker * run.fit.num_workers)
                result = fit_inline(run)
            else:
                result = fit_reward_model(run)
    except ValueError as error:
        fail(str(error))
    print(f"accuracy at t={run.reward.single_level:g} and with the ensemble {list(run.reward.ensemble_levels)}")
    for name, accuracy in result.held_out.items():
        print(f"  {name:<10}  {accuracy['accuracy_single']:.3f}  {accuracy['accuracy_ensemble']:.3f}")
    first = next(iter(result.held_out))
    if result.label_ceiling is not None:
        print(f"  label-noise ceiling of {first}: {result.label_ceiling:.3f}")
    if result.best_step is not None:
        print(f"  {REWARD_BEST}/ holds step {result.best_step}: {result.best_accuracy_single:.3f} on {first}")
    print(
        f"{result.steps} steps in {result.fit_seconds:.0f} s ({result.pairs_per_second:.0f} pairs/s), "
        f"encoding {result.encode_seconds:.0f} s, in all {result.total_seconds:.0f} s\n"
        f"reward model  {result.reward}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
