"""What the learner needs of a training engine, and the plain one; DeepSpeed's is `actors/engine.py`."""

from collections.abc import Container, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from dina_rl.adamw import MOMENTS
from dina_rl.backbones.lora import trainable
from dina_rl.backbones.trained import load_trained_state, trained_parameters, trained_state
from dina_rl.config import LearnerConfig


class Engine(Protocol):
    """One rank's hold on the policy and its optimizer.

    An update is any number of `backward` calls and one `step`. The sum of the losses over an update's `backward` calls,
    averaged over ranks, is the objective; every rank makes the same number of calls.
    """

    module: nn.Module  # what to call forward on
    rank: int
    world_size: int
    mine: frozenset[str]
    """Names of the trained tensors that leave this rank's process. Each is one rank's, see `share`."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients; `last` marks the final call before `step`."""
        ...

    def step(self, learning_rate: float) -> float:
        """Average over ranks, clip, update, clear. Returns the gradient norm before clipping."""
        ...

    def weights(self, names: Container[str] | None = None) -> dict[str, torch.Tensor]:
        """The trained part, CPU fp32, or what `names` holds of it. All ranks must call it, each with names it likes."""
        ...

    def load_weights(self, state: dict[str, torch.Tensor]) -> None: ...

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """`<parameter>.exp_avg`, `<parameter>.exp_avg_sq` in full size of what is `mine`, and `step`.

        All ranks must call it.
        """
        ...

    def load_optimizer_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take it over from all ranks' together."""
        ...

    def reduce(self, values: Sequence[float], operation: str) -> list[float]:
        """`sum` or `max` of each value over ranks."""
        ...


def build_optimizer(parameters: Sequence[nn.Parameter], config: LearnerConfig) -> torch.optim.AdamW:
    """The optimizer of every engine."""
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def share(parameters: Mapping[str, nn.Parameter], rank: int, world_size: int) -> frozenset[str]:
    """Names of a rank's part of the parameters: neighbours, and about as many numbers as any other rank's.

    Where each rank copies and sends its own, nothing is copied or sent twice.
    """
    total = sum(parameter.numel() for parameter in parameters.values())
    names, before = set(), 0
    for name, parameter in parameters.items():
        middle = before + parameter.numel() / 2
        if min(int(middle * world_size / total), world_size - 1) == rank:
            names.add(name)
        before += parameter.numel()
    return frozenset(names)


def set_rate(optimizer: torch.optim.AdamW, learning_rate: float) -> None:
    """What every engine's next step goes by."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


class TorchEngine:
    """Plain torch on one process: the reference that the distributed engine must match."""

    rank = 0
    world_size = 1

    def __init__(self, module: nn.Module, config: LearnerConfig) -> None:
        self.module = module
        self.mine = share(trained_parameters(module), self.rank, self.world_size)
        self._parameters = trainable(module)
        self._max_grad_norm = config.max_grad_norm
        self._optimizer = build_optimizer(list(self._parameters.values()), config)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        set_rate(self._optimizer, learning_rate)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def weights(self, names: Container[str] | None = None) -> dict[str, torch.Tensor]:
        return trained_state(self.module, names)

    def load_weights(self, state: dict[str, torch.Tensor]) -> None:
        load_trained_state(self.module, state)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            if state:
                tensors["step"] = state["step"].clone()
                tensors.update({f"{name}.{moment}": state[moment].cpu().clone() for moment in MOMENTS})
        return tensors

    def load_optimizer_state(self, state: dict[str, torch.Tensor]) -> None:
        self._optimizer.state.clear()  # of an optimizer that has stepped: no state is that of the start
        if not state:
            return
        for name, parameter in self._parameters.items():
            moments = {moment: state[f"{name}.{moment}"].to(parameter.device).clone() for moment in MOMENTS}
            self._optimizer.state[parameter] = {"step": state["step"].clone(), **moments}

    def reduce(self, values: Sequence[float], operation: str) -> list[float]:
        assert operation in ("sum", "max")
        return list(values)
