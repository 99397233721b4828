"""One process that encodes and scores, wherever it runs: all that a Ray actor adds is a process of its own."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dina_rl import runtime
from dina_rl.config import ImageScorerConfig, PictureScorerConfig, SetConfig
from dina_rl.data.buckets import Size
from dina_rl.data.images import MAX_PIXELS, load_image
from dina_rl.data.sets.records import PreferenceRecord, PreferenceSet
from dina_rl.data.stores.latents import LatentStore
from dina_rl.evaluation.judging import judge_records
from dina_rl.evaluation.requests import PLAIN, EncodeRequest, PartScores, Problem, ScoreRequest
from dina_rl.evaluation.sets import open_source
from dina_rl.scorers.base import Judge
from dina_rl.scorers.registry import open_judge
from dina_rl.scoring import NoiseKey, PictureScorer, open_scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image:
    """One image of one record on its way through a scorer."""

    place: int  # position among the M
    record: PreferenceRecord
    position: int  # in the record


class EvaluationWorker:
    """Keeps the scorer and the set it used last; requests come ordered by them."""

    def __init__(self) -> None:
        self._opened: tuple[PictureScorerConfig, int, PictureScorer] | None = None
        self._judging: tuple[ImageScorerConfig, Judge] | None = None
        self._source: tuple[SetConfig, PreferenceSet] | None = None

    def encode(self, request: EncodeRequest) -> int:
        """Write a shard of latents; returns how many images it holds.

        Raises:
            ValueError: the scorer or the set cannot be opened.
        """
        scorer, source = self._scorer(request.scorer, request.seed), self._set(request.source)
        store = LatentStore(request.store)
        bucket, rows = store.info.shard(request.shard)
        images = torch.zeros(len(rows), 3, *store.buckets[bucket])
        unreadable = {}
        for offset, (row, key) in enumerate(zip(rows, store.images_of(rows), strict=True)):
            try:
                images[offset] = read_image(
                    source, key, size=store.buckets[bucket], max_pixels=request.source.max_pixels
                )
            except ValueError as error:
                unreadable[row] = str(error)
        store.write_shard(request.shard, scorer.encode(images).cpu(), unreadable)
        return len(rows)

    def score(self, request: ScoreRequest) -> PartScores:
        """Scores of a request in all its views; raises like `encode`.

        An image that cannot be read has a problem. A score that is not a number stays one.
        """
        if request.scorer.of_images is not None and request.scorer.of_images.pairwise:
            return judge_records(request, self._judge(request.scorer.of_images), self._set(request.source))
        scorer = self._scorer(request.scorer, request.seed)
        images = list(_images(request.records))
        if request.known is not None:
            known = request.known.clone()
            failed = [image for image in images if known[0, image.place].isnan()]
            return PartScores(scores=(known,), problems=self._score_files(request, scorer, failed, (known,)))
        scores = tuple(torch.full((view.draws, len(images)), torch.nan) for view in request.views)
        if request.store is None:
            return PartScores(scores=scores, problems=self._score_files(request, scorer, images, scores))
        self._score_latents(request, scorer, images, scores)
        return PartScores(scores=scores, problems=request.problems)

    def _score_latents(
        self, request: ScoreRequest, scorer: PictureScorer, images: list[_Image], scores: Sequence[torch.Tensor]
    ) -> None:
        """Fill `scores` from stored latents."""
        assert request.store is not None
        store = LatentStore(request.store)
        views = [scorer.at(view.levels, draws=request.scorer.draws) for view in request.views]
        present = [image for image in images if request.rows[image.place] is not None]
        rows = torch.tensor([request.rows[image.place] for image in present], dtype=torch.int64)
        buckets = store.info.bucket_of(rows)
        for bucket in buckets.unique().tolist():
            alike = (buckets == bucket).nonzero().flatten().tolist()
            for batch in _batches([present[number] for number in alike], request.batch_size):
                latents = store.latents(torch.tensor([request.rows[image.place] for image in batch]))
                places, prompts = [image.place for image in batch], [image.record.prompt for image in batch]
                for view, at_view, filled in zip(request.views, views, scores, strict=True):
                    for draw in range(view.draws):
                        keys = [_noise_key(request.source, image, draw) for image in batch]
                        filled[draw, places] = at_view.score_latents(latents, prompts, keys)

    def _score_files(
        self, request: ScoreRequest, scorer: PictureScorer, images: list[_Image], scores: Sequence[torch.Tensor]
    ) -> dict[int, Problem]:
        """Fill `scores` from the image files, for scorers with no use for latents; returns the problems."""
        assert all(view == PLAIN for view in request.views)
        source = self._set(request.source)
        problems = {}
        for batch in _batches(images, request.batch_size):
            samples, readable = [], []
            for image in batch:
                try:
                    content = source.image(image.record.images[image.position])
                    samples.append(scorer.sample(content, max_pixels=request.source.max_pixels))
                except ValueError as error:
                    problems[image.place] = Problem(reason=str(error), broken=True)
                else:
                    readable.append(image)
            prompts = [image.record.prompt for image in readable]
            keys = [_noise_key(request.source, image, 0) for image in readable]
            found = scorer.score_samples(samples, prompts, keys)
            for filled in scores:
                filled[0, [image.place for image in readable]] = found
        return problems

    def _judge(self, config: ImageScorerConfig) -> Judge:
        if self._judging is None or self._judging[0] != config:
            self._judging = config, open_judge(config, device=runtime.device())
        return self._judging[1]

    def _scorer(self, config: PictureScorerConfig, seed: int) -> PictureScorer:
        if self._opened is None or self._opened[:2] != (config, seed):
            self._opened = None  # the old model goes before the new one comes
            self._opened = config, seed, open_scorer(config, seed=seed)
        return self._opened[2]

    def _set(self, config: SetConfig) -> PreferenceSet:
        if self._source is None or self._source[0] != config:
            self._source = config, open_source(config)
        return self._source[1]


class InlineWorkers:
    """`Workers` in this process."""

    def __init__(self) -> None:
        self._worker = EvaluationWorker()

    def encode(self, requests: Iterable[EncodeRequest]) -> Iterator[tuple[int, int]]:
        for number, request in enumerate(requests):
            yield number, self._worker.encode(request)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[tuple[int, PartScores]]:
        for number, request in enumerate(requests):
            yield number, self._worker.score(request)


def _images(records: Sequence[PreferenceRecord]) -> Iterator[_Image]:
    place = 0
    for record in records:
        for position in range(len(record.images)):
            yield _Image(place=place, record=record, position=position)
            place += 1


def _batches(images: Sequence[_Image], size: int) -> Iterator[list[_Image]]:
    """Batches of up to `size` images that keep a record's images together, unless they are more than that."""
    batch: list[_Image] = []
    for number, image in enumerate(images):
        begins = number == 0 or images[number - 1].record.index != image.record.index
        together = sum(other.record.index == image.record.index for other in images[number : number + size])
        if batch and (len(batch) == size or (begins and len(batch) + together > size)):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def _noise_key(source: SetConfig, image: _Image, draw: int) -> NoiseKey:
    """Noise belongs to a record of a set and to a draw: not to the scorer, the level or the place in a batch."""
    return NoiseKey(group=(source.kind, source.split, image.record.index, draw), member=image.position)


def read_image(source: PreferenceSet, key: str, *, size: Size, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """RGB [3, H, W] in [0, 1] of the image behind a record's key, stretched to `size`.

    Raises:
        ValueError: it is missing or broken.
    """
    height, width = size
    pixels = load_image(source.image(key), height=height, width=width, max_pixels=max_pixels)
    return torch.tensor(pixels).permute(2, 0, 1).float() / 255
