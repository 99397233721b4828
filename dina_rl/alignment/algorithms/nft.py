"""DiffusionNFT: the forward process, contrasted between better and worse samples (arXiv 2509.16117).

Samples come from an ODE and bring no log-probabilities. A sample x0 of reward R is noised afresh to x_t = (1 - t) x0 +
t eps, with v = eps - x0 the velocity that leads back to it. It is worth r = 1/2 + 1/2 clip((R - mean) / Z, -1, 1), and

    v+ = (1 - beta) v_old + beta v_theta,   v- = (1 + beta) v_old - beta v_theta
    loss = (C / beta) [ r l(v+, v) + (1 - r) l(v-, v) ]                                                  (their Eq. 5)

with v_old the policy that samples, a copy that follows the trained one. Here Z = C std, so that A = C (2 r - 1) is the
clipped group-relative advantage, C its bound. C and 1 / beta are the released code's. With d = v_theta - v_old,
e = v - v_old and l the squared distance, the loss is

    C beta |d|^2 - 2 A d.e + const,   least at d = A e / (C beta)

so its slope at d = 0 knows neither C nor beta: they only say how strongly the policy is pulled back to v_old. The
released l divides each sample's squared error in x0 by its own mean absolute error, which is t mean|v+- - v|^2 /
mean|v+- - v| (an approximation of the equation: its weight differs between v+ and v- as soon as d is not 0).

Shapes: G samples of one prompt, N denoising steps, M samples of one forward, K noise levels a sample, C H W latent.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import ClassVar, Literal

import torch

from dina_rl.alignment.advantage import Advantages, relative_advantages
from dina_rl.alignment.algorithms.base import Sampling, Texts, Work, prompts_alone
from dina_rl.alignment.objective import Minibatch, PassLoss, PreparedUpdates, deal
from dina_rl.alignment.policy import Policy, VelocityInputs
from dina_rl.alignment.sampler import PolicySampler
from dina_rl.alignment.selection import Selection, select
from dina_rl.backbones.base import TextEncoder
from dina_rl.config import AlignRun
from dina_rl.flow.process import add_noise, velocity_kl
from dina_rl.flow.sampler import denoise
from dina_rl.seeding import generator, normal
from dina_rl.types import PromptEmbeds, TrainingGroup, WorkItem

LEAST_ERROR = 1e-5  # of the adaptive weight, as in the released code


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedGroup:
    """What one group's rollout leaves behind: the finished samples."""

    latents_sigma: ClassVar[float] = 0.0
    item: WorkItem
    policy_version: int
    latents: torch.Tensor  # [G, C, H, W]
    prompt: PromptEmbeds  # one row
    sigmas: torch.Tensor  # [N + 1] the sampler's table: its levels are the ones that are trained


class DiffusionNFT:
    """See `base.Algorithm`."""

    wants_reward_gradients = False
    rounds_apart = True  # what samples is asked again by the learner, at fresh noise

    def __init__(self, run: AlignRun) -> None:
        self._run = run

    def check(self, latent_shape: tuple[int, int, int]) -> None: ...

    def texts(self, latent_shape: tuple[int, int, int]) -> Texts:
        return prompts_alone

    def sampling(self, sampler: PolicySampler) -> Sampling[FinishedGroup]:
        return partial(sample_finished, self._run, sampler)

    def weigh(self, scores: Mapping[str, torch.Tensor]) -> Advantages:
        """r [P, G] in [0, 1]."""
        nft, rewards = self._run.nft, self._run.rewards
        relative = relative_advantages(rewards, scores, std=nft.advantage_std, clip=nft.advantage_clip)
        return replace(relative, values=(0.5 + relative.values / (2 * nft.advantage_clip)).clamp(0, 1))

    def objective(self, policy: Policy) -> "NFTObjective":
        return NFTObjective(self._run, policy)

    def gate(self, metrics: Mapping[str, float]) -> str | None:
        return None

    def work(self) -> Work:
        steps, levels = self._run.rollout.num_steps, self._run.nft.levels
        return Work(
            title="DiffusionNFT",
            sampling=f"ODE of {steps} steps, trained at {levels} of their {steps} noise levels",
            texts_beside=0,
            sampled_passes=steps,
            prepared_passes=levels,
            trained_passes=levels,
            reward_passes=0,
            latents_kept=1,
            copies_kept=1,
            charts={"squared distance from the copy that samples": "distance_from_old"},
        )


def sample_finished(
    run: AlignRun, sampler: PolicySampler, items: Sequence[WorkItem], texts: TextEncoder
) -> list[FinishedGroup]:
    """One group per item, along the ODE."""
    noise = sampler.noise(items, 1)[0].to(sampler.device)
    rows, prompt = sampler.prompts(items, texts)
    velocity = sampler.velocity(prompt, run.rollout.guidance_scale, texts)
    latents = denoise(noise, sampler.sigmas.to(sampler.device), velocity).latents.cpu()
    return [
        FinishedGroup(
            item=item,
            policy_version=sampler.version,
            latents=own.clone(),  # a view would be sent with its whole batch
            prompt=rows.select(slice(i, i + 1)).to("cpu"),
            sigmas=sampler.sigmas,
        )
        for i, (item, own) in enumerate(zip(items, latents.split([item.group_size for item in items]), strict=True))
    ]


