"""What DiNa-LRM says of a sample before it is finished: `python -m benchmarks.along --rewards.dina.path FIT/reward`.

It scores noisy states natively, so a rollout could be judged along the way. Groups are sampled as Flow-GRPO samples
them, from the base, and every state is scored twice: as it is, at its own noise level, and by its one-step prediction
of x0, which is scored as a finished sample would be. The tables say how the samples of a group are ordered by that,
against the finished samples' scores and the held-out metric, and what an update could make of it.

Shapes: P groups, G samples of one, N steps; R states of a trajectory, N + 1 of them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.options import refuse
from dina_rl.alignment.advantage import group_advantages
from dina_rl.alignment.algorithms.grpo import dynamics, window_start
from dina_rl.alignment.golden import open_metric
from dina_rl.alignment.loop import plan
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.rollout import in_calls
from dina_rl.alignment.sampler import PolicySampler
from dina_rl.alignment.selection import extremes
from dina_rl.alignment.texts import EncodedTexts, PromptEncoder
from dina_rl.cli import load
from dina_rl.config import AlignRun
from dina_rl.config.base import Positive
from dina_rl.flow.sde import ode_step, step_law
from dina_rl.runtime import configure_process
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.dina import open_dina_beside
from dina_rl.seeding import normal
from dina_rl.types import WorkItem

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "shapes_flow_grpo_fast.yaml"


class BenchmarkRun(AlignRun):
    """An alignment run of which only rollouts are made, by the base; the reward is DiNa-LRM."""

    groups: Positive = 32
    """groups that are sampled"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Every sample's scores on its way, and in the end."""

    sigmas: torch.Tensor  # [R]
    native: torch.Tensor  # [R, P, G] of the states as they are
    predicted: torch.Tensor  # [R, P, G] of their one-step predictions; the last is of the finished sample
    golden: torch.Tensor  # [P, G] for reading alone: nothing is trained here

    @property
    def final(self) -> torch.Tensor:
        return self.predicted[-1]


class Judge:
    """Samples groups step by step and scores all of their states."""

    def __init__(self, run: AlignRun) -> None:
        assert run.rewards.dina is not None
        self._run = run
        self._sampler = PolicySampler(run)
        self._scorer = open_dina_beside(run.rewards.dina, run.pipeline, self._sampler.backbone)
        self._codec = self._sampler.backbone.load_codec()
        self._metric = open_metric(run.golden)

    @torch.no_grad()
    def __call__(self, items: Sequence[WorkItem], texts: EncodedTexts) -> Judged:
        run, sampler, sigmas = self._run, self._sampler, self._sampler.sigmas
        rollout, start = run.rollout, window_start(run, items[0].iteration)
        noise = sampler.noise(items, 1 + rollout.window_steps).to(sampler.device)
        _, prompt = sampler.prompts(items, texts)
        conditions = Conditions(
            prompts=tuple(item.prompt for item in items for _ in range(item.group_size)),
            embeds=prompt,
            noise=torch.stack([draw for item in items for draw in [self._shared_noise(item)] * item.group_size]),
        )
        velocity, latents = sampler.velocity(prompt, rollout.guidance_scale, texts), noise[0]
        native, predicted = [], []
        for step, sigma in enumerate(sigmas[:-1]):
            level = sigma.expand(len(latents)).to(sampler.device)
            followed = velocity.followed(latents, level)
            native.append(self._scorer.model.score(latents, level, prompt))
            predicted.append(self._scorer(latents - sigma * followed, conditions))
            if start <= step < start + rollout.window_steps:
                law = step_law(dynamics(run), sigmas, step, rollout.noise_level)
                latents = law.mean(latents, followed) + law.std * noise[1 + step - start]
            else:
                latents = ode_step(latents, followed, sigmas, step)
        native.append(self._scorer.model.score(latents, sigmas[-1:].expand(len(latents)).to(sampler.device), prompt))
        predicted.append(self._scorer(latents, conditions))
        golden = self._metric(self._codec.decode(latents).cpu(), conditions.prompts)
        groups = len(items), -1
        return Judged(
            sigmas=sigmas,
            native=torch.stack(native).cpu().view(len(sigmas), *groups),
            predicted=torch.stack(predicted).cpu().view(len(sigmas), *groups),
            golden=torch.tensor(golden.values).view(groups),
        )

    def _shared_noise(self, item: WorkItem) -> torch.Tensor:
        """The scorer's noise [draws, C, H, W] of one group."""
        shape = self._run.rewards.draws, *self._sampler.latent_shape
        return normal(shape, self._run.seed, "reward", item.iteration, item.prompt_id)


