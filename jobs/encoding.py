"""Encoding by Ray Data: `EncodeWork` for `jobs.encode` and for the fit.

Tasks read the image headers of a large set; then shards of images go to actors, which decode, run the VAE and write:
pixels never travel.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy
from tqdm import tqdm

from dina_rl.config import DatasetConfig, FitRun, PipelineConfig
from dina_rl.data.encode import encode_shard, measure_images
from dina_rl.data.plan import EncodePlan, Measured
from dina_rl.data.sets.registry import open_set
from dina_rl.data.stores.latents import LatentStore
from dina_rl.data.stores.prompts import PromptStore
from dina_rl.loading import TEXT, VAE, announce, sizes
from dina_rl.runtime import configure_process, open_pipeline
from dina_rl.storage import StorageFailed
from jobs.cluster import visible_gpus

MEASURED_HERE = 32
"""Chunks of image headers that this process reads before Ray's workers would have started."""
WAVE = 256
"""Chunks of image names on the way to the workers at once."""


def load_sizes(chunk: dict[str, Any], dataset: DatasetConfig) -> dict[str, int | list[int] | list[str]]:
    """Sizes of a chunk's images. {chunk, images} -> {chunk, heights, widths, problems}."""
    sizes = measure_images(open_set(dataset.kind, dataset.location), chunk["images"])
    return {
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
        self._store = LatentStore(directory)
        self._source = open_set(dataset.kind, dataset.location)
        self._codec = open_pipeline(pipeline).load_codec()
        self._dataset, self._threads = dataset, threads

    def __call__(self, shard: dict[str, int]) -> dict[str, int | str]:
        place = self._source, self._store, int(shard["shard"]), self._codec
        return _told(lambda: encode_shard(*place, self._dataset, threads=self._threads))


class EncodePrompts:
    """Ray Data actor: runs the text encoders on the prompts of a shard and writes it."""

    loads = TEXT

    def __init__(self, directory: Path, pipeline: PipelineConfig, threads: int) -> None:
        configure_process(threads)
        self._prompts = PromptStore(directory)
        self._encoder = open_pipeline(pipeline).load_text_encoder(cached=1)  # prompts are distinct

    def __call__(self, shard: dict[str, int]) -> dict[str, int | str]:
        return _told(lambda: self._prompts.write_shard(int(shard["shard"]), self._encoder))


def _told(encode: Callable[[], int]) -> dict[str, int | str]:
    """How much `encode` has done, or why storage refused it: an error Ray Data would wrap, and show its traceback."""
    try:
        return {"done": encode(), "failed": "", "number": 0}
    except StorageFailed as failed:
        return {"done": 0, "failed": str(failed), "number": failed.number}


class RayEncoding:
    """`EncodeWork` by Ray Data. Ray must be initialised."""

    def measure(self, run: FitRun, plan: EncodePlan, chunks: Sequence[int]) -> Iterator[tuple[int, Measured]]:
        if len(chunks) <= MEASURED_HERE:
            source = open_set(run.dataset.kind, run.dataset.location)
            yield from ((chunk, measure_images(source, plan.images(chunk))) for chunk in chunks)
            return
        dataset = run.dataset

        def sizes(chunk: dict[str, Any]) -> dict[str, int | list[int] | list[str]]:
            return load_sizes(chunk, dataset)

        for start in tqdm(range(0, len(chunks), WAVE), desc="image sizes", unit="wave"):
            wave = [{"chunk": chunk, "images": plan.images(chunk)} for chunk in chunks[start : start + WAVE]]
            done = ray.data.from_items(wave).map(sizes, num_cpus=run.fit.cpus_per_worker)
            for row in done.iter_rows():
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
        StorageFailed: an actor could not write.
    """
    gpus = run.fit.gpus_per_worker
    actors = run.fit.num_workers if gpus else 1  # on a CPU one model with all threads beats two, and starts sooner
    threads = run.fit.threads_per_worker * (1 if gpus else run.fit.num_workers)
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
        if row["failed"]:
            raise StorageFailed(row["failed"], int(row["number"]))
        yield row["done"]
