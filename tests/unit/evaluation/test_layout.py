from dina_rl.data.buckets import Bucketing
from dina_rl.data.sets.records import PreferenceRecord
from dina_rl.evaluation.layout import lay_out
from dina_rl.evaluation.requests import Problem

BUCKETS = Bucketing(buckets=((32, 32), (64, 64), (32, 64)), stretch=False, min_area=100)
SIZES = {"small": (32, 32), "large": (64, 64), "wide": (30, 60), "odd": (10, 90), "tiny": (5, 5), "gone": "no file"}


def record(index: int, *images: str) -> PreferenceRecord:
    return PreferenceRecord(index=index, prompt="", images=images, ranks=tuple(range(len(images))))


def test_one_size_needs_no_sizes() -> None:
    def never(image: str):
        raise AssertionError("sizes are not needed")

    layout = lay_out([record(4, "a", "b"), record(7, "b", "c", "a")], Bucketing(buckets=((8, 8),), stretch=True), never)
    assert layout.images == (("a", "b", "c"),)
    assert layout.rows == {4: (0, 1), 7: (1, 2, 0)}
    assert layout.problems == {}


def test_one_size_may_still_refuse_small_images() -> None:
    small = Bucketing(buckets=((8, 8),), stretch=True, min_area=100)
    layout = lay_out([record(0, "small", "large"), record(1, "small", "tiny")], small, SIZES.__getitem__)
    assert layout.rows == {0: (0, 1), 1: (None, None)}
    assert "below the minimum" in layout.problems[1][0].reason


def test_a_pair_shares_a_bucket_and_a_larger_group_does_not() -> None:
    """A small image beside a large one is seen at the large size; in a group of three each at its own."""
    layout = lay_out([record(0, "small", "large"), record(1, "small", "large", "wide")], BUCKETS, SIZES.__getitem__)
    assert layout.images == (("small",), ("small", "large"), ("wide",))
    assert layout.rows == {0: (1, 2), 1: (0, 2, 3)}


def test_what_has_no_bucket_has_a_reason() -> None:
    layout = lay_out(
        [record(0, "small", "odd"), record(1, "small", "gone"), record(2, "large", "tiny", "wide")],
        BUCKETS,
        SIZES.__getitem__,
    )
    assert layout.rows == {0: (None, None), 1: (0, None), 2: (1, None, 2)}
    assert [("10x90" in problem.reason, problem.broken) for problem in layout.problems[0]] == [(True, False)] * 2
    assert layout.problems[1] == (None, Problem(reason="no file", broken=True))  # nothing is wrong with the other one
    assert "below the minimum" in layout.problems[2][1].reason
    assert (layout.problems[2][0], layout.problems[2][2]) == (None, None)
