"""Flow-GRPO(-Fast) as an objective of the learner: replay of the stored steps, ratios, clipping, KL."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dina_rl.alignment.flow_grpo import clipped_policy_loss, ratio_gate, regulated_log_ratio
from dina_rl.alignment.objective import PassLoss, deal
from dina_rl.alignment.policy import Policy, VelocityInputs
from dina_rl.config import AlignRun
from dina_rl.errors import RunStopped
from dina_rl.flow.sampler import replay_step
from dina_rl.flow.sde import GaussianStep, gaussian_kl, step_law
from dina_rl.types import PromptEmbeds, TrainingGroup, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The samples of one forward. Padding has weight 0."""

    states: torch.Tensor  # [W + 1, M, C, H, W]
    old_log_probs: torch.Tensor  # [W, M]
    advantages: torch.Tensor  # [M]
    weights: torch.Tensor  # [M] in {0, 1}
    prompt: PromptEmbeds  # M rows


@dataclass(slots=True, kw_only=True)
class Pass:
    """One forward of an update: a micro-batch at one step of the window, and what the old policy said of it."""

    batch: MicroBatch
    k: int  # position in the window
    schedule: Trajectory  # any trajectory of the minibatch: they share window, sigmas, dynamics and guidance
    old_log_prob: torch.Tensor | None  # [M]; None: not yet recomputed
    old_mean: torch.Tensor | None = None  # [M, C, H, W], for the guard


