"""Fitting the reward model: the paper's Algorithm 1 as one loop, whoever feeds it and however many ranks run it.

Noise levels and noise are keyed by (seed, step, pair), so a pair sees the same ones on whichever rank it lands, and a
restarted fit repeats them. Pairs that share images may form a group (`fit.batch_of`), which then takes a pair's place:
one noise level and one noise for all its images, each of which is scored once for all its pairs.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dina_rl.adamw import MOMENTS
from dina_rl.backbones.base import TextEncoder
from dina_rl.backbones.lora import trainable
from dina_rl.config import FitConfig, TimestepConfig
from dina_rl.data.stores.units import TrainingBatch
from dina_rl.errors import RunStopped
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.thurstone import comparison_variance, fidelity_loss, matched_fidelity_loss
from dina_rl.reward.timesteps import draw_timestep
from dina_rl.seeding import generator

FINAL_RATE = 0.05
"""Share of the peak learning rate at which a decaying schedule ends."""
ADAMW_STATE = ("step", *MOMENTS)
"""What a checkpoint holds of a parameter's optimizer: AdamW counts steps for each."""

REWARD = "reward"
"""The averaged weights in the run directory, what `load_reward` reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step, over this rank's share of the batch (the gradient norm is of the whole batch)."""

    step: int  # steps done, this one included
    loss: float
    pairs: int  # of the whole step
    accuracy: float  # pairs ranked right, at their training noise level, over a rank's mean number of pairs
    grad_norm: float  # before clipping
    learning_rate: float


class RewardFit:
    """What a fit changes: the model's trainable weights, their average, the optimizer, the step count and the best."""

    def __init__(self, model: LatentRewardModel, config: FitConfig) -> None:
        self.model = model
        self.config = config
        self.parameters = trainable(model)
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.best_step = 0  # whose averages were the most accurate so far; 0 before the first evaluation
        self.best_accuracy = -1.0
        if config.gradient_checkpointing:
            checkpoint_blocks(model.truncated)

    def state(self) -> dict[str, torch.Tensor]:
        """CPU copies of everything that continuing needs, the step count included."""
        tensors = {
            "steps": torch.tensor(self.step),
            "best_step": torch.tensor(self.best_step),
            "best_accuracy": torch.tensor(self.best_accuracy, dtype=torch.float64),
        }
        for name, parameter in self.parameters.items():
            tensors[f"weights.{name}"] = parameter
            tensors[f"averages.{name}"] = self.averages[name]
            for part, value in self.optimizer.state[parameter].items():
                tensors[f"{part}.{name}"] = value
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue where `state` was taken: the steps that follow are those of the uninterrupted fit."""
        self.step, self.best_step = int(state["steps"]), int(state["best_step"])
        self.best_accuracy = float(state["best_accuracy"])
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"weights.{name}"])
            self.averages[name].copy_(state[f"averages.{name}"])
            self.optimizer.state[parameter] = {
                part: state[f"{part}.{name}"].to(parameter.device, copy=True) for part in ADAMW_STATE
            }

    @torch.no_grad()
    def update_averages(self) -> None:
        """Exponential moving average of the weights, decay min((1 + n) / (10 + n), ema_decay) after n steps.

        A decay of 0 leaves the weights themselves, exactly.
        """
        decay = min((1 + self.step) / (10 + self.step), self.config.ema_decay)
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[LatentRewardModel]:
        """Inside, the model holds the averaged weights: the ones to evaluate and to save."""
        current = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._set_weights(self.averages)
        try:
            yield self.model
        finally:
            self._set_weights(current)

    @torch.no_grad()
    def _set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


def fit(
    progress: RewardFit,
    batches: Iterable[TrainingBatch],
    encoder: TextEncoder,
    *,
    seed: int,
    forward: nn.Module | None = None,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    world_size: int = 1,
) -> Iterator[StepReport]:
    """One optimizer step per batch (Algorithm 1); yields after each, when `progress` may be saved.

    The loss is the mean over the pairs of the whole step, however many ranks and micro-batches share it.

    Args:
        batches: this rank's share of each step's batch, from step `progress.step` on.
        forward: `progress.model` in a wrapper that averages gradients over ranks; the model itself on one rank.
        no_sync: inside, `forward` only accumulates this rank's gradients.
        world_size: how many ranks share a step.

    Raises:
        RunStopped: a step's gradient is not finite. Ranks share gradients, so all of them stop, before the step.
    """
    model, config = progress.model, progress.config
    forward = model if forward is None else forward
    for batch in batches:
        rate = config.learning_rate * rate_factor(progress.step, config)
        for group in progress.optimizer.param_groups:
            group["lr"] = rate
        progress.optimizer.zero_grad()
        parts = micro_batches(batch, config, world_size=world_size)
        mean_pairs = batch.step_pairs / world_size  # ranks' gradients are averaged, whatever their shares of pairs
        losses: list[torch.Tensor] = []
        margins: list[torch.Tensor] = []
        for part in parts:
            with nullcontext() if part is parts[-1] else no_sync():
                margin, loss = _forward(forward, part, encoder, progress, seed=seed)
                loss = loss * (len(part) / mean_pairs)
                loss.backward()
            losses.append(loss.detach())
            margins.append(margin.detach())
        loss_of_step = sum(losses, torch.zeros(())).item()
        grad_norm = nn.utils.clip_grad_norm_(progress.parameters.values(), config.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            raise RunStopped(
                f"the gradient norm of step {progress.step + 1} is {grad_norm}, this rank's loss {loss_of_step}: "
                "a latent or a weight is not finite, or the learning rate is too high; the step is not taken"
            )
        progress.optimizer.step()
        progress.update_averages()
        progress.step += 1
        yield StepReport(
            step=progress.step,
            loss=loss_of_step,
            pairs=batch.step_pairs,
            accuracy=((torch.cat(margins) > 0).float().sum() / mean_pairs).item(),
            grad_norm=grad_norm,
            learning_rate=rate,
        )


def _forward(
    forward: nn.Module, batch: TrainingBatch, encoder: TextEncoder, progress: RewardFit, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(margins [B], mean fidelity loss) of pairs at the noise levels and noise of the current step."""
    model, config = progress.model, progress.config
    device = next(model.head.parameters()).device
    t, noise = training_noise(batch, model.config.timestep, seed=seed, step=progress.step)
    t, noise, unit = t.to(device), noise.to(device), batch.unit.to(device)
    prompt = encoder(batch.prompts).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.autocast):
        scores = forward(batch.latents.to(device), unit, t, prompt, noise).float()
    chosen = batch.chosen.to(device)
    margin = scores[chosen] - scores[batch.rejected.to(device)]
    variance = comparison_variance(t[unit[chosen]], model.config.thurstone)
    if config.labels == "hard":
        return margin, fidelity_loss(margin, variance, torch.ones_like(margin)).mean()  # y = 1: chosen is preferred
    assert batch.probability is not None, "soft labels are there, as `inputs.check_labels` has seen"
    loss = matched_fidelity_loss if config.labels == "soft_matched" else fidelity_loss
    return margin, loss(margin, variance, batch.probability.to(margin)).mean()


