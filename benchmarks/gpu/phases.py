"""Rollout, score, update and fit step, each with its time, its peak memory, and what the plan says of both."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TypeVar

import torch

from benchmarks.gpu.settings import BenchmarkRun, fit_config, pipeline_config, reward_config
from benchmarks.reward_step import one_by_one
from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.costs import count_costs
from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.footprint import learner_footprint
from dina_rl.alignment.layout import Kind
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.alignment.loop import plan
from dina_rl.alignment.occupancy import actor_footprints
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.alignment.rollout import RolloutWorker, in_calls
from dina_rl.alignment.skeletons import open_skeletons
from dina_rl.alignment.texts import EncodedTexts, PromptEncoder
from dina_rl.alignment.timeline import count_operations, count_passes
from dina_rl.config import AlignRun, PipelineConfig
from dina_rl.data.stores.units import Unit, training_batch
from dina_rl.reward.fit import RewardFit, fit
from dina_rl.reward.model import LatentRewardModel
from dina_rl.runtime import image_size, open_pipeline
from dina_rl.seeding import normal
from dina_rl.shapes.grammar import prompts
from dina_rl.sleep import Luggage, SharedGPU
from dina_rl.types import Rollout, TrainingGroup, WorkItem

Argument = TypeVar("Argument")
Result = TypeVar("Result")
PHASES: dict[Kind, str] = {"rollout": "rollout", "scorer": "score", "learner": "update"}  # by who works
PUBLISH = "publish"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What `--plan` says of an iteration, phase by phase, on a GPU that holds everything."""

    operations: dict[str, float]
    bytes: dict[str, int]  # without what a process takes before it holds a tensor, which torch does not see


@dataclass(slots=True, kw_only=True)
class Stopwatch:
    """Seconds and largest peak memory by phase."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def time(self, phase: str, work: Callable[[], Result], *, counts: bool) -> Result:
        """Do `work`; the first time does not count."""
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = perf_counter()
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
            self.peak_bytes[phase] = max(self.peak_bytes.get(phase, 0), torch.cuda.max_memory_allocated())
        if counts:
            self.seconds.setdefault(phase, []).append(perf_counter() - begin)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one setting."""

    images: int
    seconds: Mapping[str, float]  # medians
    peak_bytes: Mapping[str, int]  # none on a CPU
    planned: Planned

    @property
    def images_per_second(self) -> float:
        """Of the whole loop on one GPU."""
        return self.images / sum(self.seconds.values())

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "images_per_second": self.images_per_second}


def planned(run: AlignRun) -> Planned:
    """The plan's figures of a run whose kinds of actors share one GPU, when the text encoders have done their part."""
    with open_skeletons(run) as (local, models):
        costs = count_costs(local, models)
        actors = actor_footprints(local, models, learner_footprint(local, models.backbone))
    algorithm = open_algorithm(run)
    counted = count_operations(
        run, count_passes(run, algorithm.work()), costs, with_gradient=algorithm.wants_reward_gradients
    )
    held = sum(actors[kind].held for kind in PHASES)
    return Planned(
        operations={PHASES[kind]: counted.of(kind) for kind in PHASES},
        bytes={PHASES[kind]: held + actors[kind].working for kind in PHASES},
    )


def _encoded(run: AlignRun, iterations: Sequence[Sequence[Sequence[WorkItem]]]) -> list[list[EncodedTexts]]:
    """What each call reads; the encoders are gone afterwards."""
    prompts = PromptEncoder(run)
    return [[prompts.for_rollout(call) for call in calls] for calls in iterations]


def _sampled(
    worker: RolloutWorker, calls: Sequence[Sequence[WorkItem]], encoded: Sequence[EncodedTexts]
) -> list[list[Rollout]]:
    return [worker.rollout(call, texts) for call, texts in zip(calls, encoded, strict=True)]


