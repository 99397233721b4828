import json
from collections import Counter
from math import erf
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dina_rl.shapes.golden import golden_score
from dina_rl.shapes.grammar import prompts
from dina_rl.shapes.pipeline import build_pipeline
from dina_rl.shapes.preferences import SETTINGS, PreferenceStats, main, write_preferences

TAU = 0.05
KEYS = ["prompt", "path1", "path2", "choice_dist", "confidence", "model1", "model2"]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    # Random weights: its pictures are worthless, but layout, labels and seeds do not care.
    directory = tmp_path_factory.mktemp("pipelines") / "untrained"
    build_pipeline(0).save_pretrained(directory)
    return directory


def _write(
    pipeline: Path, directory: Path, *, seed: int = 0, train_groups: int = 60, test_groups: int = 8
) -> PreferenceStats:
    return write_preferences(
        pipeline,
        directory,
        train_groups=train_groups,
        test_groups=test_groups,
        seed=seed,
        thurstone_tau=TAU,
        generator_fraction=0.1,
        progress=False,
    )


@pytest.fixture(scope="module")
def written(untrained, tmp_path_factory) -> tuple[Path, PreferenceStats]:
    directory = tmp_path_factory.mktemp("sets") / "preferences"
    return directory, _write(untrained, directory)


def _records(directory: Path, split: str) -> list[dict]:
    return json.loads((directory / f"{split}.json").read_text())


def test_records_have_the_fields_of_hpdv3(written):
    directory, stats = written
    assert {path.name for path in directory.iterdir()} == {
        "train.json",
        "test.json",
        "golden.json",
        "stats.json",
        "images",
    }
    for split, groups, pairs in (("train", 60, 6), ("test", 8, 2)):
        records = _records(directory, split)
        assert len(records) == groups * pairs
        for record in records:
            assert list(record) == KEYS
            assert record["choice_dist"] == [1, 0]
            assert 0.5 <= record["confidence"] <= 1
            assert record["path1"] != record["path2"]
    assert (stats.train.images, stats.train.pairs) == (240, 360)
    assert (stats.test.images, stats.test.pairs) == (32, 16)
    assert json.loads((directory / "stats.json").read_text())["train"]["pairs"] == 360


def test_images_are_small_rgb_pngs_of_their_group_only(written):
    directory, _ = written
    for split in ("train", "test"):
        prompt_of = {}
        for record in _records(directory, split):
            for key in ("path1", "path2"):
                assert prompt_of.setdefault(record[key], record["prompt"]) == record["prompt"]
                assert record[key].startswith(f"images/{split}/")
        for path in prompt_of:
            with Image.open(directory / path) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
        assert len(prompt_of) == len(list((directory / "images" / split).iterdir())) > 0


def test_train_pairs_are_all_of_a_group_and_test_pairs_are_disjoint(written):
    directory, _ = written
    train = Counter(frozenset((r["path1"], r["path2"])) for r in _records(directory, "train"))
    assert set(train.values()) == {1}
    uses = Counter(r[key] for r in _records(directory, "train") for key in ("path1", "path2"))
    assert set(uses.values()) == {3}
    uses = Counter(r[key] for r in _records(directory, "test") for key in ("path1", "path2"))
    assert set(uses.values()) == {1}


def test_no_test_prompt_leaks_into_training(written):
    directory, _ = written
    train = {record["prompt"] for record in _records(directory, "train")}
    test = {record["prompt"] for record in _records(directory, "test")}
    assert train <= set(prompts("train"))
    assert test <= set(prompts("test"))


def test_golden_scores_are_those_of_the_stored_images(written):
    directory, stats = written
    golden = json.loads((directory / "golden.json").read_text())
    prompt_of = {r[key]: r["prompt"] for s in ("train", "test") for r in _records(directory, s) for key in KEYS[1:3]}
    assert golden.keys() == prompt_of.keys()
    pixels = np.stack([np.asarray(Image.open(directory / path)) for path in golden])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    expected = golden_score(images, [prompt_of[path] for path in golden]).score
    torch.testing.assert_close(torch.tensor(list(golden.values())), expected, rtol=0, atol=1e-6)
    assert stats.train.generated > 0