def training_levels(run: AlignRun, item: WorkItem, sigmas: torch.Tensor) -> torch.Tensor:
    """Noise levels [K, G] of a group's samples: `nft.levels` of the sampler's own, drawn without repeats a sample."""
    draws = generator(run.seed, "nft-levels", item.iteration, item.prompt_id)
    steps = len(sigmas) - 1  # the table ends at 0, where there is nothing to predict
    order = [torch.randperm(steps, generator=draws)[: run.nft.levels] for _ in range(item.group_size)]
    return sigmas[torch.stack(order, 1)]


def training_noise(run: AlignRun, item: WorkItem, sample: int, shape: Sequence[int]) -> torch.Tensor:
    """Fresh noise [K, C, H, W] for one sample of a group; `shape` is C, H, W."""
    return normal((run.nft.levels, *shape), run.seed, "nft-noise", item.iteration, item.prompt_id, sample)


def contrastive_loss(
    velocity: torch.Tensor,
    old: torch.Tensor,
    target: torch.Tensor,
    worth: torch.Tensor,
    sigma: torch.Tensor,
    *,
    beta: float,
    bound: float,
    weighting: Literal["adaptive", "velocity"],
) -> torch.Tensor:
    """(C / beta) [r l(v+, v) + (1 - r) l(v-, v)] per sample [M]; see the module's docstring.

    Args:
        velocity: v_theta [M, C, H, W], differentiable.
        old: v_old, likewise.
        target: v = eps - x0, likewise.
        worth: r [M] in [0, 1].
        sigma: t [M].
        bound: C, the bound on |advantage|.
        weighting: `velocity`: l is the mean squared error of the velocity; `adaptive`: the released code's.
    """
    better = (1 - beta) * old + beta * velocity
    worse = (1 + beta) * old - beta * velocity
    errors = [_error(side - target, sigma, weighting) for side in (better, worse)]
    return bound / beta * (worth * errors[0] + (1 - worth) * errors[1])


def _error(distance: torch.Tensor, sigma: torch.Tensor, weighting: Literal["adaptive", "velocity"]) -> torch.Tensor:
    """l [M] of v+- - v [M, C, H, W]."""
    flat = distance.flatten(1)
    if weighting == "velocity":
        return (flat**2).mean(1)
    clean = sigma[:, None] * flat  # the error of the predicted x0, but for its sign
    return (clean**2).mean(1) / clean.detach().abs().mean(1).clamp_min(LEAST_ERROR)


def following_share(updates: int, *, delay: int, rate: float, most: float) -> float:
    """What the sampling copy keeps of itself after `updates` updates of the run: eta of old <- eta old + (1 - eta) new.

    The released schedules are (0, 0.001, 0.5) and (75, 0.0075, 0.999).
    """
    return min(max(updates - delay, 0) * rate, most)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedBatch:
    """The samples of one forward. Padding has weight 0."""

    clean: torch.Tensor  # [M, C, H, W]
    noise: torch.Tensor  # [M, C, H, W]
    sigma: torch.Tensor  # [M]
    worth: torch.Tensor  # [M]
    weights: torch.Tensor  # [M] in {0, 1}
    prompt: PromptEmbeds  # M rows

    @property
    def inputs(self) -> VelocityInputs:
        noisy = add_noise(self.clean, self.noise, self.sigma)
        return VelocityInputs(latents=noisy, sigma=self.sigma, prompt=self.prompt, negative=None, guidance_scale=1.0)


@dataclass(slots=True, kw_only=True)
class NoisedStep:
    """A micro-batch, and the velocity there of the policy that samples."""

    batch: NoisedBatch
    old: torch.Tensor | None = None  # [M, C, H, W]; None: not yet computed


