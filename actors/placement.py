"""Where actors run: their Ray options, what is reserved for them, and waits that say what they wait for."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NotRequired, TypedDict

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.handles import AnyRef
from dina_rl.alignment.layout import Bundle, Kind, Layout, layout_of
from dina_rl.config import EvaluationWorkersConfig, WorkersConfig
from dina_rl.errors import RunStopped

log = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0

Resources = dict[str, float]  # by Ray's names for them


class ActorOptions(TypedDict):
    """Keyword arguments of `ray.remote` for an actor."""

    num_cpus: float
    num_gpus: float
    max_restarts: int
    max_task_retries: int
    runtime_env: dict[str, dict[str, str]]
    scheduling_strategy: NotRequired[PlacementGroupSchedulingStrategy | None]


def actor_options(workers: WorkersConfig | EvaluationWorkersConfig, *, num_gpus: float) -> ActorOptions:
    """Options of one actor, of whatever kind.

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


class Placement:
    """Where the actors of an alignment run go; what is reserved for them stays theirs until `release`.

    Raises:
        RunStopped: the cluster did not offer room within `workers.start_timeout_s` seconds.
    """

    def __init__(self, workers: WorkersConfig) -> None:
        layout = layout_of(workers)
        self._workers = workers
        self._gpus = {(seat.kind, seat.number): seat.gpus for seat in layout.seats()}
        asked = [(bundle, amounts) for bundle, amounts in _asked(layout, workers.cpus_per_actor) if amounts]
        amounts = [each for _, each in asked]
        self._group = _reserve(amounts, workers.start_timeout_s)
        self._strategies: dict[tuple[Kind, int], PlacementGroupSchedulingStrategy] = {}
        if self._group is not None:
            for (bundle, _), index in zip(asked, _in_node_order(self._group, amounts), strict=True):
                place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
                self._strategies.update({(seat.kind, seat.number): place for seat in bundle.seats})

    def options(self, kind: Kind, number: int) -> ActorOptions:
        """Of this actor, and of whoever replaces it."""
        options = actor_options(self._workers, num_gpus=self._gpus[kind, number])
        options["scheduling_strategy"] = self._strategies.get((kind, number))
        return options

    def release(self) -> None:
        """Give everything back; who still sits there is killed."""
        if self._group is not None:
            remove_placement_group(self._group)


def wait_for_room(asked: Sequence[Resources], timeout_s: float) -> None:
    """Return once the cluster has room for all of it, for somebody who then takes it without saying what is missing.

    Raises:
        RunStopped: not within `timeout_s` seconds.
    """
    group = _reserve(asked, timeout_s)
    if group is not None:
        remove_placement_group(group)


def _asked(layout: Layout, cpus_per_actor: float) -> Iterator[tuple[Bundle, Resources]]:
    """What each bundle reserves, maybe nothing. Colocated ones are alike, so that any may be the first rank's."""
    most = max(len(bundle.seats) for bundle in layout.bundles)
    for bundle in layout.bundles:
        actors = most if layout.in_turns else len(bundle.seats)
        amounts = {"CPU": cpus_per_actor * actors, "GPU": bundle.gpus}
        yield bundle, {name: amount for name, amount in amounts.items() if amount}


def _reserve(asked: Sequence[Resources], timeout_s: float) -> PlacementGroup | None:
    """All bundles, packed on as few nodes as possible; None where there are none."""
    if not asked:
        return None
    group: PlacementGroup = placement_group(list(asked), strategy="PACK")
    words = Counter(", ".join(f"{name} {amount:g}" for name, amount in each.items()) for each in asked)
    waiting_for = " and ".join(f"{count} x {each}" for each, count in words.items())
    deadline = time.monotonic() + timeout_s
    while not ray.wait([group.ready()], timeout=min(REPORT_EVERY_S, max(0.0, deadline - time.monotonic())))[0]:
        if time.monotonic() >= deadline:
            remove_placement_group(group)
            raise RunStopped(f"no room for {waiting_for} within {timeout_s:g} s; {resources()}")
        log.warning("waiting for room for %s; %s", waiting_for, resources())
    return group


def _in_node_order(group: PlacementGroup, asked: Sequence[Resources]) -> list[int]:
    """The group's bundle for each that was asked for: those alike node by node, so that neighbouring ranks are
    neighbours.
    """
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    free = sorted(nodes, key=lambda index: (nodes[index], index))
    found = []
    for each in asked:
        found.append(next(index for index in free if asked[index] == each))
        free.remove(found[-1])
    return found


def resources() -> str:
    """What the cluster has and what of it is free, for messages."""
    total, free = ray.cluster_resources(), ray.available_resources()
    shares = [f"{name} {free.get(name, 0):g} of {total[name]:g} free" for name in ("CPU", "GPU") if name in total]
    nodes = sum(node["Alive"] for node in ray.nodes())  # dead ones stay in the list
    return f"cluster: {nodes} node(s), {', '.join(shares)}"


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
