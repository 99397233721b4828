"""The policy's side of the loop: scored groups in, a better adapter out. It runs the same on every engine and rank."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dina_rl.alignment.ema import AdapterEMA
from dina_rl.alignment.engine import Engine
from dina_rl.alignment.flow_grpo import clipped_policy_loss
from dina_rl.backbones.lora import adapter_disabled, add_lora
from dina_rl.config import AlignRun
from dina_rl.flow.sampler import replay_step
from dina_rl.flow.sde import GaussianStep, gaussian_kl, step_law
from dina_rl.runtime import open_pipeline
from dina_rl.seeding import generator
from dina_rl.types import AdapterState, PromptEmbeds, TrainingGroup, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The samples of one forward. Padding has weight 0."""

    states: torch.Tensor  # [W + 1, M, C, H, W]
    old_log_probs: torch.Tensor  # [W, M]
    advantages: torch.Tensor  # [M]
    weights: torch.Tensor  # [M] in {0, 1}
    prompt: PromptEmbeds  # M rows


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
        update each.

        Raises:
            ValueError: trajectories of another policy version (staleness is 0 here) or of unequal sigma tables.
            RuntimeError: the gradient is not finite.
        """
        for group in groups:
            if group.trajectory.policy_version != self.version:
                raise ValueError(
                    f"trajectory of prompt {group.trajectory.item.prompt_id} was sampled by policy version "
                    f"{group.trajectory.policy_version}, the learner is at {self.version}"
                )
        order = torch.randperm(len(groups), generator=generator(self.run.seed, "minibatches", step)).tolist()
        updates = min(self.run.learner.updates_per_step, len(groups))
        totals: dict[str, float] = defaultdict(float)
        first_gap, largest_gap, norms = 0.0, 0.0, []
        for number in range(updates):
            members = [groups[i] for i in order[number * len(order) // updates : (number + 1) * len(order) // updates]]
            norm, gap = self._update_once(members, totals)
            first_gap = gap if number == 0 else first_gap
            largest_gap = max(largest_gap, gap)
            norms.append(norm)
        names = sorted(totals)
        sums = dict(zip(names, self._engine.reduce([totals[name] for name in names], "sum"), strict=True))
        first_gap, largest_gap = self._engine.reduce([first_gap, largest_gap], "max")
        terms = sums.pop("terms")
        return {
            **{name: value / terms for name, value in sums.items()},
            "first_ratio_gap": first_gap,
            "ratio_gap_max": largest_gap,
            "grad_norm": sum(norms) / len(norms),
            "updates": updates,
        }

    def _update_once(self, groups: Sequence[TrainingGroup], totals: dict[str, float]) -> tuple[float, float]:
        """One optimizer update on `groups`; returns (gradient norm, largest |ratio - 1| on this rank)."""
        engine = self._engine
        schedule = _shared_schedule(groups)
        mine = micro_batches(groups, self.run.learner.micro_batch_size, engine.rank, engine.world_size)
        window = len(groups[0].trajectory.log_probs)
        terms = window * sum(len(group.advantages) for group in groups)
        gap = 0.0
        for index, batch in enumerate(mine):
            for k in range(window):
                step = schedule.window_start + k
                law = step_law(schedule.dynamics, schedule.sigmas, step, schedule.noise_level)
                loss, stats = self._step_loss(batch, k, schedule.sigmas[step], law)
                last = index == len(mine) - 1 and k == window - 1
                engine.backward(loss * engine.world_size / terms, last=last)
                gap = max(gap, stats.pop("gap"))
                for name, value in stats.items():
                    totals[name] += value
        norm = engine.step()
        if not torch.isfinite(torch.tensor(norm)):
            raise RuntimeError(f"the gradient norm is {norm} at policy version {self.version}; the update is void")
        self.version += 1
        self._ema.update(engine.adapter())
        return norm, gap

    def _step_loss(
        self, batch: MicroBatch, k: int, sigma: torch.Tensor, law: GaussianStep
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed objective of window step `k` over a micro-batch, and sums of its statistics."""
        grpo = self.run.grpo
        device = self._backbone.device
        states = batch.states[k].to(device), batch.states[k + 1].to(device)
        prompt, weights = batch.prompt.to(device), batch.weights.to(device)
        sigma = sigma.to(device).expand(len(weights))
        velocity = self._backbone.velocity(self._engine.module, states[0], sigma, prompt)
        log_prob, mean = replay_step(law, *states, velocity)
        policy = clipped_policy_loss(
            log_prob, batch.old_log_probs[k].to(device), batch.advantages.to(device), grpo.clip_range
        )
        loss = (policy.loss * weights).sum()
        stats = {
            "terms": weights.sum().item(),
            "policy_loss": loss.item(),
            "ratio_mean": (policy.ratio * weights).sum().item(),
            "clip_low": (policy.clipped_low * weights).sum().item(),
            "clip_high": (policy.clipped_high * weights).sum().item(),
            "gap": ((policy.ratio - 1).abs() * weights).max().item(),
        }
        if grpo.kl_weight:
            # The base with its adapter off is the reference: no second model is held.
            with torch.no_grad(), adapter_disabled(self._policy):
                reference = self._backbone.velocity(self._engine.module, states[0], sigma, prompt)
            divergence = (gaussian_kl(mean, law.mean(states[0], reference), law.std) * weights).sum()
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
            (other.window_start, other.dynamics, other.noise_level)
            != (first.window_start, first.dynamics, first.noise_level)
        ):
            raise ValueError("trajectories of one minibatch were sampled on different schedules")
    return first
