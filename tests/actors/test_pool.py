"""The pool on real Ray actors that really die."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from actors.pool import Pool

pytestmark = pytest.mark.usefixtures("ray_local")
# Workers cannot import test modules by name.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def once(marker: Path) -> bool:
    """True for the first caller only, in whichever process."""
    if marker.exists():
        return False
    marker.touch()
    return True


class Multiplier:
    """Multiplies by what it was last told; 1 if it was never told."""

    def __init__(self) -> None:
        self.factor = 1

    def set_factor(self, factor: int) -> None:
        self.factor = factor

    def multiply(self, value: int) -> int:
        return self.factor * value

    def slow_first(self, value: int) -> int:
        time.sleep(0.3 if value == 0 else 0)
        return value

    def die_once(self, value: int, marker: Path) -> int:
        if value == 3 and once(marker):
            os._exit(1)
        return self.factor * value

    def die_always(self, value: int) -> int:
        os._exit(1)

    def hang_once(self, value: int, marker: Path) -> int:
        if value == 1 and once(marker):
            time.sleep(600)
        return self.factor * value

    def wait_for(self, value: int, marker: Path) -> int:
        while value == 0 and not marker.exists():
            time.sleep(0.02)
        return self.factor * value

    def reject(self, value: int) -> int:
        if value == 2:
            raise ValueError(f"cannot multiply {value}")
        return value

    def large(self, value: int) -> bytes:
        return bytes([self.factor * value]) * 1_000_000

    def double(self, value: int) -> int:
        return 2 * value


Spawn = Callable[[int], ray.actor.ActorHandle]


def spawn_multiplier(number: int) -> ray.actor.ActorHandle:
    return ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(Multiplier).remote()


def make_pool(size: int, *, spawn: Spawn = spawn_multiplier, **changes) -> Pool:
    settings = {"name": "multipliers", "start_timeout_s": 120, "call_timeout_s": 120, "max_restarts": 1, **changes}
    return Pool(spawn, size, **settings)


@pytest.fixture(scope="module")
def handles() -> list[ray.actor.ActorHandle]:
    """Every actor that `shared_pool` ever made, in order."""
    return []


@pytest.fixture(scope="module")
def shared_pool(ray_local, handles) -> Iterator[Pool]:
    def spawn(number: int) -> ray.actor.ActorHandle:
        handles.append(spawn_multiplier(number))
        return handles[-1]

    pool = make_pool(2, spawn=spawn, max_restarts=10)
    pool.wait_until_ready()
    yield pool
    pool.shutdown()


@pytest.fixture
def pool(shared_pool) -> Pool:
    """Two actors that were last told to multiply by 10."""
    shared_pool.broadcast(lambda actor: actor.set_factor.remote(10))
    return shared_pool


@pytest.fixture
def single() -> Iterator[Pool]:
    """A pool of one actor, for what a pool does not survive."""
    pool = make_pool(1)
    yield pool
    pool.shutdown()


def wait_until_dead(actor: ray.actor.ActorHandle) -> None:
    """A killed actor lives on for a moment, and might answer. Raises RayActorError when it does not."""
    while True:
        ray.get(actor.multiply.remote(1), timeout=60)


def values(refs: list[ray.ObjectRef]) -> list[int]:
    return ray.get(refs, timeout=60)


def test_results_keep_the_items_order(pool):
    assert values(pool.map(range(7), lambda actor, value: actor.slow_first.remote(value))) == list(range(7))
    assert pool.map([], lambda actor, value: actor.multiply.remote(value)) == []


def test_large_results_stay_references(pool):
    refs = pool.map([1, 2, 3], lambda actor, value: actor.large.remote(value))
    assert [result[0] for result in values(refs)] == [10, 20, 30]


def test_stream_yields_a_result_while_another_item_still_runs(pool, tmp_path):
    marker = tmp_path / "release"
    finished = []
    for index, _ in pool.stream(range(3), lambda actor, value: actor.wait_for.remote(value, marker)):
        finished.append(index)
        marker.touch()  # item 0 cannot end before another one was handed out
    assert finished[0] == 1
    assert sorted(finished) == [0, 1, 2]


def test_streams_chain(pool, single):
    rolled = pool.stream(range(6), lambda actor, value: actor.multiply.remote(value))
    scored = single.stream(rolled, lambda actor, result: actor.double.remote(result[1]))
    assert sorted(ray.get(ref, timeout=60) for _, ref in scored) == [0, 20, 40, 60, 80, 100]


def test_broadcast_reaches_every_actor_before_later_work(pool):
    for factor in (2, 7):
        pool.broadcast(lambda actor, factor=factor: actor.set_factor.remote(factor))
        assert values(pool.map(range(4), lambda actor, value: actor.multiply.remote(value))) == [
            factor * value for value in range(4)
        ]


def test_a_dead_actor_is_replaced_synced_and_its_item_redone(pool, tmp_path):
    restarts = pool.restarts
    refs = pool.map(range(8), lambda actor, value: actor.die_once.remote(value, tmp_path / "died"))
    assert values(refs) == [10 * value for value in range(8)]
    assert pool.restarts == restarts + 1


def test_a_new_actor_is_told_the_last_of_each_subject_in_order(shared_pool, handles):
    for factor, about in ((2, "weights"), (3, "turn"), (4, "weights"), (5, "turn")):
        shared_pool.broadcast(lambda actor, factor=factor: actor.set_factor.remote(factor), about=about)
    made, victim = len(handles), handles[-1]
    ray.kill(victim)
    with pytest.raises(ray.exceptions.RayActorError):
        wait_until_dead(victim)
    shared_pool.broadcast(lambda actor: actor.set_factor.remote(6), about="weights")
    shared_pool.wait_until_ready()
    assert len(handles) == made + 1
    assert ray.get(handles[-1].multiply.remote(10), timeout=60) == 60  # the weights came after the turn


def test_an_actor_killed_from_outside_mid_item_is_replaced(pool, handles, tmp_path):
    restarts, made = pool.restarts, len(handles)
    marker = tmp_path / "release"
    worker_of_item_0 = []

    def wait_for(actor: ray.actor.ActorHandle, value: int) -> ray.ObjectRef:
        if value == 0:
            worker_of_item_0.append(actor)
        return actor.wait_for.remote(value, marker)

    results = {}
    for index, ref in pool.stream(range(5), wait_for):
        if not marker.exists():
            ray.kill(worker_of_item_0[0])
            with pytest.raises(ray.exceptions.RayActorError):  # it is gone before item 0 can end
                ray.get(worker_of_item_0[0].multiply.remote(1), timeout=60)
            marker.touch()
        results[index] = ray.get(ref, timeout=60)
    assert results == {index: 10 * index for index in range(5)}
    assert pool.restarts == restarts + 1
    assert len(handles) == made + 1


def test_a_hung_actor_is_killed_and_its_item_redone(tmp_path):
    pool = make_pool(2, call_timeout_s=5)  # its own: in the shared one nothing else may run into so short a limit
    pool.wait_until_ready()
    pool.broadcast(lambda actor: actor.set_factor.remote(10))
    refs = pool.map(range(4), lambda actor, value: actor.hang_once.remote(value, tmp_path / "hung"))
    assert values(refs) == [0, 10, 20, 30]
    assert pool.restarts == 1
    pool.shutdown()


def test_an_error_of_the_call_itself_is_raised_and_not_retried(single):
    with pytest.raises(ValueError, match="cannot multiply 2"):
        single.map(range(4), lambda actor, value: actor.reject.remote(value))
    assert single.restarts == 0


def test_a_failing_broadcast_is_raised(single):
    single.broadcast(lambda actor: actor.reject.remote(2))
    with pytest.raises(ValueError, match="cannot multiply 2"):
        single.wait_until_ready()


def test_an_item_that_kills_every_actor_ends_the_run(single):
    with pytest.raises(RuntimeError, match=r"pool 'multipliers'.*item 0 \('poison'\).*max_restarts.*died"):
        single.map(["poison"], lambda actor, value: actor.die_always.remote(value))
    assert single.restarts == 2


def test_an_actor_that_finds_no_room_is_an_error_that_names_the_resources():
    def spawn(number: int) -> ray.actor.ActorHandle:
        return ray.remote(num_cpus=0, resources={"unobtainium": 1}, max_restarts=0)(Multiplier).remote()

    pool = make_pool(1, spawn=spawn, start_timeout_s=1)
    with pytest.raises(RuntimeError, match=r"did not start within 1 s; cluster: 1 node\(s\), CPU"):
        pool.wait_until_ready()
    pool.shutdown()
