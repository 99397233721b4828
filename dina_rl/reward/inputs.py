"""What a fit reads, checked before anything starts: a preference set to encode, or latent stores made before."""

from collections.abc import Sequence
from pathlib import Path

from dina_rl.backbones.base import Backbone, TextEncoder
from dina_rl.checkpoint import Input
from dina_rl.config import FitRun
from dina_rl.data.encode import LATENTS, EncodeWork, check_inputs, encode_dataset, encode_inputs
from dina_rl.data.sets.records import PreferenceRecord
from dina_rl.data.sets.registry import open_set
from dina_rl.data.stores.latents import SPLITS, LatentStore, PairStore, PairTable, Split
from dina_rl.data.stores.open import open_store
from dina_rl.data.stores.order import fit_order
from dina_rl.data.stores.preprocessed import PreprocessedStore
from dina_rl.data.stores.prompts import StoredPrompts, find_prompts
from dina_rl.data.stores.units import fit_units
from dina_rl.fingerprint import pipeline_fingerprint, pipeline_parts, same_part, store_parts
from dina_rl.loading import TEXT, TRANSFORMER, Sizes, sizes
from dina_rl.runtime import image_size, sized


def check_fit_inputs(run: FitRun, backbone: Backbone) -> FitRun:
    """`run` with absolute paths, for Ray's workers have working directories of their own, and all sizes given.

    Raises:
        ValueError: no such dataset or latent store, nothing to train on or nothing held out, too many malformed
            records, latents or prompt embeddings of another pipeline, or a reward model that the pipeline does not fit.
    """
    held_out = {name: _absolute(directory) for name, directory in run.fit.held_out.items()}
    fit = run.fit.model_copy(update={"held_out": held_out})
    run = run.model_copy(update={"fit": fit, "pipeline": sized(run.pipeline, backbone)})
    check_fit(run, backbone)
    needed: tuple[Split, ...] = ("train",) if held_out else SPLITS
    if run.latents is None:
        missing = [split for split in needed if split not in run.dataset.splits]
        if missing:
            raise ValueError(f"dataset.{missing[0]} is None: a fit needs pairs to train on and pairs to hold out")
        run = check_inputs(run, backbone)
    else:
        latents = Path(_absolute(run.latents))
        run = run.model_copy(update={"latents": latents, "pipeline": run.pipeline.absolute()})
        check_store(latents, needed, run, backbone)
    for directory in held_out.values():
        check_store(Path(directory), ("test",), run, backbone)
    if run.fit.labels != "hard" and run.latents is None:
        check_first_label(run)
    if run.latents is None or any(find_prompts(each, run.pipeline) is None for each in _stores(run, run.latents)):
        backbone.check("text")
    return run


def fit_inputs(run: FitRun) -> list[Input]:
    """What the fit is made from, once `check_fit_inputs` has found it there."""
    stores = {f"fit.held_out.{name}": Path(directory) for name, directory in run.fit.held_out.items()}
    if run.latents is not None:
        stores["latents"] = run.latents
    held = [Input(key=key, path=str(directory), parts=store_parts(directory)) for key, directory in stores.items()]
    if run.latents is None:
        return [*encode_inputs(run), *held]
    return [Input(key="pipeline.path", path=run.pipeline.path, parts=pipeline_parts(*run.pipeline.place)), *held]


def check_store(directory: Path, splits: Sequence[Split], run: FitRun, backbone: Backbone) -> None:
    """Raises ValueError if there is no complete store of encoded pairs, or one without pairs in one of `splits` or
    whose latents the pipeline did not make, or prompt embeddings that it would make differently.
    """
    store = open_store(directory)
    if isinstance(store, LatentStore):
        if not store.complete():
            raise ValueError(f"latent store {directory} is not complete; finish it with jobs.encode --resume")
        made_with, ours = store.info.pipeline, pipeline_fingerprint(*run.pipeline.place).vae
        if not same_part(store.info.vae, ours, called_alike=made_with == run.pipeline.path):
            raise ValueError(
                f"latent store {directory} was made with pipeline {made_with}, this run's is {run.pipeline.path}"
                + (", whose VAE is another now" if made_with == run.pipeline.path else "")
            )
    for (height, width), shape in zip(store.buckets, store.latent_shapes, strict=True):
        if backbone.latent_shape(height, width) != shape:
            raise ValueError(
                f"latent store {directory} holds latents of shape {shape} of {height}x{width} images, "
                f"{run.pipeline.path} makes {backbone.latent_shape(height, width)}"
            )
    for split in splits:
        pairs = store.pairs(split)
        if not len(pairs):
            raise ValueError(f"latent store {directory} has no {split} pairs")
        if split == "train":
            check_labels(directory, pairs, run)
    find_prompts(directory, run.pipeline)


def check_labels(directory: Path, pairs: PairTable, run: FitRun) -> None:
    """Raises ValueError if the fit needs a probability of every training pair and some have none."""
    if run.fit.labels == "hard":
        return
    missing = len(pairs) if pairs.probability is None else int(pairs.probability.isnan().sum())
    if missing:
        raise ValueError(
            f"fit.labels {run.fit.labels}: {missing} of {len(pairs)} training pairs in {directory} have no "
            "probability; label them with jobs.label, or fit on hard labels"
        )


