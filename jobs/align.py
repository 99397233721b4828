"""Align the generator: `python -m jobs.align --config configs/shapes_flow_grpo_fast.yaml`, also by `ray job submit`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from dina_rl.alignment import disk
from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.inputs import align_inputs
from dina_rl.alignment.loop import align
from dina_rl.alignment.planning import describe
from dina_rl.alignment.prompts import Prompts, check_captions, cut_prompts, load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.alignment.result import finished, why_not_longer
from dina_rl.backbones.adapter_files import initial_state
from dina_rl.backbones.base import Backbone
from dina_rl.backbones.files import EVERYTHING
from dina_rl.backbones.trained import check_targets, make_trainable, save_transformer
from dina_rl.cli import fail, interruptible, load
from dina_rl.config import AlignRun
from dina_rl.errors import WorkLost, opening
from dina_rl.reward.home import check_home
from dina_rl.run_directory import run_directory
from dina_rl.runtime import configure_process, image_size, open_pipeline, sized
from dina_rl.scorers.grid import TILE
from dina_rl.scorers.registry import check_image_scorer
from jobs.anew import anew_where_lost
from jobs.submitted import check_results

Run = TypeVar("Run", bound=AlignRun)


def main(argv: Sequence[str]) -> None:
    run = load(AlignRun, argv, program="python -m jobs.align")
    if run.plan:
        print(describe(run))
        return
    check_results(run_dir=run.run_dir)
    with interruptible(run.run_dir), ExitStack() as stack:
        try:
            run = with_sizes(run)
            prompts = preflight(run)
            check_room(run)
            run_dir = stack.enter_context(opened(run, prompts))
        except ValueError as error:
            fail(str(error))
        recorder = align_generator(run, prompts, run_dir)
    points = recorder.history.points()
    print(f"golden on dev prompts {points[0]['golden']:.3f} -> {points[-1]['golden']:.3f}")
    if recorder.watch.diverged_at is not None:
        best = recorder.watch.best
        outcome = "stopped; the result is that of" if recorder.watch.stopped else "its best was at"
        print(
            f"diverged  at iteration {recorder.watch.diverged_at}, {outcome} iteration {best['iteration']} "
            f"({best['golden']:.3f})"
        )
    for probe, iteration in recorder.drift_watch.drifts.items():
        print(f"drifted   {probe} at iteration {iteration}, while golden did not rise")
    print(f"{recorder.exported.name:<11} {recorder.exported}\ncurves      {run_dir / 'curves.png'}")
    print(f"look at     tensorboard --logdir {run_dir}")


def with_sizes(run: Run) -> Run:
    """`run` with the sizes that it leaves to its pipeline. Raises ValueError where that cannot be read."""
    return run.model_copy(update={"pipeline": sized(run.pipeline, open_pipeline(run.pipeline))})


def opened(run: AlignRun, prompts: Prompts) -> AbstractContextManager[Path]:
    """The run's directory for the time of a block; the run in it may have been shorter."""
    grows = {"iterations": partial(why_not_longer, run, run.run_dir.expanduser().resolve())}
    return run_directory(
        run,
        run.run_dir,
        resume=run.resume,
        may_grow=grows,
        inputs=align_inputs(run, prompts),
        finished=partial(finished, run),
    )


def preflight(run: AlignRun) -> Prompts:
    """All that can be wrong with the inputs, found before anything starts.

    Raises:
        ValueError: a missing pipeline, reward model or prompt file, or parts that do not fit together.
    """
    backbone = open_pipeline(run.pipeline)
    size = image_size(run.pipeline, backbone)
    latent_shape = backbone.latent_shape(*size)
    backbone.check(*EVERYTHING)
    backbone.sigmas(run.rollout.num_steps, *size)
    check_adapter(run, backbone)
    notes = () if run.rewards.dina is None else check_home(run.rewards.dina, run.pipeline, backbone)
    check_image_scorers(run)
    check_grid(run, backbone)
    open_algorithm(run).check(latent_shape)
    prompts = load_prompts(run.prompts)
    check_captions(run.prompts, prompts, run.golden)
    cut = cut_prompts(backbone, prompts, run.rollout.negative_prompt)
    print("".join(f"{line}\n" for line in (*notes, *cut)), end="", flush=True)
    if run.rollout.prompts_per_iteration > len(prompts.train):
        raise ValueError(
            f"rollout.prompts_per_iteration ({run.rollout.prompts_per_iteration}) exceeds the {len(prompts.train)} "
            "training prompts"
        )
    return prompts


