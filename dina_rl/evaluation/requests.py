"""What the driver asks of a worker, and what it gets.

A request carries everything that its result depends on, so that a lost one can be given to any other worker.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from dina_rl.config import PictureScorerConfig, SetConfig
from dina_rl.data.sets.records import PreferenceRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a scorer is asked: at one noise level, an ensemble of them, or none where it has no noise."""

    levels: tuple[float, ...]
    draws: int = 1  # independent noise draws, each with scores of its own

    @property
    def label(self) -> str:
        return "t=" + ",".join(f"{level:g}" for level in self.levels) if self.levels else "plain"


PLAIN = View(levels=())
"""Of scorers that look at image files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why an image has no score."""

    reason: str
    broken: bool  # something is wrong with its file; else it fits no bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeRequest:
    """One shard of a latent store."""

    scorer: PictureScorerConfig  # its pipeline's codec encodes
    seed: int  # with which the scorer is opened, so that it may stay open; latents do not depend on it
    source: SetConfig
    store: Path
    shard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Some records of a set in some views of one scorer."""

    scorer: PictureScorerConfig
    seed: int
    source: SetConfig
    records: tuple[PreferenceRecord, ...]  # M images in all
    store: Path | None  # latents of the images; None: the scorer looks at the files themselves
    rows: tuple[int | None, ...]  # in the store, of all images of the records in a row; None: it has no latent
    problems: dict[int, Problem]  # position among those -> why it has no latent
    views: tuple[View, ...]
    batch_size: int
    known: torch.Tensor | None = None  # what an earlier run was answered by a server; what failed there is asked again


@dataclass(frozen=True, slots=True, kw_only=True)
class PartScores:
    """Scores of the images of a request's records, all in a row.

    A judge's are verdicts instead, see `judging`.
    """

    scores: tuple[torch.Tensor, ...]  # per view [draws, M] fp32; NaN where there is a problem
    problems: dict[int, Problem]  # position among the M


class Workers(Protocol):
    """One or many workers. Results come as they finish, with the position of their request."""

    def encode(self, requests: Iterable[EncodeRequest]) -> Iterator[tuple[int, int]]: ...

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[tuple[int, PartScores]]: ...