def check_first_label(run: FitRun) -> None:
    """The same of a set that is yet to be encoded, by its first record: mistakes are told before hours of encoding."""
    dataset = run.dataset
    records = open_set(dataset.kind, dataset.location).records(dataset.splits["train"])
    first = next((record for record in records if isinstance(record, PreferenceRecord)), None)
    if first is not None and first.probability is None:
        raise ValueError(
            f"fit.labels {run.fit.labels}: record {first.index} of split {dataset.train} of {dataset.location} has no "
            "probability; label the set with jobs.label, or fit on hard labels"
        )


def training_latents(run: FitRun, run_dir: Path) -> Path:
    """Where the encoded pairs of a fit lie: in the store that `run` names, else in the run's own."""
    return run_dir / LATENTS if run.latents is None else run.latents


def encode_missing(run: FitRun, run_dir: Path, backbone: Backbone, work: EncodeWork) -> None:
    """Encode what is missing of the run's own store; nothing if `run` names one.

    Raises:
        ValueError: too many unusable records, found while encoding.
    """
    if run.latents is None:
        encode_dataset(run, run_dir, backbone, work)


def open_encoder(run: FitRun, latents: Path, backbone: Backbone) -> TextEncoder:
    """The embeddings stored beside the encoded pairs, if every store that the fit reads has them: the one at `latents`
    and the held-out ones. Otherwise the pipeline's text encoders, for all prompts; `without_embeddings` says why.

    Raises:
        ValueError: stored embeddings that are not complete, or were made with other settings of the pipeline.
    """
    stores = [find_prompts(directory, run.pipeline) for directory in _stores(run, latents)]
    found = [store for store in stores if store is not None]
    return StoredPrompts(found) if len(found) == len(stores) else backbone.load_text_encoder()


def without_embeddings(run: FitRun, latents: Path) -> list[str]:
    """A line for every store whose lack of embeddings makes a fit load text encoders although they were asked for, by
    `dataset.prompt_embeddings` or by storing them elsewhere.

    Raises:
        ValueError: as `open_encoder`.
    """
    stores = _stores(run, latents)
    lacking = [directory for directory in stores if find_prompts(directory, run.pipeline) is None]
    if len(lacking) == len(stores) and not run.dataset.prompt_embeddings:
        return []
    return [f"{directory} has no prompt embeddings: the text encoders are loaded" for directory in lacking]


def loads(run: FitRun, latents: Path) -> Sizes:
    """What every rank of a fit loads; raises like `open_encoder`."""
    stored = all(find_prompts(directory, run.pipeline) is not None for directory in _stores(run, latents))
    return sizes(run.pipeline.location, TRANSFORMER, *([] if stored else [TEXT]), variant=run.pipeline.variant)


def _stores(run: FitRun, latents: Path) -> list[Path]:
    return [latents, *(Path(directory) for directory in run.fit.held_out.values())]


def unseen_pairs(run: FitRun, store: PairStore) -> list[str]:
    """A line for every bucket of training pairs that is too small to get one of the run's steps, and for every split
    of preprocessed files, held-out ones too, of which pairs cannot be used.
    """
    stores: list[tuple[PairStore, tuple[Split, ...]]] = [(store, SPLITS)]
    stores += [(open_store(Path(directory)), ("test",)) for directory in run.fit.held_out.values()]
    unusable = [
        f"{each.left_out(split)} {split} pairs of {each.directory} are left out: their latents differ in shape"
        for each, splits in stores
        if isinstance(each, PreprocessedStore)
        for split in splits
        if each.left_out(split)
    ]
    pairs = store.pairs("train")
    units = fit_units(pairs, run.fit.batch_of)
    left_out = fit_order(units, store.latent_shapes, run.fit, seed=run.seed).left_out(pairs.bucket)
    sizes = {bucket: "{}x{}".format(*store.buckets[bucket]) for bucket in left_out}
    return unusable + [
        f"{count} training pairs of size {sizes[bucket]} are not seen: too few for one of {run.fit.steps} steps"
        for bucket, count in left_out.items()
    ]


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().resolve())


def check_fit(run: FitRun, backbone: Backbone) -> None:
    """Raises ValueError if the image size or the reward model does not fit the pipeline, or its files are not whole."""
    backbone.check("transformer")
    backbone.latent_shape(*image_size(run.pipeline, backbone))
    if run.reward.taps[-1] > backbone.last_tap:
        raise ValueError(
            f"reward.taps {run.reward.taps} do not fit {run.pipeline.path}: of its {backbone.num_blocks} blocks 1 to "
            f"{backbone.last_tap} can be tapped"
        )
    width = run.reward.head_width or backbone.width
    if width % run.reward.num_heads:
        raise ValueError(f"reward.num_heads ({run.reward.num_heads}) must divide the width {width}")
