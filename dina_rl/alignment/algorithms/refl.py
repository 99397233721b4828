"""ReFL: the reward's own gradient, through a one-step prediction of the clean latent (paper section B.3, Eq. 18).

The gradient of -r(x0(theta)) is -(dr/dx0) (dx0/dtheta). Its first factor may come from the scorer actors, then the only
ones to hold the reward model, or from a reward model beside the learner: the same surrogate uses either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from dina_rl.alignment.advantage import Advantages, equal_weights
from dina_rl.alignment.algorithms.base import Sampling, Texts, Work, prompts_alone
from dina_rl.alignment.algorithms.pretraining import PretrainingDraws, PretrainingSamples
from dina_rl.alignment.objective import Minibatch, PassLoss, PreparedUpdates, SamplesItself, deal
from dina_rl.alignment.policy import Policy, VelocityInputs
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.alignment.sampler import PolicySampler
from dina_rl.backbones.base import TextEncoder
from dina_rl.config import AlignRun
from dina_rl.flow.process import add_noise, flow_matching_loss, predict_clean, velocity_kl
from dina_rl.flow.sampler import denoise_until
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.mixture import weighted_sum
from dina_rl.seeding import generator
from dina_rl.types import PromptEmbeds, TrainingGroup, WorkItem


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppedGroup:
    """What one group's rollout leaves behind: where denoising stopped, and what it predicts from there."""

    latents_sigma: ClassVar[float] = 0.0
    item: WorkItem
    policy_version: int
    sigma: float  # where it stopped
    stopped: torch.Tensor  # [G, C, H, W], fp32
    latents: torch.Tensor  # [G, C, H, W]: x0 predicted in one step, stopped - sigma * velocity
    prompt: PromptEmbeds  # one row
    guidance_scale: float
    negative: PromptEmbeds | None  # one row, the empty prompt, where the loss is guided too
    pretraining: PretrainingSamples | None  # where the flow-matching loss has a weight


class ReFL:
    """See `base.Algorithm`."""

    def __init__(self, run: AlignRun) -> None:
        self._run = run
        self.wants_reward_gradients = run.refl.reward_gradient == "service"
        # The gradient is that at a rollout's prediction: in fp32 it is the learner's too (`first_prediction_gap` 0).
        self.rounds_apart = run.pipeline.dtype != "float32" or run.pipeline.compile

    def check(self, latent_shape: tuple[int, int, int]) -> None:
        self._pretraining(latent_shape)

    def texts(self, latent_shape: tuple[int, int, int]) -> Texts:
        pretraining = self._pretraining(latent_shape)
        return prompts_alone if pretraining is None else pretraining.prompts

    def sampling(self, sampler: PolicySampler) -> Sampling[StoppedGroup]:
        return partial(sample_stopped, self._run, sampler, self._pretraining(sampler.latent_shape))

    def weigh(self, scores: Mapping[str, torch.Tensor]) -> Advantages:
        return equal_weights(weighted_sum(self._run.rewards, scores))

    def objective(self, policy: Policy) -> "ReFLObjective":
        return ReFLObjective(self._run, policy)

    def gate(self, metrics: Mapping[str, float]) -> str | None:
        return None

    def work(self) -> Work:
        refl, steps = self._run.refl, self._run.rollout.num_steps
        first, last = refl.stop_range
        return Work(
            title="ReFL",
            sampling=f"ODE of {steps} steps, stopped before one of the steps {first} to {last}",
            texts_beside=1 if refl.pretraining_weight else 0,
            sampled_passes=(first + last) / 2 + 1,  # and the prediction
            prepared_passes=0,
            trained_passes=2 if refl.pretraining_weight else 1,
            reward_passes=1 if refl.reward_gradient == "learner" else 0,
            latents_kept=3,  # stopped, predicted, gradient
            copies_kept=0,
            charts={
                "norm of the reward's gradient": "reward_gradient_norm",
                "distance of the learner's prediction from the rollout's before any update": "first_prediction_gap",
            },
        )

    def _pretraining(self, latent_shape: tuple[int, int, int]) -> PretrainingDraws | None:
        return PretrainingDraws(self._run, latent_shape) if self._run.refl.pretraining_weight else None


def stop_step(run: AlignRun, iteration: int) -> int:
    """The step at which an iteration stops denoising, drawn from `refl.stop_range`, ends included."""
    first, last = run.refl.stop_range
    return first + int(torch.randint(last - first + 1, (), generator=generator(run.seed, "stop", iteration)))


def sample_stopped(
    run: AlignRun,
    sampler: PolicySampler,
    pretraining: PretrainingDraws | None,
    items: Sequence[WorkItem],
    texts: TextEncoder,
) -> list[StoppedGroup]:
    """One group per item, stopped along the ODE before the iteration's step, and its one-step prediction."""
    scale = run.rollout.guidance_scale
    noise = sampler.noise(items, 1)[0].to(sampler.device)
    rows, prompt = sampler.prompts(items, texts)
    stop = stop_step(run, items[0].iteration)
    velocity = sampler.velocity(prompt, scale, texts)
    sigmas = sampler.sigmas.to(sampler.device)
    stopped = denoise_until(noise, sigmas, velocity, stop=stop)
    # The learner's own velocity: where it trains the conditional one alone, that is all that is computed.
    trained = velocity.followed if run.learner.guidance_in_loss else velocity.conditional
    with torch.no_grad():
        clean = predict_clean(stopped, trained(stopped, sigmas[stop].expand(len(stopped))), float(sampler.sigmas[stop]))
    negative = sampler.trained_negative(texts)
    sizes = [item.group_size for item in items]
    return [
        StoppedGroup(
            item=item,
            policy_version=sampler.version,
            sigma=float(sampler.sigmas[stop]),
            stopped=before.cpu().clone(),
            latents=after.cpu().clone(),
            prompt=rows.select(slice(i, i + 1)).to("cpu"),
            guidance_scale=scale,
            negative=negative,
            pretraining=None if pretraining is None else pretraining.draw(item, texts),
        )
        for i, (item, before, after) in enumerate(zip(items, stopped.split(sizes), clean.split(sizes), strict=True))
    ]