class GRPOObjective:
    """See `learner.Objective`."""

    def __init__(self, run: AlignRun, policy: Policy) -> None:
        self._run = run
        self._policy = policy

    def passes(self, groups: Sequence[TrainingGroup]) -> list[Pass]:
        engine = self._policy.engine
        schedule = _shared_schedule(groups)
        batches = micro_batches(groups, self._run.learner.micro_batch_size, engine.rank, engine.world_size)
        own = self._run.recomputes_old_log_probs
        return [
            Pass(batch=batch, k=k, schedule=schedule, old_log_prob=None if own else batch.old_log_probs[k])
            for batch in batches
            for k in range(len(batch.old_log_probs))
        ]

    def terms(self, groups: Sequence[TrainingGroup]) -> int:
        return len(groups[0].trajectory.log_probs) * sum(len(group.advantages) for group in groups)

    @torch.no_grad()
    def before_updates(self, minibatches: Sequence[Sequence[Pass]]) -> dict[str, float]:
        """Recompute old log-probabilities at the learner's forward geometry, if configured.

        The first minibatch's first forward is the old policy's own: it needs no extra one.
        """
        floor = 0.0
        if self._run.recomputes_old_log_probs:
            for passes in minibatches[1:]:
                for each in passes:
                    floor = max(floor, self._remember(each, *self._replay(each)))
        return {"log_prob_noise": floor}

    def loss(self, each: Pass, kl_scale: float) -> PassLoss:
        grpo, batch, device = self._run.grpo, each.batch, self._policy.device
        weights = batch.weights.to(device)
        log_prob, mean = self._replay(each)
        noise = self._remember(each, log_prob, mean) if each.old_log_prob is None else self._noise(each, log_prob)
        law, minus_dt = self._law(each)
        log_ratio, scale = log_prob - each.old_log_prob.to(device), 1.0
        if grpo.guard:
            log_ratio = regulated_log_ratio(log_ratio, mean, each.old_mean.to(device), law.std)
            scale = 1 / minus_dt  # evens out the steps' gradients, which grow with dt
        policy = clipped_policy_loss(log_ratio, batch.advantages.to(device), grpo.clip_range)
        loss = scale * (policy.loss * weights).sum()
        per_step = {
            "terms": weights.sum().item(),
            "ratio_mean": (policy.ratio * weights).sum().item(),
            "clip_low": (policy.clipped_low * weights).sum().item(),
            "clip_high": (policy.clipped_high * weights).sum().item(),
        }
        step = each.schedule.window_start + each.k
        sums = {**per_step, **{f"step_{step}/{name}": value for name, value in per_step.items()}}
        sums["policy_loss"] = loss.item()
        if self._run.kl_weight:
            reference = law.mean(batch.states[each.k].to(device), self._policy.reference_velocity(self._inputs(each)))
            divergence = (gaussian_kl(mean, reference, law.std) * weights).sum()
            loss = loss + kl_scale * self._run.kl_weight * divergence
            sums["kl"] = divergence.item()
        gap = ((policy.ratio - 1).abs() * weights).max().item()
        return PassLoss(loss=loss, sums=sums, maxima={"ratio_gap": gap, "log_prob_noise": noise})

    def before_first_step(self, maxima: dict[str, float]) -> None:
        closed = ratio_gate(self._run.grpo.clip_range, maxima["ratio_gap"], maxima["log_prob_noise"])
        if closed and self._run.grpo.ratio_gate == "strict":
            raise RunStopped(closed)

    def _inputs(self, each: Pass) -> VelocityInputs:
        """Of the velocity before the pass's step."""
        schedule = each.schedule
        return VelocityInputs(
            latents=each.batch.states[each.k],
            sigma=schedule.sigmas[schedule.window_start + each.k],
            prompt=each.batch.prompt,
            negative=schedule.negative,
            guidance_scale=schedule.guidance_scale,
        )

    def _law(self, each: Pass) -> tuple[GaussianStep, float]:
        """The pass's step as a law, and its -dt."""
        schedule = each.schedule
        step = schedule.window_start + each.k
        law = step_law(schedule.dynamics, schedule.sigmas, step, schedule.noise_level)
        return law, float(schedule.sigmas[step] - schedule.sigmas[step + 1])

    def _replay(self, each: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probability [M], mean [M, C, H, W]) of the pass's step under the current weights."""
        states = each.batch.states[each.k : each.k + 2].to(self._policy.device)
        return replay_step(self._law(each)[0], *states, self._policy.velocity(self._inputs(each)))

    def _remember(self, each: Pass, log_prob: torch.Tensor, mean: torch.Tensor) -> float:
        """Keep the old policy's part of a pass; returns the noise of its log-probability."""
        each.old_log_prob = log_prob.detach().cpu()
        if self._run.grpo.guard:
            each.old_mean = mean.detach().cpu()
        return self._noise(each, log_prob)

    def _noise(self, each: Pass, log_prob: torch.Tensor) -> float:
        """Largest distance of a log-probability from the rollout's."""
        distance = (log_prob.detach().cpu() - each.batch.old_log_probs[each.k]).abs()
        return (distance * each.batch.weights).max().item()


def micro_batches(groups: Sequence[TrainingGroup], size: int, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's share of the groups' samples, in forwards of exactly `size` samples."""
    states = torch.cat([group.trajectory.states for group in groups], 1)
    old_log_probs = torch.cat([group.trajectory.log_probs for group in groups], 1)
    advantages = torch.cat([group.advantages for group in groups])
    prompt = PromptEmbeds.cat([group.trajectory.prompt.repeat(len(group.advantages)) for group in groups])
    return [
        MicroBatch(
            states=states[:, rows],
            old_log_probs=old_log_probs[:, rows],
            advantages=advantages[rows],
            weights=weights,
            prompt=prompt.select(rows),
        )
        for rows, weights in deal(len(advantages), size, rank, world_size)
    ]


def _shared_schedule(groups: Sequence[TrainingGroup]) -> Trajectory:
    """A trajectory whose sigma table, window and dynamics all trajectories of the minibatch share."""
    first = groups[0].trajectory
    for group in groups:
        other = group.trajectory
        if not torch.equal(other.sigmas, first.sigmas) or (
            (other.window_start, other.dynamics, other.noise_level, other.guidance_scale)
            != (first.window_start, first.dynamics, first.noise_level, first.guidance_scale)
        ):
            raise ValueError("trajectories of one minibatch were sampled on different schedules")
    return first
