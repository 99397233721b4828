"""How the samples of a minibatch become forwards of equal shape, on one rank or many."""

import torch


def deal(count: int, size: int, rank: int, world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(rows [size], weights [size]) of each forward of this rank over `count` samples.

    Samples are padded with zero-weight copies of the first to a multiple of `size * world_size`, so that every rank
    makes equally many forwards of equal shape, and dealt out in turn.
    """
    padded = -(-count // (size * world_size)) * size * world_size
    index = torch.arange(padded)
    weights = (index < count).float()
    rows = torch.where(index < count, index, 0)
    starts = range(rank * size, padded, size * world_size)
    return [(rows[first : first + size], weights[first : first + size]) for first in starts]
