"""What a run would do, worked out from its configuration: `python -m jobs.align --config FILE --plan`."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TypeVar

from dina_rl.alignment.algorithms.base import Work
from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.costs import Costs, count_costs
from dina_rl.alignment.disk import disk_use
from dina_rl.alignment.footprint import FP32, learner_footprint
from dina_rl.alignment.layout import Kind, Layout, layout_of
from dina_rl.alignment.occupancy import ActorFootprint, GPUMemory, actor_footprints, gpu_memory
from dina_rl.alignment.skeletons import Skeletons, open_skeletons
from dina_rl.alignment.timeline import (
    Operations,
    Passes,
    Timeline,
    best_layout,
    calls_of,
    count_operations,
    count_passes,
    measuring,
    timeline,
)
from dina_rl.backbones.base import Backbone
from dina_rl.config import AlignRun, WorkersConfig
from dina_rl.loading import TEXT, TRANSFORMER, VAE, Sizes, shown_bytes, sizes
from dina_rl.reward.home import find_home
from dina_rl.runtime import image_size
from dina_rl.scorers.registry import image_scorer_bytes

Value = TypeVar("Value")
Row = tuple[str, str]
PHASES: dict[Kind, str] = {"text": "encode", "rollout": "rollout", "scorer": "score", "learner": "update"}
ACTORS: dict[Kind, str] = {"text": "text actor", "rollout": "rollout actor", "scorer": "scorer"}
WORTH_IT = 0.98  # of its time: what another layout must save to be named
IDLE = 0.7  # a node that is busy less than this could do better


def describe(run: AlignRun) -> str:
    """Work, busy share of the GPUs, memory and steps of `run`, as lines of text. Starts nothing, loads no weights."""
    work, width = open_algorithm(run).work(), 9
    rows = [*_sampling(run, work), *_updates(run, work), *_actors(run), *_counted(run, work), *_measurements(run)]
    return "\n".join(f"{name:<{width}} {text}" for name, text in rows)


def loads(run: AlignRun) -> dict[str, Sizes]:
    """What the actors of each kind load, each of them.

    Raises:
        ValueError: there is no such reward model.
    """
    of_pipeline = partial(sizes, run.pipeline.location, variant=run.pipeline.variant)
    workers, golden, probe = run.workers, run.golden.of_images, run.probe_model
    metric: dict[str, int | None] = {} if golden is None else {golden.name: image_scorer_bytes(golden)}
    metric |= {} if probe is None else {"probes": image_scorer_bytes(probe)}
    pixels = {each.name: image_scorer_bytes(each) for each in run.rewards.of_images}
    texts = workers.text_workers
    own = [] if texts else [TEXT]
    return {
        **({f"{texts} text workers": of_pipeline(TEXT)} if texts else {}),
        f"{workers.rollout_workers} rollout workers": of_pipeline(TRANSFORMER, *own, VAE) | metric,
        f"{workers.scorers} scorers": _reward_loads(run)
        | of_pipeline(*([VAE] if pixels or run.rewards.grid else []))
        | pixels,
        f"{workers.learner_ranks} learner ranks": of_pipeline(TRANSFORMER),
    }


def _reward_loads(run: AlignRun) -> dict[str, int | None]:
    """Of a DiNa-LRM in its own backbone; text encoders only where the embeddings that are sent along are another's."""
    if run.rewards.dina is None:
        return {}
    home = find_home(run.rewards.dina, run.pipeline)
    text = [TEXT] if home.reads_prompts else []
    return sizes(home.pipeline.location, TRANSFORMER, *text, variant=home.pipeline.variant)


def _sampling(run: AlignRun, work: Work) -> list[Row]:
    rollout = run.rollout
    samples = rollout.prompts_per_iteration * rollout.group_size
    passes = "two transformer passes" if rollout.guidance_scale != 1 else "one transformer pass"
    return [
        ("run", f"{work.title}, {run.iterations} iterations, {run.iterations * samples:,} training images"),
        (
            "rollout",
            f"{rollout.prompts_per_iteration} prompts x {rollout.group_size} samples = {samples} images, "
            f"{calls_of(run)} calls",
        ),
        ("", f"{work.sampling}; guidance {rollout.guidance_scale:g}: {passes} a step"),
        ("reward", " + ".join(f"{each.weight:g} x {name}" for name, each in run.rewards.scorers.items())),
        *_requests(run, samples),
    ]


def _requests(run: AlignRun, samples: int) -> Iterator[Row]:
    """What judges are asked in an iteration: every sample beside every other of its group, in both orders."""
    others = run.rollout.group_size - 1
    for scorer in run.rewards.of_images:
        if scorer.pairwise:
            yield "", f"{scorer.name}: {samples} samples x {others} others = {samples * others:,} requests an iteration"


