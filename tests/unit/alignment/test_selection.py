"""Which samples are trained on, on groups that can be sorted by hand."""

import pytest
import torch

from dina_rl.alignment.selection import extremes, select


@pytest.mark.parametrize(
    ("advantages", "keep", "kept"),
    [
        ([0.5, -2.0, 1.0, 0.1, -0.3, 2.0], 2, [1, 5]),
        ([0.5, -2.0, 1.0, 0.1, -0.3, 2.0], 4, [1, 2, 4, 5]),
        ([0.5, -2.0, 1.0, 0.1, -0.3, 2.0], 6, [0, 1, 2, 3, 4, 5]),
        ([0.5, -2.0, 1.0, 0.1, -0.3, 2.0], None, [0, 1, 2, 3, 4, 5]),
        ([-3.0, 0.6, 0.7, 0.8, 0.9], 4, [0, 1, 3, 4]),  # skewed: either end has its half, whatever its size
        ([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], 2, [2, 3]),  # ties: the earlier counts as the lower
        ([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], 4, [1, 2, 3, 4]),
        ([0.0, 0.0, 0.0, 0.0], 4, [0, 1, 2, 3]),
        ([0.0, 0.0, 0.0, 0.0], 2, [0, 3]),
    ],
)
def test_the_extremes_of_a_group(advantages: list[float], keep: int | None, kept: list[int]) -> None:
    assert extremes(torch.tensor(advantages), keep).nonzero().flatten().tolist() == kept


def groups(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def test_the_samples_of_a_minibatch_are_numbered_through() -> None:
    selection = select(groups([0.1, 2.0, -2.0], [-1.0, 0.2, 1.0]), 2, zeros=True)
    assert selection.rows.tolist() == [1, 2, 3, 5]
    assert selection.count == 4


def test_zeros_are_left_out_of_the_forwards_and_counted_in_the_mean() -> None:
    some = groups([0.0, 1.0, 0.0, -1.0], [2.0, 0.0, -1.0, -1.0])
    assert select(some, None, zeros=True).rows.tolist() == list(range(8))
    selection = select(some, None, zeros=False)
    assert selection.rows.tolist() == [1, 3, 4, 6, 7]
    assert selection.count == 8
    kept = select(groups([0.0, 0.0, 0.0, 1.0]), 2, zeros=False)
    assert (kept.rows.tolist(), kept.count) == ([3], 2)
