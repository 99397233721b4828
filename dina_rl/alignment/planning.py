"""What a run would do, worked out from its configuration: `python -m jobs.align --config FILE --plan`."""

from functools import partial
from pathlib import Path

from dina_rl.alignment.algorithms.base import Work
from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.footprint import FP32, learner_footprint
from dina_rl.config import AlignRun
from dina_rl.loading import TEXT, TRANSFORMER, VAE, Sizes, on_disk, shown_bytes, sizes
from dina_rl.runtime import image_size, open_pipeline


def describe(run: AlignRun) -> str:
    """Batch arithmetic, actors, memory and steps of `run`, as lines of text. Starts nothing and loads no weights."""
    work, width = open_algorithm(run).work(), 9
    rows = [
        *_sampling(run, work),
        *_sizes(run),
        *_updates(run, work),
        *_actors(run),
        *_memory(run, work),
        *_measurements(run),
    ]
    return "\n".join(f"{name:<{width}} {text}" for name, text in rows)


def loads(run: AlignRun) -> dict[str, Sizes]:
    """What the actors of each kind load, each of them."""
    of_pipeline = partial(sizes, run.pipeline.location, variant=run.pipeline.variant)
    workers, golden = run.workers, run.golden
    metric = {} if golden.clip_model is None else {golden.scorer: on_disk(golden.scorer, golden.clip_model.path)}
    models = {"pickscore": run.rewards.pickscore, "clip_score": run.rewards.clip_score}
    pixels = {name: on_disk(name, model.path) for name, model in models.items() if model is not None}
    latents = [] if run.rewards.dina is None else [TRANSFORMER]
    return {
        f"{workers.rollout_workers} rollout workers": of_pipeline(TRANSFORMER, TEXT, VAE) | metric,
        f"{workers.scorers} scorers": of_pipeline(*latents, *([VAE] if pixels else [])) | pixels,
        f"{workers.learner_ranks} learner ranks": of_pipeline(TRANSFORMER),
    }


def _sampling(run: AlignRun, work: Work) -> list[tuple[str, str]]:
    rollout = run.rollout
    samples = rollout.prompts_per_iteration * rollout.group_size
    calls = -(-rollout.prompts_per_iteration // rollout.groups_per_call)
    passes = "two transformer passes" if rollout.guidance_scale != 1 else "one transformer pass"
    return [
        ("run", f"{work.title}, {run.iterations} iterations, {run.iterations * samples:,} training images"),
        (
            "rollout",
            f"{rollout.prompts_per_iteration} prompts x {rollout.group_size} samples = {samples} images, {calls} calls",
        ),
        ("", f"{work.sampling}; guidance {rollout.guidance_scale:g}: {passes} a step"),
        ("reward", " + ".join(f"{each.weight:g} x {name}" for name, each in run.rewards.scorers.items())),
    ]


def _sizes(run: AlignRun) -> list[tuple[str, str]]:
    """What is generated, and which of that is the pipeline's own choice."""
    pipeline = run.pipeline
    try:
        backbone = open_pipeline(pipeline)
    except ValueError:
        return []  # told of under memory
    height, width = image_size(pipeline, backbone)
    own = {"size": None in (pipeline.height, pipeline.width), "text length": pipeline.max_sequence_length is None}
    chosen = " and ".join(name for name, is_own in own.items() if is_own)
    text = f"{pipeline.path}, {height} x {width} pixels, {backbone.max_sequence_length} text tokens"
    return [("pipeline", f"{text}: its own {chosen}" if chosen else text)]


def _updates(run: AlignRun, work: Work) -> list[tuple[str, str]]:
    rollout, learner, ranks = run.rollout, run.learner, run.workers.learner_ranks
    minibatch = rollout.prompts_per_iteration // learner.updates_per_iteration * rollout.group_size
    forwards = minibatch // (learner.micro_batch_size * ranks)
    updates = learner.updates_per_iteration * learner.epochs
    warmup = f"after {learner.warmup_updates} updates of warm-up, " if learner.warmup_updates else ""
    return [
        (
            "learner",
            f"{updates} update(s) an iteration, {run.updates} in all, "
            f"rate {learner.learning_rate:g} {warmup}{learner.schedule}",
        ),
        *([("", f"begins at the {run.start}; the KL is to the base without it")] if run.start != "base" else []),
        (
            "",
            f"minibatch {minibatch} = {forwards} forwards x {learner.micro_batch_size} samples x {ranks} ranks; "
            f"{forwards * work.trained_passes} backward passes a rank and update",
        ),
    ]


def _actors(run: AlignRun) -> list[tuple[str, str]]:
    workers = run.workers
    kinds = (
        ("rollout", workers.rollout_workers, workers.gpus_per_rollout),
        ("scorer", workers.scorers, workers.gpus_per_scorer),
        ("learner", workers.learner_ranks, workers.gpus_per_rank),
    )
    total = sum(count * gpus for _, count, gpus in kinds)
    each = ", ".join(f"{count} {kind} x {gpus:g} GPU" for kind, count, gpus in kinds)
    return [("actors", f"{each}: {total:g} GPUs; learner on {run.learner.engine}, ZeRO {run.learner.zero_stage}")]


def _memory(run: AlignRun, work: Work) -> list[tuple[str, str]]:
    """Object store, and what each kind of actor holds."""
    try:
        backbone = open_pipeline(run.pipeline)
        shape = backbone.latent_shape(*image_size(run.pipeline, backbone))
        learner = learner_footprint(run, backbone)
    except ValueError as error:
        return [("memory", f"unknown: {error}")]
    samples = run.rollout.prompts_per_iteration * run.rollout.group_size
    latent = shape[0] * shape[1] * shape[2] * FP32
    rows = [
        ("memory", f"{shown_bytes(samples * work.latents_kept * latent)} of latents an iteration in the object store")
    ]
    rows.append(
        (
            "",
            f"learner rank {shown_bytes(learner.total)}: weights {shown_bytes(learner.weights)}, gradients and moments "
            f"{shown_bytes(learner.optimizer)}, activations of a micro-batch {shown_bytes(learner.activations)}",
        )
    )
    weights = _weights(Path(run.pipeline.location))
    if "transformer" in weights:
        rollout, transformer = sum(weights.values()), weights["transformer"]
        scorer = f"scorer at most {shown_bytes(transformer)} and its pixel models"
        rows.append(("", f"weights on disk: rollout actor {shown_bytes(rollout)}, {scorer}"))
    return rows


def _measurements(run: AlignRun) -> list[tuple[str, str]]:
    golden = run.golden
    base = {run.rollout.guidance_scale, *golden.guidances}
    return [
        ("golden", f"{golden.scorer}, {golden.dev_samples} dev samples every {golden.every} iterations"),
        ("", f"{golden.test_samples} test samples of the base at {len(base)} guidance scales before the first update"),
    ]


def _weights(pipeline: Path) -> dict[str, int]:
    """Bytes of weight files by component of a local pipeline directory; empty for a hub id."""
    components = {file.parent.name for file in pipeline.glob("*/*.safetensors")} if pipeline.is_dir() else set()
    return {name: sum(f.stat().st_size for f in pipeline.glob(f"{name}/*.safetensors")) for name in sorted(components)}
