"""Flow-GRPO(-Fast): a clipped policy gradient over the steps of an SDE window (arXiv 2505.05470; section C.2).

Shapes: G samples of one prompt, N denoising steps, W of them in the window, M samples of one forward, C H W latent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dina_rl.alignment.advantage import Advantages, relative_advantages
from dina_rl.alignment.algorithms.base import Sampling, Texts, Work, prompts_alone
from dina_rl.alignment.algorithms.clipping import clipped_policy_loss, ratio_gate, regulated_log_ratio
from dina_rl.alignment.objective import Minibatch, PassLoss, PreparedUpdates, SamplesItself, deal
from dina_rl.alignment.policy import Policy, VelocityInputs
from dina_rl.alignment.sampler import PolicySampler
from dina_rl.alignment.selection import Selection, select
from dina_rl.backbones.base import TextEncoder
from dina_rl.config import AlignRun
from dina_rl.errors import RunStopped
from dina_rl.flow.sampler import denoise, replay_step
from dina_rl.flow.sde import Dynamics, GaussianStep, gaussian_kl, released_kl_factor, step_law
from dina_rl.seeding import generator
from dina_rl.types import PromptEmbeds, TrainingGroup, WorkItem


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What one group's rollout leaves behind: all that scoring and training need, nothing they would recompute.

    `states[k]` and `states[k + 1]` are the latents before and after window step `window_start + k`, fp32 and exactly as
    the sampler stored them, so that replaying the step gives the sampled log-probability back.
    """

    item: WorkItem
    policy_version: int
    sigmas: torch.Tensor  # [N + 1] the table the sampler used; it travels so that replay cannot use another one
    window_start: int
    dynamics: Dynamics  # which stochastic step, see flow/sde.py
    noise_level: float
    states: torch.Tensor  # [W + 1, G, C, H, W]
    log_probs: torch.Tensor  # [W, G]
    latents: torch.Tensor  # [G, C, H, W] the finished samples x0, or the states that are judged in their place
    latents_sigma: float  # noise level of the latents
    prompt: PromptEmbeds  # one row
    guidance_scale: float
    negative: PromptEmbeds | None  # one row, the empty prompt, where the loss is guided too


class FlowGRPO:
    """See `base.Algorithm`."""

    wants_reward_gradients = False

    def __init__(self, run: AlignRun) -> None:
        self._run = run
        self.rounds_apart = recomputes(run)

    def check(self, latent_shape: tuple[int, int, int]) -> None: ...

    def texts(self, latent_shape: tuple[int, int, int]) -> Texts:
        return prompts_alone

    def sampling(self, sampler: PolicySampler) -> Sampling[Trajectory]:
        return partial(sample_trajectories, self._run, sampler)

    def weigh(self, scores: Mapping[str, torch.Tensor]) -> Advantages:
        grpo, rewards = self._run.grpo, self._run.rewards
        return relative_advantages(rewards, scores, std=grpo.advantage_std, clip=grpo.advantage_clip)

    def objective(self, policy: Policy) -> "GRPOObjective":
        return GRPOObjective(self._run, policy)

    def gate(self, metrics: Mapping[str, float]) -> str | None:
        return ratio_gate(self._run.grpo.clip_range, metrics["first_ratio_gap"], metrics["first_log_prob_noise"])

    def work(self) -> Work:
        rollout = self._run.rollout
        end = rollout.window_start + rollout.window_steps
        window = f"steps {rollout.window_start} to {end - 1}"
        if rollout.window_range is not None:
            first, end = rollout.window_range
            window = f"{rollout.window_steps} steps drawn within {first} to {end - 1}"
        later = 1 - 1 / self._run.learner.updates_per_iteration  # minibatches after the first
        judged = self._run.grpo.judge_after
        steps = f"{rollout.num_steps} steps" + ("" if judged is None else f", judged and left after {judged}")
        return Work(
            title="Flow-GRPO",
            sampling=f"{steps}, {dynamics(self._run)} and trained: {window}",
            texts_beside=0,
            sampled_passes=judged or rollout.num_steps,
            prepared_passes=rollout.window_steps * later if recomputes(self._run) else 0,
            trained_passes=rollout.window_steps,
            reward_passes=0,
            latents_kept=rollout.window_steps + 2,
            copies_kept=0,
            charts={
                "mean policy ratio": "ratio_mean",
                "|ratio - 1| before any update, at most": "first_ratio_gap",
                "|ratio - 1| at most": "largest_ratio_gap",
                "share clipped below": "clip_low",
                "share clipped above": "clip_high",
            },
        )


