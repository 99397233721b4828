"""What a fit reads, checked before anything starts: a preference set to encode, or latent stores made before."""

from collections.abc import Sequence
from pathlib import Path

from dina_rl.backbones.base import Backbone
from dina_rl.config import FitRun
from dina_rl.data.encode import EncodeWork, check_fit, check_inputs, encode_dataset
from dina_rl.data.latents import SPLITS, LatentStore, Split

MAY_CHANGE = (
    "inline",
    *(
        f"fit.{key}"
        for key in (
            *("num_workers", "cpus_per_worker", "gpus_per_worker", "threads_per_worker", "max_failures"),
            *("micro_batch_size", "gradient_checkpointing", "evaluation_batch_size", "checkpoint_every"),
        )
    ),
)
"""What a resumed fit may set differently: who does the work and in what portions, not what comes out."""


def check_fit_inputs(run: FitRun, backbone: Backbone) -> FitRun:
    """`run` with absolute paths: Ray's workers have working directories of their own.

    Raises:
        ValueError: no such dataset or latent store, too many malformed records, latents of another pipeline, or a
            reward model that the pipeline does not fit.
    """
    held_out = {name: _absolute(directory) for name, directory in run.fit.held_out.items()}
    run = run.model_copy(update={"fit": run.fit.model_copy(update={"held_out": held_out})})
    if run.latents is None:
        missing = [split for split in SPLITS if split not in run.dataset.splits]
        if missing:
            raise ValueError(f"dataset.{missing[0]} is None: a fit needs pairs to train on and pairs to hold out")
        run = check_inputs(run, backbone)
    else:
        check_fit(run, backbone)
        run = run.model_copy(update={"latents": Path(_absolute(run.latents))})
        check_store(run.latents, SPLITS, run, backbone)
    for directory in held_out.values():
        check_store(Path(directory), ("test",), run, backbone)
    return run


def check_store(directory: Path, splits: Sequence[Split], run: FitRun, backbone: Backbone) -> None:
    """Raises ValueError if there is no complete latent store, or one without pairs in one of `splits` or whose latents
    the pipeline did not make.
    """
    store = LatentStore(directory)
    if not store.complete():
        raise ValueError(f"latent store {directory} is not complete; finish it with jobs.encode --resume")
    if store.info.pipeline != run.pipeline.path:
        raise ValueError(
            f"latent store {directory} was made with pipeline {store.info.pipeline}, this run's is {run.pipeline.path}"
        )
    for (height, width), shape in zip(store.buckets, store.latent_shapes, strict=True):
        if backbone.latent_shape(height, width) != shape:
            raise ValueError(
                f"latent store {directory} holds latents of shape {shape} of {height}x{width} images, "
                f"{run.pipeline.path} makes {backbone.latent_shape(height, width)}"
            )
    for split in splits:
        if not len(store.pairs(split)):
            raise ValueError(f"latent store {directory} has no {split} pairs")


def open_training_store(run: FitRun, run_dir: Path, backbone: Backbone, work: EncodeWork) -> LatentStore:
    """The store that `run` names, else the run's own, encoded as far as it is missing.

    Raises:
        ValueError: too many unusable records, found while encoding.
    """
    if run.latents is not None:
        return LatentStore(run.latents)
    return encode_dataset(run, run_dir, backbone, work)


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().resolve())
