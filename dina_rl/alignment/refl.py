"""ReFL: the reward's own gradient, through a one-step prediction of the clean latent (paper section B.3, Eq. 18).

The gradient of -r(x0(theta)) is -(dr/dx0) (dx0/dtheta). Its first factor may come from the scorer actors, then the only
ones to hold the reward model, or from a reward model beside the learner: the same surrogate uses either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dina_rl.alignment.objective import PassLoss, deal
from dina_rl.alignment.policy import Policy, VelocityInputs
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.config import AlignRun
from dina_rl.flow.sampler import predict_clean
from dina_rl.reward.model import add_noise
from dina_rl.scorers.base import Conditions
from dina_rl.types import PretrainingSamples, PromptEmbeds, StoppedGroup, TrainingGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ReFLBatch:
    """The samples of one forward. Padding has weight 0."""

    group: StoppedGroup  # any of the minibatch: they share sigma and guidance
    stopped: torch.Tensor  # [M, C, H, W]
    predicted: torch.Tensor  # [M, C, H, W] x0 as the rollout saw it
    gradient: torch.Tensor | None  # [M, C, H, W] dr/dx0 there; None: the learner computes it
    conditions: Conditions | None  # of M samples: the reward's, where the learner computes the gradient
    real: PretrainingSamples | None  # M of them
    weights: torch.Tensor  # [M]
    prompt: PromptEmbeds  # M rows


def reward_surrogate(clean: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """-(dr/dx0) . x0 per sample [B]: its gradient in theta is that of -r(x0(theta)) (Eq. 18), its value means nothing.

    Args:
        clean: x0(theta) [B, C, H, W], differentiable.
        gradient: dr/dx0 at x0 [B, C, H, W].
    """
    return -(clean * gradient.detach()).flatten(1).sum(1)


def velocity_kl(velocity: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL of unit-variance Gaussians around two velocities [B, C, H, W], averaged over dimensions: [B].

    ReFL has no stochastic step whose law could be compared; this is flow matching's own likelihood of a velocity.
    """
    return ((velocity - reference) ** 2).flatten(1).mean(1) / 2


def flow_matching_loss(velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of the velocity from eps - x0 [B, C, H, W]: [B]. The loss the base was pretrained with."""
    return ((velocity - (noise - latents)) ** 2).flatten(1).mean(1)


class ReFLObjective:
    """See `learner.Objective`."""

    def __init__(self, run: AlignRun, policy: Policy) -> None:
        self._run = run
        self._policy = policy
        self._reward = ScoringWorker(run) if run.refl.reward_gradient == "learner" else None

    def passes(self, groups: Sequence[TrainingGroup]) -> list[ReFLBatch]:
        first = groups[0].trajectory
        if any(group.trajectory.sigma != first.sigma for group in groups):
            raise ValueError("samples of one minibatch were stopped at different noise levels")
        conditions = None
        if self._reward is not None:
            _, conditions = self._reward.inputs([group.trajectory for group in groups])
        engine = self._policy.engine
        return refl_batches(groups, conditions, self._run.learner.micro_batch_size, engine.rank, engine.world_size)

    def terms(self, groups: Sequence[TrainingGroup]) -> int:
        return sum(len(group.advantages) for group in groups)

    def before_updates(self, minibatches: Sequence[Sequence[ReFLBatch]]) -> dict[str, float]:
        return {}

    def before_first_step(self, maxima: dict[str, float]) -> None: ...

    def loss(self, each: ReFLBatch, kl_scale: float) -> PassLoss:
        device = self._policy.device
        weights, stopped = each.weights.to(device), each.stopped.to(device)
        group = each.group
        inputs = VelocityInputs(
            latents=stopped,
            sigma=torch.tensor(group.sigma),
            prompt=each.prompt,
            negative=group.negative,
            guidance_scale=group.guidance_scale,
        )
        velocity = self._policy.velocity(inputs)
        clean = predict_clean(stopped, velocity, group.sigma)
        gradient = each.gradient
        if gradient is None:
            _, gradient = self._reward.gradient(clean, each.conditions)
        gradient = gradient.to(device)
        loss = (reward_surrogate(clean, gradient) * weights).sum()
        sums = {
            "terms": weights.sum().item(),
            "reward_gradient_norm": (gradient.flatten(1).norm(dim=1) * weights).sum().item(),
        }
        if self._run.kl_weight:
            divergence = (velocity_kl(velocity, self._policy.reference_velocity(inputs)) * weights).sum()
            loss = loss + kl_scale * self._run.kl_weight * divergence
            sums["kl"] = divergence.item()
        if each.real is not None:
            matching = (self._matching(each.real) * weights).sum()
            loss = loss + self._run.refl.pretraining_weight * matching
            sums["pretraining_loss"] = matching.item()
        distance = (clean.detach().cpu() - each.predicted).flatten(1).abs().amax(1) * each.weights
        return PassLoss(loss=loss, sums=sums, maxima={"prediction_gap": distance.max().item()})

    def _matching(self, real: PretrainingSamples) -> torch.Tensor:
        """Flow-matching loss [M] of the policy on real samples."""
        device = self._policy.device
        latents, noise = real.latents.to(device), real.noise.to(device)
        noisy = add_noise(latents, noise, real.sigma.to(device))
        inputs = VelocityInputs(latents=noisy, sigma=real.sigma, prompt=real.prompt, negative=None, guidance_scale=1.0)
        return flow_matching_loss(self._policy.velocity(inputs), latents, noise)


def refl_batches(
    groups: Sequence[TrainingGroup], conditions: Conditions | None, size: int, rank: int, world_size: int
) -> list[ReFLBatch]:
    """This rank's share of the groups' samples; `conditions` are the reward's for all of them, or None."""
    stopped = torch.cat([group.trajectory.stopped for group in groups])
    predicted = torch.cat([group.trajectory.latents for group in groups])
    gradient = None if conditions is not None else torch.cat([group.reward_gradient for group in groups])
    prompt = PromptEmbeds.cat([group.trajectory.prompt.repeat(len(group.advantages)) for group in groups])
    real = None
    if groups[0].trajectory.pretraining is not None:
        real = PretrainingSamples.cat([group.trajectory.pretraining for group in groups])
    return [
        ReFLBatch(
            group=groups[0].trajectory,
            stopped=stopped[rows],
            predicted=predicted[rows],
            gradient=None if gradient is None else gradient[rows],
            conditions=None if conditions is None else conditions.select(rows),
            real=None if real is None else real.select(rows),
            weights=weights,
            prompt=prompt.select(rows),
        )
        for rows, weights in deal(len(stopped), size, rank, world_size)
    ]
