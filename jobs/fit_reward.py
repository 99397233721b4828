"""Fit DiNa-LRM by Ray Train: `python -m jobs.fit_reward --config configs/shapes_reward.yaml`, also by `ray job submit`.

Run directory:
    config.yaml, versions.json   the resolved configuration
    skipped.jsonl                unusable records and why (absent if there are none)
    latents/                     the encoded images (jobs/encode.py); absent with --latents, a store that fits share
    latents/prompts/             the encoded prompts, with dataset.prompt_embeddings; a fit whose stores, the held-out
                                 ones too, all have theirs loads no text encoders
    train/                       checkpoints that a killed fit continues from with --resume, and Ray Train's own files
    tensorboard/, fit.jsonl      curves, those of the held-out sets among them
    reward/, reward_best/        the averaged weights, what `load_reward` reads: at the end, and at their best
    metrics.json                 FitResult, written last
On a cluster the run directory must lie on storage that all nodes share. With --inline the same fit runs in this one
process, without Ray.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dina_rl.backbones.base import Backbone
from dina_rl.cli import fail, interruptible, load
from dina_rl.config import FitRun
from dina_rl.reward.inline import work_here
from dina_rl.reward.job import FitWork, fit_reward
from dina_rl.reward.outcome import FitResult
from dina_rl.reward.session import REWARD_BEST
from dina_rl.runtime import configure_process
from jobs.encode import DEFAULT_CONFIG
from jobs.submitted import check_results


def fit_reward_model(run: FitRun) -> FitResult:
    """`fit_reward` in this process with `inline`, else on Ray, which it starts unless it runs."""
    return fit_reward(run, work_here if run.inline else partial(work_on_ray, run.run_dir))


def work_on_ray(run_dir: Path, backbone: Backbone) -> FitWork:
    from jobs.cluster import quiet_ray_data, start_ray
    from jobs.encoding import RayEncoding
    from jobs.training import RayTraining

    start_ray(run_dir)
    quiet_ray_data()
    return RayEncoding(), RayTraining()


def main(argv: Sequence[str]) -> None:
    run = load(FitRun, argv, program="python -m jobs.fit_reward", default_config=DEFAULT_CONFIG)
    check_results(run_dir=run.run_dir)
    try:
        with interruptible(run.run_dir):
            if run.inline:
                configure_process(run.fit.threads_per_worker * run.fit.num_workers)
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
