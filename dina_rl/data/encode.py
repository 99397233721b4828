"""From a preference set on disk to a complete latent store; who reads sizes and runs the VAE is the caller's choice.

run_dir/plan.sqlite       what is encoded (`plan.py`); with the shards it lets a killed run go on
run_dir/latents/          the store, with `dataset.prompt_embeddings` also its prompts/ (`prompt_store.py`)
run_dir/skipped.jsonl     every entry with something wrong in it, and what: malformed, unreadable, refused paths,
                          repeats, images without a bucket (absent if there are none)
run_dir/retention.json    what became of every pair: in = kept + dropped
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy
import torch
from tqdm import tqdm

from dina_rl.backbones.base import Backbone, LatentCodec
from dina_rl.checkpoint import Input, write_json
from dina_rl.config import DatasetConfig, FitRun
from dina_rl.config.fitting import Split
from dina_rl.config.keys import Mark, dump_without
from dina_rl.data.buckets import Bucketing, Size
from dina_rl.data.copy import copy_latents
from dina_rl.data.filters import bucketing, max_per_prompt
from dina_rl.data.images import READING, load_image
from dina_rl.data.plan import CHUNK, EncodePlan, Measured, SplitRetention
from dina_rl.data.sets.preprocessed import PreprocessedSet
from dina_rl.data.sets.records import PreferenceRecord, PreferenceSet
from dina_rl.data.sets.registry import open_set
from dina_rl.data.stores.files import write_lines
from dina_rl.data.stores.latents import SPLITS, LatentStore, StoreInfo
from dina_rl.data.stores.prompts import PromptsInfo, PromptStore
from dina_rl.fingerprint import pipeline_fingerprint, pipeline_parts, records_parts
from dina_rl.loading import LARGE, shown_bytes
from dina_rl.runtime import sized
from dina_rl.storage import free_bytes

LATENTS = "latents"
PLAN_FILE = "plan.sqlite"
SKIPPED_FILE = "skipped.jsonl"
RETENTION_FILE = "retention.json"


class EncodeWork(Protocol):
    """The heavy parts, done by whatever processes there are."""

    def measure(self, run: FitRun, plan: EncodePlan, chunks: Sequence[int]) -> Iterator[tuple[int, Measured]]:
        """(chunk, sizes) of the given chunks of the plan's images in any order, by `measure_images`."""
        ...

    def encode(self, run: FitRun, store: LatentStore, shards: Sequence[int]) -> None:
        """Encode the given shards of the store by `encode_shard`."""
        ...

    def encode_prompts(self, run: FitRun, prompts: PromptStore, shards: Sequence[int]) -> None:
        """Encode the given shards of the prompts by `PromptStore.write_shard`."""
        ...


