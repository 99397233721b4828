"""Named tensors compared bit for bit."""

from collections.abc import Mapping

import torch


def assert_same_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """The same names, of which there are some, and equal tensors."""
    assert ours.keys() == theirs.keys()
    assert ours
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []
