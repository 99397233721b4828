"""The paper's Figure 4, what a reward costs in a ReFL step: `python -m benchmarks.figure4 --out figure4.png`, seconds.

DiNa-LRM on the latents against HPSv3 on the decoded picture; SD3.5-medium at 1024 px, batch 1. Operations are counted,
and memory added up, on tensors without data: weights, and once each what autograd keeps. Where there is a GPU the same
steps run on it too, with weights of zeros, and their peak is measured.

    reward           operations of one score
    optimisation     the trained pass and its one-step prediction, the score, and everything's backward
    memory           the policy with its adapter's gradients and moments, the reward, and what the backward needs

    one graph            from the policy to the score, as the paper has it
    gradient first       ours: the reward's gradient at the prediction, then the policy's (`refl.reward_gradient`)
    and blocks again     the policy's blocks are computed again on the way back (`learner.gradient_checkpointing`)
    and the idle asleep  the one of policy and reward that does not work is in host memory (`workers.sleep`)

All of these help either reward, so the table has both; `vs graph` is DiNa-LRM against HPSv3 in one graph.
"""

import gc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.options import refuse
from benchmarks.refl_step import (
    AGAIN,
    ARRANGEMENTS,
    DINA,
    HPSV3,
    PLAIN,
    REWARDS,
    Cost,
    RewardName,
    Step,
    costs,
    filled,
    measured_peaks,
)
from dina_rl.alignment.skeletons import open_skeletons
from dina_rl.cli import load
from dina_rl.config import AlignRun, HPSv3Config, PolicyLoRAConfig
from dina_rl.config.base import Positive, Section
from dina_rl.loading import shown_bytes

PAPER = {"reward": -0.711, "optimisation": -0.464, "memory": -0.514}  # 5.4, Figure 4
COLOURS = {DINA: "#2f6f9f", HPSV3: "#c9a227"}
Pair = Mapping[RewardName, float]
Peaks = Mapping[RewardName, Mapping[str, int]]
Row = tuple[Pair, Pair, float | None]
"""Both rewards' numbers, those of the step as one graph, and the paper's change where it gives one."""


class BenchmarkRun(Section):
    """Operations and memory of a ReFL step by reward."""

    pipeline: str = "stabilityai/stable-diffusion-3.5-medium"
    """a published pipeline's hub id, or a pipeline directory"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """parameter dtype of the frozen weights"""
    height: Positive = 1024
    """image height in pixels"""
    width: Positive = 1024
    """image width in pixels"""
    max_sequence_length: Positive = 128
    """text tokens; 128 is the released code's"""
    dina: str = "~/dina_rl/sd35m_reward/reward"
    """directory of a DiNa-LRM; where there is none, the paper's is counted"""
    hpsv3: HPSv3Config = HPSv3Config()
    lora: PolicyLoRAConfig = PolicyLoRAConfig(rank=32, alpha=64)
    measure: bool = True
    """measure the peak where there is a GPU"""
    out: Path | None = None
    """PNG file to draw; None: none"""

    def align_run(self) -> AlignRun:
        """An alignment with such steps."""
        size = {"height": self.height, "width": self.width, "max_sequence_length": self.max_sequence_length}
        return AlignRun.model_validate(
            {
                "algorithm": "refl",
                "pipeline": {"path": self.pipeline, "dtype": self.dtype, **size},
                "rewards": {"dina": {"path": self.dina}, "hpsv3": self.hpsv3.model_dump()},
                "refl": {"stop_range": [1, 2]},
                "learner": {"lora": self.lora.model_dump(), "micro_batch_size": 1},
            }
        )


def count(run: AlignRun, *, measure: bool) -> tuple[dict[RewardName, Cost], Peaks]:
    """Both rewards' steps, and their peaks by arrangement where they are measured.

    Raises:
        ValueError: a pipeline or model that is neither known nor can be read here.
    """
    with open_skeletons(run) as (local, models):
        step = Step(run=local, models=models)
        peaks = {reward: _measured(step, reward) for reward in REWARDS} if measure else {}
        return costs(step), peaks


def _measured(step: Step, reward: RewardName) -> dict[str, int]:
    peaks = measured_peaks(filled(step, reward, "cuda"), reward)
    gc.collect()
    torch.cuda.empty_cache()
    return peaks


