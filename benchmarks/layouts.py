"""The colocated layout against the split one, beside what `--plan` says of them: `python -m benchmarks.layouts`.

Cores stand for GPUs: Ray is told of two for each layout, every actor computes with one thread on the core that stands
for its GPU, and nobody else works. Colocated: both cores hold a rollout actor, a scorer and a learner rank, in turns.
Split: one core samples; a scorer and a rank share the other. Both are up at once and take turns by iteration, and a
ratio is of neighbours. Real actors, a real DeepSpeed learner, the miniature SD3.5 and a reward model of random weights:
three minutes on two cores that have nothing else to do.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil
import ray

from actors.alignment import open_actors
from benchmarks.iteration import iterate
from benchmarks.loop import REWARD
from benchmarks.spread import ratios
from benchmarks.untrained import save_untrained
from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.costs import count_costs
from dina_rl.alignment.layout import Kind, layout_of
from dina_rl.alignment.skeletons import open_skeletons
from dina_rl.alignment.timeline import Timeline, count_operations, count_passes, timeline
from dina_rl.cli import fail, load
from dina_rl.config import AlignRun
from dina_rl.config.base import Positive, Section
from dina_rl.runtime import configure_process
from dina_rl.shapes.grammar import prompts

CORES = 2
COLOCATED, SPLIT = "colocated", "split"
LAYOUTS = {  # rollout actors encode the miniature's prompts themselves: a text actor would be one process more to pin
    COLOCATED: {"gpus": CORES, "text_workers": 0},
    SPLIT: {
        **{"text_workers": 0, "rollout_workers": 1, "scorers": 1, "learner_ranks": 1},
        **{"gpus_per_rollout": 1, "gpus_per_scorer": 0.5, "gpus_per_rank": 0.5},
    },
}
CORES_OF: dict[str, dict[Kind, tuple[int, ...]]] = {
    COLOCATED: dict.fromkeys(("rollout", "scorer", "learner"), tuple(range(CORES))),
    SPLIT: {"rollout": (0,), "scorer": (1,), "learner": (1,)},
}
TITLES: dict[Kind, str] = {"rollout": "ray::RolloutActor", "scorer": "ray::ScorerActor", "learner": "ray::LearnerActor"}


class BenchmarkRun(Section):
    """Seconds of an iteration by layout."""

    iterations: Positive = 6
    """iterations of each layout, after one that does not count"""
    prompts: Positive = 8
    """groups of an iteration"""
    group_size: Positive = 12
    """samples of a group"""
    micro_batch_size: Positive = 24
    """samples of a learner's forward"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured and what was planned, by layout."""

    seconds: dict[str, list[float]]  # of every iteration
    planned: dict[str, Timeline]


def alignment(run: BenchmarkRun, layout: str, directory: Path) -> AlignRun:
    """Flow-GRPO-Fast on the miniature world, as `configs/shapes_flow_grpo_fast.yaml` has it."""
    return AlignRun.model_validate(
        {
            "run_dir": directory / layout,
            "rewards": {"dina": {"path": str(directory / "reward"), "levels": [0.4]}},
            "rollout": {
                **{"num_steps": 10, "guidance_scale": 2.0, "noise_level": 0.7, "window_steps": 3},
                **{"prompts_per_iteration": run.prompts, "group_size": run.group_size, "groups_per_call": 2},
            },
            "grpo": {"clip_range": 1e-4, "kl_weight": 0.1},
            "learner": {
                **{"lora": {"rank": 16, "alpha": 32}, "updates_per_iteration": 2},
                **{"micro_batch_size": run.micro_batch_size},
            },
            "workers": LAYOUTS[layout],
        }
    )


def planned(run: AlignRun) -> Timeline:
    """An iteration as `--plan` counts it."""
    algorithm = open_algorithm(run)
    with open_skeletons(run) as (local, models):
        costs = count_costs(local, models)
    passes = count_passes(run, algorithm.work())
    counted = count_operations(run, passes, costs, with_gradient=algorithm.wants_reward_gradients)
    line = timeline(run, layout_of(run.workers), counted)
    assert line is not None, "every actor has a GPU"
    return line


def pin(layout: str, processes: Sequence[psutil.Process]) -> None:
    """Let every actor among `processes` compute on its own core alone; all actors of a kind are alike."""
    for kind, cores in CORES_OF[layout].items():
        actors = [process for process in processes if process.cmdline()[:1] == [TITLES[kind]]]
        assert len(actors) == len(cores), f"{len(actors)} actors are called {TITLES[kind]}"
        for actor, core in zip(actors, cores, strict=True):
            for thread in actor.threads():
                os.sched_setaffinity(thread.id, {core})


@contextmanager
def iterations(run: AlignRun, layout: str) -> Iterator[Callable[[int], float]]:
    """A function that does one iteration of the loop on actors that are up, and returns its seconds."""
    captions = prompts("train")
    before = set(psutil.Process().children(recursive=True))
    with open_actors(run) as (experience, learner):
        pin(layout, [each for each in psutil.Process().children(recursive=True) if each not in before])
        experience.publish(learner.policy())

        yield lambda number: sum(iterate(run, captions, experience, learner, number).values())


def measure(run: BenchmarkRun) -> Result:
    """Iterations of both layouts in turns, on a Ray of this machine."""
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        num_cpus=CORES,
        num_gpus=CORES * len(LAYOUTS),
        _node_ip_address="127.0.0.1",
    )
    try:
        return in_turns(run, tuple(LAYOUTS))
    finally:
        ray.shutdown()


def in_turns(run: BenchmarkRun, layouts: Sequence[str]) -> Result:
    """The same on the Ray that runs."""
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        directory = Path(scratch)
        runs = {layout: alignment(run, layout, directory) for layout in layouts}
        save_untrained(directory / "reward", runs[layouts[0]].pipeline, REWARD)
        opened = {layout: stack.enter_context(iterations(each, layout)) for layout, each in runs.items()}
        seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
        for iteration in range(run.iterations + 1):
            for layout, once in opened.items():
                taken = once(iteration)
                if iteration:  # the first one warms up
                    seconds[layout].append(taken)
        return Result(seconds=seconds, planned={layout: planned(each) for layout, each in runs.items()})


def table(result: Result) -> str:
    """Seconds and shares by layout, and the ratio as measured and as planned."""
    lines = [f"{'':<20}{'min':>8}{'median':>8}{'max':>8}{'planned busy':>14}"]
    for layout, values in result.seconds.items():
        numbers = "".join(f"{f(values):>8.2f}" for f in (min, median, max))
        lines.append(f"{layout + ', s':<20}{numbers}{result.planned[layout].mean_busy:>14.0%}")
    measured = ratios(result.seconds[COLOCATED], result.seconds[SPLIT])
    numbers = "".join(f"{f(measured):>8.2f}" for f in (min, median, max))
    lines.append(f"{'colocated / split':<20}{numbers}")
    plan = result.planned[COLOCATED].length / result.planned[SPLIT].length
    lines.append(f"{'  by the plan':<20}{plan:>16.2f}; measured is {median(measured) / plan - 1:+.0%} from it")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    run = load(BenchmarkRun, argv, program="python -m benchmarks.layouts")
    cores = len(os.sched_getaffinity(0))
    if cores < CORES:
        fail(f"{CORES} cores stand for GPUs here; this process may use {cores}")
    configure_process(1)
    result = measure(run)
    print(f"{CORES} cores as GPUs; {run.iterations} iterations of {run.prompts} x {run.group_size} images by layout")
    print(table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