def dynamics(run: AlignRun) -> Dynamics:
    """The stochastic step of the window."""
    return "flow_sde" if run.rollout.dynamics == "auto" else run.rollout.dynamics


def recomputes(run: AlignRun) -> bool:
    """Whether the old log-probabilities are the learner's own rather than the rollout's."""
    if run.grpo.old_log_probs == "auto":
        return run.grpo.guard or run.pipeline.dtype != "float32" or run.pipeline.compile
    return run.grpo.old_log_probs == "recompute"


def window_start(run: AlignRun, iteration: int) -> int:
    """First SDE step of an iteration: fixed, or drawn within `rollout.window_range`.

    One window for all groups of an iteration: different windows inside a group would compare rewards of different
    amounts of exploration, and one schedule per minibatch keeps its forwards whole.
    """
    rollout = run.rollout
    if rollout.window_range is None:
        return rollout.window_start
    first, end = rollout.window_range
    choices = end - first - rollout.window_steps + 1
    return first + int(torch.randint(choices, (), generator=generator(run.seed, "window", iteration)))


def sample_trajectories(
    run: AlignRun, sampler: PolicySampler, items: Sequence[WorkItem], texts: TextEncoder
) -> list[Trajectory]:
    """One trajectory per group: SDE steps inside the iteration's window, ODE steps elsewhere.

    With `grpo.judge_after` they end there: DiNa-LRM scores noisy states (Eq. 11), and nothing after them is trained.
    """
    rollout, device = run.rollout, sampler.device
    noise = sampler.noise(items, 1 + rollout.window_steps)
    rows, prompt = sampler.prompts(items, texts)
    start = window_start(run, items[0].iteration)
    result = denoise(
        noise[0].to(device),
        sampler.sigmas.to(device),
        sampler.velocity(prompt, rollout.guidance_scale, texts),
        window_start=start,
        dynamics=dynamics(run),
        noise_level=rollout.noise_level,
        window_noise=noise[1:].to(device),
        guided_density=run.learner.guidance_in_loss,
        stop=run.grpo.judge_after,
    )
    negative = sampler.trained_negative(texts)
    trajectories, first = [], 0
    for i, item in enumerate(items):
        group = slice(first, first + item.group_size)
        first += item.group_size
        trajectories.append(
            Trajectory(
                item=item,
                policy_version=sampler.version,
                sigmas=sampler.sigmas,
                window_start=start,
                dynamics=dynamics(run),
                noise_level=rollout.noise_level,
                states=result.states[:, group].cpu().clone(),  # a view would be sent with its whole batch
                log_probs=result.log_probs[:, group].cpu().clone(),
                latents=result.latents[group].cpu().clone(),
                latents_sigma=0.0 if run.grpo.judge_after is None else float(sampler.sigmas[run.grpo.judge_after]),
                prompt=rows.select(slice(i, i + 1)).to("cpu"),
                guidance_scale=rollout.guidance_scale,
                negative=negative,
            )
        )
    return trajectories


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The samples of one forward. Padding has weight 0."""

    states: torch.Tensor  # [W + 1, M, C, H, W]
    old_log_probs: torch.Tensor  # [W, M]
    advantages: torch.Tensor  # [M]
    weights: torch.Tensor  # [M] in {0, 1}
    prompt: PromptEmbeds  # M rows


@dataclass(slots=True, kw_only=True)
class WindowStep:
    """A micro-batch at one step of the window, and what the old policy said of it."""

    batch: MicroBatch
    k: int  # position in the window
    schedule: Trajectory  # any trajectory of the minibatch: they share window, sigmas, dynamics and guidance
    old_log_prob: torch.Tensor | None  # [M]; None: not yet recomputed
    old_mean: torch.Tensor | None = None  # [M, C, H, W], for the guard


class GRPOObjective(SamplesItself):
    """See `objective.Objective`."""

    def __init__(self, run: AlignRun, policy: Policy) -> None:
        super().__init__(policy)
        self._run = run
        self._recomputes = recomputes(run)

    def prepare(self, minibatches: Sequence[Sequence[TrainingGroup[Trajectory]]]) -> PreparedUpdates:
        """Old log-probabilities are recomputed here, at the learner's forward geometry, if configured.

        The first minibatch's first forward is the old policy's own: it needs no extra one.
        """
        selections = [self._select(groups) for groups in minibatches]
        steps = [self._steps(*each) for each in zip(minibatches, selections, strict=True)]
        noise = self._recompute(steps[1:]) if self._recomputes else 0.0
        window = len(minibatches[0][0].rollout.log_probs)
        return PreparedUpdates(
            minibatches=[
                Minibatch(
                    passes=[partial(self._loss, each) for each in own],
                    terms=window * selection.count,
                    samples=len(selection.rows),
                )
                for own, selection in zip(steps, selections, strict=True)
            ],
            maxima={"log_prob_noise": noise},
        )

    def before_first_step(self, maxima: Mapping[str, float]) -> None:
        closed = ratio_gate(self._run.grpo.clip_range, maxima["ratio_gap"], maxima["log_prob_noise"])
        if closed and self._run.grpo.ratio_gate == "strict":
            raise RunStopped(closed)

    def _select(self, groups: Sequence[TrainingGroup[Trajectory]]) -> Selection:
        """Without a KL a sample of advantage 0 has no gradient."""
        advantages = [group.advantages for group in groups]
        selection = select(advantages, self._run.learner.keep, zeros=self._run.grpo.kl_weight > 0)
        assert len(selection.rows), "groups whose advantages are all 0 are dropped before"
        return selection

    def _steps(self, groups: Sequence[TrainingGroup[Trajectory]], selection: Selection) -> list[WindowStep]:
        engine = self._policy.engine
        schedule = _shared_schedule(groups)
        size = self._run.learner.micro_batch_size
        batches = micro_batches(groups, selection.rows, size, engine.rank, engine.world_size)
        return [
            WindowStep(
                batch=batch,
                k=k,
                schedule=schedule,
                old_log_prob=None if self._recomputes else batch.old_log_probs[k],
            )
            for batch in batches
            for k in range(len(batch.old_log_probs))
        ]

    def _recompute(self, minibatches: Sequence[Sequence[WindowStep]]) -> float:
        """Fill in the old log-probabilities under the policy that sampled; returns their noise."""
        noise = 0.0
        for steps in minibatches:
            for each in steps:
                noise = max(noise, self._remember(each, *self._replay(each, self._policy.fixed_velocity)))
        return noise

    def _loss(self, each: WindowStep, kl_scale: float) -> PassLoss:
        grpo, batch, device = self._run.grpo, each.batch, self._policy.device
        weights = batch.weights.to(device)
        log_prob, mean = self._replay(each, self._policy.velocity)
        noise = self._remember(each, log_prob, mean) if each.old_log_prob is None else self._noise(each, log_prob)
        assert each.old_log_prob is not None
        law, minus_dt = self._law(each)
        log_ratio, scale = log_prob - each.old_log_prob.to(device), 1.0
        if grpo.guard:
            assert each.old_mean is not None
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
        if grpo.kl_weight:
            reference = law.mean(batch.states[each.k].to(device), self._policy.reference_velocity(self._inputs(each)))
            divergence = (gaussian_kl(mean, reference, law.std) * weights).sum()
            if grpo.kl == "released":
                divergence = divergence * released_kl_factor(each.schedule.dynamics, minus_dt)
            loss = loss + kl_scale * grpo.kl_weight * divergence
            sums["kl"] = divergence.item()
        gap = ((policy.ratio - 1).abs() * weights).max().item()
        return PassLoss(loss=loss, sums=sums, maxima={"ratio_gap": gap, "log_prob_noise": noise})

    def _inputs(self, each: WindowStep) -> VelocityInputs:
        """Of the velocity before the step."""
        schedule = each.schedule
        return VelocityInputs(
            latents=each.batch.states[each.k],
            sigma=schedule.sigmas[schedule.window_start + each.k],
            prompt=each.batch.prompt,
            negative=schedule.negative,
            guidance_scale=schedule.guidance_scale,
        )

    def _law(self, each: WindowStep) -> tuple[GaussianStep, float]:
        """The step as a law, and its -dt."""
        schedule = each.schedule
        step = schedule.window_start + each.k
        law = step_law(schedule.dynamics, schedule.sigmas, step, schedule.noise_level)
        return law, float(schedule.sigmas[step] - schedule.sigmas[step + 1])

    def _replay(
        self, each: WindowStep, velocity: Callable[[VelocityInputs], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probability [M], mean [M, C, H, W]) of the step under the current weights."""
        before, after = each.batch.states[each.k : each.k + 2].to(self._policy.device)
        return replay_step(self._law(each)[0], before, after, velocity(self._inputs(each)))

    def _remember(self, each: WindowStep, log_prob: torch.Tensor, mean: torch.Tensor) -> float:
        """Keep the old policy's part of a step; returns the noise of its log-probability."""
        each.old_log_prob = log_prob.detach().cpu()
        if self._run.grpo.guard:
            each.old_mean = mean.detach().cpu()
        return self._noise(each, log_prob)

    def _noise(self, each: WindowStep, log_prob: torch.Tensor) -> float:
        """Largest distance of a log-probability from the rollout's."""
        distance = (log_prob.detach().cpu() - each.batch.old_log_probs[each.k]).abs()
        return (distance * each.batch.weights).max().item()


