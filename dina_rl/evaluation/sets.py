"""The preference sets of an evaluation: read once by the driver, with what is unusable counted and listed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch

from dina_rl.config import SetConfig
from dina_rl.data.sets.records import PreferenceRecord, PreferenceSet, SkippedRecord, UnlabelledRecord
from dina_rl.data.sets.registry import open_set
from dina_rl.seeding import generator


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """A set's records, ready to be scored."""

    name: str
    config: SetConfig
    records: tuple[PreferenceRecord, ...]
    skipped: tuple[SkippedRecord, ...]  # malformed records of the whole split
    usable: int  # records of the whole split that are not malformed: `records` may be a sample of them
    digest: str  # of the records and of where their images lie
    unlabelled: int = 0  # records of the whole split that nobody compared
    parent: "EvaluationSet | None" = None  # the set that this is a sample of

    @property
    def source(self) -> PreferenceSet:
        return open_source(self.config)

    @property
    def malformed_share(self) -> float:
        """Of the whole split, sampled or not."""
        return len(self.skipped) / (self.usable + len(self.skipped))

    @property
    def whole(self) -> "EvaluationSet":
        """The set whose images are encoded: a sample uses those of its parent."""
        return self.parent or self

    def sample(self, pairs: int, seed: int) -> "EvaluationSet":
        """Random records with at least `pairs` comparisons that people decide; all of them if there are not so many."""
        order = torch.randperm(len(self.records), generator=generator(seed, "sample-of-set", self.config.split))
        chosen, count = [], 0
        for position in order.tolist():
            if count >= pairs:
                break
            chosen.append(position)
            count += len(self.records[position].ordered_pairs())
        records = [self.records[position] for position in sorted(chosen)]
        sample = evaluation_set(self.name, self.config, records, self.skipped, usable=self.usable)
        return replace(sample, parent=self.whole, unlabelled=self.unlabelled)


def open_source(config: SetConfig) -> PreferenceSet:
    """The reader of a set.

    Raises:
        ValueError: an unknown kind, or nothing of that kind there.
    """
    return open_set(config.kind, config.location)


def read_sets(configs: Mapping[str, SetConfig], *, seed: int) -> list[EvaluationSet]:
    """Records of all sets, a seeded random sample where `max_records` says so.

    Raises:
        ValueError: a set that cannot be read, or without a usable record.
    """
    return [read_set(name, config, seed=seed) for name, config in configs.items()]


def read_set(name: str, config: SetConfig, *, seed: int) -> EvaluationSet:
    """Records of one set; raises like `read_sets`."""
    config = config.model_copy(update={"path": str(config.location.resolve())})  # workers have directories of their own
    records: list[PreferenceRecord] = []
    skipped: list[SkippedRecord] = []
    unlabelled = 0
    for record in open_source(config).records(config.split):
        if isinstance(record, PreferenceRecord):
            records.append(record)
        elif isinstance(record, UnlabelledRecord):
            unlabelled += 1
        else:
            skipped.append(record)
    if not any(record.ordered_pairs() for record in records):
        raise ValueError(
            f"set {name}: {config.path} has no comparison in split {config.split} ({len(records)} records, "
            f"{len(skipped)} malformed, {unlabelled} unlabelled)"
        )
    usable = len(records)
    if config.max_records is not None and config.max_records < len(records):
        order = torch.randperm(len(records), generator=generator(seed, "records-of-set", config.split))
        records = [records[position] for position in sorted(order[: config.max_records].tolist())]
    data = evaluation_set(name, config, records, tuple(skipped), usable=usable)
    return replace(data, unlabelled=unlabelled)


def check_malformed(data: EvaluationSet, max_broken: float) -> None:
    """Whether enough of a set's split can be read, which is known before any of it is scored.

    Raises:
        ValueError: more of its records are malformed than `max_broken` allows.
    """
    if data.malformed_share > max_broken:
        raise ValueError(
            f"set {data.name}: {len(data.skipped)} of {data.usable + len(data.skipped)} records are malformed, more "
            f"than max_broken = {max_broken:g} allows; one of them: {data.skipped[0].reason}"
        )


def evaluation_set(
    name: str, config: SetConfig, records: list[PreferenceRecord], skipped: tuple[SkippedRecord, ...], *, usable: int
) -> EvaluationSet:
    """Given records of a set, whoever chose or made them; `skipped` and `usable` are of its whole split."""
    digest = blake2b(f"{config.kind}\n{config.path}\n{config.split}\n".encode(), digest_size=16)
    for record in records:
        digest.update(json.dumps([record.index, record.prompt, record.images, record.ranks]).encode())
    return EvaluationSet(
        name=name, config=config, records=tuple(records), skipped=skipped, usable=usable, digest=digest.hexdigest()
    )