class EncodingHere:
    """`EncodeWork` in this process."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def measure(self, run: FitRun, plan: EncodePlan, chunks: Sequence[int]) -> Iterator[tuple[int, Measured]]:
        source = open_set(run.dataset.kind, run.dataset.location)
        return ((chunk, measure_images(source, plan.images(chunk))) for chunk in chunks)

    def encode(self, run: FitRun, store: LatentStore, shards: Sequence[int]) -> None:
        source = open_set(run.dataset.kind, run.dataset.location)
        codec = self._backbone.load_codec()
        for shard in tqdm(shards, desc="encode", unit="shard"):
            encode_shard(source, store, shard, codec, run.dataset, threads=1)

    def encode_prompts(self, run: FitRun, prompts: PromptStore, shards: Sequence[int]) -> None:
        encoder = self._backbone.load_text_encoder(cached=1)  # prompts are distinct
        with tqdm(total=sum(len(prompts.rows(shard)) for shard in shards), desc="prompts", unit="prompt") as bar:
            for shard in shards:
                bar.update(prompts.write_shard(shard, encoder))


def check_inputs(run: FitRun, backbone: Backbone) -> FitRun:
    """What can be wrong with the inputs, found before anything starts.

    Returns:
        `run` with absolute paths, for Ray's workers have working directories of their own, and all sizes given.

    Raises:
        ValueError: no such dataset or split, one without images, or an image size that the pipeline does not fit.
    """
    dataset, pipeline = run.dataset, sized(run.pipeline, backbone)
    source = open_set(dataset.kind, dataset.location)
    for split in dataset.splits.values():
        records = source.records(split)
        first = next((record for record in records if isinstance(record, PreferenceRecord)), None)
        if first is not None and not first.images:
            raise ValueError(f"split {split} of {dataset.location} holds prompts without images: nothing to encode")
    for height, width in bucketing(dataset, pipeline).buckets:
        backbone.latent_shape(height, width)
    if dataset.kind != "preprocessed":
        backbone.check("vae")
    if dataset.prompt_embeddings:
        backbone.check("text")
    dataset = dataset.model_copy(update={"path": str(dataset.location.resolve())})
    return run.model_copy(update={"pipeline": pipeline.absolute(), "dataset": dataset})


def encode_inputs(run: FitRun) -> list[Input]:
    """What the latents are made from, once `check_inputs` has found it there."""
    source = open_set(run.dataset.kind, run.dataset.location)
    files = [file for split in run.dataset.splits.values() for file in source.files(split)]
    return [
        Input(key="pipeline.path", path=run.pipeline.path, parts=pipeline_parts(*run.pipeline.place)),
        Input(key="dataset.path", path=run.dataset.path, parts=records_parts(files)),
    ]


def encode_dataset(run: FitRun, run_dir: Path, backbone: Backbone, work: EncodeWork) -> LatentStore:
    """The complete latent store of `run.dataset` in `run_dir`; whatever of it is missing is encoded now.

    With `dataset.prompt_embeddings` its prompts are encoded last, those of the pairs that are left.

    Raises:
        ValueError: no such dataset, too many unusable records, the directory holds latents of something else, or its
            plan is broken.
        StorageFailed: storage refuses; what is encoded stays.
    """
    try:
        return _encode_dataset(run, run_dir, backbone, work)
    except sqlite3.DatabaseError as error:
        file = run_dir / PLAN_FILE
        raise ValueError(f"{file} is broken ({error}); begin another run") from error


def _encode_dataset(run: FitRun, run_dir: Path, backbone: Backbone, work: EncodeWork) -> LatentStore:
    dataset = run.dataset
    sizes = bucketing(dataset, run.pipeline)
    plan = EncodePlan(run_dir / PLAN_FILE, made_of=_ingredients(run))
    try:
        try:
            _make_plan(plan, run, run_dir, sizes, work)
        except ValueError:
            if not (run_dir / LATENTS).exists():
                (run_dir / PLAN_FILE).unlink()  # the set or its filters are about to be mended
            raise
        store = _open_store(run, run_dir, plan, sizes, backbone)
        missing = store.missing_shards()
        _say_room(store, missing)
        if missing and dataset.kind == "preprocessed":
            copy_latents(PreprocessedSet(dataset.location), store, missing)
        elif missing:
            work.encode(run, store, missing)
        if missing or not store.complete():
            _finish(plan, store, run_dir, dataset)
        if dataset.prompt_embeddings:
            prompts = PromptStore.create(store.directory, PromptsInfo.of(run.pipeline, backbone), plan.prompts())
            missing = prompts.missing_shards()
            if missing:
                work.encode_prompts(run, prompts, missing)
        return store
    finally:
        plan.close()


def _make_plan(plan: EncodePlan, run: FitRun, run_dir: Path, sizes: Bucketing, work: EncodeWork) -> None:
    """Decide what is encoded. Raises ValueError if too much of the set is broken or none of it is left."""
    dataset = run.dataset
    if not plan.is_read:
        source = open_set(dataset.kind, dataset.location)
        records = {ours: source.records(theirs) for ours, theirs in dataset.splits.items()}
        plan.read(records, preferences=dataset.filter, seed=run.seed)
    _check_broken(plan, run_dir, dataset)
    for chunk, measured in work.measure(run, plan, plan.unmeasured()):
        plan.measured(chunk, measured)
    if not plan.is_placed:
        plan.place(sizes, max_per_prompt=max_per_prompt(dataset))
    _check_broken(plan, run_dir, dataset)
    _check_kept(plan.retention(sizes.buckets), run_dir, dataset)


def measure_images(source: PreferenceSet, images: Sequence[str]) -> Measured:
    """(height, width) of every image, or why it has none."""
    sizes: Measured = []
    for key in images:
        try:
            sizes.append(source.size(key))
        except ValueError as error:
            sizes.append(str(error))
    return sizes


@torch.no_grad()
def encode_shard(
    source: PreferenceSet, store: LatentStore, shard: int, codec: LatentCodec, dataset: DatasetConfig, *, threads: int
) -> int:
    """Decode, resize and encode a shard's images, a batch at a time, and write it; returns how many it holds.

    Meanwhile the next batch is decoded by `threads`: memory holds the pixels of two batches and the latents of a shard.
    """
    bucket, rows = store.info.shard(shard)
    size, batch_size = store.buckets[bucket], dataset.encode_batch_size
    keys = store.images_of(rows)
    latents: list[torch.Tensor] = []
    problems: list[str | None] = []
    with ThreadPoolExecutor(threads) as pool:
        upcoming: list[Future[tuple[numpy.ndarray, str | None]]] = []
        for start in range(0, len(keys) + batch_size, batch_size):
            batch, upcoming = upcoming, []
            for key in keys[start : start + batch_size]:
                content = _read(source, key)  # here, one after the other: parquet sets keep what they have just read
                upcoming.append(pool.submit(_pixels, content, size, dataset.max_pixels))
            if batch:
                pixels, reasons = zip(*(decoded.result() for decoded in batch), strict=True)
                images = torch.tensor(numpy.stack(pixels)).permute(0, 3, 1, 2).float() / 255
                latents.append(codec.encode(images).cpu())
                problems += reasons
    unreadable = {row: problem for row, problem in zip(rows, problems, strict=True) if problem is not None}
    encoded = torch.cat(latents)
    for row in unreadable:
        encoded[row - rows.start] = 0
    store.write_shard(shard, encoded, unreadable)
    return len(rows)


def _read(source: PreferenceSet, key: str) -> bytes | ValueError:
    try:
        return source.image(key)
    except ValueError as error:
        return error


def _pixels(content: bytes | ValueError, size: Size, max_pixels: int) -> tuple[numpy.ndarray, str | None]:
    """(pixels [height, width, 3] uint8, problem); an image that cannot be read is black and has a problem."""
    height, width = size
    try:
        if isinstance(content, ValueError):
            raise content
        return load_image(content, height=height, width=width, max_pixels=max_pixels), None
    except ValueError as error:
        return numpy.zeros((height, width, 3), dtype=numpy.uint8), str(error)


def retention_lines(retention: Mapping[Split, SplitRetention]) -> list[str]:
    """What became of the pairs, for people."""
    lines = []
    for split, part in retention.items():
        share = part.kept / part.pairs if part.pairs else 0.0
        lines.append(
            f"{split}: {part.records} records, {part.malformed} malformed; {part.pairs} pairs in, {part.kept} kept "
            f"({share:.1%})"
        )
        lines += [f"  dropped by {name}: {count}" for name, count in part.dropped.items()]
        lines += [f"  kept at {size}: {count}" for size, count in part.kept_per_bucket.items()]
    return lines


def _ingredients(run: FitRun) -> dict[str, object]:
    """What the plan and the latents depend on."""
    dataset = dump_without(run.dataset, Mark.PROCESS)
    pipeline = run.pipeline.model_dump(mode="json", include={"path", "dtype", "height", "width"})
    return {"dataset": dataset, "pipeline": pipeline, "seed": run.seed, "chunk": CHUNK}


def _vae(run: FitRun) -> str | None:
    """Fingerprint of the VAE that makes the latents; the authors' own is unknown."""
    return None if run.dataset.kind == "preprocessed" else pipeline_fingerprint(*run.pipeline.place).vae


