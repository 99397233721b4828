"""Where actors run: their Ray options, the learner's placement group, and waits that say what they wait for."""

import logging
import time
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.handles import AnyRef
from dina_rl.config import EvaluationWorkersConfig, WorkersConfig
from dina_rl.errors import RunStopped

log = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0


class ActorOptions(TypedDict):
    """Keyword arguments of `ray.remote` for an actor."""

    num_cpus: float
    num_gpus: float
    max_restarts: int
    max_task_retries: int
    runtime_env: dict[str, dict[str, str]]
    scheduling_strategy: NotRequired[PlacementGroupSchedulingStrategy | None]


def actor_options(workers: WorkersConfig | EvaluationWorkersConfig, *, num_gpus: float) -> ActorOptions:
    """Options of one rollout, scorer or learner actor.

    Ray itself never restarts or retries: an actor that it restarts would answer with the weights of its `__init__`.
    `actors/pool.py` recreates a lost actor and tells it the current weights first.
    """
    env_vars = {
        "OMP_NUM_THREADS": str(workers.threads_per_actor),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if num_gpus == 0:
        env_vars.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # a GPU of the node is not this actor's to use
    return {
        "num_cpus": workers.cpus_per_actor,
        "num_gpus": num_gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": env_vars},
    }


def place_gang(
    world_size: int, *, num_cpus: float, num_gpus: float, timeout_s: float
) -> PlacementGroupSchedulingStrategy | None:
    """Reserve one bundle per rank, packed on as few nodes as possible; None where the ranks reserve nothing.

    Raises:
        RunStopped: the cluster did not offer the bundles within `timeout_s` seconds.
    """
    bundle = {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount}
    if not bundle:
        return None
    group = placement_group([bundle] * world_size, strategy="PACK")
    waiting_for = f"{world_size} learner ranks of {bundle}"
    deadline = time.monotonic() + timeout_s
    while not ray.wait([group.ready()], timeout=min(REPORT_EVERY_S, max(0.0, deadline - time.monotonic())))[0]:
        if time.monotonic() >= deadline:
            remove_placement_group(group)
            raise RunStopped(f"no room for {waiting_for} within {timeout_s:g} s; {resources()}")
        log.warning("waiting for room for %s; %s", waiting_for, resources())
    return PlacementGroupSchedulingStrategy(placement_group=group)


def release_gang(strategy: PlacementGroupSchedulingStrategy | None) -> None:
    """Give the gang's bundles back."""
    if strategy is not None:
        group: PlacementGroup = strategy.placement_group
        remove_placement_group(group)


def resources() -> str:
    """What the cluster has and what of it is free, for messages."""
    total, free = ray.cluster_resources(), ray.available_resources()
    shares = [f"{name} {free.get(name, 0):g} of {total[name]:g} free" for name in ("CPU", "GPU") if name in total]
    return f"cluster: {len(ray.nodes())} node(s), {', '.join(shares)}"


def wait_all(refs: Sequence[AnyRef], *, timeout_s: float, what: str) -> None:
    """Wait until every one of `refs` is done, reporting the cluster's resources every 30 s; ends at the first failure.

    Raises:
        TimeoutError: some are not done after `timeout_s` seconds.
        ray.exceptions.RayError: what the first failed one raised.
    """
    deadline = time.monotonic() + timeout_s
    pending = list(refs)
    while pending:
        tick = min(REPORT_EVERY_S, max(0.0, deadline - time.monotonic()))
        # One at a time: when a member of a gang fails, the others hang in a collective and would never be done.
        done, pending = ray.wait(pending, num_returns=1, timeout=tick, fetch_local=False)
        if done:
            check(done[0])
        elif time.monotonic() >= deadline:
            raise TimeoutError(f"{what}: {len(pending)} of {len(refs)} not done after {timeout_s:g} s; {resources()}")
        else:
            log.warning("%s: waiting for %d of %d; %s", what, len(pending), len(refs), resources())


def check(done: AnyRef) -> None:
    """Raise the error that a finished call ended with, if it did, without bringing a large value here.

    An error always lies with the caller. A value on another node is not fetched within 0 s: that is a success too.
    """
    try:
        ray.get(done, timeout=0)
    except ray.exceptions.GetTimeoutError:
        log.debug("result of %s stays on its node", done)