def micro_batches(
    groups: Sequence[TrainingGroup[Trajectory]], chosen: torch.Tensor, size: int, rank: int, world_size: int
) -> list[MicroBatch]:
    """This rank's share of the groups' samples `chosen`, in forwards of exactly `size` samples."""
    states = torch.cat([group.rollout.states for group in groups], 1)
    old_log_probs = torch.cat([group.rollout.log_probs for group in groups], 1)
    advantages = torch.cat([group.advantages for group in groups])
    prompt = PromptEmbeds.cat([group.rollout.prompt.repeat(len(group.advantages)) for group in groups])
    dealt = deal(len(chosen), size, rank, world_size)
    return [
        MicroBatch(
            states=states[:, rows],
            old_log_probs=old_log_probs[:, rows],
            advantages=advantages[rows],
            weights=weights,
            prompt=prompt.select(rows),
        )
        for rows, weights in ((chosen[picks], weights) for picks, weights in dealt)
    ]


def _shared_schedule(groups: Sequence[TrainingGroup[Trajectory]]) -> Trajectory:
    """A trajectory whose sigma table, window and dynamics all trajectories of the minibatch share."""
    first = groups[0].rollout
    for group in groups:
        other = group.rollout
        if not torch.equal(other.sigmas, first.sigmas) or (
            (other.window_start, other.dynamics, other.noise_level, other.guidance_scale)
            != (first.window_start, first.dynamics, first.noise_level, first.guidance_scale)
        ):
            raise ValueError("trajectories of one minibatch were sampled on different schedules")
    return first
