"""A set with rotten entries of every kind: encoding ends, nothing good is lost, everything bad is listed and says why.

Through the functions that the Ray job uses, in this process.
"""

import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from dina_rl.backbones.registry import open_backbone
from dina_rl.config import FitRun
from dina_rl.data.encode import LATENTS, RETENTION_FILE, SKIPPED_FILE, EncodingHere, check_inputs, encode_dataset
from dina_rl.data.images import load_image
from dina_rl.data.stores.latents import LatentStore
from tests.tiny_reward import TINY_REWARD

GOOD = 380  # beside 20 rotten records: 5 percent
SQUARE, WIDE = (32, 32), (24, 48)
BUCKETS = [list(SQUARE), list(WIDE)]
LONG_PROMPT = " ".join(f"word{number}" for number in range(2000))


def png(seed: int, size: tuple[int, int] = SQUARE) -> bytes:
    pixels = numpy.random.default_rng(seed).integers(0, 255, (*size, 3), numpy.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def other_modes() -> dict[str, bytes]:
    """Modes that are converted: nothing is wrong with these."""
    base = Image.open(io.BytesIO(png(1)))
    grey16 = numpy.random.default_rng(2).integers(0, 65535, SQUARE, numpy.uint16)
    return {
        "cmyk.jpg": encoded(base.convert("CMYK"), "JPEG"),
        "bits.png": encoded(base.convert("1")),
        "grey16.png": encoded(Image.fromarray(grey16)),
        "rgba.png": encoded(base.convert("RGBA")),
        "palette.png": encoded(base.convert("P", palette=Image.Palette.ADAPTIVE)),
    }


def broken_images() -> dict[str, tuple[bytes, str]]:
    """File -> (content, how its reason begins after the file's name)."""
    jpeg = encoded(Image.open(io.BytesIO(png(3))), "JPEG")
    floats = Image.fromarray(numpy.zeros(SQUARE, numpy.float32))
    return {
        "cut.jpg": (jpeg[:-200], "unreadable image: image file is truncated"),
        "cut-header.jpg": (jpeg[:30], "unreadable image: "),
        "empty.png": (b"", "unreadable image: not of a known format"),
        "text.png": (b"<html>404</html>", "unreadable image: not of a known format"),
        "float.tiff": (encoded(floats, "TIFF"), "unreadable image: mode F"),
    }


@pytest.fixture(scope="module")
def rotten(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """(directory, index of every bad training record -> how its reason begins)."""
    place = tmp_path_factory.mktemp("rotten")
    directory = place / "set"
    (directory / "images").mkdir(parents=True)
    (place / "secret.png").write_bytes(png(4))
    (place / "x").write_bytes(png(5))
    os.symlink(place / "secret.png", directory / "images" / "link.png")

    def save(name: str, content: bytes) -> str:
        (directory / "images" / name).write_bytes(content)
        return f"images/{name}"

    def record(first: str, second: str, **values: object) -> dict:
        usual = {"prompt": "a red circle", "choice_dist": [7, 2], "confidence": 0.9}
        return usual | {"path1": first, "path2": second} | values

    good = []
    for number in range(GOOD - 9):
        size = WIDE if number % 5 == 0 else SQUARE
        sides = [save(f"{number}-{side}.png", png(100 + 2 * number + side, size)) for side in range(2)]
        good.append(record(*sides, prompt=f"prompt {number % 50}"))
    partner = good[1]["path1"]
    good += [record(save(name, content), partner) for name, content in other_modes().items()]
    good += [
        record(good[1]["path1"], good[2]["path1"], confidence=None, choice_dist=None),
        record(good[2]["path1"], good[3]["path1"], prompt="ein Hund 🐕 auf Grün, 犬"),
        record(good[3]["path1"], good[4]["path1"], prompt=LONG_PROMPT),
        record(good[2]["path1"], good[1]["path1"], confidence=None, choice_dist=[None, None]),
    ]
    assert len(good) == GOOD

    bad = [
        (record(save(name, content), partner), f"images/{name}: {reason}")
        for name, (content, reason) in broken_images().items()
    ]
    dot = save("dot.png", png(6, (1, 1)))
    for path, reason in {
        "../../x": "'../../x' leaves the data directory",
        "../x": "'../x' leaves the data directory",
        "images/../../secret.png": "'images/../../secret.png' leaves the data directory",
        str(place / "secret.png"): "leaves the data directory",
        "images/link.png": "'images/link.png' leads out of the data directory by a symlink",
    }.items():
        bad.append((record(partner, path), f"{path}: refused: {reason}" if ".." in path or "link" in path else path))
    bad += [
        (record(partner, "images/missing.png"), "images/missing.png: unreadable image: no file"),
        (record(dot, partner), f"{dot}, {partner}: image of 1x1 is below the minimum of 64 pixels"),
        (record(save("strip.png", png(7, (8, 80))), partner), "images/strip.png, "),
        (record(partner, good[0]["path1"]), f"{partner}, {good[0]['path1']}: no bucket fits both 32x32 and 24x48"),
        (record(partner, partner), f"{partner}: compared with itself"),
        (dict(good[7]), "duplicate of record 7 of train.json"),
        (record(partner, good[2]["path1"], confidence="high"), "confidence must be"),
        (record(partner, good[2]["path1"], prompt=""), "prompt must be"),
        ({"prompt": "no images"}, "path1 must be"),
        ("no record", "record is a str"),
    ]
    assert len(bad) == 20
    (directory / "train.json").write_text(json.dumps(good + [raw for raw, _ in bad]), encoding="utf-8")
    (directory / "test.json").write_text(json.dumps(good[10:30]))
    return directory, {GOOD + position: reason for position, (_, reason) in enumerate(bad)}


def make_run(directory: Path, run_dir: Path, pipeline: Path, **values: object) -> FitRun:
    usual = {
        "path": str(directory),
        "buckets": BUCKETS,
        "filter": {"min_area": 64},
        "max_skipped": 0.05,
        "encode_batch_size": 32,
        "batches_per_shard": 2,
    }
    dataset = usual | values
    return FitRun(run_dir=run_dir, pipeline={"path": str(pipeline)}, dataset=dataset, reward=TINY_REWARD)


@pytest.fixture(scope="module")
def encoded_set(rotten, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FitRun, list[str]]:
    """(the finished run, every file that was opened meanwhile)."""
    run = make_run(rotten[0], tmp_path_factory.mktemp("encode") / "run", tiny_pipeline)
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple) -> None:
        if watching and event == "open" and not isinstance(arguments[0], int):
            opened.append(os.fsdecode(arguments[0]))

    sys.addaudithook(watch)  # cannot be removed, hence `watching`
    backbone = open_backbone(tiny_pipeline, max_sequence_length=8)
    encode_dataset(check_inputs(run, backbone), run.run_dir, backbone, EncodingHere(backbone))
    watching = False
    return run, opened


def listed(run: FitRun) -> dict[int, str]:
    lines = [json.loads(line) for line in (run.run_dir / SKIPPED_FILE).read_text(encoding="utf-8").splitlines()]
    assert {line["file"] for line in lines} == {"train.json"}
    assert len({line["index"] for line in lines}) == len(lines)
    return {line["index"]: line["reason"] for line in lines}


def test_everything_bad_is_listed_with_its_reason(encoded_set, rotten) -> None:
    found, expected = listed(encoded_set[0]), rotten[1]
    assert set(found) == set(expected)
    assert len(expected) == 20
    for index, reason in expected.items():
        assert found[index].startswith(reason), (found[index], reason)


def test_nothing_good_is_lost(encoded_set) -> None:
    store = LatentStore(encoded_set[0].run_dir / LATENTS)
    table = store.pairs("train")
    assert sorted(table.pair_ids.tolist()) == list(range(GOOD))
    assert {LONG_PROMPT, "ein Hund 🐕 auf Grün, 犬"} <= set(table.prompts)
    assert sorted(Counter(table.bucket.tolist()).values()) == [75, 305]
    assert len(store.pairs("test")) == 20


def test_in_is_dropped_plus_kept(encoded_set) -> None:
    report = json.loads((encoded_set[0].run_dir / RETENTION_FILE).read_text())
    train = report["train"]
    assert (train["records"], train["malformed"], train["pairs"], train["kept"]) == (GOOD + 20, 4, GOOD + 16, GOOD)
    assert train["dropped"] == {"duplicate": 1, "same_image": 1, "min_area": 1, "bucket": 2, "unreadable": 11}
    assert train["pairs"] == train["kept"] + sum(train["dropped"].values())
    assert train["kept_per_bucket"] == {"32x32": 305, "24x48": 75}
    assert report["test"]["dropped"] == {}


def test_latents_are_those_of_the_images(encoded_set, rotten, tiny_pipeline: Path) -> None:
    store = LatentStore(encoded_set[0].run_dir / LATENTS)
    assert len(set(store.images)) == len(store.images), "no image is here at two sizes, and none is encoded twice"
    codec = open_backbone(tiny_pipeline, max_sequence_length=8).load_codec()
    for row, name in ((store.images.index(f"images/{name}"), name) for name in ("0-0.png", "1-1.png", "cmyk.jpg")):
        height, width = store.buckets[int(store.info.bucket_of(torch.tensor(row)))]
        pixels = load_image((rotten[0] / "images" / name).read_bytes(), height=height, width=width)
        expected = codec.encode(torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255)
        torch.testing.assert_close(store.latents(torch.tensor([row])), expected, rtol=1e-4, atol=1e-5)


def test_nothing_outside_the_data_root_is_opened(encoded_set, rotten) -> None:
    run, opened = encoded_set
    assert any(path.endswith("images/0-0.png") for path in opened), "the watch works"
    place = os.path.realpath(rotten[0].parent)
    near = [path for path in map(os.path.realpath, opened) if path.startswith(place)]
    assert [path for path in near if not path.startswith(os.path.realpath(rotten[0]) + os.sep)] == []
    assert not any(path.endswith(("secret.png", "link.png")) for path in opened)


def test_too_many_rotten_records_stop_the_run_before_the_vae(rotten, tiny_pipeline: Path, tmp_path: Path) -> None:
    run = make_run(rotten[0], tmp_path / "run", tiny_pipeline, max_skipped=0.02)
    backbone = open_backbone(tiny_pipeline, max_sequence_length=8)
    with pytest.raises(ValueError, match=r"13 of 420 records .* dataset.max_skipped = 0.02"):
        encode_dataset(run, run.run_dir, backbone, EncodingHere(backbone))
    assert not (run.run_dir / LATENTS).exists()
    assert len(listed(run)) == 18  # what decoding alone would find is missing


def test_a_killed_encode_goes_on(encoded_set, rotten, tiny_pipeline: Path, tmp_path: Path) -> None:
    """Killed in the VAE, then continued, it is the uninterrupted one, and no shard is encoded twice."""
    run = make_run(rotten[0], tmp_path / "run", tiny_pipeline)
    backbone = open_backbone(tiny_pipeline, max_sequence_length=8)

    class Killed(EncodingHere):
        def encode(self, run, store, shards) -> None:
            super().encode(run, store, shards[:3])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_dataset(run, run.run_dir, backbone, Killed(backbone))
    before = {file.name: file.stat().st_mtime_ns for file in (run.run_dir / LATENTS).glob("shard-*")}
    assert len(before) == 3
    store = encode_dataset(run, run.run_dir, backbone, EncodingHere(backbone))
    after = {file.name: file.stat().st_mtime_ns for file in store.directory.glob("shard-*")}
    assert before.items() <= after.items()
    whole = LatentStore(encoded_set[0].run_dir / LATENTS)
    tables = sorted(whole.directory.glob("*.parquet"))
    assert tables
    for file in tables:
        assert file.read_bytes() == (store.directory / file.name).read_bytes(), file.name
    for name in (SKIPPED_FILE, RETENTION_FILE):
        assert (run.run_dir / name).read_bytes() == (encoded_set[0].run_dir / name).read_bytes()


def test_a_set_without_images_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a cat\n")
    run = make_run(tmp_path / "train.txt", tmp_path / "run", tiny_pipeline, kind="prompts", test=None)
    with pytest.raises(ValueError, match="prompts without images: nothing to encode"):
        check_inputs(run, open_backbone(tiny_pipeline, max_sequence_length=8))