def micro_batches(batch: TrainingBatch, config: FitConfig, *, world_size: int) -> list[TrainingBatch]:
    """A rank's share of a step in parts of whole units and at most 2 x `micro_batch_size` images, in order.

    A unit of more images is a part of its own. Where a bucket's steps hold k times `batch_size` units, parts hold k
    times as many images: all parts cost about the same memory.
    """
    if config.micro_batch_size is None:
        return [batch]
    units = len(batch.keys)
    most = 2 * config.micro_batch_size * max(1, units * world_size // config.batch_size)
    images = batch.unit.bincount(minlength=units).tolist()
    parts, first, held = [], 0, 0
    for unit, count in enumerate(images):
        if unit > first and held + count > most:
            parts.append(batch.part(first, unit))
            first, held = unit, 0
        held += count
    return [*parts, batch.part(first, units)]


def checkpoint_blocks(truncated: nn.Module) -> None:
    """Keep only the inputs of a truncated transformer's blocks and recompute the blocks in the backward pass.

    The blocks are the members of its `ModuleList`s, whatever the family; names and weights stay as they are.
    """
    for blocks in truncated.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def training_noise(
    batch: TrainingBatch, config: TimestepConfig, *, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """t [U] ~ q(t) and noise [U, C, H, W] of every unit; a pair's two images share both."""
    levels, noise = [], []
    for key in batch.keys:
        draws = generator(seed, "fit", step, key)
        levels.append(draw_timestep(config, draws))
        noise.append(torch.randn(batch.latents.shape[1:], generator=draws))
    return torch.stack(levels), torch.stack(noise)


def rate_factor(step: int, config: FitConfig) -> float:
    """Share of the peak learning rate at 0-based `step`: linear warm-up, constant, linear decay to 5 percent."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps or 1))
    decay_from = config.decay_start * config.steps
    if step < decay_from:
        return warmup
    share = (step - decay_from) / (config.steps - decay_from)
    return warmup * (1 - (1 - FINAL_RATE) * share)