def _open_store(run: FitRun, run_dir: Path, plan: EncodePlan, sizes: Bucketing, backbone: Backbone) -> LatentStore:
    info = StoreInfo(
        dataset=run.dataset.path,
        pipeline=run.pipeline.path,
        buckets=sizes.buckets,
        latent_shapes=tuple(backbone.latent_shape(height, width) for height, width in sizes.buckets),
        rows=plan.rows_per_bucket(len(sizes.buckets)),
        rows_per_shard=run.dataset.encode_batch_size * run.dataset.batches_per_shard,
        dtype=run.dataset.latent_dtype,
        vae=_vae(run),
        pictures=None if run.dataset.kind == "preprocessed" else READING,
    )
    return LatentStore.create(run_dir / LATENTS, info, plan.row_images())


def _say_room(store: LatentStore, missing: Sequence[int]) -> None:
    """How large the latents become, where that is more than a little, and whether there is room for them."""
    need = store.info.latent_bytes * len(missing) // max(1, store.info.num_shards)
    room = free_bytes(store.directory)
    if need < LARGE or room is None:
        return
    warning = "" if need < room else "; warning: they may not fit"
    print(f"latents of up to {shown_bytes(need)}, {shown_bytes(room)} free in {store.directory}{warning}", flush=True)


def _finish(plan: EncodePlan, store: LatentStore, run_dir: Path, dataset: DatasetConfig) -> None:
    """Leave out what turned out unreadable, report, and write the pairs."""
    plan.found_unreadable(store.unreadable())
    _check_broken(plan, run_dir, dataset)
    retention = plan.retention(store.buckets)
    _check_kept(retention, run_dir, dataset)
    print("\n".join(retention_lines(retention)), flush=True)
    for split in SPLITS:  # the other one, which the set does not have, is empty
        store.write_pairs(split, plan.stored_pairs(split))


def _check_kept(retention: Mapping[Split, SplitRetention], run_dir: Path, dataset: DatasetConfig) -> None:
    """Write the report, and stop if a split has no pairs left."""
    write_json(run_dir / RETENTION_FILE, {split: asdict(part) for split, part in retention.items()})
    for split, part in retention.items():
        if not part.kept:
            raise ValueError(
                f"no pair is left in split {dataset.splits[split]} of {dataset.location}; {run_dir / RETENTION_FILE} "
                "says which filter dropped how many"
            )


def _check_broken(plan: EncodePlan, run_dir: Path, dataset: DatasetConfig) -> None:
    """List what is wrong in the run directory, and stop if it is too much."""
    broken, total = plan.broken_records()
    if not total:
        raise ValueError(f"dataset {dataset.location} holds no records")
    file = run_dir / SKIPPED_FILE
    write_lines(file, (json.dumps(asdict(record)) for record in plan.skipped()))
    if not file.stat().st_size:
        file.unlink()
    if broken > dataset.max_skipped * total or broken == total:
        raise ValueError(
            f"{broken} of {total} records of {dataset.location} are malformed or have unreadable images, more than "
            f"dataset.max_skipped = {dataset.max_skipped:g} allows; they are listed in {file}"
        )
