from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dina_rl.config import FilterConfig
from dina_rl.data.buckets import Bucketing
from dina_rl.data.plan import CHUNK, EncodePlan
from dina_rl.data.sets.records import PreferenceRecord, SkippedRecord, UnlabelledRecord
from dina_rl.data.stores.latents import StoredPair

BUCKETS = Bucketing(buckets=((10, 10), (10, 20)), stretch=False, min_area=50)
SQUARE, WIDE = (10, 10), (10, 20)


def record(index: int, *images: str, prompt: str = "p", ranks: tuple[int, ...] | None = None, **values):
    ranks = tuple(range(len(images))) if ranks is None else ranks
    return PreferenceRecord(index=index, prompt=prompt, images=images, ranks=ranks, file="set.json", **values)


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[EncodePlan]:
    plan = EncodePlan(tmp_path / "plan.sqlite", made_of={"seed": 0})
    yield plan
    plan.close()


def fill(plan: EncodePlan, train: list, test: Sequence = (), sizes: dict | None = None, **preferences: float) -> None:
    """Read, measure (all square unless `sizes` says otherwise) and place."""
    plan.read({"train": train, "test": test}, preferences=FilterConfig(**preferences), seed=0)
    for chunk in plan.unmeasured():
        plan.measured(chunk, [(sizes or {}).get(key, SQUARE) for key in plan.images(chunk)])
    plan.place(BUCKETS, max_per_prompt=None)


def row_images(plan: EncodePlan, pair: StoredPair) -> tuple[str, str]:
    images = list(plan.row_images())
    return images[pair.chosen], images[pair.rejected]


def test_an_image_is_a_row_once_per_bucket(plan: EncodePlan) -> None:
    """Buckets of aspects 1 and 2 never meet: an image at two sizes needs two buckets of one aspect."""
    two = Bucketing(buckets=((10, 10), (20, 20)), stretch=False)
    records = [record(0, "b", "a"), record(1, "a", "c"), record(2, "b", "d")]
    plan.read({"train": records}, preferences=FilterConfig(), seed=0)
    sizes = {"a": (10, 10), "b": (10, 10), "c": (20, 20), "d": (10, 10)}
    plan.measured(0, [sizes[key] for key in plan.images(0)])
    plan.place(two, max_per_prompt=None)
    assert plan.rows_per_bucket(2) == (3, 2)
    assert list(plan.row_images()) == ["b", "a", "d", "a", "c"]  # in order of appearance within a bucket
    assert [row_images(plan, pair) for pair in plan.stored_pairs("train")] == [("b", "a"), ("a", "c"), ("b", "d")]


def test_what_goes_in_is_dropped_or_kept(plan: EncodePlan) -> None:
    train = [
        record(0, "a", "b"),
        record(1, "a", "b", votes=(1, 9)),  # vote_share
        record(2, "a", "b"),  # duplicate
        record(3, "b", "a"),  # the opposite opinion is none
        record(4, "a", "a"),  # same_image
        SkippedRecord(file="set.json", index=5, reason="malformed"),
        record(6, "a", "tiny"),  # min_area
        record(7, "a", "tall"),  # bucket
        record(8, "a", "wide"),  # bucket: does not fit its partner's
        record(9, "wide", "wider"),
        record(10, "a", "broken"),  # unreadable
        record(11, "a", "b", "c", ranks=(0, 1, 1), prompt="q"),  # two pairs and a tie
        record(12, "late", "b", prompt="r"),  # unreadable, which decoding finds
    ]
    sizes = {"tiny": (7, 7), "tall": (20, 10), "wide": WIDE, "wider": (20, 40), "broken": "unreadable image: why"}
    fill(plan, train, [record(0, "a", "b")] * 2, sizes, min_vote_share=0.5)
    plan.found_unreadable({list(plan.row_images()).index("late"): "unreadable image: cut"})
    report = plan.retention(BUCKETS.buckets)
    assert report["train"].dropped == {
        "vote_share": 1,
        "duplicate": 1,
        "same_image": 1,
        "min_area": 1,
        "bucket": 2,
        "unreadable": 2,
        "tie": 1,
    }
    assert (report["train"].records, report["train"].malformed, report["train"].pairs) == (13, 1, 14)
    assert (report["train"].kept, report["train"].kept_per_bucket) == (5, {"10x10": 4, "10x20": 1})
    assert report["train"].pairs == report["train"].kept + sum(report["train"].dropped.values())
    assert (report["test"].pairs, report["test"].kept, report["test"].dropped) == (2, 2, {}), "held out: no filters"
    assert [(line.index, line.reason) for line in plan.skipped()] == [
        (2, "duplicate of record 0 of set.json"),
        (4, "a: compared with itself"),
        (5, "malformed"),
        (6, "a, tiny: image of 7x7 is below the minimum of 50 pixels"),
        (7, "a, tall: no bucket has the aspect of an image of 20x10"),
        (8, "a, wide: no bucket fits both 10x10 and 10x20"),
        (10, "broken: unreadable image: why"),
        (12, "late: unreadable image: cut"),
    ]
    assert plan.broken_records() == (3, 15)
    assert len(list(plan.stored_pairs("train"))) == 5


