"""Requests per second of a served DiNa-LRM, and what it does under more than it can bear: `python -m benchmarks.serve`.

Real HTTP on this machine, clients in threads of the same process, each asking anew as soon as it is answered. Three
servers of the same model take turns: batched, batched with the same bits, and one sample a forward; beside them full
forwards without a server. Then a batched one with room for few requests meets many clients with large ones.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event
from time import perf_counter, sleep
from typing import Annotated
from urllib.request import urlopen

import psutil
import torch
from pydantic import Field
from safetensors.torch import save

from benchmarks.clocks import CLOCKS, ClockName
from benchmarks.spread import Row, spread_table
from benchmarks.untrained import save_untrained
from dina_rl.cli import fail, load
from dina_rl.config import LoRAConfig, PipelineConfig, RewardModelConfig, ServeRun
from dina_rl.config.base import Indices, Positive, Rate, Section
from dina_rl.runtime import configure_process, device
from dina_rl.scoring import NoiseKey, PictureScorer, open_scorer
from dina_rl.seeding import normal
from dina_rl.serving.server import ScoreServer

UNTRAINED = RewardModelConfig(taps=(1, 2, 3), num_heads=4, lora=LoRAConfig(rank=16, alpha=32))
BATCHED, SAME_BITS, ONE_BY_ONE = "batched", "batched, same bits", "one by one"
ALONE = "without a server, full forwards"
PATIENCE_S = 60.0  # of a client
PAUSE_S = 0.05  # of a client that was refused
LOOK_S = 0.02  # between looks at the memory


class BenchmarkRun(Section):
    """Speed of a scorer over HTTP."""

    reward: str | None = None
    """directory of a reward model; None: an untrained one on the miniature world's pipeline"""
    concurrency: Indices = (1, 4, 16)
    """clients at a time"""
    samples: Positive = 1
    """samples of a request"""
    prompts: Positive = 32
    """prompts that are asked about; each is encoded once"""
    requests: Positive = 96
    """requests of a repeat, by all clients together"""
    repeats: Positive = 5
    """times that the servers take turns, after one that does not count"""
    max_batch: Positive = 16
    """rows of a batched forward"""
    overload_clients: Positive = 64
    """clients of a server that has no room for them"""
    overload_samples: Positive = 256
    """samples of one of their requests"""
    overload_room: Positive = 4
    """requests that it takes at a time"""
    overload_s: Annotated[Rate, Field(le=600)] = 15.0
    """how long they ask"""
    clock: ClockName = "wall"
    """what a second of the rates is: cpu counts the processor's, of clients too, where others use the cores"""
    threads: Positive = 1
    """torch threads"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request, answered."""

    status: int
    seconds: float


def ask(server: ScoreServer, body: bytes) -> Asked:
    begin = perf_counter()
    connection = HTTPConnection("127.0.0.1", int(server.server_address[1]), timeout=PATIENCE_S)
    try:
        connection.request("POST", "/score", body)
        reply = connection.getresponse()
        scores = json.loads(reply.read()).get("scores", ())
    finally:
        connection.close()
    assert None not in scores
    return Asked(status=reply.status, seconds=perf_counter() - begin)


def bodies(scorer: PictureScorer, *, requests: int, samples: int, prompts: int) -> list[bytes]:
    (shape, *_) = scorer.latent_shapes
    return [
        save(
            {"latents": normal((samples, *shape), "request", number)},
            metadata={"prompts": json.dumps(f"a scene with {number % prompts} circles")},
        )
        for number in range(requests)
    ]


@contextmanager
def serving(scorer: PictureScorer, run: ServeRun) -> Iterator[ScoreServer]:
    server = ScoreServer(run, token=None)
    server.start(scorer)
    try:
        yield server
    finally:
        server.stop()


