"""Who sits on which GPU: Ray places actors by these records (`actors/placement.py`), and the plan counts by them.

colocated   GPU k: rollout k, scorer k, rank k; all sample, then all score, then all train
split       every actor has GPUs of its own, or a share of one; encoding and scoring overlap with sampling

Text encoders are large and soon done: few actors hold them, text k on the GPU of rollout k. Colocated they have the
first turn; split they share that GPU, which holds no more then than if the rollout actor had them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dina_rl.config import WorkersConfig

Kind = Literal["text", "rollout", "scorer", "learner"]
KINDS: tuple[Kind, ...] = ("text", "rollout", "scorer", "learner")
COLOCATED_SHARE = 0.25  # of a GPU, in Ray's books: what each of up to four actors that take turns asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One actor's place."""

    kind: Kind
    number: int  # among its kind; a learner's is its rank
    gpus: float  # what its actor asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Seats on one node that are reserved before anything starts, and kept for who comes after a lost actor."""

    seats: tuple[Seat, ...]
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All seats of a run."""

    bundles: tuple[Bundle, ...]  # a learner rank in each, or a text actor beside its rollout actor
    free: tuple[Seat, ...]  # where Ray finds room
    in_turns: bool  # the kinds work one after the other

    def seats(self) -> Iterator[Seat]:
        """All of them."""
        for bundle in self.bundles:
            yield from bundle.seats
        yield from self.free

    def gpus(self) -> list[tuple[Seat, ...]]:
        """Who sits on each GPU. An actor with several works on the first of them; nobody sits on the others."""
        if self.in_turns:
            return [bundle.seats for bundle in self.bundles]
        seats = list(self.seats())
        whole = [at for seat in seats for at in [(seat,), *[()] * (round(seat.gpus) - 1)] if seat.gpus >= 1]
        return [*whole, *_packed([seat for seat in seats if 0 < seat.gpus < 1])]


def layout_of(workers: WorkersConfig) -> Layout:
    """The layout that the configuration asks for."""
    if workers.colocated:
        return _colocated(workers.gpus, workers.text_workers)
    ranks = [Seat(kind="learner", number=rank, gpus=workers.gpus_per_rank) for rank in range(workers.learner_ranks)]
    beside = [_beside(number, workers.gpus_per_rollout) for number in range(workers.text_workers)]
    others = range(workers.text_workers, workers.rollout_workers)
    rollouts = [Seat(kind="rollout", number=i, gpus=workers.gpus_per_rollout) for i in others]
    scorers = [Seat(kind="scorer", number=i, gpus=workers.gpus_per_scorer) for i in range(workers.scorers)]
    return Layout(
        bundles=(*(Bundle(seats=(rank,), gpus=rank.gpus) for rank in ranks), *beside),
        free=(*rollouts, *scorers),
        in_turns=False,
    )


def _beside(number: int, gpus: float) -> Bundle:
    """A text actor and its rollout actor, with the GPUs of the latter: half of one each, or whole ones of several."""
    own = gpus / 2 if gpus <= 1 else 1.0
    seats = Seat(kind="text", number=number, gpus=own), Seat(kind="rollout", number=number, gpus=gpus - own)
    return Bundle(seats=seats, gpus=gpus)


def _colocated(gpus: int, text_workers: int) -> Layout:
    def bundle(number: int) -> Bundle:
        kinds = KINDS if number < text_workers else KINDS[1:]
        return Bundle(seats=tuple(Seat(kind=kind, number=number, gpus=COLOCATED_SHARE) for kind in kinds), gpus=1)

    return Layout(bundles=tuple(bundle(number) for number in range(gpus)), free=(), in_turns=True)


def _packed(seats: list[Seat]) -> list[tuple[Seat, ...]]:
    """Seats with a share of a GPU, each on the first that has room for it."""
    gpus: list[list[Seat]] = []
    for seat in seats:
        room = (gpu for gpu in gpus if sum(each.gpus for each in gpu) + seat.gpus <= 1)
        gpu = next(room, None)
        if gpu is None:
            gpus.append(gpu := [])
        gpu.append(seat)
    return [tuple(gpu) for gpu in gpus]
