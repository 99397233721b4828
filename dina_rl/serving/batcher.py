"""One model, one thread, and the samples of many requests in its forwards.

The oldest request says what the next forward is of (shape, levels, draws); others that are alike fill it. A request of
many samples takes several forwards, in the order of arrival with all others.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Thread
from time import monotonic

import torch

from dina_rl.scoring import NoiseKey, PictureScorer
from dina_rl.serving.protocol import Question

IDLE_S = 1.0  # between looks at an empty queue; an arrival ends the wait

log = logging.getLogger(__name__)

Scores = tuple[torch.Tensor, torch.Tensor]  # and their deviations over the draws, [M] each


class _Job:
    """A question on its way through the model."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.outcome: Future[Scores] = Future()
        self.arrived = monotonic()
        self.taken = 0  # samples that are in a forward or through it
        self.scores, self.deviations = torch.empty(2, len(question.rows))

    @property
    def total(self) -> int:
        return len(self.question.rows)

    @property
    def kind(self) -> tuple[object, ...]:
        """What may share a forward is equal in this."""
        return self.question.samples.shape[1:], self.question.levels, self.question.draws


@dataclass(frozen=True, slots=True)
class _Part:
    """Samples of one job in one forward."""

    job: _Job
    rows: slice


class Batcher:
    """Scores questions, as many samples in a forward as there are and may be.

    Args:
        rows: of a forward: samples times levels, but at least one sample.
        wait_s: how long the oldest request waits for others while its forward is not full.
        same_bits: fill every forward, so that all have one shape.
    """

    def __init__(self, scorer: PictureScorer, *, rows: int, wait_s: float, same_bits: bool) -> None:
        self._scorer = scorer
        self._rows = rows
        self._wait_s = wait_s
        self._same_bits = same_bits
        self._waiting: list[_Job] = []
        self._changed = Condition()
        self._closing = False
        self._thread = Thread(target=self._run, name="scorer", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def ask(self, question: Question) -> Future[Scores]:
        """The scores to come. Cancelled, what is left of the question is not scored.

        Its exception is a ValueError or RuntimeError where the model fails, or the batcher is closed.
        """
        job = _Job(question)
        with self._changed:
            if self._closing or not self.alive:
                job.outcome.set_exception(RuntimeError("the scorer has ended"))
            elif job.total == 0:
                job.outcome.set_result((job.scores, job.deviations))
            else:
                self._waiting.append(job)
                self._changed.notify()
        return job.outcome

    def close(self, timeout_s: float) -> None:
        """End the thread after its forward; what waits still is answered by an exception."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        parts: Sequence[_Part] = ()
        try:
            while parts := self._next():
                self._score(parts)
        finally:  # whatever ends it: nobody waits for a thread that is no more
            with self._changed:
                self._closing = True
                for job in (*(part.job for part in parts), *self._waiting):
                    _fail(job, RuntimeError("the scorer has ended"))

    def _next(self) -> list[_Part]:
        """What the next forward is of; nothing: the batcher is closed."""
        with self._changed:
            while not self._closing:
                self._waiting = [job for job in self._waiting if not job.outcome.done()]  # given up, or failed
                if not self._waiting:
                    self._changed.wait(IDLE_S)
                    continue
                oldest = self._waiting[0]
                alike = [job for job in self._waiting if job.kind == oldest.kind]
                room = self._room(oldest.question)
                left = self._wait_s - (monotonic() - oldest.arrived)
                if left <= 0 or sum(job.total - job.taken for job in alike) >= room:
                    return self._take(alike, room)
                self._changed.wait(left)
        return []

    def _take(self, jobs: Sequence[_Job], room: int) -> list[_Part]:
        """The first `room` samples of the jobs; those that are taken whole no longer wait."""
        parts = []
        for job in jobs:
            if room == 0:
                break
            count = min(room, job.total - job.taken)
            parts.append(_Part(job, slice(job.taken, job.taken + count)))
            job.taken += count
            room -= count
        self._waiting = [job for job in self._waiting if job.taken < job.total]
        return parts

    def _room(self, question: Question) -> int:
        """Samples of a forward."""
        return max(1, self._rows // max(1, len(question.levels)))

    def _score(self, parts: Sequence[_Part]) -> None:
        try:
            scores, deviations = self._forward(parts)
        except (RuntimeError, ValueError) as error:  # of torch, out of memory too, or of a scorer
            log.exception("a forward of %d requests failed", len(parts))
            for part in parts:
                _fail(part.job, error)
            return
        first = 0
        for part in parts:
            count = part.rows.stop - part.rows.start
            part.job.scores[part.rows] = scores[first : first + count]
            part.job.deviations[part.rows] = deviations[first : first + count]
            first += count
            if part.rows.stop == part.job.total:
                with suppress(InvalidStateError):  # who asked waits no more
                    part.job.outcome.set_result((part.job.scores, part.job.deviations))

    def _forward(self, parts: Sequence[_Part]) -> Scores:
        """Scores and deviations of the samples of all parts."""
        question = parts[0].job.question
        samples = torch.cat([self._looked_at(part.job.question.samples[part.rows]) for part in parts])
        prompts = [prompt for part in parts for prompt in part.job.question.prompts[part.rows]]
        keys = [
            NoiseKey(group=(prompt,), member="", seed=part.job.question.seed)
            for part in parts
            for prompt in part.job.question.prompts[part.rows]
        ]
        if self._scorer.space == "images":
            scores = self._scorer.score_images(samples, prompts, keys)
            return scores, torch.zeros(len(scores))
        missing = self._room(question) - len(samples) if self._same_bits else 0
        samples = torch.cat([samples, samples[-1:].expand(missing, -1, -1, -1)])
        asked = self._scorer.at(question.levels, draws=question.draws)
        scores, deviations = asked.score_draws(
            samples, [*prompts, *prompts[-1:] * missing], [*keys, *keys[-1:] * missing]
        )
        kept = len(prompts)
        return scores[:kept], deviations[:kept]

    def _looked_at(self, samples: torch.Tensor) -> torch.Tensor:
        """In fp32, pictures as large as the scorer looks at them: not before, as they may grow by that."""
        if self._scorer.space == "latents":
            return samples.float()
        return torch.stack([self._scorer.picture(pixels).tensor for pixels in samples])


def _fail(job: _Job, error: Exception) -> None:
    with suppress(InvalidStateError):  # it has failed in an earlier forward, or who asked waits no more
        job.outcome.set_exception(error)