def without_server(scorer: PictureScorer, run: BenchmarkRun) -> float:
    """Requests per second of their samples' forwards alone, all of them full."""
    (shape, *_) = scorer.latent_shapes
    count = -(-run.requests * run.samples // run.max_batch)
    texts = [f"a scene with {number % run.prompts} circles" for number in range(run.max_batch)]
    keys = [NoiseKey(group=(text,), member="") for text in texts]
    latents = normal((run.max_batch, *shape), "without server")
    clock = CLOCKS[run.clock]
    begin = clock()
    for _ in range(count):
        scorer.score_draws(latents, texts, keys)
    return count * run.max_batch / run.samples / (clock() - begin)


def speeds(scorer: PictureScorer, run: BenchmarkRun) -> tuple[dict[str, Row], dict[str, Row]]:
    """Requests per second, and a request's seconds, of every repeat."""
    asked = bodies(scorer, requests=run.requests, samples=run.samples, prompts=run.prompts)
    settings: dict[str, dict[str, object]] = {
        BATCHED: {},
        SAME_BITS: {"same_bits": True},
        ONE_BY_ONE: {"max_batch": 1, "wait_ms": 0},
    }
    clock = CLOCKS[run.clock]
    rates: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    with ExitStack() as stack:
        servers = {
            kind: stack.enter_context(
                serving(scorer, ServeRun.model_validate({"port": 0, "token": False, "max_batch": run.max_batch, **own}))
            )
            for kind, own in settings.items()
        }
        for repeat in range(run.repeats + 1):
            alone = without_server(scorer, run)
            if repeat:  # the first one warms up
                rates.setdefault(ALONE, []).append(alone)
            for clients in run.concurrency:
                for kind, server in servers.items():
                    begin = clock()
                    with ThreadPoolExecutor(clients) as pool:
                        answers = list(pool.map(lambda body, server=server: ask(server, body), asked))
                    took = clock() - begin
                    assert {each.status for each in answers} == {200}
                    if repeat:
                        name = f"{clients:>3} clients, {kind}"
                        rates.setdefault(name, []).append(len(asked) / took)
                        waits.setdefault(name, []).append(1000 * median(each.seconds for each in answers))
    return (
        {name: Row(values=values, digits=1) for name, values in rates.items()},
        {name: Row(values=values, digits=1) for name, values in waits.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Overload:
    """What became of more requests than there was room for."""

    statuses: Counter[int]
    answered_s: Sequence[float]  # what each request with scores took
    refused_s: Sequence[float]
    health_s: Sequence[float]  # what /health took meanwhile
    before: int  # bytes of this process, clients and all
    peak: int
    body: int


def overload(scorer: PictureScorer, run: BenchmarkRun) -> Overload:
    """Many clients with large requests at a server with room for few; who is refused asks again soon."""
    (body,) = bodies(scorer, requests=1, samples=run.overload_samples, prompts=1)
    ended, health, memory, process = Event(), list[float](), list[int](), psutil.Process()

    def client() -> list[Asked]:
        answers = []
        while not ended.is_set():
            answers.append(ask(server, body))
            if answers[-1].status != 200:
                ended.wait(PAUSE_S)
        return answers

    def watch() -> None:
        while not ended.is_set():
            memory.append(process.memory_info().rss)
            begin = perf_counter()
            with urlopen(f"{server.url}/health", timeout=PATIENCE_S):
                health.append(perf_counter() - begin)
            ended.wait(LOOK_S)

    settings = ServeRun(port=0, token=False, max_batch=run.max_batch, max_requests=run.overload_room)
    with serving(scorer, settings) as server, ThreadPoolExecutor(run.overload_clients + 1) as pool:
        ask(server, body)  # what one needs is no part of the growth
        before = process.memory_info().rss
        watching = pool.submit(watch)
        clients = [pool.submit(client) for _ in range(run.overload_clients)]
        sleep(run.overload_s)
        ended.set()
        watching.result()
        answers = [each for client_ in clients for each in client_.result()]
    return Overload(
        statuses=Counter(each.status for each in answers),
        answered_s=[each.seconds for each in answers if each.status == 200],
        refused_s=[each.seconds for each in answers if each.status == 503],
        health_s=health,
        before=before,
        peak=max(memory),
        body=len(body),
    )


def told(found: Overload, run: BenchmarkRun) -> str:
    shares = ", ".join(f"{count} x {status}" for status, count in sorted(found.statuses.items()))
    return "\n".join(
        (
            f"overload: {run.overload_clients} clients, room for {run.overload_room}, "
            f"{found.body / 2**20:.2f} MiB a request, {run.overload_s:g} s",
            f"  answers           {shares}",
            f"  with scores       {_spread(found.answered_s)}",
            f"  refused           {_spread(found.refused_s)}",
            f"  /health           {_spread(found.health_s)}",
            f"  samples/s         {found.statuses[200] * run.overload_samples / run.overload_s:.0f}",
            f"  memory, MiB       {found.before / 2**20:.0f} before, {found.peak / 2**20:.0f} at its peak",
        )
    )


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    return f"{1000 * median(ordered):.0f} ms, 95 % within {1000 * ordered[(len(ordered) * 95 - 1) // 100]:.0f}"


def main(argv: Sequence[str]) -> None:
    run = load(BenchmarkRun, argv, program="python -m benchmarks.serve")
    configure_process(run.threads)
    with TemporaryDirectory() as scratch:
        try:
            path = run.reward or str(save_untrained(Path(scratch) / "reward", PipelineConfig(), UNTRAINED))
            scorer = open_scorer(path)
        except ValueError as error:
            fail(str(error))
        rates, waits = speeds(scorer, run)
        where = torch.cuda.get_device_name() if device() == "cuda" else f"CPU, {run.threads} threads"
        print(
            f"{where}; {run.samples} samples a request, {run.requests} requests, {run.repeats} repeats, "
            f"{run.clock} clock"
        )
        print("requests/s" + spread_table(rates)[10:])
        print("median ms " + spread_table(waits)[10:])
        print(told(overload(scorer, run), run))


if __name__ == "__main__":
    main(sys.argv[1:])
