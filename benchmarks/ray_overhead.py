"""Iterations through Ray and DeepSpeed against the same in one process: `python -m benchmarks.ray_overhead`.

Both train the same run, turn by turn, on the same cores: this process and all that Ray starts are bound to `cores` of
them, so with one core and one actor of each kind the ratio is what the actors, their messages and the engine cost.
Actors that are not at work wait without using the core. What it takes to start is printed apart; it is paid once.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.clocks import CLOCKS, Clock, ClockName
from benchmarks.iteration import SAMPLE, UPDATE, IterationSizes, Seconds, iterate
from benchmarks.loop import REWARD
from benchmarks.options import refuse
from benchmarks.spread import Row, ratios, spread_table
from benchmarks.untrained import save_untrained
from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.cli import load
from dina_rl.config import AlignRun, PipelineConfig
from dina_rl.config.base import Positive
from dina_rl.runtime import configure_process
from dina_rl.shapes.grammar import prompts

INLINE, RAY = "in one process", "through Ray"


class BenchmarkRun(IterationSizes):
    """Cost of the actors."""

    repeats: Positive = 3
    """iterations of each kind, after one that does not count"""
    cores: Positive = 1
    """cores that all processes share"""
    rollout_workers: Positive = 1
    """rollout actors"""
    learner_ranks: Positive = 1
    """ranks of the learner"""
    clock: ClockName = "wall"
    """what an iteration's seconds are: the wall's, or where others use the cores too those that all processes have had
    of them, which says nothing of waiting"""
    pipeline: PipelineConfig = PipelineConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """By kind."""

    start: dict[str, float]
    seconds: dict[str, list[Seconds]]  # one a repeat


def run_of(benchmark: BenchmarkRun, reward: Path) -> AlignRun:
    """The alignment run that both make: `configs/local.yaml`'s."""
    return AlignRun.model_validate(
        {
            "pipeline": benchmark.pipeline,
            "rewards": {"dina": {"path": str(reward)}},
            "rollout": {
                "guidance_scale": 2.0,
                "prompts_per_iteration": benchmark.prompts,
                "group_size": benchmark.group_size,
                "groups_per_call": benchmark.groups_per_call,
            },
            "grpo": {"clip_range": 1e-4, "kl_weight": 0.1},
            "learner": {
                "lora": {"rank": 16, "alpha": 32},
                "learning_rate": 1e-3,
                "updates_per_iteration": benchmark.updates,
                "micro_batch_size": benchmark.micro_batch_size,
            },
            "workers": {
                "rollout_workers": benchmark.rollout_workers,
                "scorers": 1,
                "learner_ranks": benchmark.learner_ranks,
            },
        }
    )


def measure(run: AlignRun, repeats: int, clock: Clock) -> Measured:
    """Both kinds, turn by turn. Starts Ray on this machine, if it does not run."""
    from actors.alignment import open_actors
    from jobs.cluster import start_ray

    captions, begin = prompts("train"), perf_counter()
    experience, learner = InlineExperience(run), InlineLearner(run)
    experience.publish(learner.policy())
    start = {INLINE: perf_counter() - begin}
    begin = perf_counter()
    start_ray(run.run_dir)
    with open_actors(run) as (remote, gang):
        remote.publish(gang.policy())
        start[RAY] = perf_counter() - begin
        kinds: dict[str, Callable[[int], Seconds]] = {
            INLINE: lambda number: iterate(run, captions, experience, learner, number, clock),
            RAY: lambda number: iterate(run, captions, remote, gang, number, clock),
        }
        seconds: dict[str, list[Seconds]] = {kind: [] for kind in kinds}
        for number in range(repeats + 1):
            for kind, once in kinds.items():
                taken = once(number)
                if number:  # the first one warms up
                    seconds[kind].append(taken)
    return Measured(start=start, seconds=seconds)


def report(measured: Measured) -> str:
    """Start apart, then the iterations."""
    totals = {kind: [sum(each.values()) for each in every] for kind, every in measured.seconds.items()}
    rows = {f"{kind}, s an iteration": Row(values=total, digits=2) for kind, total in totals.items()}
    for phase in (SAMPLE, UPDATE):
        for kind, every in measured.seconds.items():
            rows[f"  {phase}, {kind}"] = Row(values=[each[phase] for each in every], digits=2)
    rows["through Ray / in one process"] = Row(values=ratios(totals[RAY], totals[INLINE]), digits=2)
    started = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in measured.start.items())
    return f"start: {started}\n{spread_table(rows)}"


def main(argv: Sequence[str]) -> None:
    benchmark = load(BenchmarkRun, argv, program="python -m benchmarks.ray_overhead")
    cores = sorted(os.sched_getaffinity(0))[: benchmark.cores]
    os.sched_setaffinity(0, cores)  # what Ray starts inherits it
    configure_process(threads=1)
    with TemporaryDirectory() as scratch:
        try:
            run = run_of(benchmark, save_untrained(Path(scratch) / "reward", benchmark.pipeline, REWARD))
        except ValueError as error:
            refuse(error)
        measured = measure(run, benchmark.repeats, CLOCKS[benchmark.clock])
    print(
        f"cores: {len(cores)}; {benchmark.prompts} groups of {benchmark.group_size}; "
        f"{benchmark.rollout_workers} rollout actors, 1 scorer, {benchmark.learner_ranks} ranks; "
        f"{benchmark.repeats} repeats, {benchmark.clock} seconds"
    )
    print(report(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
