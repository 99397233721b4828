"""The miniature's numbers on a GPU against the CPU's, and what must hold on the GPU alone.

The CPU's are computed by a process that sees no GPU (`python -m benchmarks.gpu.parity FILE REWARD`): all code asks
`runtime.device()` where it is. In fp32 the two differ by the order of sums; convolutions in TF32, torch's default on
GPUs, are switched off here.
"""

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.phases import measure_sleep
from dina_rl.alignment.algorithms.grpo import Trajectory
from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.alignment.loop import plan
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.alignment.rollout import RolloutWorker
from dina_rl.alignment.texts import PromptEncoder
from dina_rl.checkpoint import load_tensors, save_tensors
from dina_rl.config import AlignRun, PipelineConfig
from dina_rl.runtime import configure_process, open_pipeline
from dina_rl.seeding import normal
from dina_rl.shapes.grammar import prompts
from dina_rl.types import TrainingGroup

ROOT = Path(__file__).parents[2]
GROUP = 4
CLIP_RANGE = 1e-5
NOISE = 1e-3  # of a log-probability, mean over dimensions; 5e-4 was seen between forwards of other batch sizes
LIMITS = {  # largest distance over the largest value; of the update 1 - cosine, for Adam's first step is all but signs
    "velocity": 1e-4,
    "log-probabilities": 1e-4,
    "finished latents": 1e-3,
    "scores": 1e-3,
    "gradient norm": 1e-2,
    "update": 1e-2,
}

Numbers = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that must hold."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # a NaN is not


def parity_run(dtype: str, reward: Path) -> AlignRun:
    """Two groups of the miniature in forwards of a group, for rollout and learner alike."""
    return AlignRun.model_validate(
        {
            "pipeline": {"dtype": dtype},
            "rewards": {"dina": {"path": str(reward)}},
            "rollout": {"prompts_per_iteration": 2, "group_size": GROUP, "guidance_scale": 2.0, "num_steps": 5},
            "grpo": {"clip_range": CLIP_RANGE, "kl_weight": 0.1},
            "learner": {
                "lora": {"rank": 4, "alpha": 8},
                "learning_rate": 1e-3,
                "updates_per_iteration": 2,
                "micro_batch_size": GROUP,
                "engine": "torch",
            },
            "workers": {"learner_ranks": 1},
        }
    )


def numbers(dtype: str, reward: Path) -> Numbers:
    """What an iteration computes on this process's device."""
    run = parity_run(dtype, reward)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        backbone = open_pipeline(run.pipeline)
        prompt = backbone.load_text_encoder()(prompts("train")[:GROUP])
        noise = normal((GROUP, *backbone.latent_shape(*backbone.image_size)), "parity").to(backbone.device)
        sigma = torch.linspace(0.1, 0.9, GROUP, device=backbone.device)
        with torch.no_grad():
            velocity = backbone.velocity(backbone.load_transformer(), noise, sigma, prompt)
        rollout, scorer = RolloutWorker(run), ScoringWorker(run)
        learner = PolicyLearner(run, lambda module: TorchEngine(module, run.learner))
        before = learner.policy().tensors
        items = plan(run, prompts("train"), 0)
        rollouts = rollout.rollout(items, PromptEncoder(run).for_rollout(items))
        scores = scorer.score(rollouts)["dina"]
        advantages = torch.linspace(-1, 1, GROUP)  # given: the scores' own are compared apart
        metrics = learner.update(0, [TrainingGroup(rollout=each, advantages=advantages) for each in rollouts])
        after = learner.policy().tensors
    return {
        "velocity": velocity.cpu(),
        "log-probabilities": torch.cat([each.log_probs for each in rollouts if isinstance(each, Trajectory)]),
        "finished latents": torch.cat([each.latents for each in rollouts]),
        "scores": scores,
        "gradient norm": torch.tensor([metrics["grad_norm"]]),
        "update": torch.cat([(after[name] - before[name]).flatten() for name in sorted(after)]),
        "first ratio gap": torch.tensor([metrics["first_ratio_gap"]]),
        "first noise": torch.tensor([metrics["first_log_prob_noise"]]),
    }


def numbers_on_cpu(reward: Path, scratch: Path) -> Numbers:
    """`numbers` of a process that sees no GPU."""
    file = scratch / "cpu.safetensors"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.parity", str(file), str(reward)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        check=True,
    )
    return load_tensors(file)


def compare(found: Numbers, expected: Numbers) -> list[Check]:
    """The checks of `LIMITS`."""
    errors = {name: _relative(found[name], expected[name]) for name in LIMITS}
    errors["update"] = 1 - torch.cosine_similarity(found["update"].double(), expected["update"].double(), dim=0).item()
    return [Check(name=f"fp32 {name}", error=errors[name], limit=limit) for name, limit in LIMITS.items()]


def on_this_device(fp32: Numbers, reward: Path) -> list[Check]:
    """Ratios before an update are 1, and what sleeps wakes as it was."""
    gaps = {"fp32": fp32, "bf16": numbers("bfloat16", reward)}
    checks = [
        Check(name=f"{dtype} |first ratio - 1|", error=found["first ratio gap"].item(), limit=CLIP_RANGE)
        for dtype, found in gaps.items()
    ]
    # Below fp32 the learner recomputes old log-probabilities; the distance of the rollout's says whether it must.
    checks.append(Check(name="bf16 log-probability noise", error=gaps["bf16"]["first noise"].item(), limit=NOISE))
    slept = measure_sleep(PipelineConfig())
    checks.append(Check(name="tensors changed by a sleep", error=slept["tensors_changed"], limit=0))
    return [*checks, Check(name="share that stayed awake", error=slept["bytes_awake"] / slept["bytes"], limit=0)]


def failures(checks: list[Check]) -> list[str]:
    return [f"{check.name}: {check.error:.2e}, at most {check.limit:.0e}" for check in checks if not check.passed]


def table(checks: list[Check]) -> str:
    lines = [f"{check.name:<28}{check.error:>10.1e}{check.limit:>10.0e}  {_word(check)}" for check in checks]
    return "\n".join([f"{'parity':<28}{'error':>10}{'limit':>10}", *lines])


def as_json(checks: list[Check]) -> Mapping[str, dict[str, float | bool]]:
    return {each.name: {"error": each.error, "limit": each.limit, "passed": each.passed} for each in checks}


def _word(check: Check) -> str:
    return "ok" if check.passed else "FAILED"


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    return error if math.isfinite(error) else math.nan


if __name__ == "__main__":
    configure_process(threads=1)
    save_tensors(Path(sys.argv[1]), numbers("float32", Path(sys.argv[2])))
