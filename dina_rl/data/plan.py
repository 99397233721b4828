"""What will be encoded, decided before a pixel is: an SQLite file in the run directory.

A million comparisons name two million paths. Keeping them, counting per prompt and finding repeats is a database's
work, and its file keeps memory flat and survives a kill: each stage is one transaction, sizes come a few at a time.

    read      every pair of the set's records that the preference filters leave, every distinct image
    sizes     of the images, by header
    place     pairs to buckets, the cap per prompt; rows of the store, one for every (image, bucket)
    finish    pairs whose images turned out unreadable
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dina_rl.config import FilterConfig
from dina_rl.config.fitting import Split
from dina_rl.data.buckets import Bucketing, Size
from dina_rl.data.filters import preference_filter
from dina_rl.data.sets.records import (
    AnyRecord,
    PreferencePair,
    PreferenceRecord,
    SkippedRecord,
    UnlabelledRecord,
    pairs_of,
)
from dina_rl.data.stores.latents import StoredPair
from dina_rl.seeding import derive_seed
from dina_rl.storage import StorageFailed, refuse_link, writing
from dina_rl.textfiles import parse_json

CHUNK = 512
"""Images whose sizes are read together."""

Measured = list[tuple[int, int] | str]
"""Of every image of a chunk (height, width), or why it has none."""

_Sized = tuple[str, int, int, str | None]
"""(key, height, width, problem) of an image; one with a problem has no sizes."""

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE prompts (id INTEGER PRIMARY KEY, text TEXT UNIQUE NOT NULL);
CREATE TABLE images (id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, height INTEGER, width INTEGER, problem TEXT);
CREATE TABLE pairs (
    position INTEGER PRIMARY KEY, split TEXT NOT NULL, id INTEGER NOT NULL, file TEXT NOT NULL, record INTEGER NOT NULL,
    prompt INTEGER NOT NULL, chosen INTEGER NOT NULL, rejected INTEGER NOT NULL, draw INTEGER NOT NULL, bucket INTEGER
);
CREATE INDEX repeats ON pairs (prompt, chosen, rejected);
CREATE TABLE latents (
    id INTEGER PRIMARY KEY, image INTEGER NOT NULL, bucket INTEGER NOT NULL, problem TEXT, UNIQUE (image, bucket)
);
CREATE TABLE dropped (split TEXT, filter TEXT, pairs INTEGER NOT NULL, PRIMARY KEY (split, filter));
CREATE TABLE listed (
    split TEXT NOT NULL, file TEXT NOT NULL, record INTEGER NOT NULL, reason TEXT NOT NULL, broken INTEGER NOT NULL,
    UNIQUE (split, file, record, reason)
);
"""
_SOFT = "CREATE TABLE IF NOT EXISTS soft (position INTEGER PRIMARY KEY, probability REAL NOT NULL)"
"""Of the pairs that have a probability: beside `pairs`, whose plans of before have no column for it."""
_NO, _YES, _DECODING = 0, 1, 2  # `listed.broken`: whether the record cannot be used, and was found out by decoding
_USABLE = """
FROM pairs JOIN latents a ON a.image = chosen AND a.bucket = pairs.bucket
JOIN latents b ON b.image = rejected AND b.bucket = pairs.bucket JOIN prompts ON prompts.id = prompt
WHERE a.problem IS NULL AND b.problem IS NULL
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRetention:
    """What became of a split: pairs = kept + the sum of dropped."""

    records: int  # in the files
    malformed: int  # records of which nothing could be used
    pairs: int  # of the other records, ties and unlabelled ones included
    dropped: dict[str, int]  # filter -> pairs
    kept: int
    kept_per_bucket: dict[str, int]  # "height x width" -> pairs


class EncodePlan:
    """The plan in a file that one process writes; opened again it goes on where it stopped.

    Args:
        made_of: what the plan depends on, by sections; a file made of something else is refused. Where a section lies,
            its `path`, is kept, but does not count: the run directory knows what was there.

    Raises:
        ValueError: the file is a plan of something else, or none.
    """

    def __init__(self, file: Path, made_of: Mapping[str, object]) -> None:
        self._file = file
        refuse_link(file)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()  # with the mode that the umask leaves; SQLite's own leaves the group out
        # One process has the run directory, and file locks do not work on many shared file systems.
        self._db = sqlite3.connect(f"{file.absolute().as_uri()}?nolock=1", uri=True, isolation_level=None)
        wanted = json.dumps(made_of, sort_keys=True)
        try:
            self._db.execute("PRAGMA cache_size = -65536")  # KiB
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                with writing(file):
                    self._db.executescript(f"BEGIN;{_SCHEMA}COMMIT;")
            with self._transaction():
                self._db.execute(_SOFT)
                self._db.execute("INSERT OR IGNORE INTO facts VALUES ('made of', ?)", (wanted,))
        except sqlite3.DatabaseError as error:
            self.close()
            raise ValueError(f"{file} is not an encoding plan, or broken: {error}") from error
        except StorageFailed:
            self.close()
            raise
        if _placeless(self._fact("made of")) != _placeless(wanted):
            self.close()
            raise ValueError(f"{file.parent} holds latents of another dataset or encoder; choose a new run_dir")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block or nothing. Raises StorageFailed where there is no room."""
        with writing(self._file):
            self._db.execute("BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite itself goes back where a disk is full
                    self._db.execute("ROLLBACK")
                raise

    # read

    @property
    def is_read(self) -> bool:
        return self._fact("read") is not None

    def read(
        self,
        splits: Mapping[Split, Iterable[AnyRecord]],
        *,
        preferences: FilterConfig,
        seed: int,
    ) -> None:
        """Take in the records of every split, all or none of them.

        Args:
            preferences: applies to the training split alone.
            seed: of the draws that `place` keeps the smallest of.
        """
        with self._transaction():
            for split, records in splits.items():
                counts = Counter(records=0, malformed=0, pairs=0)
                dropped: Counter[str] = Counter()
                for record in records:
                    counts["records"] += 1
                    if isinstance(record, SkippedRecord):
                        counts["malformed"] += 1
                        self._list(split, record.file, record.index, record.reason, broken=_YES)
                        continue
                    if isinstance(record, UnlabelledRecord):
                        counts["pairs"] += 1
                        dropped["unlabelled"] += 1
                        continue
                    dropped["tie"] += record.ties
                    counts["pairs"] += record.ties
                    for pair in pairs_of(record):
                        counts["pairs"] += 1
                        refused = preference_filter(pair, preferences) if split == "train" else None
                        if refused is None:
                            refused = self._take(split, record, pair, preferences, seed)
                        if refused is not None:
                            dropped[refused] += 1
                self._count(split, dropped)
                self._db.execute("INSERT INTO facts VALUES (?, ?)", (f"read {split}", json.dumps(counts)))
            self._db.execute("INSERT INTO facts VALUES ('read', 'yes')")

    def _take(
        self, split: Split, record: PreferenceRecord, pair: PreferencePair, preferences: FilterConfig, seed: int
    ) -> str | None:
        """Add a pair, or say which filter refuses it."""
        if pair.chosen == pair.rejected:
            self._list(split, record.file, record.index, f"{pair.chosen}: compared with itself", broken=_NO)
            return "same_image"
        chosen, rejected = self._id("images", "key", pair.chosen), self._id("images", "key", pair.rejected)
        prompt = self._id("prompts", "text", pair.prompt)
        if split == "train" and preferences.duplicates == "drop":
            earlier = self._db.execute(
                "SELECT file, record FROM pairs WHERE prompt = ? AND chosen = ? AND rejected = ? AND split = ?",
                (prompt, chosen, rejected, split),
            ).fetchone()
            if earlier is not None:
                reason = f"duplicate of record {earlier[1]} of {earlier[0]}"
                self._list(split, record.file, record.index, reason, broken=_NO)
                return "duplicate"
        draw = derive_seed(seed, "pairs of a prompt", split, pair.index)
        values = (split, pair.index, record.file, record.index, prompt, chosen, rejected, draw)
        position = self._db.execute(
            "INSERT INTO pairs (split, id, file, record, prompt, chosen, rejected, draw) VALUES (?,?,?,?,?,?,?,?)",
            values,
        ).lastrowid
        if pair.probability is not None:
            self._db.execute("INSERT INTO soft VALUES (?, ?)", (position, pair.probability))
        return None

    def _id(self, table: str, column: str, value: str) -> int:
        found: tuple[int] | None = self._db.execute(f"SELECT id FROM {table} WHERE {column} = ?", (value,)).fetchone()
        if found is not None:
            return found[0]
        row = self._db.execute(f"INSERT INTO {table} ({column}) VALUES (?)", (value,)).lastrowid
        assert row is not None
        return row

    # sizes

    def images(self, chunk: int) -> list[str]:
        """The distinct images that the pairs name, `CHUNK` of them, in order of appearance."""
        query = "SELECT key FROM images WHERE id BETWEEN ? AND ? ORDER BY id"
        return [key for (key,) in self._db.execute(query, (chunk * CHUNK + 1, (chunk + 1) * CHUNK))]

    def unmeasured(self) -> list[int]:
        """Numbers of the chunks of images whose sizes are unknown."""
        missing = "SELECT DISTINCT (id - 1) / ? FROM images WHERE height IS NULL AND problem IS NULL ORDER BY 1"
        return [number for (number,) in self._db.execute(missing, (CHUNK,))]

    def measured(self, chunk: int, sizes: Measured) -> None:
        """Store the sizes of a chunk's images."""
        values = [(None, None, size) if isinstance(size, str) else (*size, None) for size in sizes]
        first = chunk * CHUNK + 1
        with self._transaction():
            self._db.executemany(
                "UPDATE images SET height = ?, width = ?, problem = ? WHERE id = ?",
                ((*value, first + offset) for offset, value in enumerate(values)),
            )

    # place

    @property
    def is_placed(self) -> bool:
        return self._fact("placed") is not None

    def place(self, bucketing: Bucketing, *, max_per_prompt: int | None) -> None:
        """Give every pair whose images have sizes its bucket, cap the training prompts, and number the rows."""
        with self._transaction():
            dropped: dict[Split, Counter[str]] = {}
            of_pair = lru_cache(maxsize=2**16)(bucketing.of_pair)  # the same sizes recur
            for position, split, file, record, first, second in self._sized_pairs():
                broken = [side for side in (first, second) if side[3] is not None]
                if broken:
                    name, reasons = "unreadable", [f"{key}: {problem}" for key, _, _, problem in broken]
                else:
                    found = of_pair(first[1:3], second[1:3])
                    if isinstance(found, int):
                        self._db.execute("UPDATE pairs SET bucket = ? WHERE position = ?", (found, position))
                        continue
                    name, reasons = found.filter, [f"{first[0]}, {second[0]}: {found.reason}"]
                dropped.setdefault(split, Counter())[name] += 1
                for reason in reasons:
                    self._list(split, file, record, reason, broken=_YES if broken else _NO)
            for split, counts in dropped.items():
                self._count(split, counts)
            if max_per_prompt is not None:
                self._cap(max_per_prompt)
            self._db.execute(
                "INSERT INTO latents (image, bucket) SELECT chosen, bucket FROM pairs WHERE bucket IS NOT NULL "
                "UNION SELECT rejected, bucket FROM pairs WHERE bucket IS NOT NULL ORDER BY 2, 1"
            )
            self._db.execute("INSERT INTO facts VALUES ('placed', 'yes')")

    def _sized_pairs(self) -> Iterator[tuple[int, Split, str, int, _Sized, _Sized]]:
        """(position, split, file, record, either image); may be updated meanwhile."""
        query = (
            "SELECT position, split, file, record, a.key, a.height, a.width, a.problem, b.key, b.height, b.width, "
            "b.problem FROM pairs JOIN images a ON a.id = chosen JOIN images b ON b.id = rejected "
            "WHERE position > ? ORDER BY position LIMIT 10000"
        )
        last = 0
        while page := self._db.execute(query, (last,)).fetchall():
            for values in page:
                position, split, file, record = values[:4]
                yield position, split, file, record, values[4:8], values[8:]
            last = page[-1][0]

    def _cap(self, most: int) -> None:
        beyond = (
            "SELECT position FROM (SELECT position, row_number() OVER (PARTITION BY prompt ORDER BY draw, id) AS "
            "number FROM pairs WHERE split = 'train' AND bucket IS NOT NULL) WHERE number > ?"
        )
        count = self._db.execute(f"UPDATE pairs SET bucket = NULL WHERE position IN ({beyond})", (most,)).rowcount
        self._count("train", {"max_per_prompt": count})

    def rows_per_bucket(self, buckets: int) -> tuple[int, ...]:
        """How many rows each bucket has."""
        counts = dict(self._db.execute("SELECT bucket, count(*) FROM latents GROUP BY bucket"))
        return tuple(counts.get(bucket, 0) for bucket in range(buckets))

    def row_images(self) -> Iterator[str]:
        """The image of every row, in order."""
        query = "SELECT key FROM latents JOIN images ON images.id = image ORDER BY latents.id"
        return (key for (key,) in self._db.execute(query))

    # finish

    def found_unreadable(self, rows: Mapping[int, str]) -> None:
        """Note which rows have no latent, and why; the rest have one."""
        with self._transaction():
            self._db.execute("UPDATE latents SET problem = NULL WHERE problem IS NOT NULL")
            self._db.execute("DELETE FROM listed WHERE broken = ?", (_DECODING,))
            self._db.executemany(
                "UPDATE latents SET problem = ? WHERE id = ?", ((reason, row + 1) for row, reason in rows.items())
            )
            for column in ("chosen", "rejected"):
                self._db.execute(
                    "INSERT OR IGNORE INTO listed SELECT split, file, record, key || ': ' || latents.problem, ? FROM "
                    f"pairs JOIN latents ON latents.image = {column} AND latents.bucket = pairs.bucket "
                    "JOIN images ON images.id = latents.image WHERE latents.problem IS NOT NULL",
                    (_DECODING,),
                )

    def stored_pairs(self, split: Split) -> Iterator[StoredPair]:
        """The pairs of a split that can be used, in the order of its files."""
        soft = "(SELECT probability FROM soft WHERE soft.position = pairs.position)"
        query = f"SELECT pairs.id, a.id, b.id, text, {soft} {_USABLE} AND split = ? ORDER BY position"
        for pair, chosen, rejected, prompt, probability in self._db.execute(query, (split,)):
            yield StoredPair(
                pair_id=pair, chosen=chosen - 1, rejected=rejected - 1, prompt=prompt, probability=probability
            )

    def prompts(self) -> Iterator[str]:
        """The distinct prompts of the pairs that can be used, in order of appearance."""
        query = f"SELECT text FROM prompts WHERE id IN (SELECT pairs.prompt {_USABLE}) ORDER BY id"
        return (text for (text,) in self._db.execute(query))

    def skipped(self) -> Iterator[SkippedRecord]:
        """Everything that is wrong with a record of the set, in the order of its files."""
        query = "SELECT file, record, reason FROM listed ORDER BY file, record, rowid"
        for file, record, reason in self._db.execute(query):
            yield SkippedRecord(file=file, index=record, reason=reason)

    def broken_records(self) -> tuple[int, int]:
        """(records that are malformed or have an unreadable image, all records)."""
        broken = self._db.execute(
            "SELECT count(*) FROM (SELECT DISTINCT split, file, record FROM listed WHERE broken)"
        ).fetchone()[0]
        return broken, sum(counts["records"] for counts in self._read_counts().values())

    def retention(self, buckets: tuple[Size, ...]) -> dict[Split, SplitRetention]:
        """What became of every split that was read."""
        result = {}
        for split, counts in self._read_counts().items():
            dropped = dict(
                self._db.execute("SELECT filter, pairs FROM dropped WHERE split = ? AND pairs > 0", (split,))
            )
            kept = dict(
                self._db.execute(
                    f"SELECT pairs.bucket, count(*) {_USABLE} AND split = ? GROUP BY 1 ORDER BY 1", (split,)
                )
            )
            placed = self._db.execute(
                "SELECT count(*) FROM pairs WHERE split = ? AND bucket IS NOT NULL", (split,)
            ).fetchone()[0]
            undecodable = placed - sum(kept.values())
            if undecodable:
                dropped["unreadable"] = dropped.get("unreadable", 0) + undecodable
            result[split] = SplitRetention(
                records=counts["records"],
                malformed=counts["malformed"],
                pairs=counts["pairs"],
                dropped=dropped,
                kept=sum(kept.values()),
                kept_per_bucket={"x".join(map(str, buckets[number])): count for number, count in kept.items()},
            )
        return result

    def _read_counts(self) -> dict[Split, dict[str, int]]:
        facts = self._db.execute("SELECT name, value FROM facts WHERE name LIKE 'read %' ORDER BY rowid")
        return {name.removeprefix("read "): parse_json(value) for name, value in facts}

    def _list(self, split: str, file: str, record: int, reason: str, *, broken: int) -> None:
        values = (split, file, record, reason, broken)
        self._db.execute("INSERT OR IGNORE INTO listed VALUES (?, ?, ?, ?, ?)", values)

    def _count(self, split: str, dropped: Mapping[str, int]) -> None:
        self._db.executemany(
            "INSERT INTO dropped VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET pairs = pairs + ?3",
            ((split, name, count) for name, count in dropped.items()),
        )

    def _fact(self, name: str) -> str | None:
        found = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if found is None else found[0]


def _placeless(made_of: str | None) -> object:
    """What a plan is made of, wherever that lies."""
    sections: dict[str, object] = parse_json(made_of or "{}")
    return {
        name: {key: value for key, value in section.items() if key != "path"} if isinstance(section, dict) else section
        for name, section in sections.items()
    }
