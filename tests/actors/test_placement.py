"""Where actors sit, on GPUs that only Ray believes in: two nodes of four."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray

from actors.placement import Placement, wait_for_room
from actors.pool import Pool
from dina_rl.alignment.layout import KINDS, Kind
from dina_rl.config import WorkersConfig
from dina_rl.errors import RunStopped

pytestmark = pytest.mark.usefixtures("ray_local")
# Workers cannot import test modules by name.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

Place = tuple[str, tuple[str, ...]]  # node, GPUs


class Sitter:
    """Stands for an actor of any kind; it knows where it sits."""

    def place(self, number: int) -> Place:
        return ray.get_runtime_context().get_node_id(), tuple(map(str, ray.get_gpu_ids()))


@pytest.fixture(scope="module")
def two_nodes(ray_local) -> Iterator[None]:
    """A second node of four GPUs beside the session's own."""
    command = ["ray", "start", "--address", ray.get_runtime_context().gcs_address, "--node-ip-address", "127.0.0.1"]
    command += ["--num-cpus", "0", "--num-gpus", "4", "--object-store-memory", str(100 * 2**20), "--block"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as node:
        yield
        node.terminate()


@pytest.fixture(scope="module")
def placement(two_nodes) -> Iterator[Placement]:
    placement = Placement(WorkersConfig(gpus=8, text_workers=2, start_timeout_s=120))
    yield placement
    placement.release()


@pytest.fixture(scope="module")
def handles() -> dict[tuple[Kind, int], ray.actor.ActorHandle]:
    """Who sits in each seat."""
    return {}


@pytest.fixture(scope="module")
def pools(placement, handles) -> Iterator[dict[Kind, Pool]]:
    def spawn(kind: Kind, number: int) -> ray.actor.ActorHandle:
        handles[kind, number] = ray.remote(**placement.options(kind, number))(Sitter).remote()
        return handles[kind, number]

    def pool(kind: Kind) -> Pool:
        settings = {"name": kind, "start_timeout_s": 240, "call_timeout_s": 120, "max_restarts": 1}
        return Pool(lambda number: spawn(kind, number), 2 if kind == "text" else 8, **settings)

    pools = {kind: pool(kind) for kind in KINDS}
    yield pools
    for each in pools.values():
        each.shutdown()


@pytest.fixture(scope="module")
def places(pools) -> dict[Kind, list[Place]]:
    """Where each of eight items was worked on, kind after kind."""
    return {
        kind: ray.get(pool.map(range(8), lambda actor, item: actor.place.remote(item)), timeout=60)
        for kind, pool in pools.items()
    }


def test_every_gpu_is_used_by_each_phase(places):
    assert {kind: len(set(each)) for kind, each in places.items()} == dict.fromkeys(KINDS, 8) | {"text": 2}
    assert places["rollout"] == places["scorer"] == places["learner"]
    assert places["text"][:2] == places["rollout"][:2]


def test_no_two_ranks_share_a_gpu_and_neighbours_are_on_one_node(places):
    ranks = places["learner"]
    assert all(len(gpus) == 1 for _, gpus in ranks)
    nodes = [node for node, _ in ranks]
    assert len(set(nodes[:4])) == len(set(nodes[4:])) == 1
    assert nodes[0] != nodes[4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_actor_comes_back_into_its_bundle(pools, handles, places, kind: Kind):
    number = 1 if kind == "text" else 5
    lost = handles[kind, number]
    ray.kill(lost)
    pools[kind].map(range(8), lambda actor, item: actor.place.remote(item))
    assert handles[kind, number] is not lost
    assert ray.get(handles[kind, number].place.remote(0), timeout=60) == places[kind][number]


def test_actors_that_ask_for_nothing_reserve_nothing():
    placement = Placement(WorkersConfig())
    assert placement.options("learner", 1)["scheduling_strategy"] is None


def test_ranks_are_reserved_together_or_not_at_all():
    with pytest.raises(RuntimeError, match=r"no room for 2 x GPU 16 within 1 s; cluster: [12] node"):
        Placement(WorkersConfig(gpus_per_rank=16, start_timeout_s=1))


def test_room_is_waited_for_and_left_to_others(ray_local):
    everything = {"CPU": ray.cluster_resources()["CPU"]}
    for _ in range(2):
        wait_for_room([everything], 60)
    with pytest.raises(RunStopped, match=r"no room for 2 x CPU 1000 within 0.2 s; cluster: \d node"):
        wait_for_room([{"CPU": 1000.0}] * 2, 0.2)
    wait_for_room([everything], 60)