def _sizes(run: AlignRun, backbone: Backbone) -> Row:
    """What is generated, and which of that is the pipeline's own choice."""
    pipeline = run.pipeline
    height, width = image_size(pipeline, backbone)
    own = {"size": None in (pipeline.height, pipeline.width), "text length": pipeline.max_sequence_length is None}
    chosen = " and ".join(name for name, is_own in own.items() if is_own)
    text = f"{pipeline.path}, {height} x {width} pixels, {backbone.max_sequence_length} text tokens"
    return "pipeline", f"{text}: its own {chosen}" if chosen else text


def _updates(run: AlignRun, work: Work) -> list[Row]:
    rollout, learner, ranks = run.rollout, run.learner, run.workers.learner_ranks
    minibatch = rollout.prompts_per_iteration // learner.updates_per_iteration * run.kept_of_group
    forwards = minibatch // (learner.micro_batch_size * ranks)
    updates = learner.updates_per_iteration * learner.epochs
    warmup = f"after {learner.warmup_updates} updates of warm-up, " if learner.warmup_updates else ""
    return [
        (
            "learner",
            f"{updates} update(s) an iteration, {run.updates} in all, "
            f"rate {learner.learning_rate:g} {warmup}{learner.schedule}",
        ),
        *([("", f"trains on the {learner.keep} most extreme samples of each group")] if learner.keep else []),
        *([("", f"begins at the {run.start}; the KL is to the base without it")] if run.start != "base" else []),
        (
            "",
            f"minibatch {minibatch} = {forwards} forwards x {learner.micro_batch_size} samples x {ranks} ranks; "
            f"{forwards * work.trained_passes} backward passes a rank and update",
        ),
    ]


def _actors(run: AlignRun) -> list[Row]:
    workers = run.workers
    engine = f"learner on {run.learner.engine}, ZeRO {run.learner.zero_stage}"
    return [("actors", f"{_layout_words(workers)}: {len(layout_of(workers).gpus())} GPUs; {engine}")]


def _layout_words(workers: WorkersConfig) -> str:
    if workers.colocated:
        return f"colocated, {workers.gpus} x (rollout, scorer, learner) in turns{_texts(workers, '')}"
    kinds = (
        ("rollout", workers.rollout_workers, workers.gpus_per_rollout),
        ("scorer", workers.scorers, workers.gpus_per_scorer),
        ("learner", workers.learner_ranks, workers.gpus_per_rank),
    )
    counts = ", ".join(f"{count} {kind} x {gpus:g} GPU" for kind, count, gpus in kinds)
    return f"split, {counts}{_texts(workers, ' beside a rollout')}"


def _texts(workers: WorkersConfig, where: str) -> str:
    return f", {workers.text_workers} text{where}" if workers.text_workers else ""


def _counted(run: AlignRun, work: Work) -> list[Row]:
    """What is counted on the models' shapes."""
    try:
        with open_skeletons(run) as (local, models):
            costs = count_costs(local, models)
            learner = learner_footprint(local, models.backbone)
            actors = actor_footprints(local, models, learner)
            shape = models.backbone.latent_shape(*image_size(run.pipeline, models.backbone))
            disk = disk_use(local, models.backbone)
    except (OSError, ValueError) as error:
        return [("memory", f"unknown: {error}")]
    passes = count_passes(run, work)
    counted = count_operations(run, passes, costs, with_gradient=open_algorithm(run).wants_reward_gradients)
    layout = layout_of(run.workers)
    line = timeline(run, layout, counted)
    samples = run.rollout.prompts_per_iteration * run.rollout.group_size
    latents = samples * work.latents_kept * shape[0] * shape[1] * shape[2] * FP32
    return [
        _sizes(run, models.backbone),
        *_work(passes, counted, models),
        *(_without_gpus(run, layout) if line is None else _busy(run, layout, line, counted)),
        *([] if line is None else _times(run, layout, line, costs)),
        ("memory", f"{shown_bytes(latents)} of latents an iteration in the object store{_kept_for(run)}"),
        (
            "",
            f"learner rank {shown_bytes(learner.total)}: weights {shown_bytes(learner.weights)}, gradients and moments "
            f"{shown_bytes(learner.optimizer)}, activations of a micro-batch {shown_bytes(learner.activations)}",
        ),
        ("", ", ".join(f"{name} {shown_bytes(actors[kind].total)}" for kind, name in ACTORS.items() if kind in actors)),
        *_memory(run, layout, actors),
        ("disk", disk.words),
    ]


def _kept_for(run: AlignRun) -> str:
    return "" if run.inline else f", those of {run.workers.snapshot_every} iterations at most (workers.snapshot_every)"


def _work(passes: Passes, counted: Operations, models: Skeletons) -> list[Row]:
    update = [f"{passes.trained:,} trained passes"]
    update += [f"{passes.reference:,} of the base"] if passes.reference else []
    update += [f"{passes.prepared:,.0f} before the first step"] if passes.prepared else []
    update += [f"{passes.rewarded:,} gradients of the reward"] if passes.rewarded else []
    assumed = models.reward is not None and models.reward.assumed
    note = "; the reward model is not there yet and counted as the paper's" if assumed else ""
    return [
        ("work", f"encode  {_operations(counted.text)}: {passes.encoded:,} texts an iteration"),
        ("", f"rollout {_operations(counted.rollout)}: {passes.sampled:,.0f} passes of one sample"),
        ("", f"score   {_operations(counted.scorer)}: {passes.scored:,} samples{note}"),
        ("", f"update  {_operations(counted.learner)}: {', '.join(update)}"),
    ]


