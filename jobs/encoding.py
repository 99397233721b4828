"""Encoding by Ray Data: `EncodeWork` for `jobs.encode` and for the fit.

Tasks read the image headers of a large set; then shards of images go to actors, which decode, run the VAE and write:
pixels never travel. Both say what they cannot do in their rows (`jobs/told.py`); actors open what they need at their
first shard, since of what a constructor raises Ray Data tells only that it did.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from tqdm import tqdm

from actors.placement import wait_for_room
from dina_rl.backbones.base import LatentCodec, TextEncoder
from dina_rl.config import DatasetConfig, FitRun, PipelineConfig
from dina_rl.data.encode import encode_shard, measure_images
from dina_rl.data.plan import EncodePlan, Measured
from dina_rl.data.sets.records import PreferenceSet
from dina_rl.data.sets.registry import open_set
from dina_rl.data.stores.latents import LatentStore
from dina_rl.data.stores.prompts import PromptStore
from dina_rl.loading import TEXT, VAE, announce, sizes
from dina_rl.runtime import configure_process, open_pipeline
from jobs.cluster import resources_of, visible_gpus
from jobs.told import FATAL, NOTHING, check_told, told

MEASURED_HERE = 32
"""Chunks of image headers that this process reads before Ray's workers would have started."""
WAVE = 256
"""Chunks of image names on the way to the workers at once."""


def load_sizes(chunk: dict[str, Any], dataset: DatasetConfig) -> dict[str, int | str | list[int] | list[str]]:
    """Sizes of a chunk's images. {chunk, images} -> {chunk, heights, widths, problems}, and what is told."""
    sizes: Measured = []
    trouble = NOTHING
    try:
        sizes = measure_images(open_set(dataset.kind, dataset.location), chunk["images"])
    except FATAL as error:
        trouble = told(error)
    return {
        **trouble,
        "chunk": chunk["chunk"],
        "heights": [0 if isinstance(size, str) else size[0] for size in sizes],
        "widths": [0 if isinstance(size, str) else size[1] for size in sizes],
        "problems": [size if isinstance(size, str) else "" for size in sizes],
    }


class EncodeShard:
    """Ray Data actor: decodes the images of a shard, runs the VAE, and writes it to the store."""

    loads = VAE

    def __init__(self, directory: Path, pipeline: PipelineConfig, dataset: DatasetConfig, threads: int) -> None:
        configure_process(threads)
        self._directory, self._pipeline, self._dataset, self._threads = directory, pipeline, dataset, threads

    def __call__(self, shard: dict[str, int]) -> dict[str, int | str]:
        return _done(lambda: self._encode(int(shard["shard"])))

    def _encode(self, shard: int) -> int:
        source, store, codec = self._opened
        return encode_shard(source, store, shard, codec, self._dataset, threads=self._threads)

    @cached_property
    def _opened(self) -> tuple[PreferenceSet, LatentStore, LatentCodec]:
        source = open_set(self._dataset.kind, self._dataset.location)
        return source, LatentStore(self._directory), open_pipeline(self._pipeline).load_codec()


class EncodePrompts:
    """Ray Data actor: runs the text encoders on the prompts of a shard and writes it."""

    loads = TEXT

    def __init__(self, directory: Path, pipeline: PipelineConfig, threads: int) -> None:
        configure_process(threads)
        self._directory, self._pipeline = directory, pipeline

    def __call__(self, shard: dict[str, int]) -> dict[str, int | str]:
        return _done(lambda: self._encode(int(shard["shard"])))

    def _encode(self, shard: int) -> int:
        prompts, encoder = self._opened
        return prompts.write_shard(shard, encoder)

    @cached_property
    def _opened(self) -> tuple[PromptStore, TextEncoder]:
        encoder = open_pipeline(self._pipeline).load_text_encoder(cached=1)  # prompts are distinct
        return PromptStore(self._directory), encoder


def _done(encode: Callable[[], int]) -> dict[str, int | str]:
    """How much `encode` has done, or why it could not."""
    try:
        return NOTHING | {"done": encode()}
    except FATAL as error:
        return told(error) | {"done": 0}


class RayEncoding:
    """`EncodeWork` by Ray Data. Ray must be initialised."""

    def measure(self, run: FitRun, plan: EncodePlan, chunks: Sequence[int]) -> Iterator[tuple[int, Measured]]:
        if len(chunks) <= MEASURED_HERE:
            source = open_set(run.dataset.kind, run.dataset.location)
            yield from ((chunk, measure_images(source, plan.images(chunk))) for chunk in chunks)
            return
        dataset = run.dataset
        wait_for_room([{"CPU": run.fit.cpus_per_worker}], run.fit.start_timeout_s)

        def sizes(chunk: dict[str, Any]) -> dict[str, int | str | list[int] | list[str]]:
            return load_sizes(chunk, dataset)

        for start in tqdm(range(0, len(chunks), WAVE), desc="image sizes", unit="wave"):
            wave = [{"chunk": chunk, "images": plan.images(chunk)} for chunk in chunks[start : start + WAVE]]
            done = ray.data.from_items(wave).map(sizes, num_cpus=run.fit.cpus_per_worker)
            for row in done.iter_rows():
                check_told(row)
                found = zip(row["heights"], row["widths"], row["problems"], strict=True)
                yield int(row["chunk"]), [problem or (int(height), int(width)) for height, width, problem in found]

    def encode(self, run: FitRun, store: LatentStore, shards: Sequence[int]) -> None:
        images = sum(len(store.info.shard(shard)[1]) for shard in shards)
        with tqdm(total=images, desc="encode", unit="img") as bar:
            for done in _on_actors(EncodeShard, (store.directory, run.pipeline, run.dataset), run, shards):
                bar.update(done)

    def encode_prompts(self, run: FitRun, prompts: PromptStore, shards: Sequence[int]) -> None:
        count = sum(len(prompts.rows(shard)) for shard in shards)
        with tqdm(total=count, desc="prompts", unit="prompt") as bar:
            for done in _on_actors(EncodePrompts, (prompts.directory.parent, run.pipeline), run, shards):
                bar.update(done)


def _on_actors(
    actor: type[EncodeShard | EncodePrompts], arguments: tuple[object, ...], run: FitRun, shards: Sequence[int]
) -> Iterator[int]:
    """How much of every shard is done, as it is. An actor is made of `arguments` and its number of threads.

    Raises:
        RunStopped: there was no room for one of the actors within `fit.start_timeout_s`.
        StorageFailed: an actor could not write or read.
        BadInput: the pipeline or the set cannot be opened, or is broken.
    """
    gpus = run.fit.gpus_per_worker
    actors = run.fit.num_workers if gpus else 1  # on a CPU one model with all threads beats two, and starts sooner
    threads = run.fit.threads_per_worker * (1 if gpus else run.fit.num_workers)
    wait_for_room([resources_of(run.fit)], run.fit.start_timeout_s)  # the others come as room does
    announce(f"{actors} encoding actors", sizes(run.pipeline.location, actor.loads, variant=run.pipeline.variant))
    done = ray.data.from_items([{"shard": shard} for shard in shards]).map(
        actor,  # type: ignore[arg-type]  # Ray's annotation knows functions alone, its documentation classes too
        fn_constructor_args=(*arguments, threads),
        compute=ActorPoolStrategy(size=actors),
        num_cpus=run.fit.cpus_per_worker,
        num_gpus=gpus,
        runtime_env=visible_gpus(gpus),
    )
    for row in done.iter_rows():
        check_told(row)
        yield row["done"]