class NFTObjective:
    """See `objective.Objective`. It remembers the weights that sample."""

    def __init__(self, run: AlignRun, policy: Policy) -> None:
        self._run = run
        self._policy = policy
        self._old = policy.engine.weights()

    def prepare(self, minibatches: Sequence[Sequence[TrainingGroup[FinishedGroup]]]) -> PreparedUpdates:
        """v_old of every forward is computed here: it stays the same through the iteration's updates.

        It is kept on the CPU, K latents of each of this rank's samples. Where the copy does not lag behind, the first
        minibatch's first forwards are its own: they need no extra ones.
        """
        selections = [self._select(groups) for groups in minibatches]
        batches = [self._batches(*each) for each in zip(minibatches, selections, strict=True)]
        steps = [[NoisedStep(batch=batch) for batch in own] for own in batches]
        with self._old_weights() as lags:
            for each in chain.from_iterable(steps if lags else steps[1:]):
                each.old = self._policy.fixed_velocity(each.batch.inputs).cpu()
        return PreparedUpdates(
            minibatches=[
                Minibatch(
                    passes=[partial(self._loss, each) for each in own],
                    terms=self._run.nft.levels * selection.count,
                    samples=len(selection.rows),
                )
                for own, selection in zip(steps, selections, strict=True)
            ]
        )

    def before_first_step(self, maxima: Mapping[str, float]) -> None: ...

    def after_updates(self, updates: int) -> None:
        nft = self._run.nft
        kept = following_share(updates, delay=nft.old_delay, rate=nft.old_rate, most=nft.old_most)
        for name, tensor in self._policy.engine.weights().items():
            self._old[name].lerp_(tensor, 1 - kept)

    def sampling_weights(self) -> dict[str, torch.Tensor]:
        mine = self._policy.engine.mine
        return {name: tensor.clone() for name, tensor in self._old.items() if name in mine}

    def state(self) -> dict[str, torch.Tensor]:
        return self.sampling_weights()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self._old = {name: tensor.clone() for name, tensor in state.items()}

    @contextmanager
    def _old_weights(self) -> Iterator[bool]:
        """The sampling copy's weights in the policy, for as long as the block lasts; yields whether they are others."""
        engine = self._policy.engine
        current = engine.weights()
        lags = any(not torch.equal(self._old[name], tensor) for name, tensor in current.items())
        if lags:
            engine.load_weights(self._old)
        yield lags
        if lags:
            engine.load_weights(current)

    def _select(self, groups: Sequence[TrainingGroup[FinishedGroup]]) -> Selection:
        """A sample of worth 1/2, of advantage 0, still pulls the policy back to the copy that samples."""
        return select([group.advantages for group in groups], self._run.learner.keep, zeros=True)

    def _batches(self, groups: Sequence[TrainingGroup[FinishedGroup]], selection: Selection) -> list[NoisedBatch]:
        engine, size = self._policy.engine, self._run.learner.micro_batch_size
        return noised_batches(self._run, groups, selection.rows, size, engine.rank, engine.world_size)

    def _loss(self, each: NoisedStep, kl_scale: float) -> PassLoss:
        nft, batch, device = self._run.nft, each.batch, self._policy.device
        weights, inputs = batch.weights.to(device), batch.inputs
        velocity = self._policy.velocity(inputs)
        if each.old is None:
            each.old = velocity.detach().cpu()
        old = each.old.to(device)
        losses = contrastive_loss(
            velocity,
            old,
            (batch.noise - batch.clean).to(device),
            batch.worth.to(device),
            batch.sigma.to(device),
            beta=nft.beta,
            bound=nft.advantage_clip,
            weighting=nft.weighting,
        )
        loss = (losses * weights).sum()
        distance = ((velocity.detach() - old) ** 2).flatten(1).mean(1)
        sums = {
            "terms": weights.sum().item(),
            "policy_loss": loss.item(),
            "distance_from_old": (distance * weights).sum().item(),
        }
        if nft.kl_weight:
            divergence = (velocity_kl(velocity, self._policy.reference_velocity(inputs)) * weights).sum()
            loss = loss + kl_scale * nft.kl_weight * divergence
            sums["kl"] = divergence.item()
        farthest = (distance * weights).max().item()
        return PassLoss(loss=loss, sums=sums, maxima={"distance_from_old": farthest})


def noised_batches(
    run: AlignRun,
    groups: Sequence[TrainingGroup[FinishedGroup]],
    chosen: torch.Tensor,
    size: int,
    rank: int,
    world_size: int,
) -> list[NoisedBatch]:
    """This rank's share of the samples `chosen` at each of their levels, in forwards of exactly `size` samples."""
    rollouts = [group.rollout for group in groups]
    clean = torch.cat([each.latents for each in rollouts])
    sigma = torch.cat([training_levels(run, each.item, each.sigmas) for each in rollouts], 1)
    worth = torch.cat([group.advantages for group in groups])
    prompt = PromptEmbeds.cat([each.prompt.repeat(each.item.group_size) for each in rollouts])
    samples = [(each.item, sample) for each in rollouts for sample in range(each.item.group_size)]
    batches = []
    for picks, weights in deal(len(chosen), size, rank, world_size):
        rows = chosen[picks]
        own = [samples[row] for row in rows.tolist()]
        noise = torch.stack([training_noise(run, item, sample, clean.shape[1:]) for item, sample in own], 1)
        batches += [
            NoisedBatch(
                clean=clean[rows],
                noise=noise[k],
                sigma=sigma[k, rows],
                worth=worth[rows],
                weights=weights,
                prompt=prompt.select(rows),
            )
            for k in range(run.nft.levels)
        ]
    return batches
