"""The policy's side of the loop: scored groups in, a better adapter out. It runs the same on every engine and rank."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dina_rl.alignment.ema import AdapterEMA
from dina_rl.alignment.engine import Engine
from dina_rl.alignment.flow_grpo import clipped_policy_loss, ratio_gate, regulated_log_ratio
from dina_rl.backbones.lora import adapter_disabled, add_lora
from dina_rl.config import AlignRun
from dina_rl.flow.sampler import guided, replay_step
from dina_rl.flow.sde import GaussianStep, gaussian_kl, step_law
from dina_rl.runtime import open_pipeline
from dina_rl.seeding import generator
from dina_rl.types import AdapterState, PromptEmbeds, TrainingGroup, Trajectory

PER_STEP = ("terms", "ratio_mean", "clip_low", "clip_high")
"""Statistics that are also kept for each step of the window."""


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
    old_log_prob: torch.Tensor | None  # [M]; None: not yet recomputed
    old_mean: torch.Tensor | None = None  # [M, C, H, W], for the guard


class PolicyLearner:
    """Flow-GRPO(-Fast) on one rank. All ranks are built alike and get the same groups.

    Args:
        run: the run's configuration.
        make_engine: wraps the policy with its adapter, e.g. `lambda module: TorchEngine(module, run.learner)`.
    """

    def __init__(self, run: AlignRun, make_engine: Callable[[nn.Module], Engine]) -> None:
        self.run = run
        self._backbone = open_pipeline(run.pipeline)
        self._policy = self._backbone.load_transformer()
        lora = run.learner.lora
        add_lora(self._policy, rank=lora.rank, alpha=lora.alpha, targets=self._backbone.lora_targets, seed=run.seed)
        if run.learner.gradient_checkpointing:
            self._policy.enable_gradient_checkpointing()
        self._engine = make_engine(self._policy)
        self._ema = AdapterEMA(self._engine.adapter(), run.learner.ema_decay)
        self.version = 0

    def update(self, step: int, groups: Sequence[TrainingGroup]) -> dict[str, float]:
        """Train on one iteration's groups; returns metrics, the same on every rank.

        The groups are shuffled and split into `learner.updates_per_step` minibatches of whole groups, one optimizer
        update each, in fresh order in each of `learner.epochs`.

        Raises:
            ValueError: trajectories of another policy version (staleness is 0 here) or of unequal sigma tables.
            RuntimeError: the gradient is not finite, or the ratio gate is strict and closed.
        """
        self._check_version(groups)
        learner, engine = self.run.learner, self._engine
        draws = generator(self.run.seed, "minibatches", step)
        order = torch.randperm(len(groups), generator=draws).tolist()
        count = min(learner.updates_per_step, len(groups))
        parts = [
            [groups[i] for i in order[n * len(order) // count : (n + 1) * len(order) // count]] for n in range(count)
        ]
        schedule = _shared_schedule(groups)
        minibatches = [self._passes(part) for part in parts]
        floor = 0.0
        if self.run.recomputes_old_log_probs:
            # The first minibatch's first forward is the old policy's own: it needs no extra one.
            for passes in minibatches[1:]:
                floor = max(floor, *(self._recompute(each, schedule) for each in passes))
        totals: dict[str, float] = defaultdict(float)
        first_gap, largest_gap, norms = 0.0, 0.0, []
        for epoch in range(learner.epochs):
            visits = range(count) if epoch == 0 else torch.randperm(count, generator=draws).tolist()
            for number in visits:
                terms = len(minibatches[number][0].batch.old_log_probs) * sum(len(g.advantages) for g in parts[number])
                gap, noise = self._accumulate(minibatches[number], schedule, terms, totals)
                if not norms:
                    first_gap, floor = engine.reduce([gap, max(floor, noise)], "max")
                    closed = ratio_gate(self.run.grpo.clip_range, first_gap, floor)
                    if closed and self.run.grpo.ratio_gate == "strict":
                        raise RuntimeError(closed)
                largest_gap = max(largest_gap, gap)
                norms.append(self._take_step())
        return {
            **self._averages(totals),
            "first_ratio_gap": first_gap,
            "log_prob_noise_floor": floor,
            "ratio_gap_max": engine.reduce([largest_gap], "max")[0],
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": learner.learning_rate,
            "updates": len(norms),
        }

    def _check_version(self, groups: Sequence[TrainingGroup]) -> None:
        for group in groups:
            if group.trajectory.policy_version != self.version:
                raise ValueError(
                    f"trajectory of prompt {group.trajectory.item.prompt_id} was sampled by policy version "
                    f"{group.trajectory.policy_version}, the learner is at {self.version}"
                )

    def _passes(self, groups: Sequence[TrainingGroup]) -> list[Pass]:
        """This rank's forwards of one minibatch."""
        engine = self._engine
        batches = micro_batches(groups, self.run.learner.micro_batch_size, engine.rank, engine.world_size)
        own = self.run.recomputes_old_log_probs
        return [
            Pass(batch=batch, k=k, old_log_prob=None if own else batch.old_log_probs[k])
            for batch in batches
            for k in range(len(batch.old_log_probs))
        ]

    @torch.no_grad()
    def _recompute(self, each: Pass, schedule: Trajectory) -> float:
        """Fill in the old policy's part of a pass; returns the largest distance from the rollout's log-probability."""
        log_prob, mean = self._replay(each, schedule)
        return self._remember(each, log_prob, mean)

    def _remember(self, each: Pass, log_prob: torch.Tensor, mean: torch.Tensor) -> float:
        each.old_log_prob = log_prob.detach().cpu()
        if self.run.grpo.guard:
            each.old_mean = mean.detach().cpu()
        return self._noise(each, log_prob)

    def _noise(self, each: Pass, log_prob: torch.Tensor) -> float:
        batch = each.batch
        distance = (log_prob.detach().cpu() - batch.old_log_probs[each.k]).abs() * batch.weights
        return distance.max().item()

    def _accumulate(
        self, passes: Sequence[Pass], schedule: Trajectory, terms: int, totals: dict[str, float]
    ) -> tuple[float, float]:
        """Gradients of one minibatch; returns this rank's largest |ratio - 1| and log-probability noise."""
        engine = self._engine
        gap = noise = 0.0
        for index, each in enumerate(passes):
            loss, stats = self._pass_loss(each, schedule)
            engine.backward(loss * engine.world_size / terms, last=index == len(passes) - 1)
            gap, noise = max(gap, stats.pop("gap")), max(noise, stats.pop("noise"))
            step = f"step_{schedule.window_start + each.k}"
            for name, value in stats.items():
                totals[name] += value
                if name in PER_STEP:
                    totals[f"{step}/{name}"] += value
        return gap, noise

    def _take_step(self) -> float:
        """One optimizer update; returns the gradient norm."""
        norm = self._engine.step()
        if not torch.isfinite(torch.tensor(norm)):
            raise RuntimeError(f"the gradient norm is {norm} at policy version {self.version}; the update is void")
        self.version += 1
        self._ema.update(self._engine.adapter())
        return norm

    def _averages(self, totals: dict[str, float]) -> dict[str, float]:
        """Means over terms, over all ranks: of the whole window, and of each step under `step_<number>/`."""
        names = sorted(totals)
        sums = dict(zip(names, self._engine.reduce([totals[name] for name in names], "sum"), strict=True))
        means = {}
        for name in names:
            step, slash, statistic = name.rpartition("/")
            if statistic != "terms":
                means[name] = sums[name] / sums[f"{step}{slash}terms"]
        return means

    def _replay(self, each: Pass, schedule: Trajectory) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probability [M], mean [M, C, H, W]) of the pass's step under the current weights."""
        law, _ = self._law(each, schedule)
        device = self._backbone.device
        states = each.batch.states[each.k].to(device), each.batch.states[each.k + 1].to(device)
        return replay_step(law, *states, self._velocity(each, schedule))

    def _law(self, each: Pass, schedule: Trajectory) -> tuple[GaussianStep, float]:
        """The pass's step as a law, and its -dt."""
        step = schedule.window_start + each.k
        law = step_law(schedule.dynamics, schedule.sigmas, step, schedule.noise_level)
        return law, float(schedule.sigmas[step] - schedule.sigmas[step + 1])

    def _velocity(self, each: Pass, schedule: Trajectory) -> torch.Tensor:
        """The current weights' velocity before the pass's step: conditional, or guided if the rollout's density was."""
        device = self._backbone.device
        latents = each.batch.states[each.k].to(device)
        sigma = schedule.sigmas[schedule.window_start + each.k].to(device).expand(len(latents))

        def forward(prompt: PromptEmbeds) -> torch.Tensor:
            return self._backbone.velocity(self._engine.module, latents, sigma, prompt.to(device))

        velocity = forward(each.batch.prompt)
        if schedule.negative is None:
            return velocity
        return guided(velocity, forward(schedule.negative.repeat(len(latents))), schedule.guidance_scale)

    def _pass_loss(self, each: Pass, schedule: Trajectory) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed objective of one pass, and sums of its statistics."""
        grpo, batch, device = self.run.grpo, each.batch, self._backbone.device
        weights = batch.weights.to(device)
        law, minus_dt = self._law(each, schedule)
        log_prob, mean = self._replay(each, schedule)
        noise = self._noise(each, log_prob)
        if each.old_log_prob is None:
            self._remember(each, log_prob, mean)
        log_ratio, scale = log_prob - each.old_log_prob.to(device), 1.0
        if grpo.guard:
            log_ratio = regulated_log_ratio(log_ratio, mean, each.old_mean.to(device), law.std)
            scale = 1 / minus_dt  # evens out the steps' gradients, which grow with dt
        policy = clipped_policy_loss(log_ratio, batch.advantages.to(device), grpo.clip_range)
        loss = scale * (policy.loss * weights).sum()
        stats = {
            "terms": weights.sum().item(),
            "policy_loss": loss.item(),
            "ratio_mean": (policy.ratio * weights).sum().item(),
            "clip_low": (policy.clipped_low * weights).sum().item(),
            "clip_high": (policy.clipped_high * weights).sum().item(),
            "gap": ((policy.ratio - 1).abs() * weights).max().item(),
            "noise": noise,
        }
        if grpo.kl_weight:
            # The base with its adapter off is the reference: no second model is held.
            with torch.no_grad(), adapter_disabled(self._policy):
                reference = law.mean(batch.states[each.k].to(device), self._velocity(each, schedule))
            divergence = (gaussian_kl(mean, reference, law.std) * weights).sum()
            loss = loss + grpo.kl_weight * divergence
            stats["kl"] = divergence.item()
        return loss, stats

    def policy(self) -> AdapterState:
        """The adapter to sample with. All ranks must call it."""
        return AdapterState(version=self.version, tensors=self._engine.adapter())

    def average(self) -> AdapterState:
        """The averaged adapter, to evaluate and export."""
        return AdapterState(
            version=self.version, tensors={name: tensor.clone() for name, tensor in self._ema.state.items()}
        )

    def state(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs, as plain tensors that fit any number of ranks. All ranks must call it."""
        return {
            "version": torch.tensor(self.version),
            "ema_updates": torch.tensor(self._ema.updates),
            **{f"policy/{name}": tensor for name, tensor in self._engine.adapter().items()},
            **{f"ema/{name}": tensor.clone() for name, tensor in self._ema.state.items()},
            **{f"optimizer/{name}": tensor for name, tensor in self._engine.optimizer_state().items()},
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue exactly where `state()` was taken."""

        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

        self.version = int(state["version"])
        self._engine.load_adapter(under("policy/"))
        self._engine.load_optimizer_state(under("optimizer/"))
        self._ema = AdapterEMA(under("ema/"), self.run.learner.ema_decay, int(state["ema_updates"]))


def micro_batches(groups: Sequence[TrainingGroup], size: int, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's share of the groups' samples, in forwards of exactly `size` samples.

    Samples are laid end to end, padded with zero-weight copies to a multiple of `size * world_size` so that every rank
    makes equally many forwards of equal shape, and dealt out in turn.
    """
    states = torch.cat([group.trajectory.states for group in groups], 1)
    old_log_probs = torch.cat([group.trajectory.log_probs for group in groups], 1)
    advantages = torch.cat([group.advantages for group in groups])
    prompt = PromptEmbeds.cat([group.trajectory.prompt.repeat(len(group.advantages)) for group in groups])
    count = len(advantages)
    padded = -(-count // (size * world_size)) * size * world_size
    index = torch.arange(padded)
    weights = (index < count).float()
    index = torch.where(index < count, index, 0)
    batches = []
    for first in range(rank * size, padded, size * world_size):
        rows = index[first : first + size]
        batches.append(
            MicroBatch(
                states=states[:, rows],
                old_log_probs=old_log_probs[:, rows],
                advantages=advantages[rows],
                weights=weights[first : first + size],
                prompt=prompt.select(rows),
            )
        )
    return batches


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
