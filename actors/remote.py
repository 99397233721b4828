"""What stays in the object store, by the references that the driver passes on: rollouts and weights."""

from dataclasses import dataclass

import ray
import torch

from actors.losses import losses_told
from dina_rl.types import PolicyWeights, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRollout:
    """Rollout number `number` of the list that a call returned, and where the reward's gradients of that call are."""

    call: ray.ObjectRef[list[Rollout]]
    gradients: ray.ObjectRef[torch.Tensor] | None
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteWeights:
    """The policy's weights in the object store, where the learner's rank 0 left them."""

    version: int
    parts: tuple[ray.ObjectRef[PolicyWeights], ...]
    timeout_s: float  # longest wait for one part

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, brought here.

        Raises:
            WorkLost: they lay on a node that is gone.
        """
        with losses_told():
            parts = [ray.get(part, timeout=self.timeout_s) for part in self.parts]
        return {name: tensor for part in parts for name, tensor in part.tensors.items()}
