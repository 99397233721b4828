import json
from pathlib import Path

import numpy
import pytest
from PIL import Image

from dina_rl.data.hpdv3 import check_skipped, load_image, read_split
from dina_rl.data.pairs import PreferencePair

GOOD = {
    "prompt": "a cat",
    "path1": "images/a.jpg",
    "path2": "images/b.jpg",
    "choice_dist": [11, 2],
    "confidence": 0.97,
    "model1": "flux",
    "model2": "sd15",
}


def write(directory: Path, *records: object) -> Path:
    (directory / "train.json").write_text(json.dumps(records))
    return directory


def test_path1_is_the_preferred_image(tmp_path: Path) -> None:
    records, skipped = read_split(write(tmp_path, GOOD), "train")
    assert records == [
        PreferencePair(
            index=0, prompt="a cat", chosen="images/a.jpg", rejected="images/b.jpg", votes=(11, 2), confidence=0.97
        )
    ]
    assert skipped == []


@pytest.mark.parametrize("votes", [None, [], [3], [None, None]])
def test_pairs_without_votes_are_kept(tmp_path: Path, votes: object) -> None:
    records, skipped = read_split(write(tmp_path, GOOD | {"choice_dist": votes, "confidence": None}), "train")
    assert (records[0].votes, records[0].confidence, skipped) == (None, None, [])


def test_optional_fields_may_be_absent(tmp_path: Path) -> None:
    bare = {key: GOOD[key] for key in ("prompt", "path1", "path2")}
    records, _ = read_split(write(tmp_path, bare), "train")
    assert (records[0].votes, records[0].confidence) == (None, None)


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
def test_malformed_records_are_skipped_with_the_reason(tmp_path: Path, change: dict, reason: str) -> None:
    records, skipped = read_split(write(tmp_path, GOOD, GOOD | change, GOOD), "train")
    assert [record.index for record in records] == [0, 2]
    assert [(s.file, s.index) for s in skipped] == [("train.json", 1)]
    assert skipped[0].reason.startswith(reason)


@pytest.mark.parametrize("raw", ["text", 3, None, ["a", "b"]])
def test_records_that_are_no_objects_are_skipped(tmp_path: Path, raw: object) -> None:
    records, skipped = read_split(write(tmp_path, raw, GOOD), "train")
    assert ([record.index for record in records], [s.index for s in skipped]) == ([1], [0])


def test_missing_directory_and_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_split(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"has no test\.json"):
        read_split(write(tmp_path, GOOD), "test")


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ('{"a": 1}', "array of records, not dict")])
def test_broken_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_split(tmp_path, "train")


def test_too_many_skipped(tmp_path: Path) -> None:
    check_skipped(1, 100, max_skipped=0.01, where=tmp_path)
    with pytest.raises(ValueError, match="2 of 100 records"):
        check_skipped(2, 100, max_skipped=0.01, where=tmp_path)
    with pytest.raises(ValueError, match="5 of 5 records"):
        check_skipped(5, 5, max_skipped=1.0, where=tmp_path)


def test_images_are_rgb_of_the_wanted_size(tmp_path: Path) -> None:
    Image.new("L", (10, 30), 200).save(tmp_path / "grey.png")
    pixels = load_image(tmp_path / "grey.png", height=8, width=16)
    assert (pixels.shape, pixels.dtype) == ((8, 16, 3), numpy.uint8)
    assert (pixels == 200).all()


def test_an_image_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    exact = numpy.arange(4 * 4 * 3, dtype=numpy.uint8).reshape(4, 4, 3)
    Image.fromarray(exact).save(tmp_path / "exact.png")
    assert numpy.array_equal(load_image(tmp_path / "exact.png", height=4, width=4), exact)


def test_unreadable_images(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (32, 32, 3), numpy.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    for name in ("text.png", "cut.png", "missing.png"):
        with pytest.raises(ValueError, match="unreadable image"):
            load_image(tmp_path / name, height=32, width=32)
