"""Scores of scorers on sets, each computed once and kept in files.

    sizes/SET.json                            (height, width) of every image, where buckets are asked for
    latents/KEY/                              LatentStore of a set's images for one pipeline
    scores/KEY/task.json                      what KEY is the digest of: all that decides the numbers
    scores/KEY/part-00000.safetensors         `scores` [draws, images] of consecutive records; metadata: problems,
                                              and the sha256 of both

Of a judge `scores` are verdicts, see `judging`. What a server failed to answer is asked again by the next run.
KEY is a digest of the scorer's weights, its pipeline, the set's records, noise, levels and batch geometry: another
table over the same cache finds its scores. Image files are trusted not to change under their names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from dina_rl.checkpoint import write_bytes, write_json
from dina_rl.config import EvaluateRun, PictureScorerConfig, ServedScorerConfig
from dina_rl.data.buckets import Bucketing, Size
from dina_rl.data.images import READING
from dina_rl.data.sets.records import PreferenceRecord, PreferenceSet
from dina_rl.data.stores.latents import LatentStore, StoreInfo
from dina_rl.evaluation.identity import Identities, digest
from dina_rl.evaluation.judging import asked, width
from dina_rl.evaluation.layout import Layout, lay_out, needs_sizes
from dina_rl.evaluation.requests import PLAIN, EncodeRequest, Problem, ScoreRequest, View, Workers
from dina_rl.evaluation.sets import EvaluationSet
from dina_rl.loading import say
from dina_rl.runtime import open_pipeline
from dina_rl.textfiles import parse_json, read_text, regular

Value = TypeVar("Value")
PROBLEMS, SUM = "problems", "sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringJob:
    """Some views of one scorer on one set."""

    scorer: PictureScorerConfig
    bucketing: Bucketing | None  # sizes at which a latent scorer sees the images; None: it reads the files
    data: EvaluationSet
    views: tuple[View, ...]

    @property
    def pairwise(self) -> bool:
        """Whether a judge is asked about pairs of images."""
        return self.scorer.of_images is not None and self.scorer.of_images.pairwise

    @property
    def served(self) -> bool:
        """Whether a server answers, so that a failed score may be there another time."""
        return isinstance(self.scorer.of_images, ServedScorerConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedImage:
    """An image that could not be scored."""

    record: int
    image: str
    problem: Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class SetScores:
    """One scorer's scores of one set in one view."""

    records: tuple[PreferenceRecord, ...]  # with the images that have a score, where those are two or more
    scores: Mapping[int, torch.Tensor]  # `PreferenceRecord.index` -> [draws, images of the record above], or of a judge
    # verdicts [1, images, images]
    dropped: tuple[DroppedImage, ...]
    dropped_pairs: int  # comparisons that the dropped images take part in

    def draw(self, number: int) -> dict[int, torch.Tensor]:
        """Scores [images] of one noise draw, or a judge's verdicts [images, images], by record."""
        return {index: scores[number] for index, scores in self.scores.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingPart:
    """Scores of some records of a job that nobody has computed."""

    job: ScoringJob
    records: tuple[PreferenceRecord, ...]
    files: Mapping[View, Path]  # where they belong, by view
    known: torch.Tensor | None = None  # what a server has answered of it

    @property
    def images(self) -> int:
        """Images to be scored, once per view and draw."""
        return sum(len(record.images) for record in self.records) * sum(view.draws for view in self.files)


class ScoreStore:
    """The cache. `missing` says what `fill` has to compute; `read` gives what is there."""

    def __init__(self, run: EvaluateRun) -> None:
        self._run = run
        self._root = run.cache_dir
        self._layouts: dict[tuple[str, Bucketing], Layout] = {}
        self._unreadable: dict[Path, dict[int, str]] = {}  # latent store -> row -> reason
        self._identities = Identities()
        self._tasks: dict[tuple[PictureScorerConfig, Bucketing | None, str, View], str] = {}

    def missing(self, jobs: Sequence[ScoringJob]) -> list[MissingPart]:
        """The scores of `jobs` that are not there, are broken, or that a server failed to give, in the jobs' order."""
        parts = []
        for job in jobs:
            for number, records in enumerate(self._parts(job.data)):
                files = {view: self._part(job, view, number) for view in job.views}
                absent = {view: file for view, file in files.items() if not _is_whole(file)}
                known = None if absent or not job.served else _unanswered(files[PLAIN], job, records)
                if absent or known is not None:
                    parts.append(MissingPart(job=job, records=records, files=absent or files, known=known))
        return parts

    def fill(self, parts: Sequence[MissingPart], workers: Workers) -> None:
        """Compute the missing scores and keep them.

        Raises:
            ValueError: a scorer or a set that cannot be read, or parts that do not fit together.
        """
        self._encode([part.job for part in parts if part.job.bucketing is not None], workers)
        with tqdm(total=sum(part.images for part in parts), desc="score", unit="img") as bar:
            for index, scored in workers.score(self._request(part) for part in parts):
                for file, scores in zip(parts[index].files.values(), scored.scores, strict=True):
                    _write_part(file, scores, scored.problems)
                bar.update(parts[index].images)

    def read(self, job: ScoringJob, view: View) -> SetScores:
        """The scores of a job that `fill` has seen."""
        records, kept, dropped, lost = [], {}, [], 0
        for number, part in enumerate(self._parts(job.data)):
            scores, problems = _read_part(self._part(job, view, number))
            first, start = 0, 0
            for record in part:
                count, numbers = len(record.images), width(record, pairwise=job.pairwise)
                good = [position for position in range(count) if first + position not in problems]
                dropped += [
                    DroppedImage(record=record.index, image=image, problem=problems[first + position])
                    for position, image in enumerate(record.images)
                    if first + position in problems
                ]
                lost += len(list(combinations(range(count), 2))) - len(list(combinations(good, 2)))
                if len(good) > 1:
                    records.append(_restricted(record, good))
                    kept[record.index] = _restricted_scores(scores[:, start : start + numbers], count, good)
                first, start = first + count, start + numbers
        return SetScores(records=tuple(records), scores=kept, dropped=tuple(dropped), dropped_pairs=lost)

    def _encode(self, jobs: Sequence[ScoringJob], workers: Workers) -> None:
        """Encode what the jobs need and nobody has encoded."""
        requests, images = [], 0
        for directory, job in {self._store_directory(job): job for job in jobs}.items():
            store = self._open_store(job)
            for shard in store.missing_shards():
                images += len(store.info.shard(shard)[1])
                requests.append(
                    EncodeRequest(
                        scorer=self._asked(job.scorer),
                        seed=self._run.seed,
                        source=job.data.config,
                        store=directory,
                        shard=shard,
                    )
                )
        if requests:
            with tqdm(total=images, desc="encode", unit="img") as bar:
                for _, count in workers.encode(requests):
                    bar.update(count)

    def _request(self, part: MissingPart) -> ScoreRequest:
        job, records = part.job, part.records
        store: Path | None = None
        rows: tuple[int | None, ...] = ()
        problems: dict[int, Problem] = {}
        if job.bucketing is not None:
            store = self._store_directory(job)
            rows, problems = self._rows(job, records)
        return ScoreRequest(
            scorer=self._asked(job.scorer),
            seed=self._run.seed,
            source=job.data.config,
            records=records,
            store=store,
            rows=rows,
            problems=problems,
            views=tuple(part.files),
            batch_size=self._run.batch_size,
            known=part.known,
        )

    def _rows(
        self, job: ScoringJob, records: Sequence[PreferenceRecord]
    ) -> tuple[tuple[int | None, ...], dict[int, Problem]]:
        """Row of every image of the records, one after the other, and why some have none."""
        directory, layout = self._store_directory(job), self._layout(job)
        if directory not in self._unreadable:
            self._unreadable[directory] = LatentStore(directory).unreadable()
        unreadable = self._unreadable[directory]
        rows: list[int | None] = []
        problems: dict[int, Problem] = {}
        for record in records:
            for position, row in enumerate(layout.rows[record.index]):
                if row is None:
                    problem = layout.problems[record.index][position]
                    assert problem is not None, "an image without a row has a reason"
                    problems[len(rows)] = problem
                elif row in unreadable:
                    problems[len(rows)] = Problem(reason=unreadable[row], broken=True)
                rows.append(None if len(rows) in problems else row)
        return tuple(rows), problems

    def _parts(self, data: EvaluationSet) -> list[tuple[PreferenceRecord, ...]]:
        size = self._run.records_per_part
        return [data.records[first : first + size] for first in range(0, len(data.records), size)]

    def _part(self, job: ScoringJob, view: View, number: int) -> Path:
        key = job.scorer, job.bucketing, job.data.digest, view
        if key not in self._tasks:
            self._tasks[key] = self._task(job, view)
        return self._root / "scores" / self._tasks[key] / f"part-{number:05d}.safetensors"

    def _task(self, job: ScoringJob, view: View) -> str:
        """The digest of everything that decides the scores of a job in a view; written down beside them."""
        run = self._run
        task: dict[str, object] = {
            "scorer": self._identities.of_scorer(job.scorer),
            "set": [job.data.config.kind, job.data.config.path, job.data.config.split],
            "records": job.data.digest,
            "pictures": READING,
            "batch_size": run.batch_size,
            "records_per_part": run.records_per_part,
        }
        if job.bucketing is not None:
            task |= {
                "latents": self._store_directory(job).name,
                "levels": view.levels,
                "draws": [view.draws, job.scorer.draws],
                "noise": run.noise,
                "seed": run.seed,
            }
        name = digest(task)
        file = self._root / "scores" / name / "task.json"
        if not file.exists():
            write_json(file, task)
        return name

    def _asked(self, scorer: PictureScorerConfig) -> PictureScorerConfig:
        """The scorer as workers open it: views bring their own levels."""
        return scorer.model_copy(update={"levels": None, "noise": self._run.noise})

    def _layout(self, job: ScoringJob) -> Layout:
        """Rows of the images of the whole set that the job's records are of."""
        assert job.bucketing is not None
        data, bucketing = job.data.whole, job.bucketing
        key = data.digest, bucketing
        if key not in self._layouts:
            sizes = self._sizes(data) if needs_sizes(bucketing) else {}
            self._layouts[key] = lay_out(data.records, bucketing, sizes.__getitem__)
        return self._layouts[key]

    def _sizes(self, data: EvaluationSet) -> dict[str, Size | str]:
        """(height, width) of every image of a set, or why it has none; read from the files once."""
        file = self._root / "sizes" / f"{data.digest}.json"
        if not file.exists():
            images = list(dict.fromkeys(image for record in data.records for image in record.images))
            source = data.source
            write_json(file, {image: _size(source, image) for image in tqdm(images, desc="sizes", unit="img")})
        stored = parse_json(read_text(file))
        return {image: size if isinstance(size, str) else (size[0], size[1]) for image, size in stored.items()}

    def _store_directory(self, job: ScoringJob) -> Path:
        assert job.bucketing is not None
        identity = {
            "records": job.data.whole.digest,
            "pipeline": self._identities.of_pipeline(job.scorer),
            "pictures": READING,
            "bucketing": asdict(job.bucketing),
            "rows_per_shard": self._run.encode_batch_size,
        }
        return self._root / "latents" / digest(identity)

    def _open_store(self, job: ScoringJob) -> LatentStore:
        """The store of a job's images, begun if it is not there.

        Raises:
            ValueError: image sizes that the pipeline does not fit.
        """
        layout, bucketing = self._layout(job), job.bucketing
        assert bucketing is not None
        pipeline = self._identities.pipeline(job.scorer)
        backbone = open_pipeline(pipeline)
        info = StoreInfo(
            dataset=job.data.config.path,
            pipeline=pipeline.path,
            buckets=bucketing.buckets,
            latent_shapes=tuple(backbone.latent_shape(*size) for size in bucketing.buckets),
            rows=tuple(len(images) for images in layout.images),
            rows_per_shard=self._run.encode_batch_size,
        )
        images = (image for bucket in layout.images for image in bucket)
        return LatentStore.create(self._store_directory(job), info, images)


def _restricted(record: PreferenceRecord, positions: Sequence[int]) -> PreferenceRecord:
    """The record with the images at `positions` alone."""
    if len(positions) == len(record.images):
        return record

    def pick(values: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(values[position] for position in positions)

    return replace(
        record,
        images=pick(record.images),
        ranks=pick(record.ranks),
        models=None if record.models is None else pick(record.models),
    )


def _restricted_scores(scores: torch.Tensor, count: int, positions: Sequence[int]) -> torch.Tensor:
    """A record's scores [draws, count], or verdicts [draws, count^2] as squares, of the images at `positions` alone."""
    if scores.shape[1] == count:
        return scores[:, positions]
    return scores.view(-1, count, count)[:, positions][:, :, positions]


def _unanswered(file: Path, job: ScoringJob, records: Sequence[PreferenceRecord]) -> torch.Tensor | None:
    """The numbers of a part where some of them failed; None: all that was asked has an answer."""
    scores, problems = _read_part(file)
    places = asked(records, problems, pairwise=job.pairwise)
    return scores if scores[:, places].isnan().any() else None


def _size(source: PreferenceSet, image: str) -> Size | str:
    try:
        return source.size(image)
    except ValueError as error:
        return str(error)


def _write_part(file: Path, scores: torch.Tensor, problems: Mapping[int, Problem]) -> None:
    told = json.dumps({str(place): asdict(problem) for place, problem in problems.items()})
    scores = scores.contiguous()
    write_bytes(file, save({"scores": scores}, {PROBLEMS: told, SUM: _sum(scores, told)}))


def _read_part(file: Path) -> tuple[torch.Tensor, dict[int, Problem]]:
    scores, told, _ = _content(file)
    return scores, {int(place): Problem(**problem) for place, problem in parse_json(told).items()}


def _is_whole(file: Path) -> bool:
    """Whether a part is there and holds what was written; of one that does not a line tells, and it is done again."""
    if not file.exists():
        return False
    try:
        scores, told, digest = _content(file)
        if digest in (None, _sum(scores, told)):  # versions before 0.2 wrote none
            return True
        why = "it does not hold what was written"
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
    say(f"scores {file} are broken ({why}) and computed again")
    return False


def _content(file: Path) -> tuple[torch.Tensor, str, str | None]:
    """(scores, problems as JSON, digest of the two)."""
    with safe_open(regular(file), "pt") as content:
        metadata = content.metadata()
        return content.get_tensor("scores"), metadata[PROBLEMS], metadata.get(SUM)


def _sum(scores: torch.Tensor, problems: str) -> str:
    return sha256(scores.numpy().tobytes() + problems.encode()).hexdigest()
