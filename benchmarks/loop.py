"""One iteration of the alignment against a plain loop: `python -m benchmarks.loop`, some minutes on one core.

Ours is what `--inline` runs: keyed noise, stored trajectories, scores, advantages, updates, weights published. The
plain loop (`plain_loop.py`) is flow_grpo's design on the stock pipeline. Same model, images, steps, trained steps,
batch sizes and reward; they take turns, and a ratio is of neighbours. What each put through the networks is counted in
an iteration that is not timed, and printed beside the times: only equal counts of passes make a fair ratio.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator

from benchmarks.clocks import CLOCKS, Clock, ClockName
from benchmarks.counting import DECODED, ENCODED, FREE, SCORED, TRAINED, counted
from benchmarks.iteration import SAMPLE, UPDATE, IterationSizes, Seconds, iterate
from benchmarks.options import one_or_several, refuse
from benchmarks.plain_loop import PlainLoop
from benchmarks.spread import Row, ratios, spread_table
from benchmarks.untrained import save_untrained
from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.loop import plan
from dina_rl.cli import load
from dina_rl.config import AlignRun, LoRAConfig, PipelineConfig, RewardModelConfig
from dina_rl.config.base import Positive
from dina_rl.runtime import configure_process, device
from dina_rl.shapes.grammar import prompts

Name = Literal["fast", "fast_guided", "whole", "whole_guided", "rollout_guided"]
NAMES: tuple[Name, ...] = ("fast", "fast_guided", "whole", "whole_guided", "rollout_guided")
GUIDED, IN_LOSS = {"guidance_scale": 4.5}, {"guidance_in_loss": True}
SETTINGS: Mapping[Name, tuple[str, Mapping[str, object], Mapping[str, object]]] = {  # title, rollout, learner
    "fast": ("Flow-GRPO-Fast: 3 steps trained, no guidance", {}, {}),
    "fast_guided": ("Flow-GRPO-Fast with guidance 4.5, in the loss too", GUIDED, IN_LOSS),
    "whole": ("Flow-GRPO: all steps but the last, no guidance", {"window_steps": 9}, {}),
    "whole_guided": ("Flow-GRPO with guidance 4.5, in the loss too", {**GUIDED, "window_steps": 9}, IN_LOSS),
    "rollout_guided": ("Flow-GRPO-Fast, ours with guidance in the rollout alone: NOT the same passes", GUIDED, {}),
}
OURS, PLAIN = "ours", "plain loop"
WORK = (FREE, TRAINED, SCORED, DECODED, ENCODED)
REWARD = RewardModelConfig(taps=(1, 2, 3), num_heads=4, lora=LoRAConfig(rank=16, alpha=32))


class BenchmarkRun(IterationSizes):
    """Speed of an iteration of the alignment."""

    settings: Annotated[tuple[Name, ...], BeforeValidator(one_or_several)] = NAMES
    """what is measured, of fast, fast_guided, whole, whole_guided and rollout_guided"""
    repeats: Positive = 3
    """iterations of each loop, after one that is counted and not timed"""
    threads: Positive = 1
    """torch threads; with other work on the machine, more than one wait for each other"""
    clock: ClockName = "wall"
    """what seconds are: the wall's, or on a CPU that others use too the processor's"""
    pipeline: PipelineConfig = PipelineConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of one setting, by loop."""

    images: int
    work: dict[str, Counter[str]]
    seconds: dict[str, list[Seconds]]  # one a repeat


def run_of(benchmark: BenchmarkRun, name: Name, reward: Path) -> AlignRun:
    """The alignment run of a setting; all but guidance and window is `configs/local.yaml`'s."""
    _, rollout, learner = SETTINGS[name]
    return AlignRun.model_validate(
        {
            "pipeline": benchmark.pipeline,
            "rewards": {"dina": {"path": str(reward)}},
            "rollout": {
                "prompts_per_iteration": benchmark.prompts,
                "group_size": benchmark.group_size,
                "groups_per_call": benchmark.groups_per_call,
                **rollout,
            },
            "grpo": {"clip_range": 1e-4, "kl_weight": 0.1},
            "learner": {
                "lora": {"rank": 16, "alpha": 32},
                "learning_rate": 1e-3,
                "updates_per_iteration": benchmark.updates,
                "micro_batch_size": benchmark.micro_batch_size,
                "engine": "torch",
                **learner,
            },
            "workers": {"learner_ranks": 1},
        }
    )


def measure(run: AlignRun, repeats: int, clock: Clock) -> Measured:
    """Both loops, turn by turn."""
    captions = prompts("train")
    experience, learner, plain = InlineExperience(run), InlineLearner(run), PlainLoop(run)
    experience.publish(learner.policy())
    loops: dict[str, Callable[[int], Seconds]] = {
        OURS: lambda number: iterate(run, captions, experience, learner, number, clock),
        PLAIN: lambda number: plain.iterate([item.prompt for item in plan(run, captions, number)], clock),
    }
    work, seconds = {}, {}
    for name, once in loops.items():
        with counted() as work[name]:
            once(0)
        seconds[name] = list[Seconds]()
    for number in range(1, repeats + 1):
        for name, once in loops.items():
            seconds[name].append(once(number))
    rollout = run.rollout
    return Measured(images=rollout.prompts_per_iteration * rollout.group_size, work=work, seconds=seconds)


def report(title: str, measured: Measured) -> str:
    """Work and times of one setting."""
    work = [f"{kind:<28}" + "".join(f"{measured.work[name][kind]:>12,}" for name in (OURS, PLAIN)) for kind in WORK]
    totals = {name: [sum(each.values()) for each in measured.seconds[name]] for name in (OURS, PLAIN)}
    rows = {f"{name}, s an iteration": Row(values=totals[name], digits=2) for name in (OURS, PLAIN)}
    for phase in (SAMPLE, UPDATE):
        for name in (OURS, PLAIN):
            rows[f"  {phase}, {name}"] = Row(values=[each[phase] for each in measured.seconds[name]], digits=2)
    rows["ours, images/s"] = Row(values=[measured.images / total for total in totals[OURS]], digits=1)
    rows["plain loop / ours"] = Row(values=ratios(totals[PLAIN], totals[OURS]), digits=2)
    header = f"{measured.images} images:".ljust(28) + f"{OURS:>12}{PLAIN:>12}"
    return "\n".join([title, header, *work, spread_table(rows), ""])


def main(argv: Sequence[str]) -> None:
    benchmark = load(BenchmarkRun, argv, program="python -m benchmarks.loop")
    configure_process(benchmark.threads)
    where = torch.cuda.get_device_name() if device() == "cuda" else f"CPU, {benchmark.threads} threads"
    print(f"{where}, {benchmark.repeats} repeats, {benchmark.clock} seconds")
    with TemporaryDirectory() as scratch:
        try:
            reward = save_untrained(Path(scratch) / "reward", benchmark.pipeline, REWARD)
            for name in benchmark.settings:
                measured = measure(run_of(benchmark, name, reward), benchmark.repeats, CLOCKS[benchmark.clock])
                print(report(SETTINGS[name][0], measured), flush=True)
        except ValueError as error:
            refuse(error)


if __name__ == "__main__":
    main(sys.argv[1:])
