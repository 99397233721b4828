"""The evaluator's workers on Ray: `EvaluationWorker` in processes of their own, in a pool that replaces lost ones."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import ray
from ray.exceptions import RayTaskError

from actors.handles import Handle
from actors.placement import actor_options
from actors.pool import Pool
from dina_rl.config import EvaluationWorkersConfig
from dina_rl.errors import RunStopped
from dina_rl.evaluation.requests import EncodeRequest, PartScores, ScoreRequest
from dina_rl.evaluation.worker import EvaluationWorker
from dina_rl.loading import announce
from dina_rl.runtime import configure_process
from dina_rl.scoring import loads

Request = TypeVar("Request", EncodeRequest, ScoreRequest)
Result = TypeVar("Result")


class EvaluationActor:
    def __init__(self, threads: int) -> None:
        configure_process(threads)
        self._worker = EvaluationWorker()

    @ray.method
    def encode(self, request: EncodeRequest) -> int:
        return self._worker.encode(request)

    @ray.method
    def score(self, request: ScoreRequest) -> PartScores:
        return self._worker.score(request)


class RayWorkers:
    """`Workers` on a pool of actors. Latent stores must lie on storage that all nodes share."""

    def __init__(self, config: EvaluationWorkersConfig) -> None:
        self._timeout_s = config.call_timeout_s
        self._who = f"{config.num_workers} scoring workers"
        options = actor_options(config, num_gpus=config.gpus_per_actor)
        self._pool = Pool(
            lambda number: ray.remote(**options)(EvaluationActor).remote(config.threads_per_actor),
            config.num_workers,
            name="scoring workers",
            start_timeout_s=config.start_timeout_s,
            call_timeout_s=config.call_timeout_s,
            max_restarts=config.max_restarts,
        )

    def encode(self, requests: Iterable[EncodeRequest]) -> Iterator[tuple[int, int]]:
        yield from self._stream(requests, lambda actor, request: actor.encode.remote(request))

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[tuple[int, PartScores]]:
        yield from self._stream(requests, lambda actor, request: actor.score.remote(request))

    def shutdown(self) -> None:
        self._pool.shutdown()

    def _told(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The same; where the scorer is another one, which workers are about to open, says what they load."""
        scorer = None
        for request in requests:
            if request.scorer != scorer:
                scorer = request.scorer
                announce(self._who, loads(scorer))
            yield request

    def _stream(
        self, requests: Iterable[Request], call: Callable[[Handle[EvaluationActor], Request], ray.ObjectRef[Result]]
    ) -> Iterator[tuple[int, Result]]:
        """Results as they finish.

        Raises:
            ValueError, RunStopped: a worker says so: a scorer or set that cannot be opened, or storage refuses.
        """
        try:
            for number, ref in self._pool.stream(self._told(requests), call):
                yield number, ray.get(ref, timeout=self._timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, (ValueError, RunStopped)):
                raise error.cause from None
            raise
