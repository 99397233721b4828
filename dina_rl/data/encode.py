"""From a preference set on disk to a complete latent store; who runs the VAE is the caller's choice.

Every unusable record is skipped, counted, and listed with its reason in `<run_dir>/skipped.jsonl`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy
import torch

from dina_rl.backbones.base import Backbone, LatentCodec
from dina_rl.checkpoint import write_text
from dina_rl.config import FitRun
from dina_rl.data.hpdv3 import check_skipped, load_image, read_split
from dina_rl.data.latents import SPLITS, LatentStore, StoredPair, StoreInfo
from dina_rl.data.pairs import PreferencePair
from dina_rl.data.records import SkippedRecord

LATENTS = "latents"
SKIPPED_FILE = "skipped.jsonl"

EncodeShards = Callable[[FitRun, LatentStore, Sequence[int]], None]
"""Encodes the given shards of the store: `read_shard`, then `write_latents`, for each."""


def check_inputs(run: FitRun, backbone: Backbone) -> FitRun:
    """What can be wrong with the inputs, found before anything starts.

    Returns:
        `run` with absolute paths: Ray's workers have working directories of their own.

    Raises:
        ValueError: no such dataset, too many malformed records, or an image size or reward model that the pipeline
            does not fit.
    """
    for split in SPLITS:
        records, skipped = read_split(run.dataset.location, split)
        check_skipped(
            len(skipped),
            len(records) + len(skipped),
            max_skipped=run.dataset.max_skipped,
            where=run.dataset.location / f"{split}.json",
        )
    check_fit(run, backbone)
    pipeline = run.pipeline
    if pipeline.path != "shapes" and Path(pipeline.location).is_dir():
        pipeline = pipeline.model_copy(update={"path": str(Path(pipeline.location).resolve())})
    dataset = run.dataset.model_copy(update={"path": str(run.dataset.location.resolve())})
    return run.model_copy(update={"pipeline": pipeline, "dataset": dataset})


def check_fit(run: FitRun, backbone: Backbone) -> None:
    """Raises ValueError if the image size or the reward model does not fit the pipeline."""
    backbone.latent_shape(run.pipeline.height, run.pipeline.width)
    if run.reward.taps[-1] >= backbone.num_blocks:
        raise ValueError(
            f"reward.taps {run.reward.taps} do not fit {run.pipeline.path}: of its {backbone.num_blocks} blocks 1 to "
            f"{backbone.num_blocks - 1} can be tapped"
        )
    if backbone.width % run.reward.num_heads:
        raise ValueError(f"reward.num_heads ({run.reward.num_heads}) must divide the width {backbone.width}")


def encode_dataset(run: FitRun, run_dir: Path, backbone: Backbone, encode_shards: EncodeShards) -> LatentStore:
    """The complete latent store of `run.dataset` in `run_dir`; whatever of it is missing is encoded now.

    Raises:
        ValueError: no such dataset, too many unusable records, or the directory holds latents of something else.
    """
    records, skipped = {}, {}
    for split in SPLITS:
        records[split], skipped[split] = read_split(run.dataset.location, split)
    total = sum(map(len, records.values())) + sum(map(len, skipped.values()))
    _report_skipped(run, run_dir, skipped, total)

    store = _open_store(run, run_dir, records, backbone)
    missing = store.missing_shards()
    if missing:
        encode_shards(run, store, missing)
    unreadable = store.unreadable()
    broken = {store.images[row]: reason for row, reason in unreadable.items()}
    rows = {image: row for row, image in enumerate(store.images)}
    usable = {}
    for split in SPLITS:
        usable[split] = [r for r in records[split] if r.chosen not in broken and r.rejected not in broken]
        skipped[split] += [
            SkippedRecord(file=f"{split}.json", index=record.index, reason=f"{path}: {broken[path]}")
            for record in records[split]
            for path in (record.chosen, record.rejected)
            if path in broken
        ]
    _report_skipped(run, run_dir, skipped, total)
    for split in SPLITS:
        if not usable[split]:
            raise ValueError(f"no usable record is left in {run.dataset.location / split}.json; see {run_dir}")
        store.write_pairs(split, _stored(usable[split], rows))
    return store


def shard_paths(store: LatentStore, shard: int) -> list[str]:
    """The image files of a shard, in its order."""
    return [str(Path(store.info.dataset) / image) for image in store.images_of(store.info.shard(shard)[1])]


def read_pixels(paths: Sequence[str], *, height: int, width: int) -> tuple[numpy.ndarray, list[str]]:
    """(pixels [n, H, W, 3] uint8, problems [n]); an image that cannot be read is black and has a problem."""
    pixels, problems = [], []
    for path in paths:
        try:
            pixels.append(load_image(Path(path), height=height, width=width))
            problems.append("")
        except ValueError as error:
            pixels.append(numpy.zeros((height, width, 3), dtype=numpy.uint8))
            problems.append(str(error))
    return numpy.stack(pixels), problems


def write_latents(
    store: LatentStore, shard: int, pixels: numpy.ndarray, problems: Sequence[str], codec: LatentCodec
) -> int:
    """Encode a shard's pixels and write it; returns how many images it holds."""
    images = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
    _, rows = store.info.shard(shard)
    unreadable = {row: problem for row, problem in zip(rows, problems, strict=True) if problem}
    latents = codec.encode(images).cpu()
    for row in unreadable:
        latents[row - rows.start] = 0
    store.write_shard(shard, latents, unreadable)
    return len(rows)


def _open_store(
    run: FitRun, run_dir: Path, records: dict[str, list[PreferencePair]], backbone: Backbone
) -> LatentStore:
    pairs = [pair for split in SPLITS for pair in records[split]]
    images = list(dict.fromkeys(path for pair in pairs for path in (pair.chosen, pair.rejected)))
    info = StoreInfo(
        dataset=str(run.dataset.location.resolve()),
        pipeline=run.pipeline.path,
        buckets=((run.pipeline.height, run.pipeline.width),),
        latent_shapes=(backbone.latent_shape(run.pipeline.height, run.pipeline.width),),
        rows=(len(images),),
        rows_per_shard=run.dataset.encode_batch_size,
    )
    return LatentStore.create(run_dir / LATENTS, info, images)


def _stored(pairs: list[PreferencePair], rows: dict[str, int]) -> Iterator[StoredPair]:
    for pair in pairs:
        yield StoredPair(pair_id=pair.index, chosen=rows[pair.chosen], rejected=rows[pair.rejected], prompt=pair.prompt)


def _report_skipped(run: FitRun, run_dir: Path, skipped: dict[str, list[SkippedRecord]], total: int) -> None:
    """List what is skipped in the run directory, a record once, and stop if it is too much."""
    first = {(record.file, record.index): record for split in SPLITS for record in reversed(skipped[split])}
    ordered = [first[key] for key in sorted(first)]
    if ordered:
        file = run_dir / SKIPPED_FILE
        write_text(file, "".join(json.dumps(asdict(record)) + "\n" for record in ordered))
        print(f"skipped {len(ordered)} of {total} records, listed in {file}", flush=True)
    check_skipped(len(ordered), total, max_skipped=run.dataset.max_skipped, where=run.dataset.location)
