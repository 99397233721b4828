"""What stays in the object store, by the references that the driver passes on: rollouts, weights, states."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import ray
import torch

from actors.losses import losses_told
from dina_rl.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRollout:
    """Rollout number `number` of the list that a call returned, and where the reward's gradients of that call are."""

    call: ray.ObjectRef[list[Rollout]]
    gradients: ray.ObjectRef[torch.Tensor] | None
    number: int


class StoredTensors:
    """Tensors on the CPU, by name, that lie in the object store as they are.

    Ray writes arrays there in one copy and reads them in none, but takes a tensor of torch's apart on the way in, and
    puts another together on the way out.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.arrays: dict[str, np.ndarray] = {name: tensor.numpy() for name, tensor in tensors.items()}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that read them share the memory: copy, and never write to them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return {name: torch.from_numpy(array) for name, array in self.arrays.items()}


Part = ray.ObjectRef[StoredTensors]


def in_parts(tensors: Mapping[str, torch.Tensor], part_bytes: int) -> list[StoredTensors]:
    """The tensors in parts of about `part_bytes`, at least one in each, in order."""
    parts: list[dict[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors.items():
        if not parts or size + tensor.nbytes > part_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return [StoredTensors(part) for part in parts]


def together(parts: Iterable[StoredTensors]) -> dict[str, torch.Tensor]:
    """What all parts hold, to read."""
    return {name: tensor for part in parts for name, tensor in part.tensors.items()}


def brought_here(parts: Iterable[Part], *, timeout_s: float) -> dict[str, torch.Tensor]:
    """What all parts hold, to read, wherever they lie.

    Args:
        timeout_s: longest wait for one part.

    Raises:
        WorkLost: they lay on a node that is gone.
    """
    with losses_told():
        return together([ray.get(part, timeout=timeout_s) for part in parts])


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteWeights:
    """The policy's weights in the object store, where the learner's ranks left them."""

    version: int
    parts: tuple[Part, ...]
    timeout_s: float  # longest wait for one part

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, brought here, to read; raises WorkLost where they lay on a node that is gone."""
        return brought_here(self.parts, timeout_s=self.timeout_s)