def _busy(run: AlignRun, layout: Layout, line: Timeline, counted: Operations) -> Iterator[Row]:
    """The busy share of every GPU, and what would be better."""
    name = "busy"
    seats = [tuple(seat.kind for seat in gpu) for gpu in layout.gpus()]
    for gpus, (kinds, share) in _alike(list(zip(seats, line.busy, strict=True))):
        yield name, f"{gpus} ({_named(kinds)}) {share:.0%}"
        name = ""
    if line.mean_busy >= IDLE:
        return
    best = best_layout(run, len(line.busy), counted)
    better = "no layout of as many does better"
    if best is not None and best[1].length < WORTH_IT * line.length:
        better = f"{best[1].mean_busy:.0%} with {_setting(best[0])}"
    yield "", f"warning: the GPUs are busy {line.mean_busy:.0%}; {better}"
    calls, actors = calls_of(run), run.workers.rollout_workers
    if calls % actors:
        yield "", f"{calls} calls do not divide over {actors} rollout actors (rollout.groups_per_call)"


def _without_gpus(run: AlignRun, layout: Layout) -> list[Row]:
    asked = bool(layout.gpus()) or run.plan_tflops is not None
    return [("busy", "unknown: not every actor has a GPU")] if asked else []


def _setting(workers: WorkersConfig) -> str:
    if workers.colocated:
        return f"workers: {{gpus: {workers.gpus}}}"
    numbers = workers.rollout_workers, workers.scorers, workers.learner_ranks
    return "workers: {{rollout_workers: {}, scorers: {}, learner_ranks: {}}}, a GPU each".format(*numbers)


def _times(run: AlignRun, layout: Layout, line: Timeline, costs: Costs) -> list[Row]:
    if run.plan_tflops is None:
        return []
    pace = run.plan_tflops * 1e12
    samplers = sum(any(seat.kind == "rollout" for seat in gpu) for gpu in layout.gpus())
    measured = measuring(run, costs) / samplers / pace
    seconds = run.iterations * line.length / pace + measured
    hours = seconds / 3600 * len(line.busy)
    return [
        (
            "time",
            f"{line.length / pace:.3g} s an iteration at {run.plan_tflops:g} TFLOP/s; {seconds / 3600:.3g} h and "
            f"{hours:.3g} GPU hours in all, {measured / seconds:.0%} of it measuring",
        )
    ]


def _memory(run: AlignRun, layout: Layout, actors: Mapping[Kind, ActorFootprint]) -> Iterator[Row]:
    """Memory of each GPU by phase, with everything that lives there, and whether that is too much."""
    gpus = gpu_memory(layout, actors, sleep=run.workers.sleep)
    for names, gpu in _alike(gpus):
        yield "", f"{names} ({_named(gpu.kinds)}): {_phases(gpu)}"
    limit = run.plan_gib * 2**30
    if all(gpu.peak <= limit for gpu in gpus):
        return
    yield "", f"warning: beyond the {run.plan_gib:g} GiB of one GPU (plan_gib)"
    if layout.in_turns and not run.workers.sleep:
        asleep = gpu_memory(layout, actors, sleep=True)[0]
        fits = "they fit" if asleep.peak <= limit else "they do not fit either"
        yield "", f"with workers.sleep {fits}: {_phases(asleep)}"


def _phases(gpu: GPUMemory) -> str:
    return ", ".join(f"{PHASES[kind]} {shown_bytes(count)}" for kind, count in gpu.phases.items()) or "nothing"


def _measurements(run: AlignRun) -> list[Row]:
    golden = run.golden
    base = {run.rollout.guidance_scale, *golden.guidances}
    return [
        ("golden", f"{golden.scorer}, {golden.dev_samples} dev samples every {golden.every} iterations"),
        ("", f"{golden.test_samples} test samples of the base at {len(base)} guidance scales before the first update"),
    ]


def _alike(gpus: Sequence[Value]) -> Iterator[tuple[str, Value]]:
    """Neighbouring GPUs of which the same is to be said, by their numbers."""
    first = 0
    for value, group in groupby(gpus):
        last = first + len(list(group)) - 1
        yield f"GPU {first}" if first == last else f"GPU {first}-{last}", value
        first = last + 1


def _named(kinds: Sequence[Kind]) -> str:
    return ", ".join(kinds) or "nobody"


def _operations(count: float) -> str:
    return f"{count / 1e15:,.1f} PFLOP" if count >= 1e14 else f"{count / 1e12:,.3f} TFLOP"
