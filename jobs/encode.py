"""Encode the images of a preference set to latents by Ray Data: `python -m jobs.encode --config configs/...yaml`.

Image shards flow through two stages: tasks decode and resize images, an actor runs the VAE and writes the shard. Shards
that are on disk already are not encoded again, so an interrupted encode continues where it stopped. On a cluster,
`run_dir` and the dataset must lie on storage that all nodes share.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.data import ActorPoolStrategy
from tqdm import tqdm

from dina_rl.checkpoint import open_run_dir
from dina_rl.cli import fail, load
from dina_rl.config import FitRun, PipelineConfig
from dina_rl.data.encode import check_inputs, encode_dataset, read_pixels, shard_paths, write_latents
from dina_rl.data.latents import LatentStore
from dina_rl.runtime import configure_process, open_pipeline
from jobs.cluster import quiet_ray_data, start_ray, visible_gpus

DEFAULT_CONFIG = "configs/shapes_reward.yaml"
MAY_CHANGE = tuple(
    f"fit.{key}"
    for key in ("num_workers", "cpus_per_worker", "gpus_per_worker", "threads_per_worker", "checkpoint_every")
)
"""What a resumed run may set differently: who does the work, not what comes out."""


def load_images(shard: dict) -> dict:
    """Ray Data task: decode a shard's images. {shard, paths} -> {shard, pixels [n, H, W, 3] uint8, problems [n]}."""
    pixels, problems = read_pixels(shard["paths"], height=shard["height"], width=shard["width"])
    return {"shard": shard["shard"], "pixels": pixels, "problems": problems}


class EncodeShard:
    """Ray Data actor: the VAE. Writes a decoded shard to the store."""

    def __init__(self, directory: Path, pipeline: PipelineConfig, threads: int) -> None:
        configure_process(threads)
        self._store = LatentStore(directory)
        self._codec = open_pipeline(pipeline).load_codec()

    def __call__(self, shard: dict) -> dict:
        count = write_latents(self._store, shard["shard"], shard["pixels"], shard["problems"], self._codec)
        return {"images": count}


def encode_shards(run: FitRun, store: LatentStore, shards: Sequence[int]) -> None:
    """`EncodeShards` by Ray Data. Ray must be initialised."""
    jobs = [
        {
            "shard": shard,
            "paths": shard_paths(store, shard),
            "height": store.buckets[0][0],
            "width": store.buckets[0][1],
        }
        for shard in shards
    ]
    gpus = run.fit.gpus_per_worker
    actors = run.fit.num_workers if gpus else 1  # on a CPU one VAE with all the threads beats two, and starts sooner
    threads = run.fit.threads_per_worker * (1 if gpus else run.fit.num_workers)
    done = (
        ray.data.from_items(jobs)
        .map(load_images, num_cpus=run.fit.cpus_per_worker)  # without GPUs Ray runs it inside the actor: one process
        .map(
            EncodeShard,
            fn_constructor_args=(store.directory, run.pipeline, threads),
            compute=ActorPoolStrategy(size=actors),
            num_cpus=run.fit.cpus_per_worker,
            num_gpus=gpus,
            runtime_env=visible_gpus(gpus),
        )
    )
    with tqdm(total=sum(len(job["paths"]) for job in jobs), desc="encode", unit="img") as bar:
        for shard in done.iter_rows():
            bar.update(shard["images"])


def main(argv: Sequence[str]) -> None:
    run = load(FitRun, argv, program="python -m jobs.encode", default_config=DEFAULT_CONFIG)
    try:
        backbone = open_pipeline(run.pipeline)
        run = check_inputs(run, backbone)
        run_dir = open_run_dir(run, run.run_dir, resume=run.resume, may_change=MAY_CHANGE)
        start_ray()
        quiet_ray_data()
        store = encode_dataset(run, run_dir, backbone, encode_shards)
    except ValueError as error:
        fail(str(error))
    print(f"{store.info.num_rows} images in {store.directory}; continue with jobs.fit_reward --resume")


if __name__ == "__main__":
    main(sys.argv[1:])
