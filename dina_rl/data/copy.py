"""The latent store's copy of the authors' preprocessed files.

The files' row groups hold 100 pairs of mixed sizes, some 100 MB a side: a random pair costs all of that. The copy costs
one pass over the files, and then a row costs little to read.
"""

import heapq
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from dina_rl.data.sets.preprocessed import PreprocessedSet
from dina_rl.data.stores.latents import LatentStore
from dina_rl.data.stores.preprocessed import read_latent


def copy_latents(source: PreprocessedSet, store: LatentStore, shards: Sequence[int]) -> None:
    """Write shards of the store from the published latents, in one pass over the files.

    Every bucket has one shard under way, so memory holds a shard for each.
    """
    bucket_rows: dict[int, list[int]] = {}
    for shard in shards:
        bucket_rows.setdefault(store.info.shard(shard)[0], []).append(shard)
    passes = [_rows_of(store, own) for own in bucket_rows.values()]
    latents: dict[int, list[torch.Tensor]] = {}
    unreadable: dict[int, dict[int, str]] = {}
    total = sum(len(store.info.shard(shard)[1]) for shard in shards)
    for _, shard, row, key in tqdm(heapq.merge(*passes), total=total, desc="copy", unit="img"):
        bucket, rows = store.info.shard(shard)
        try:
            latent = read_latent(source.image(key), store.latent_shapes[bucket])
        except ValueError as error:
            latent = torch.zeros(store.latent_shapes[bucket])
            unreadable.setdefault(shard, {})[row] = str(error)
        latents.setdefault(shard, []).append(latent)
        if row == rows[-1]:
            store.write_shard(shard, torch.stack(latents.pop(shard)), unreadable.pop(shard, {}))


def _rows_of(store: LatentStore, shards: Sequence[int]) -> Iterator[tuple[tuple[str, int, int], int, int, str]]:
    """(place in the files, shard, row, key) of the rows of shards of one bucket."""
    for shard in shards:
        _, rows = store.info.shard(shard)
        for row, key in zip(rows, store.images_of(rows), strict=True):
            file, _, cell = key.rpartition("#")
            group, position, _ = cell.split("/")
            yield (file, int(group), int(position)), shard, row, key