def reward_surrogate(clean: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """-(dr/dx0) . x0 per sample [B]: its gradient in theta is that of -r(x0(theta)) (Eq. 18), its value means nothing.

    Args:
        clean: x0(theta) [B, C, H, W], differentiable.
        gradient: dr/dx0 at x0 [B, C, H, W].
    """
    return -(clean * gradient.detach()).flatten(1).sum(1)


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


class ReFLObjective(SamplesItself):
    """See `objective.Objective`."""

    def __init__(self, run: AlignRun, policy: Policy) -> None:
        super().__init__(policy)
        self._run = run
        self._reward = ScoringWorker(run) if run.refl.reward_gradient == "learner" else None

    def prepare(self, minibatches: Sequence[Sequence[TrainingGroup[StoppedGroup]]]) -> PreparedUpdates:
        return PreparedUpdates(minibatches=[self._minibatch(groups) for groups in minibatches])

    def _minibatch(self, groups: Sequence[TrainingGroup[StoppedGroup]]) -> Minibatch:
        first = groups[0].rollout
        if any(group.rollout.sigma != first.sigma for group in groups):
            raise ValueError("samples of one minibatch were stopped at different noise levels")
        conditions = None
        if self._reward is not None:
            _, conditions = self._reward.inputs([group.rollout for group in groups])
        engine = self._policy.engine
        size, samples = self._run.learner.micro_batch_size, sum(len(group.advantages) for group in groups)
        return Minibatch(
            passes=[
                partial(self._loss, each)
                for each in refl_batches(groups, conditions, size, engine.rank, engine.world_size)
            ],
            terms=samples,
            samples=samples,
        )

    def _loss(self, each: ReFLBatch, kl_scale: float) -> PassLoss:
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
        gradient = self._gradient(each, clean).to(device)
        loss = (reward_surrogate(clean, gradient) * weights).sum()
        sums = {
            "terms": weights.sum().item(),
            "reward_gradient_norm": (gradient.flatten(1).norm(dim=1) * weights).sum().item(),
        }
        if self._run.refl.kl_weight:
            divergence = (velocity_kl(velocity, self._policy.reference_velocity(inputs)) * weights).sum()
            loss = loss + kl_scale * self._run.refl.kl_weight * divergence
            sums["kl"] = divergence.item()
        if each.real is not None:
            matching = (self._matching(each.real) * weights).sum()
            loss = loss + self._run.refl.pretraining_weight * matching
            sums["pretraining_loss"] = matching.item()
        distance = (clean.detach().cpu() - each.predicted).flatten(1).abs().amax(1) * each.weights
        return PassLoss(loss=loss, sums=sums, maxima={"prediction_gap": distance.max().item()})

    def _gradient(self, each: ReFLBatch, clean: torch.Tensor) -> torch.Tensor:
        """dr/dx0 [M, C, H, W]: the scorers', or of the reward model beside the learner."""
        if each.gradient is not None:
            return each.gradient
        assert self._reward is not None
        assert each.conditions is not None
        return self._reward.gradient(clean, each.conditions)[1]

    def _matching(self, real: PretrainingSamples) -> torch.Tensor:
        """Flow-matching loss [M] of the policy on real samples."""
        device = self._policy.device
        latents, noise = real.latents.to(device), real.noise.to(device)
        noisy = add_noise(latents, noise, real.sigma.to(device))
        inputs = VelocityInputs(latents=noisy, sigma=real.sigma, prompt=real.prompt, negative=None, guidance_scale=1.0)
        return flow_matching_loss(self._policy.velocity(inputs), latents, noise)


def refl_batches(
    groups: Sequence[TrainingGroup[StoppedGroup]], conditions: Conditions | None, size: int, rank: int, world_size: int
) -> list[ReFLBatch]:
    """This rank's share of the groups' samples; `conditions` are the reward's for all of them, or None."""
    stopped = torch.cat([group.rollout.stopped for group in groups])
    predicted = torch.cat([group.rollout.latents for group in groups])
    gradients = [group.reward_gradient for group in groups if group.reward_gradient is not None]
    gradient = None if conditions is not None else torch.cat(gradients)
    prompt = PromptEmbeds.cat([group.rollout.prompt.repeat(len(group.advantages)) for group in groups])
    real = [group.rollout.pretraining for group in groups if group.rollout.pretraining is not None]
    samples = PretrainingSamples.cat(real) if real else None
    return [
        ReFLBatch(
            group=groups[0].rollout,
            stopped=stopped[rows],
            predicted=predicted[rows],
            gradient=None if gradient is None else gradient[rows],
            conditions=None if conditions is None else conditions.select(rows),
            real=None if samples is None else samples.select(rows),
            weights=weights,
            prompt=prompt.select(rows),
        )
        for rows, weights in deal(len(stopped), size, rank, world_size)
    ]
