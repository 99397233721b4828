"""The learner's state from its ranks into the object store, and back: `python -m benchmarks.state_way`, a minute.

The state is made up, of matrices as large as those of SD3.5-medium, and whole on every rank, as at ZeRO stage 0; what
is measured is its way alone. Whole: every rank copies all of it, as a gathered one has to be, and rank 0 sends it as
tensors of torch. Shares: each rank copies and sends its own, in parts, as the learner does. Then every rank gets all of
it. They take turns; a ratio is of neighbours.
"""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated

import ray
import torch
from pydantic import Field
from torch import nn

from actors.gang import Gang, GangMember
from actors.handles import Handle
from actors.placement import actor_options
from actors.remote import StoredTensors, in_parts, together
from benchmarks.spread import Row, ratios, spread_table
from dina_rl.alignment.engine import share
from dina_rl.cli import load
from dina_rl.config import WorkersConfig
from dina_rl.config.base import Positive, Section

WHOLE, SHARES = "whole, from rank 0", "in shares"
MATRIX = (1536, 6144)  # of SD3.5-medium's feed-forward layers
MATRIX_MIB = 4 * MATRIX[0] * MATRIX[1] // 2**20
LIMIT_S = 600.0

State = dict[str, torch.Tensor]
Seconds = dict[str, list[float]]  # by way, one a repeat


class BenchmarkRun(Section):
    """The way of a learner's state."""

    ranks: Positive = 2
    """of the learner, on this machine"""
    mib: Annotated[int, Field(ge=MATRIX_MIB, multiple_of=MATRIX_MIB)] = 28 * MATRIX_MIB
    """size of the state, of matrices of 36 MiB"""
    part_mib: Positive = WorkersConfig().weights_part_mib
    """size of the parts of a share"""
    repeats: Positive = 3
    """times that the state goes each way, after one that does not count"""


class Rank(GangMember):
    """Holds a state."""

    @ray.method
    def build(self, mib: int) -> None:
        count = mib // MATRIX_MIB
        self._state = {str(number): torch.full(MATRIX, 1.0 + number) for number in range(count)}
        parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in self._state.items()}
        self._mine = share(parameters, self.rank, self.world_size)
        self._offered: deque[StoredTensors] = deque()

    @ray.method
    def whole(self) -> State:
        copied = {name: tensor.clone() for name, tensor in self._state.items()}
        return copied if self.rank == 0 else {}

    @ray.method
    def offer(self, part_mib: int) -> int:
        mine = {name: tensor.clone() for name, tensor in self._state.items() if name in self._mine}
        self._offered.extend(in_parts(mine, part_mib * 2**20))
        return len(self._offered)

    @ray.method
    def take(self) -> StoredTensors:
        return self._offered.popleft()

    @ray.method
    def forget(self) -> None:
        for tensor in self._state.values():
            tensor.zero_()

    @ray.method
    def remembers(self) -> bool:
        return all(bool((tensor == 1.0 + int(name)).all()) for name, tensor in self._state.items())

    @ray.method
    def get_whole(self, state: State) -> None:
        self._get(state)

    @ray.method
    def get_parts(self, *parts: StoredTensors) -> None:
        self._get(together(parts))

    def _get(self, state: State) -> None:
        for name, tensor in self._state.items():
            tensor.copy_(state[name])


def measure(benchmark: BenchmarkRun) -> tuple[Seconds, Seconds]:
    """Seconds to keep a state, and to get it again. Needs a Ray."""

    def spawn(rank: int) -> Handle[Rank]:
        options = actor_options(WorkersConfig(), num_gpus=0)
        return ray.remote(**options)(Rank).remote(rank, benchmark.ranks, timeout_s=LIMIT_S)

    gang = Gang[Rank](spawn, benchmark.ranks, name="ranks", start_timeout_s=LIMIT_S, call_timeout_s=LIMIT_S)

    def whole() -> Callable[[], object]:
        state = gang.call(lambda rank: rank.whole.remote())[0]
        return lambda: gang.call(lambda rank: rank.get_whole.remote(state))

    def shares() -> Callable[[], object]:
        offers = gang.call(lambda rank: rank.offer.remote(benchmark.part_mib))
        taken = gang.call_often(lambda rank: rank.take.remote(), ray.get(offers, timeout=LIMIT_S))
        parts = [part for of_rank in taken for part in of_rank]
        return lambda: gang.call(lambda rank: rank.get_parts.remote(*parts))

    ways = {WHOLE: whole, SHARES: shares}
    kept: Seconds = {way: [] for way in ways}
    got: Seconds = {way: [] for way in ways}
    try:
        gang.call(lambda rank: rank.build.remote(benchmark.mib))
        for number in range(benchmark.repeats + 1):
            for way, keep in [*ways.items()][:: 1 if number % 2 else -1]:
                begin = perf_counter()
                get = keep()
                seconds = perf_counter() - begin
                gang.call(lambda rank: rank.forget.remote())
                begin = perf_counter()
                get()
                again = perf_counter() - begin
                assert all(ray.get(gang.call(lambda rank: rank.remembers.remote()), timeout=LIMIT_S))
                if number:  # the first one warms up
                    kept[way].append(seconds)
                    got[way].append(again)
                del get  # and with it what lies in the store
    finally:
        gang.shutdown()
    return kept, got


def report(benchmark: BenchmarkRun, kept: Seconds, got: Seconds) -> str:
    """Both ways."""
    rows = {}
    for what, seconds in (("kept", kept), ("got again", got)):
        for way, values in seconds.items():
            rows[f"{what}, {way}, s"] = Row(values=values, digits=2)
        rows[f"  whole / shares, {what}"] = Row(values=ratios(seconds[WHOLE], seconds[SHARES]), digits=1)
    rows["MiB/s kept in shares"] = Row(values=[benchmark.mib / each for each in kept[SHARES]], digits=0)
    return f"{benchmark.ranks} ranks, {benchmark.mib} MiB, {benchmark.repeats} repeats\n{spread_table(rows)}"


def main(argv: Sequence[str]) -> None:
    from jobs.cluster import start_ray

    benchmark = load(BenchmarkRun, argv, program="python -m benchmarks.state_way")
    with TemporaryDirectory() as scratch:
        start_ray(Path(scratch))
        print(report(benchmark, *measure(benchmark)))


if __name__ == "__main__":
    main(sys.argv[1:])
