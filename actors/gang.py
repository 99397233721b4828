"""The learner's ranks as one unit: created together, called together, lost together.

A rank that dies leaves the others waiting inside a collective, so there is no replacing a single one: all are killed,
and the caller builds a new gang from its last checkpoint.
"""

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Generic, TypeVar

import ray
import torch.distributed
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from actors.handles import AnyRef, Handle, kill, ready
from actors.losses import ACTOR_DEATHS, cause_of
from actors.network import interface_of, meet_over_the_nodes_network
from actors.placement import check, wait_all
from dina_rl.errors import RunStopped

DEATH_NOTICE_S = 5.0  # Ray reports a dead process well within this
STARTING = "starting"


class GangLost(RuntimeError):
    """A rank died or hung; the gang is gone."""


class GangMember:
    """One rank's part of the rendezvous; the base of an actor class whose instances form a `Gang`.

    Args:
        timeout_s: longest wait for the other ranks, at the rendezvous and in each collective.
    """

    def __init__(self, rank: int, world_size: int, *, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._store: torch.distributed.TCPStore | None = None

    @ray.method
    def listen(self) -> tuple[str, int]:
        """Rank 0 opens the store that all ranks meet at; returns its (address, port)."""
        address = ray.util.get_node_ip_address()
        # Left to itself the store listens on all of the machine's networks, as it has to behind a NAT, where the node's
        # address is none of the machine's. Port 0: the system picks a free one, and it is held at once, so nobody can
        # take it in between.
        place = "" if interface_of(address) is None else address
        listener = socket.create_server((place, 0), family=socket.getaddrinfo(address, 0)[0][0])
        self._store = torch.distributed.TCPStore(
            address,
            listener.getsockname()[1],
            self.world_size,
            is_master=True,
            timeout=timedelta(seconds=self.timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return address, self._store.port

    @ray.method
    def join(self, address: str, port: int) -> None:
        """Form torch's default process group. All ranks must call it."""
        timeout = timedelta(seconds=self.timeout_s)
        if self._store is None:
            self._store = torch.distributed.TCPStore(address, port, self.world_size, is_master=False, timeout=timeout)
        # DeepSpeed reads these; Ray shows each actor only its own device, hence LOCAL_RANK 0 on every rank.
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world_size), LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        meet_over_the_nodes_network()
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=self._store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
        )


Member = TypeVar("Member", bound=GangMember)
Result = TypeVar("Result")


class Gang(Generic[Member]):
    """`size` actors from `spawn(rank)`, each a `GangMember`, joined in one process group.

    Args:
        spawn: creates the actor of a rank; with `max_restarts=0` and `max_task_retries=0`.
        name: of the gang, for messages.
        start_timeout_s: longest wait for all constructors, and then for the process group.
        call_timeout_s: longest run of one call.

    Raises:
        GangLost: a rank died while it started, or they did not find each other.
        RunStopped: their constructors took too long.
    """

    def __init__(
        self,
        spawn: Callable[[int], Handle[Member]],
        size: int,
        *,
        name: str,
        start_timeout_s: float,
        call_timeout_s: float,
    ) -> None:
        self.name = name
        self._call_timeout_s = call_timeout_s
        self._handles = [spawn(rank) for rank in range(size)]
        self._run([ready(handle) for handle in self._handles], start_timeout_s, STARTING)
        meeting_point = self._handles[0].listen.remote()
        self._run([meeting_point], start_timeout_s, "rendezvous")
        address, port = ray.get(meeting_point, timeout=start_timeout_s)
        self._run([handle.join.remote(address, port) for handle in self._handles], start_timeout_s, "rendezvous")

    def call(self, call: Callable[[Handle[Member]], ray.ObjectRef[Result]]) -> list[ray.ObjectRef[Result]]:
        """Submit `call` to every rank and wait for all; returns their finished results, in order.

        Raises:
            GangLost: a rank died or exceeded the limit; all ranks are killed.
            ray.exceptions.RayTaskError: a rank raised; all ranks are killed, since the others may wait for it forever.
            ray.exceptions.ObjectLostError: what they were to read was lost with its node; all ranks are killed.
        """
        return [ref for (ref,) in self.call_often(call, [1] * len(self._handles))]

    def call_often(
        self, call: Callable[[Handle[Member]], ray.ObjectRef[Result]], times: Sequence[int]
    ) -> list[list[ray.ObjectRef[Result]]]:
        """As `call`, but so many times of each rank, one after the other."""
        refs = [[call(handle) for _ in range(count)] for handle, count in zip(self._handles, times, strict=True)]
        self._run([ref for of_rank in refs for ref in of_rank], self._call_timeout_s, "call")
        return refs

    def shutdown(self) -> None:
        """Kill all ranks."""
        for handle in self._handles:
            kill(handle)
        self._handles = []

    def _run(self, refs: Sequence[AnyRef], timeout_s: float, what: str) -> None:
        try:
            wait_all(refs, timeout_s=timeout_s, what=f"{self.name} ({what})")
        except RayTaskError:
            death = _death_among(refs)
            self.shutdown()
            if death is not None:
                raise GangLost(f"{self.name}: a rank was lost ({what}): {cause_of(death)}") from death
            raise
        except TimeoutError as late:
            self.shutdown()
            if what == STARTING:
                raise RunStopped(str(late)) from late
            raise GangLost(f"{self.name}: a rank was lost ({what}): {late}") from late
        except ACTOR_DEATHS as death:
            self.shutdown()
            raise GangLost(f"{self.name}: a rank was lost ({what}): {cause_of(death)}") from death
        except ObjectLostError:  # of what the ranks were to read
            self.shutdown()
            raise


def _death_among(refs: Sequence[AnyRef]) -> RayError | None:
    """The death of a rank behind another rank's error, if there is one.

    When a rank dies, the collective of the others fails at once and may be heard of first; Ray tells of the death soon
    after. Without this look a lost rank would pass for an error of the program.
    """
    done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=DEATH_NOTICE_S, fetch_local=False)
    for ref in done:
        try:
            check(ref)
        except (RayTaskError, ObjectLostError):
            continue
        except ACTOR_DEATHS as death:
            return death
    return None