def measure_loop(run: AlignRun, repeats: int) -> Figures:
    """Iterations of a run in one process that holds rollout, scorer and learner as a shared GPU does.

    Prompts are encoded before: it is a thousandth of the work, and random weights have random embeddings.
    """
    calls = [in_calls(plan(run, prompts("train"), n), run.rollout.groups_per_call) for n in range(repeats + 1)]
    encoded = _encoded(run, calls)
    rollout, scorer = RolloutWorker(run), ScoringWorker(run)
    learner = PolicyLearner(run, lambda module: TorchEngine(module, run.learner))
    algorithm, watch = open_algorithm(run), Stopwatch()
    rollout.load_weights(learner.policy())
    for number in range(repeats + 1):
        counts = number > 0
        sampled = watch.time("rollout", partial(_sampled, rollout, calls[number], encoded[number]), counts=counts)
        scored = watch.time("score", partial(_each, scorer.score, sampled), counts=counts)
        scores = {name: torch.cat([call[name] for call in scored]) for name in run.rewards.scorers}
        advantages = algorithm.weigh(scores).values
        groups = [
            TrainingGroup(rollout=group, advantages=row)
            for group, row in zip([group for call in sampled for group in call], advantages, strict=True)
        ]
        watch.time("update", partial(learner.update, number, groups), counts=counts)
        watch.time(PUBLISH, lambda: rollout.load_weights(learner.policy()), counts=counts)
    return Figures(
        images=run.rollout.prompts_per_iteration * run.rollout.group_size,
        seconds={phase: median(values) for phase, values in watch.seconds.items()},
        peak_bytes=watch.peak_bytes,
        planned=planned(run),
    )


def measure_fit(benchmark: BenchmarkRun, pipeline: Path | str) -> dict[str, float]:
    """A step of the reward model's fit."""
    config, watch = pipeline_config(benchmark, pipeline), Stopwatch()
    backbone = open_pipeline(config)
    progress = RewardFit(LatentRewardModel(backbone, reward_config(benchmark), seed=0), fit_config(benchmark))
    encoder, shape = backbone.load_text_encoder(), backbone.latent_shape(*image_size(config, backbone))

    def step(number: int) -> None:
        pairs = one_by_one(
            [
                Unit(
                    key=number * benchmark.pairs + index,
                    prompt=prompts("train")[index % len(prompts("train"))],
                    latents=normal((2, *shape), "fit step", number, index),
                    chosen=(0,),
                    rejected=(1,),
                )
                for index in range(benchmark.pairs)
            ]
        )
        next(fit(progress, [training_batch(pairs, step_pairs=len(pairs))], encoder, seed=0))

    for number in range(benchmark.repeats + 1):
        watch.time("fit step", partial(step, number), counts=number > 0)
    seconds = median(watch.seconds["fit step"])
    peak = {"peak_bytes": float(watch.peak_bytes["fit step"])} if watch.peak_bytes else {}
    return {"seconds": seconds, "pairs_per_second": benchmark.pairs / seconds, **peak}


def measure_sleep(pipeline: PipelineConfig) -> dict[str, float]:
    """A transformer to host memory and back, twice (the first time pins the buffer), and what is not as it was then.

    On a CPU, which has nothing to give back, the same moves are made within host memory.
    """
    parameters = list(open_pipeline(pipeline).load_transformer().parameters())
    before = [parameter.to("cpu", copy=True) for parameter in parameters]
    on_gpu, watch = torch.cuda.is_available(), Stopwatch()
    gpu, luggage = SharedGPU(sleeps=True), Luggage()
    rest, wake = (gpu.rest, gpu.wake) if on_gpu else (partial(luggage.pack, parameters), luggage.unpack)
    size, given_back = sum(map(_bytes, parameters)), 0

    def held() -> int:
        """Also what no tensor of ours holds: cuBLAS keeps a workspace."""
        return torch.cuda.memory_allocated() if on_gpu else sum(map(_bytes, parameters))

    for number in range(2):
        awake = held()
        watch.time("rest", rest, counts=number > 0)
        given_back = awake - held()
        watch.time("wake", wake, counts=number > 0)
    changed = [not torch.equal(old, new.cpu()) for old, new in zip(before, parameters, strict=True)]
    return {
        "bytes": size,
        "bytes_awake": max(0, size - given_back),
        "rest_seconds": watch.seconds["rest"][0],
        "wake_seconds": watch.seconds["wake"][0],
        "tensors_changed": sum(changed),
    }


def _each(work: Callable[[Argument], Result], calls: Sequence[Argument]) -> list[Result]:
    return [work(call) for call in calls]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def release() -> None:
    """Give back what a phase's models held, so that the next peak is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
