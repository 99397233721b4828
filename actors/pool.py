"""A pool of identical actors that survives the death of any of them.

The driver owns the policy of recovery: a dead or hung actor is killed, a new one is created, told first what the pool
was last told (the policy's weights, whose turn it is), and given the lost work again. Work carries its own seeds: the
result is the same.

    submit -> [start] [sync] [item] [item]      one FIFO per actor, as the actor itself runs its calls
               ^ the head is what the actor is doing; only heads are waited for
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import ray
from ray.exceptions import RayTaskError

from actors.handles import Actor, AnyRef, Handle, kill, ready
from actors.losses import ACTOR_DEATHS, cause_of
from actors.placement import REPORT_EVERY_S, check, resources
from dina_rl.errors import RunStopped

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Purpose = Literal["start", "sync", "work"]
ITEM_SHOWN = 200  # characters
CAPACITY = 2  # items per actor: one running, one queued so that it never waits for the driver


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work(Generic[Actor]):
    """One item of a stream, kept until its result is known."""

    index: int
    item: object  # to be named in messages
    submit: Callable[[Handle[Actor]], AnyRef]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call(Generic[Actor]):
    """A call that was submitted to an actor."""

    ref: AnyRef
    purpose: Purpose
    work: _Work[Actor] | None = None


@dataclass(slots=True, kw_only=True)
class _Member(Generic[Actor]):
    """An actor and its submitted calls, oldest first."""

    handle: Handle[Actor]
    calls: deque[_Call[Actor]] = field(default_factory=deque)
    head_since: float = 0.0  # when the oldest call became the oldest

    def submit(self, call: _Call[Actor]) -> None:
        if not self.calls:
            self.head_since = time.monotonic()
        self.calls.append(call)

    def pop(self) -> _Call[Actor]:
        self.head_since = time.monotonic()
        return self.calls.popleft()

    def work(self) -> list[_Work[Actor]]:
        return [call.work for call in self.calls if call.work is not None]


class Pool(Generic[Actor]):
    """`size` actors from `spawn(number)`, all alike.

    Actors must be created with `max_restarts=0` and `max_task_retries=0`; their methods return their values (a value
    that an actor `ray.put`s dies with it). One stream runs at a time. Not thread-safe.

    Args:
        spawn: creates actor number 0 to size - 1; called again with the same number to replace it.
        opened: the call with which an actor is ready. What a constructor raises is lost to Ray's error of a dead actor,
            which the pool replaces in vain; what this call raises comes here as it is.
        name: of the pool, for messages.
        start_timeout_s: longest wait for one actor's constructor and `opened`.
        call_timeout_s: longest run of one call; then the actor counts as hung and is killed.
        max_restarts: actors replaced in the pool's lifetime before it gives up.
    """

    def __init__(
        self,
        spawn: Callable[[int], Handle[Actor]],
        size: int,
        *,
        opened: Callable[[Handle[Actor]], AnyRef] = ready,
        name: str,
        start_timeout_s: float,
        call_timeout_s: float,
        max_restarts: int,
    ) -> None:
        self.name = name
        self.restarts = 0
        self._spawn = spawn
        self._opened = opened
        self._told: dict[str, Callable[[Handle[Actor]], AnyRef]] = {}  # by subject, what was told last at the end
        self._limits: dict[Purpose, float] = {"start": start_timeout_s, "sync": call_timeout_s, "work": call_timeout_s}
        self._max_restarts = max_restarts
        self._pending: deque[_Work[Actor]] = deque()
        self._members = [self._create(number) for number in range(size)]

    def wait_until_ready(self) -> None:
        """Block until every actor runs and has been told what there is to tell."""
        while any(member.calls for member in self._members):
            self._advance()

    def broadcast(self, call: Callable[[Handle[Actor]], AnyRef], *, about: str = "weights") -> None:
        """Submit `call` to every actor, to run after what is submitted and before what is not. Does not wait.

        A new actor is told the last call of each subject before any work, in the order in which they came.
        """
        self._told.pop(about, None)
        self._told[about] = call
        for member in self._members:
            member.submit(_Call(ref=call(member.handle), purpose="sync"))

    def map(
        self, items: Iterable[Item], call: Callable[[Handle[Actor], Item], ray.ObjectRef[Result]]
    ) -> list[ray.ObjectRef[Result]]:
        """The finished results of `call` on every item, in the items' order; raises like `stream`."""
        return [ref for _, ref in sorted(self.stream(items, call), key=lambda result: result[0])]

    def stream(
        self, items: Iterable[Item], call: Callable[[Handle[Actor], Item], ray.ObjectRef[Result]]
    ) -> Iterator[tuple[int, ray.ObjectRef[Result]]]:
        """Yield (index, result) as results finish. `items` is pulled only as actors become free.

        Streams chain: `scorers.stream(rollouts.stream(...), ...)` scores a rollout while others are still sampled.

        Raises:
            RunStopped: more actors were lost than `max_restarts`, or one did not start in time.
            ray.exceptions.RayTaskError: the call itself raised; that is not retried.
        """
        left = len(self._pending) + sum(len(member.work()) for member in self._members)
        assert left == 0, f"pool {self.name!r}: the previous stream was not exhausted"
        source = enumerate(items)
        refs: dict[int, ray.ObjectRef[Result]] = {}  # of the items that are under way, lost ones by their last call

        def work_on(index: int, item: Item) -> _Work[Actor]:
            def submit(handle: Handle[Actor]) -> ray.ObjectRef[Result]:
                refs[index] = call(handle, item)
                return refs[index]

            return _Work(index=index, item=item, submit=submit)

        exhausted = False
        while True:
            member = self._freest()
            if member is not None and not self._pending and not exhausted:
                try:
                    self._pending.append(work_on(*next(source)))
                except StopIteration:
                    exhausted = True
            if member is not None and self._pending:
                work = self._pending.popleft()
                member.submit(_Call(ref=work.submit(member.handle), purpose="work", work=work))
            elif any(each.work() for each in self._members):
                for done in self._advance():
                    yield done.index, refs.pop(done.index)
            else:
                return

    def shutdown(self) -> None:
        """Kill all actors."""
        for member in self._members:
            kill(member.handle)
        self._members = []

    def _create(self, number: int) -> _Member[Actor]:
        member = _Member(handle=self._spawn(number))
        member.submit(_Call(ref=self._opened(member.handle), purpose="start"))
        for call in self._told.values():
            member.submit(_Call(ref=call(member.handle), purpose="sync"))
        return member

    def _freest(self) -> _Member[Actor] | None:
        """The actor with the least work submitted, None if all are at capacity."""
        member = min(self._members, key=lambda member: len(member.work()))
        return member if len(member.work()) < CAPACITY else None

    def _advance(self) -> list[_Work[Actor]]:
        """Wait for the oldest call of any actor; replace dead and hung actors. Returns the work that is done."""
        heads = {member.calls[0].ref: number for number, member in enumerate(self._members) if member.calls}
        now = time.monotonic()
        slack = min(self._deadline(self._members[number]) for number in heads.values()) - now
        done, waiting = ray.wait(
            list(heads),
            num_returns=1,
            timeout=min(max(slack, 0.0), REPORT_EVERY_S),
            fetch_local=False,
        )
        finished: list[_Work[Actor]] = []
        for ref in done:
            number = heads[ref]
            try:
                check(ref)
            except RayTaskError:
                raise
            except ACTOR_DEATHS as death:
                self._replace(number, f"died: {cause_of(death)}")
            else:
                call = self._members[number].pop()
                if call.work is not None:
                    finished.append(call.work)
        if not done:
            self._judge_waiting([heads[ref] for ref in waiting])
        return finished

    def _judge_waiting(self, numbers: list[int]) -> None:
        """None of these actors' oldest calls is done: replace those that are over their limit."""
        starting = []
        for number in numbers:
            member = self._members[number]
            purpose = member.calls[0].purpose
            if time.monotonic() >= self._deadline(member):
                if purpose == "start":
                    raise RunStopped(
                        f"pool {self.name!r}: actor {number} did not start within {self._limits['start']:g} s; "
                        f"{resources()}"
                    )
                self._replace(number, f"hung: one call ({purpose}) ran longer than {self._limits[purpose]:g} s")
            elif purpose == "start":
                starting.append(number)
        if starting:
            size = len(self._members)
            log.warning("pool %r: %d of %d have started; %s", self.name, size - len(starting), size, resources())

    def _deadline(self, member: _Member[Actor]) -> float:
        return member.head_since + self._limits[member.calls[0].purpose]

    def _replace(self, number: int, reason: str) -> None:
        member = self._members[number]
        kill(member.handle)
        lost = member.work()
        self.restarts += 1
        which = f"item {lost[0].index} ({_cut(repr(lost[0].item))})" if lost else "no item"
        if self.restarts > self._max_restarts:
            raise RunStopped(
                f"pool {self.name!r}: actor {number} was lost with {which}, after {self._max_restarts} replaced actors "
                f"(workers.max_restarts); it {reason}"
            )
        log.warning("pool %r: actor %d was lost with %s and is replaced; it %s", self.name, number, which, reason)
        self._pending.extendleft(reversed(lost))  # at the front: lost work is the oldest
        self._members[number] = self._create(number)


def _cut(item: str) -> str:
    return item if len(item) <= ITEM_SHOWN else f"{item[:ITEM_SHOWN]}..."