def test_an_unreadable_image_of_a_ranking_drops_its_pairs_alone(plan: EncodePlan) -> None:
    fill(plan, [record(0, "a", "b", "c", "d")], sizes={"c": "gone"})
    assert [row_images(plan, pair) for pair in plan.stored_pairs("train")] == [("a", "b"), ("a", "d"), ("b", "d")]
    assert plan.retention(BUCKETS.buckets)["train"].dropped == {"unreadable": 3}
    assert plan.broken_records() == (1, 1)


def test_the_cap_keeps_drawn_pairs_of_a_prompt(tmp_path: Path) -> None:
    def kept(name: str, seed: int, order: int) -> list[int]:
        plan = EncodePlan(tmp_path / name, made_of={})
        records = [record(index, f"a{index}", f"b{index}", prompt="pq"[index % 2]) for index in range(40)][::order]
        plan.read({"train": records, "test": records}, preferences=FilterConfig(), seed=seed)
        plan.measured(0, [SQUARE] * len(plan.images(0)))
        plan.place(BUCKETS, max_per_prompt=8)
        report = plan.retention(BUCKETS.buckets)
        assert (report["train"].dropped, report["train"].kept) == ({"max_per_prompt": 24}, 16)
        assert report["test"].kept == 40
        ids = sorted(pair.pair_id for pair in plan.stored_pairs("train"))
        plan.close()
        return ids

    first = kept("first", 0, 1)
    assert [sum(index % 2 == parity for index in first) for parity in (0, 1)] == [8, 8]
    assert kept("backwards", 0, -1) == first, "a draw depends on the pair, not on the order of the file"
    assert kept("other", 1, 1) != first


def test_sizes_survive_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "plan.sqlite"
    plan = EncodePlan(file, made_of={"a": 1})
    plan.read({"train": [record(n, f"{n}a", f"{n}b") for n in range(CHUNK)]}, preferences=FilterConfig(), seed=0)
    assert plan.unmeasured() == [0, 1]
    plan.measured(1, [SQUARE] * CHUNK)
    plan.close()
    again = EncodePlan(file, made_of={"a": 1})
    assert again.is_read
    assert again.unmeasured() == [0]
    assert again.images(0)[:3] == ["0a", "0b", "1a"]
    assert not again.is_placed
    again.close()


def test_a_killed_reading_leaves_nothing(plan: EncodePlan) -> None:
    def breaking():
        yield record(0, "a", "b")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.read({"train": breaking()}, preferences=FilterConfig(), seed=0)
    assert not plan.is_read
    assert plan.images(0) == []
    fill(plan, [record(0, "a", "b")])
    assert len(list(plan.stored_pairs("train"))) == 1


def test_a_plan_of_something_else_is_refused(tmp_path: Path, plan: EncodePlan) -> None:
    with pytest.raises(ValueError, match="another dataset or encoder"):
        EncodePlan(tmp_path / "plan.sqlite", made_of={"seed": 1})
    (tmp_path / "text").write_text("not a database, but long enough to be looked at " * 30)
    with pytest.raises(ValueError, match="not an encoding plan"):
        EncodePlan(tmp_path / "text", made_of={})


def test_pairs_that_nobody_compared_are_a_counted_filter(plan: EncodePlan) -> None:
    """However many there are: they are no corruption, and not listed as such."""
    unlabelled = [UnlabelledRecord(index=index, prompt="p", file="set.json") for index in range(1, 9)]
    fill(plan, [record(0, "a", "b"), *unlabelled])
    retention = plan.retention(BUCKETS.buckets)["train"]
    assert (retention.records, retention.malformed, retention.pairs, retention.kept) == (9, 0, 9, 1)
    assert retention.dropped == {"unlabelled": 8}
    assert plan.broken_records() == (0, 9)
    assert list(plan.skipped()) == []


def test_a_probability_stays_with_its_pair(plan: EncodePlan) -> None:
    fill(plan, [record(0, "a", "b"), record(1, "a", "c", probability=0.75), record(2, "a", "a", probability=0.5)])
    assert [pair.probability for pair in plan.stored_pairs("train")] == [None, 0.75]
