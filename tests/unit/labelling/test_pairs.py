from dina_rl.data.sets.records import PreferenceRecord
from dina_rl.labelling.pairs import to_label


def record(index: int, *images: str, prompt: str = "p", **values) -> PreferenceRecord:
    return PreferenceRecord(index=index, prompt=prompt, images=images, ranks=(0,) * len(images), **values)


RECORDS = [
    record(0, "a", "b", models=("x", "y")),
    record(1, "b", "c"),
    record(2, "d", "e"),
    record(3, "b", "a"),  # the same pair, asked again
    record(4, "a", "a"),
    record(5, "a", "b", prompt="q"),
    record(6, "c", "d", "f"),  # connects the first three pairs; one that people left tied is a pair too
]


def test_pictures_that_pairs_connect_are_scored_together_and_once() -> None:
    work = to_label(RECORDS, connect=True)
    assert [pair.images for pair in work.pairs] == [
        *(("a", "b"), ("b", "c"), ("d", "e"), ("a", "b")),
        *(("c", "d"), ("c", "f"), ("d", "f")),
    ]
    assert [(each.prompt, each.images) for each in work.records] == [("p", tuple("abcdef")), ("q", ("a", "b"))]
    assert [pair.group for pair in work.pairs] == [0, 0, 0, 1, 0, 0, 0]
    assert (work.repeats, work.images) == (2, 8)
    assert work.pairs[0].models == ("x", "y")


def test_pictures_may_be_scored_pair_by_pair() -> None:
    work = to_label(RECORDS, connect=False)
    assert [each.images for each in work.records] == [pair.images for pair in work.pairs]
    assert [each.index for each in work.records] == [pair.group for pair in work.pairs] == list(range(7))