def rows(counted: Mapping[RewardName, Cost], peaks: Peaks) -> dict[str, Row]:
    """By name."""
    score = {reward: each.reward.forward / 1e12 for reward, each in counted.items()}
    found: dict[str, Row] = {"reward, TFLOP": (score, score, PAPER["reward"])}
    work = {reward: each.optimisation() for reward, each in counted.items()}
    found |= _arranged("optimisation, TFLOP", work, 1e12, (PLAIN, AGAIN))
    planned = {reward: each.peaks() for reward, each in counted.items()}
    found |= _arranged("memory, GiB", planned, 2**30, ARRANGEMENTS)
    return found | (_arranged("measured memory, GiB", peaks, 2**30, ARRANGEMENTS) if peaks else {})


def _arranged(what: str, numbers: Peaks, unit: float, arrangements: Sequence[str]) -> dict[str, Row]:
    def pair(arrangement: str) -> Pair:
        return {reward: each[arrangement] / unit for reward, each in numbers.items()}

    paper = next(change for name, change in PAPER.items() if name in what)
    return {f"{what}: {each}": (pair(each), pair(PLAIN), paper if each == PLAIN else None) for each in arrangements}


def table(found: Mapping[str, Row]) -> str:
    width = max(map(len, found))
    lines = [f"{'':<{width}}{DINA:>10}{HPSV3:>10}{'change':>10}{'vs graph':>10}{'paper':>10}"]
    for name, (numbers, plain, paper) in found.items():
        changes = numbers[DINA] / numbers[HPSV3] - 1, numbers[DINA] / plain[HPSV3] - 1, paper
        shown = "".join(f"{'' if change is None else f'{change:+.1%}':>10}" for change in changes)
        lines.append(f"{name:<{width}}{numbers[DINA]:>10.2f}{numbers[HPSV3]:>10.2f}{shown}")
    return "\n".join(lines)


def parts(counted: Mapping[RewardName, Cost]) -> str:
    """What the numbers are made of."""
    return "\n".join(
        f"{name}: score {reward.forward / 1e12:.2f} + {reward.backward / 1e12:.2f} TFLOP, policy "
        f"{policy.forward / 1e12:.2f} + {policy.backward / 1e12:.2f} (forward + backward); weights "
        f"{shown_bytes(reward.held)} + {shown_bytes(policy.held)}, kept "
        f"{shown_bytes(reward.kept)} + {shown_bytes(policy.kept)} (reward + policy)"
        for name, reward, policy in ((name, each.reward, each.policy) for name, each in counted.items())
    )


def draw(found: Mapping[str, Row], file: Path) -> None:
    """Bars by arrangement, operations above memory, with DiNa-LRM's change against HPSv3 in one graph."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, unit in zip(figure.subplots(2), ("TFLOP", "GiB"), strict=True):
        bars = {name: row for name, row in found.items() if f", {unit}" in name}
        for shift, reward in ((-0.2, DINA), (0.2, HPSV3)):
            places = [place + shift for place in range(len(bars))]
            axes.bar(places, [row[0][reward] for row in bars.values()], width=0.38, color=COLOURS[reward], label=reward)
        for place, (numbers, plain, _) in enumerate(bars.values()):
            change = numbers[DINA] / plain[HPSV3] - 1
            axes.annotate(f"{change:+.0%}", (place - 0.2, numbers[DINA]), ha="center", va="bottom", fontsize=8)
        axes.set_xticks(
            range(len(bars)), [name.replace(f", {unit}", "\n").replace(":", "") for name in bars], fontsize=7
        )
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main(argv: Sequence[str]) -> None:
    run = load(BenchmarkRun, argv, program="python -m benchmarks.figure4")
    try:
        counted, peaks = count(run.align_run(), measure=run.measure and torch.cuda.is_available())
    except ValueError as error:
        refuse(error)
    found = rows(counted, peaks)
    print(
        f"one ReFL step of {run.pipeline} at {run.height}x{run.width}, batch 1, {run.max_sequence_length} text tokens"
    )
    print(table(found))
    print(parts(counted))
    if run.out is not None:
        draw(found, run.out.expanduser())


if __name__ == "__main__":
    main(sys.argv[1:])