def judge(run: BenchmarkRun) -> Judged:
    """`run.groups` groups of the run's own prompts."""
    judge, encoder, prompts = Judge(run), PromptEncoder(run), load_prompts(run.prompts).train
    per_iteration = run.rollout.prompts_per_iteration
    parts = []
    for number in tqdm(range(-(-run.groups // per_iteration)), desc="iterations", dynamic_ncols=True):
        items = plan(run, prompts, number)[: run.groups - number * per_iteration]
        parts += [judge(call, encoder.for_rollout(call)) for call in in_calls(items, run.rollout.groups_per_call)]
    return Judged(
        sigmas=parts[0].sigmas,
        native=torch.cat([part.native for part in parts], 1),
        predicted=torch.cat([part.predicted for part in parts], 1),
        golden=torch.cat([part.golden for part in parts]),
    )


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's correlation [P] of the samples of each group, by two scores [P, G] without ties."""
    x, y = (each.argsort(-1).argsort(-1).double() for each in (a, b))
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    correlation: torch.Tensor = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return correlation


def signal(advantages: torch.Tensor, golden: torch.Tensor) -> float:
    """(mean of sum_i A_i B_i)^2 / mean of sum_i A_i^2 over groups, of advantages A [P, G] and golden's own B.

    A policy gradient is sum_i A_i grad log p_i. Its part along what golden asks for grows with sum A B, its noise with
    the root of sum A^2: so this is signal to noise, squared, up to a factor, and counts samples where all are as good.
    """
    truth = group_advantages(golden).values
    return float((advantages * truth).sum(1).mean() ** 2 / (advantages**2).sum(1).mean())


def finished_alone(middle: torch.Tensor, final: torch.Tensor, finish: int) -> torch.Tensor:
    """Advantages [P, G] where only the extremes at the middle are finished, and compared with each other; else 0."""
    values = torch.zeros_like(final)
    mask = torch.stack([extremes(row, finish) for row in middle])
    values[mask] = group_advantages(final[mask].view(len(final), finish)).values.flatten()
    return values


def report(judged: Judged) -> str:
    """Two tables, by state."""
    final, golden = judged.final, judged.golden
    half = final.shape[1] // 4 * 2
    whole = signal(group_advantages(final).values, golden)
    lines = [
        f"{len(golden)} groups of {golden.shape[1]}; rank correlation within a group, mean over groups and its error",
        f"finished samples' score with golden {_mean(rank_correlation(final, golden))}",
        "",
        "| state | noise level | native: final | golden | one-step prediction: final | golden |",
        "|---|---|---|---|---|---|",
    ]
    for number, sigma in enumerate(judged.sigmas.tolist()):
        rows = (judged.native[number], judged.predicted[number])
        shown = [_mean(rank_correlation(row, truth)) for row in rows for truth in (final, golden)]
        lines.append(f"| {number} | {sigma:.3f} | {' | '.join(shown)} |")
    lines += [
        "",
        "Signal to noise, squared, over that of all finished samples:",
        "",
        f"| state | native score alone | one-step prediction alone | {half} finished, chosen by native score |",
        "|---|---|---|---|",
    ]
    for number in range(1, len(judged.sigmas) - 1):
        ways = (
            group_advantages(judged.native[number]).values,
            group_advantages(judged.predicted[number]).values,
            finished_alone(judged.native[number], final, half),
        )
        lines.append(f"| {number} | {' | '.join(f'{signal(way, golden) / whole:.2f}' for way in ways)} |")
    return "\n".join(lines)


def _mean(values: torch.Tensor) -> str:
    return f"{values.mean():.2f} ± {values.std() / len(values) ** 0.5:.2f}"


def main(argv: Sequence[str]) -> None:
    run = load(BenchmarkRun, argv, program="python -m benchmarks.along", default_config=str(DEFAULT_CONFIG))
    configure_process(run.workers.threads_per_actor)
    try:
        if run.rewards.dina is None or run.rewards.of_images or run.algorithm != "grpo":
            raise ValueError("the states are scored by DiNa-LRM on Flow-GRPO's way: rewards.dina alone, algorithm grpo")
        print(report(judge(run)))
    except ValueError as error:
        refuse(error)


if __name__ == "__main__":
    main(sys.argv[1:])
