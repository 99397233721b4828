"""The learner's gang: one rank lost, all lost, and nobody waits forever."""

import os
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import ray
import torch

from actors.gang import Gang, GangLost, GangMember

pytestmark = pytest.mark.usefixtures("ray_local")
# Workers cannot import test modules by name.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


DIED = (
    r"The actor is dead because its worker process has died: Worker unexpectedly exits with [^.]+ "
    r"\(pid \d+, ip [\d.]+\)"
)


class Rank(GangMember):
    """Sums over the group, unless it is rank 1 and told to do worse."""

    def total(self) -> float:
        tensor = torch.tensor([self.rank + 1.0])
        torch.distributed.all_reduce(tensor)
        return tensor.item()

    def listens_at(self) -> set[str]:
        sockets = psutil.Process().net_connections("inet")
        return {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN and each.laddr.port == self.port}

    def listen(self) -> tuple[str, int]:
        address, self.port = super().listen()
        return address, self.port

    def die_at_rank_1(self) -> float:
        if self.rank == 1:
            os._exit(1)
        return self.total()

    def raise_at_rank_1(self) -> float:
        if self.rank == 1:
            raise ValueError("rank 1 has a problem")
        return self.total()

    def hang_at_rank_1(self) -> float:
        if self.rank == 1:
            time.sleep(600)
        return self.total()


@pytest.fixture
def handles() -> list[ray.actor.ActorHandle]:
    return []


@pytest.fixture
def gang(handles, call_timeout_s: float) -> Iterator[Gang]:
    def spawn(rank: int) -> ray.actor.ActorHandle:
        actor = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(Rank)
        handles.append(actor.remote(rank, 2, timeout_s=120))
        return handles[-1]

    gang = Gang(spawn, 2, name="learner", start_timeout_s=120, call_timeout_s=call_timeout_s)
    assert ray.get(gang.call(lambda rank: rank.total.remote()), timeout=60) == [3, 3]
    # Where its ranks meet others of the cluster come to, and nobody from the machine's other networks.
    assert ray.get(handles[0].listens_at.remote(), timeout=60) == {ray.util.get_node_ip_address()}
    yield gang
    gang.shutdown()


def assert_dead(handles: list[ray.actor.ActorHandle]) -> None:
    for handle in handles:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(handle.total.remote(), timeout=60)


# Only what hangs runs into the limit; Ray tells of a death or an error when it finds the time.
@pytest.mark.parametrize(
    ("call", "call_timeout_s", "error", "message"),
    [
        (lambda rank: rank.die_at_rank_1.remote(), 120, GangLost, rf"^learner: a rank was lost \(call\): {DIED}$"),
        (lambda rank: rank.hang_at_rank_1.remote(), 10, GangLost, r"2 of 2 not done after 10 s; cluster: 1 node"),
        (lambda rank: rank.raise_at_rank_1.remote(), 120, ValueError, "rank 1 has a problem"),
    ],
    ids=["dies", "hangs", "raises"],
)
def test_one_failing_rank_ends_all(gang, handles, call: Callable, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        gang.call(call)
    assert_dead(handles)


class Unable(GangMember):
    """Where a node's environment is another."""

    def __init__(self) -> None:
        raise ModuleNotFoundError("No module named 'deepspeed'")


def test_a_rank_that_cannot_be_made_says_why() -> None:
    def spawn(rank: int) -> ray.actor.ActorHandle:
        return ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(Unable).remote()

    with pytest.raises(GangLost, match=r"\(starting\): ModuleNotFoundError: No module named 'deepspeed'$"):
        Gang(spawn, 1, name="learner", start_timeout_s=120, call_timeout_s=120)
