"""Exponential moving average of the trained weights."""

import torch


class WeightsEMA:
    """Averaged weights with decay warm-up min((1 + n) / (10 + n), decay), n = updates seen.

    It keeps tensors of its own and never touches the policy's, so there is nothing to swap back.
    """

    def __init__(self, state: dict[str, torch.Tensor], decay: float, updates: int = 0) -> None:
        self.decay = decay
        self.updates = updates
        self.state = {name: tensor.clone() for name, tensor in state.items()}

    def update(self, state: dict[str, torch.Tensor]) -> None:
        """Move towards `state`, the policy's weights after one optimizer update."""
        decay = min((1 + self.updates) / (10 + self.updates), self.decay)
        self.updates += 1
        for name, tensor in state.items():
            self.state[name].lerp_(tensor, 1 - decay)