def check_adapter(run: AlignRun, backbone: Backbone) -> None:
    """Raises ValueError where the transformer lacks layers to adapt, or the adapter to start from is another's."""
    module, lora = backbone.empty_transformer(), run.learner.lora
    check_targets(module, lora)
    if lora is not None and lora.init is not None:
        make_trainable(module, lora, targets=backbone.lora_targets, seed=run.seed)
        initial_state(module, lora, backbone.convert_adapter)


def check_room(run: AlignRun) -> None:
    """Say where the run directory has less room than the run takes.

    Raises:
        ValueError: it has none for two checkpoints.
    """
    line = disk.check_room(run, open_pipeline(run.pipeline), run.run_dir.expanduser().resolve())
    if line is not None:
        print(line, flush=True)


def check_image_scorers(run: AlignRun) -> None:
    """Raises ValueError where a model of the rewards, of the golden metric or of the probes cannot be read."""
    for scorer in (run.golden.of_images, run.probe_model, *run.rewards.of_images):
        if scorer is not None:
            check_image_scorer(scorer)


def check_grid(run: AlignRun, backbone: Backbone) -> None:
    """Raises ValueError where the grid of the pictures is asked for, and they are smaller than it is measured on."""
    side, edges = TILE * backbone.grid.period, image_size(run.pipeline, backbone)
    asked = {"rewards.grid": run.rewards.grid is not None, "probes.grid": run.probes is not None and run.probes.grid}
    for key, is_on in asked.items():
        if is_on and min(edges) < side:
            raise ValueError(f"{key} needs pictures of {side} pixels to a side, these have {edges[0]}x{edges[1]}")


def align_generator(run: AlignRun, prompts: Prompts, run_dir: Path) -> Recorder:
    """Run the loop on Ray actors, or in this process with `run.inline`; returns what was recorded.

    Where a node takes unsaved work along, everything begins anew at the last checkpoint, as `--resume` would.

    Raises:
        RunStopped: the run stops itself, for whatever reason; also where all its checkpoints are broken.
    """
    with opening():
        recorder = Recorder(run, run_dir, exporter(run))
        if finished(run, run_dir):
            recorder.recall()
            return recorder
    recorder.checkpoints.check()  # before anything starts
    if run.inline:
        from dina_rl.alignment.inline import InlineExperience, InlineLearner

        configure_process(run.workers.threads_per_actor)
        align(run, prompts, InlineExperience(run), InlineLearner(run), recorder)
        return recorder
    from actors.alignment import open_actors
    from jobs.cluster import start_ray

    def attempt() -> Recorder:
        own = Recorder(run, run_dir, exporter(run))
        try:
            with ExitStack() as stack:
                with own.timed("start"):
                    experience, learner = stack.enter_context(open_actors(run))
                align(run, prompts, experience, learner, own)
        except WorkLost:
            own.close()
            raise
        return own

    start_ray(run_dir)
    return anew_where_lost(
        attempt,
        times=run.workers.max_restarts,
        setting="workers.max_restarts",
        goes_on=lambda: f"all actors start anew, and the run goes on after iteration {recorder.checkpoints.done()}",
    )


def exporter(run: AlignRun) -> Callable[[Path, dict[str, torch.Tensor]], Path]:
    """Writes trained weights as stock diffusers reads them: by `load_lora_weights`, or as a transformer."""
    lora = run.learner.lora
    backbone = open_pipeline(run.pipeline)
    if lora is None:
        return lambda directory, state: save_transformer(backbone.load_transformer(), directory, state)
    targets = lora.targets or backbone.lora_targets
    return lambda directory, state: backbone.save_adapter(
        directory, state, rank=lora.rank, alpha=lora.alpha, targets=targets
    )


if __name__ == "__main__":
    main(sys.argv[1:])
