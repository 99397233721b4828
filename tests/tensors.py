"""Named tensors compared bit for bit, and weights taken apart."""

from collections.abc import Mapping

import torch

from dina_rl.types import PolicyWeights


def assert_same_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """The same names, of which there are some, and equal tensors."""
    assert ours.keys() == theirs.keys()
    assert ours
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def in_parts(weights: PolicyWeights, count: int) -> list[PolicyWeights]:
    """The same weights as a rollout actor gets them."""
    named = list(weights.tensors.items())
    return [
        PolicyWeights(version=weights.version, tensors=dict(named[part::count]), part=part, parts=count)
        for part in range(count)
    ]
