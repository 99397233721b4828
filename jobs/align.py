"""Align the generator: `python -m jobs.align --config configs/shapes_flow_grpo_fast.yaml`, also by `ray job submit`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.loop import align
from dina_rl.alignment.planning import describe
from dina_rl.alignment.prompts import Prompts, cut_prompts, load_prompts
from dina_rl.alignment.record import Recorder, finished
from dina_rl.backbones.files import EVERYTHING
from dina_rl.backbones.trained import check_targets, save_transformer
from dina_rl.cli import fail, interruptible, load
from dina_rl.config import AlignRun, DiNaScorerConfig, PipelineConfig
from dina_rl.reward.checkpoint import read_card
from dina_rl.run_directory import run_directory
from dina_rl.runtime import configure_process, open_pipeline
from dina_rl.scorers.clip import check_clip


def main(argv: Sequence[str]) -> None:
    run = load(AlignRun, argv, program="python -m jobs.align")
    if run.plan:
        print(describe(run))
        return
    with ExitStack() as stack:
        try:
            prompts = preflight(run)
            directory = run_directory(run, run.run_dir, resume=run.resume, finished=partial(finished, run))
            run_dir = stack.enter_context(directory)
        except ValueError as error:
            fail(str(error))
        with interruptible(run_dir):
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
    print(f"{recorder.exported.name:<11} {recorder.exported}\ncurves      {run_dir / 'curves.png'}")
    print(f"look at     tensorboard --logdir {run_dir}")


def preflight(run: AlignRun) -> Prompts:
    """All that can be wrong with the inputs, found before anything starts.

    Raises:
        ValueError: a missing pipeline, reward model or prompt file, or parts that do not fit together.
    """
    backbone = open_pipeline(run.pipeline)
    height, width = run.pipeline.height, run.pipeline.width
    latent_shape = backbone.latent_shape(height, width)
    backbone.check(*EVERYTHING)
    backbone.sigmas(run.rollout.num_steps, height, width)
    check_targets(backbone.empty_transformer(), run.learner.lora)
    if run.rewards.dina is not None:
        _check_reward(run.rewards.dina, run.pipeline, backbone.width)
    check_clip_models(run)
    open_algorithm(run).check(latent_shape)
    prompts = load_prompts(run.prompts)
    cut = cut_prompts(backbone, prompts, run.rollout.negative_prompt)
    print("".join(f"{line}\n" for line in cut), end="", flush=True)
    if run.rollout.prompts_per_iteration > len(prompts.train):
        raise ValueError(
            f"rollout.prompts_per_iteration ({run.rollout.prompts_per_iteration}) exceeds the {len(prompts.train)} "
            "training prompts"
        )
    return prompts


def check_clip_models(run: AlignRun) -> None:
    """Raises ValueError where a CLIP model of the rewards or of the golden metric cannot be read."""
    for model in (run.golden.clip_model, run.rewards.pickscore, run.rewards.clip_score):
        if model is not None:
            check_clip(model)


def _check_reward(dina: DiNaScorerConfig, pipeline: PipelineConfig, width: int) -> None:
    card = read_card(dina.location)
    if (card.width, card.max_sequence_length) != (width, pipeline.max_sequence_length):
        raise ValueError(
            f"reward model {dina.path} was fitted on {card.pipeline} with width {card.width} and "
            f"{card.max_sequence_length} text tokens; {pipeline.path} has {width} and {pipeline.max_sequence_length}"
        )


def align_generator(run: AlignRun, prompts: Prompts, run_dir: Path) -> Recorder:
    """Run the loop on Ray actors, or in this process with `run.inline`; returns what was recorded."""
    recorder = Recorder(run, run_dir, exporter(run))
    if finished(run, run_dir):
        recorder.recall()
        return recorder
    if run.inline:
        from dina_rl.alignment.inline import InlineExperience, InlineLearner

        configure_process(run.workers.threads_per_actor)
        align(run, prompts, InlineExperience(run), InlineLearner(run), recorder)
        return recorder
    from actors.alignment import open_actors
    from jobs.cluster import start_ray

    start_ray()
    with ExitStack() as stack:
        with recorder.timed("start"):
            experience, learner = stack.enter_context(open_actors(run))
        align(run, prompts, experience, learner, recorder)
    return recorder


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