def test_labels_follow_thurstone(written):
    directory, stats = written
    golden = json.loads((directory / "golden.json").read_text())
    gaps = torch.tensor([golden[r["path1"]] - golden[r["path2"]] for r in _records(directory, "train")])
    assert (gaps[gaps.abs() > 6 * TAU] > 0).all()  # 4 standard deviations of the noise difference
    near = gaps[gaps.abs() < 1.5 * TAU]
    likelier = torch.tensor([(1 + erf(gap.abs().item() / (2 * TAU))) / 2 for gap in near])
    error = (likelier * (1 - likelier)).sum().sqrt() / len(near)
    assert len(near) > 60
    agreed = (near > 0).float().mean().item()
    assert agreed == pytest.approx(likelier.mean().item(), abs=3.5 * error.item())
    assert agreed < 1  # the labels are noisy
    assert stats.train.ceiling == pytest.approx((gaps > 0).float().mean().item(), abs=1e-4)


def test_confidence_is_the_probability_of_the_likelier_order(written):
    directory, _ = written
    golden = json.loads((directory / "golden.json").read_text())
    records = _records(directory, "train")
    gaps = [abs(golden[record["path1"]] - golden[record["path2"]]) for record in records]
    expected = [(1 + erf(gap / (2 * TAU))) / 2 for gap in gaps]
    assert [record["confidence"] for record in records] == pytest.approx(expected, abs=1e-4)
    assert len(records) == 360


def test_the_seed_decides_everything(untrained, tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        _write(untrained, tmp_path / name, seed=seed, train_groups=6, test_groups=2)
    first = [path for path in sorted((tmp_path / "first").rglob("*")) if path.is_file()]
    assert len(first) == 32 + 4
    for path in first:
        if path.name != "stats.json":  # it holds the wall time
            relative = path.relative_to(tmp_path / "first")
            assert (tmp_path / "again" / relative).read_bytes() == path.read_bytes()
    other = (tmp_path / "other" / "train.json").read_bytes()
    assert other != (tmp_path / "first" / "train.json").read_bytes()


def test_models_are_named_after_their_settings(written):
    directory, stats = written
    models = {r["path1"]: r["model1"] for r in _records(directory, "train")}
    models |= {r["path2"]: r["model2"] for r in _records(directory, "train")}
    counts = Counter(models.values())
    assert set(counts) == {"render"} | {f"shapes-sd3-{n}steps-cfg{g:g}" for n, g in SETTINGS["in"]}
    assert counts["render"] == stats.train.images - stats.train.generated
    assert 0.02 < stats.train.generated / stats.train.images < 0.2


def test_a_used_directory_is_left_alone(written, untrained, capsys):
    directory, _ = written
    before = (directory / "train.json").read_bytes()
    with pytest.raises(ValueError, match="in use: choose a new one"):
        _write(untrained, directory)
    assert (directory / "train.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_groups": 0}, "needs groups"),
        ({"thurstone_tau": 0.0}, "thurstone_tau above 0"),
        ({"generator_fraction": 1.5}, "generator_fraction must be"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(untrained, tmp_path, change, message):
    arguments = {"train_groups": 1, "test_groups": 1, "seed": 0, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        write_preferences(untrained, tmp_path / "set", **arguments)
    assert not list(tmp_path.iterdir())


def test_the_command_line_reports_a_missing_pipeline_in_one_line(tmp_path, monkeypatch, capsys):
    arguments = ["preferences", "--out", str(tmp_path / "set"), "--pipeline", str(tmp_path / "none")]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_out_of_domain_pictures_come_from_other_defects_and_settings(untrained, tmp_path):
    arguments = {"train_groups": 2, "test_groups": 20, "seed": 0, "generator_fraction": 0.3, "progress": False}
    stats = write_preferences(untrained, tmp_path / "out", domain="out", **arguments)
    write_preferences(untrained, tmp_path / "in", **arguments)
    models = {record[side] for record in _records(tmp_path / "out", "test") for side in ("model1", "model2")}
    assert models == {"foreign-render"} | {f"shapes-sd3-{n}steps-cfg{g:g}" for n, g in SETTINGS["out"]}
    assert not set(SETTINGS["out"]) & set(SETTINGS["in"])
    assert stats.domain == "out"
    held_out = {record["prompt"] for record in _records(tmp_path / "out", "test")}
    assert held_out <= set(prompts("test"))
