"""The step loop that both pretraining stages share: schedule, progress bar, checkpoints, resume."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

CHECKPOINT_EVERY = 500
GRADIENT_CLIP = 1.0
SMOOTHING = 0.99  # of the loss that the progress bar shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of pretraining. The learning rate is each group's own times `schedule(step)`."""

    name: str
    steps: int
    modules: dict[str, nn.Module]  # what a checkpoint stores; the optimizers' parameters are among theirs
    optimizers: tuple[torch.optim.Optimizer, ...]
    schedule: Callable[[int], float]
    loss: Callable[[], Tensor]  # draws its batch from `generator`
    after_step: Callable[[int], None]  # number of finished steps
    generator: torch.Generator


def linear_decay(steps: int, *, warmup: int, hold: float, floor: float) -> Callable[[int], float]:
    """Learning rate factor: linear warm-up, constant for the share `hold` of all steps, linear to `floor`."""

    def factor(step: int) -> float:
        progress = step / steps
        decayed = 1.0 if progress < hold else max(floor, (1 - progress) / (1 - hold))
        return min(1.0, (step + 1) / warmup) * decayed

    return factor


def run_stage(stage: Stage, checkpoint: Path) -> float:
    """Train to the end, from the checkpoint if there is one; returns all seconds, also those before a kill."""
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in stage.optimizers]
    parameters = [p for o in stage.optimizers for group in o.param_groups for p in group["params"]]
    done, before = _restore(stage, checkpoint) if checkpoint.exists() else (0, 0.0)
    started = time.monotonic()
    smooth = None
    with tqdm(total=stage.steps, initial=done, desc=stage.name, mininterval=10, dynamic_ncols=True) as bar:
        for step in range(done, stage.steps):
            for optimizer, rates in zip(stage.optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = peak * stage.schedule(step)
            loss = stage.loss()
            for optimizer in stage.optimizers:
                optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
            for optimizer in stage.optimizers:
                optimizer.step()
            stage.after_step(step + 1)
            value = loss.item()
            smooth = value if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * value
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == stage.steps:
                _store(stage, checkpoint, step + 1, before + time.monotonic() - started)
    return before + time.monotonic() - started


def _store(stage: Stage, checkpoint: Path, step: int, seconds: float) -> None:
    # One file, so that weights and optimizer state can never come from different steps.
    state = {
        "step": step,
        "seconds": seconds,
        "modules": {name: module.state_dict() for name, module in stage.modules.items()},
        "optimizers": [optimizer.state_dict() for optimizer in stage.optimizers],
        "generator": stage.generator.get_state(),
    }
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    temporary = checkpoint.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, checkpoint)


def _restore(stage: Stage, checkpoint: Path) -> tuple[int, float]:
    state = torch.load(checkpoint, weights_only=True)
    for name, module in stage.modules.items():
        module.load_state_dict(state["modules"][name])
    for optimizer, saved in zip(stage.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    stage.generator.set_state(state["generator"])
    return state["step"], state["seconds"]
