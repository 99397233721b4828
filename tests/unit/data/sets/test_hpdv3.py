import json
from pathlib import Path

import pytest

from dina_rl.data.sets.hpdv3 import HPDv3
from dina_rl.data.sets.records import AnyRecord, PreferenceRecord, SkippedRecord, pairs_of

GOOD = {
    "prompt": "a cat",
    "path1": "images/a.jpg",
    "path2": "images/b.jpg",
    "choice_dist": [11, 2],
    "confidence": 0.97,
    "model1": "flux",
    "model2": "sd15",
}


def read(directory: Path, *records: object) -> list[AnyRecord]:
    (directory / "train.json").write_text(json.dumps(records))
    return list(HPDv3(directory).records("train"))


def test_path1_is_the_preferred_image(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD) == [
        PreferenceRecord(
            index=0,
            prompt="a cat",
            images=("images/a.jpg", "images/b.jpg"),
            ranks=(0, 1),
            votes=(11, 2),
            confidence=0.97,
            models=("flux", "sd15"),
            file="train.json",
        )
    ]


@pytest.mark.parametrize("probability", [0.0, 0.25, 1])
def test_a_probability_is_of_path1(tmp_path: Path, probability: float) -> None:
    record = read(tmp_path, GOOD | {"probability": probability})[0]
    assert [pair.probability for pair in pairs_of(record)] == [probability]


def test_a_probability_beyond_1_is_malformed(tmp_path: Path) -> None:
    (record,) = read(tmp_path, GOOD | {"probability": 1.5})
    assert isinstance(record, SkippedRecord)
    assert record.reason.startswith("probability must be a number in [0, 1]")


@pytest.mark.parametrize("votes", [None, [], [3], [None, None]])
def test_pairs_without_votes_are_kept(tmp_path: Path, votes: object) -> None:
    record = read(tmp_path, GOOD | {"choice_dist": votes, "confidence": None})[0]
    assert (record.votes, record.confidence) == (None, None)


def test_optional_fields_may_be_absent(tmp_path: Path) -> None:
    record = read(tmp_path, {key: GOOD[key] for key in ("prompt", "path1", "path2")})[0]
    assert (record.votes, record.confidence, record.models) == (None, None, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "prompt must be"),
        ({"prompt": "  "}, "prompt must be"),
        ({"path1": 3}, "path1 must be"),
        ({"path2": ""}, "path2 must be"),
        ({"choice_dist": ["a", "b"]}, "choice_dist must be"),
        ({"choice_dist": [1, 2, 3]}, "choice_dist must be"),
        ({"choice_dist": [1, -2]}, "choice_dist must be"),
        ({"confidence": "high"}, "confidence must be"),
        ({"confidence": 1.5}, "confidence must be"),
    ],
)
def test_malformed_records_come_with_the_reason(tmp_path: Path, change: dict, reason: str) -> None:
    first, bad, last = read(tmp_path, GOOD, GOOD | change, GOOD)
    assert (first.index, last.index) == (0, 2)
    assert (bad.file, bad.index) == ("train.json", 1)
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize("raw", ["text", 3, None, ["a", "b"]])
def test_records_that_are_no_objects_are_malformed(tmp_path: Path, raw: object) -> None:
    bad, good = read(tmp_path, raw, GOOD)
    assert (bad.index, good.index) == (0, 1)
    assert bad.reason.startswith("record is a ")


def test_missing_directory_and_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        HPDv3(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no test\.json"):
        next(HPDv3(tmp_path).records("test"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must hold an array"),
        ('{"a": 1}', "must hold an array"),
        ("", "not valid JSON"),
        ("[1, 2", "not valid JSON"),
        ("[] x", "not valid JSON"),
        ('["\udcff"]', "not valid JSON"),
    ],
)
def test_broken_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        list(HPDv3(tmp_path).records("train"))


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    """The first records come although the file ends in garbage, and only the garbage's turn is an error."""
    with (tmp_path / "train.json").open("w") as file:
        file.write("[")
        for _ in range(20_000):
            file.write(json.dumps(GOOD) + ",")
        file.write("!")
    records = HPDv3(tmp_path).records("train")
    assert next(records).index == 0
    with pytest.raises(ValueError, match="not valid JSON"):
        list(records)
