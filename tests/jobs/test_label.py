"""`python -m jobs.label` as a person runs it, in this process, with real scorers on tiny weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageStat

from dina_rl.config import PictureScorerConfig
from dina_rl.data.sets.hpdv3 import HPDv3
from dina_rl.data.sets.records import PreferenceRecord
from dina_rl.scoring import NoiseKey, open_scorer
from jobs.label import main
from tests.answering import Asked, answering
from tests.tiny_clip import save_tiny_clip
from tests.tiny_reward import write_preferences


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_reward: Path) -> list[str]:
    """A mixture of a scorer of pictures and one of latents."""
    clip = str(save_tiny_clip(tmp_path_factory.mktemp("clip") / "clip"))
    return [
        *("--scorers.pixel.kind", "pickscore", "--scorers.pixel.path", clip, "--scorers.pixel.processor", clip),
        *("--scorers.pixel.weight", "-2", "--scorers.pixel.mean", "1", "--scorers.pixel.std", "4"),
        *("--scorers.latent.path", str(tiny_reward)),
    ]


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    write_preferences(tmp_path / "set", train=5, test=6)
    return tmp_path / "set"


def records_of(labels: Path) -> list[PreferenceRecord]:
    return [record for record in HPDv3(labels).records("train") if isinstance(record, PreferenceRecord)]


def card_of(labels: Path) -> dict:
    return json.loads((labels / "teacher.json").read_text())


def label(*words: object) -> None:
    main(["--inline", *map(str, words)])


def test_a_set_is_labelled_anew(teacher, preferences, tmp_path, capsys) -> None:
    """A picture that cannot be read costs its pair, which is counted; a resumed run finds what the first one wrote."""
    (preferences / "images" / "train-3-dark.png").write_bytes(b"not an image")
    out = tmp_path / "labels"
    words = [*teacher, "--dataset.path", preferences, "--dataset.split", "train", "--run-dir", out, "--scale", "0.5"]
    with pytest.raises(SystemExit) as ended:
        label(*words)
    assert ended.value.code == 2
    assert "error: 1 of 5 pairs have no score, more than max_broken = 0.01 allows" in capsys.readouterr().err
    label(*words, "--max-broken", "0.5", "--resume")
    shown = capsys.readouterr().out
    assert "4 pairs labelled, 0 ties, 1 without a score, 0 repeats left out\nscale 0.5 (given)" in shown
    (dropped,) = (out / "dropped.jsonl").read_text().splitlines()
    assert "train-3-dark.png: pixel: unreadable image" in json.loads(dropped)["reason"].replace("images/", "")

    raw = json.loads((out / "train.json").read_text())
    for record, written in zip(records_of(out), raw, strict=True):
        assert written["score1"] > written["score2"]
        expected = torch.special.ndtr(torch.tensor((written["score1"] - written["score2"]) / (math.sqrt(2) * 0.5)))
        assert record.probability == pytest.approx(expected.item(), rel=1e-5)
        sizes = [HPDv3(out).size(image) for image in record.images]
        assert sizes == [(32, 32), (32, 32)]
    first = records_of(out)[0]
    pictures = [HPDv3(out).image(image) for image in first.images]
    keys = [NoiseKey(group=("hpdv3", "train", 0, 0), member=member) for member in range(2)]
    pixel, latent = (
        scorer.score_samples([scorer.sample(picture) for picture in pictures], [first.prompt] * 2, keys)
        for scorer in (open_scorer(scorer_of(teacher, "pixel")), open_scorer(scorer_of(teacher, "latent")))
    )
    total = -2 * (pixel - 1) / 4 + latent
    torch.testing.assert_close(total, torch.tensor([raw[0]["score1"], raw[0]["score2"]]), rtol=1e-4, atol=1e-4)

    before = (out / "train.json").stat().st_mtime_ns
    label(*words, "--max-broken", "0.5", "--resume")
    assert (out / "train.json").stat().st_mtime_ns == before


def test_a_score_that_a_server_failed_to_give_is_asked_for_again(preferences, tmp_path) -> None:
    """Also where all was done; the pictures that are there keep their names, so that none stands for another."""
    out, silent = tmp_path / "labels", True

    def grade(asked: Asked) -> None:
        grey = sum(ImageStat.Stat(asked.picture).mean)
        asked.say(
            "I cannot say" if silent and asked.picture.tobytes() == quiet else f"Final Score: {1 + grey / 200:.2f}"
        )

    with answering(grade) as server:
        words = [
            "--scorers.a.kind",
            "unified_reward",
            "--scorers.a.path",
            server.url,
            "--scorers.a.server.timeout-s",
            "600",
        ]
        words += ["--dataset.path", preferences, "--dataset.split", "train", "--run-dir", out, "--scale", "0.5"]
        with Image.open(preferences / "images" / "train-0-dark.png") as picture:
            quiet = picture.convert("RGB").resize((512, 512), Image.Resampling.BICUBIC).tobytes()
        label(*words, "--max-broken", "0.5")
        assert (card_of(out)["failed"], len(server.asked)) == (1, 10)
        silent = False
        label(*words, "--max-broken", "0.5", "--resume")
        assert (card_of(out)["failed"], len(server.asked)) == (0, 11)
        label(*words, "--max-broken", "0.5", "--resume")
        assert len(server.asked) == 11, "nothing is left to ask"
    originals = {file.read_bytes(): file.name for file in (preferences / "images").iterdir()}
    for number, record in enumerate(records_of(out)):
        shown = {originals[HPDv3(out).image(image)] for image in record.images}
        assert shown == {f"train-{number}-{kind}.png" for kind in ("bright", "dark")}


def scorer_of(teacher: list[str], name: str) -> PictureScorerConfig:
    """One of the teacher's scorers alone."""
    values = dict(zip(teacher[::2], teacher[1::2], strict=True))
    given = {key: values.get(f"--scorers.{name}.{key}") for key in ("kind", "path", "processor")}
    return PictureScorerConfig(**{key: value for key, value in given.items() if value is not None})


def test_samples_are_the_same_after_an_interruption(teacher, tiny_pipeline, tmp_path, capsys) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle on blue\na small cat\na red circle on blue\n")
    words = [
        *teacher, "--prompts.path", file, "--prompts.num-steps", "2", "--prompts.per-prompt", "3",
        "--prompts.batch-size", "4", "--pipeline.path", tiny_pipeline,
    ]  # fmt: skip
    label(*words, "--plan", "--run-dir", tmp_path / "labels")
    assert "pairs     6 in 2 groups" in capsys.readouterr().out
    assert not (tmp_path / "labels").exists()
    label(*words, "--run-dir", tmp_path / "labels")
    assert "scale_from" in card_of(tmp_path / "labels")
    first = (tmp_path / "labels" / "train.json").read_bytes()
    assert len(records_of(tmp_path / "labels")) == 6
    pictures = {file: file.read_bytes() for file in (tmp_path / "labels" / "images").iterdir()}
    assert len(set(pictures.values())) == 6
    (tmp_path / "labels" / "teacher.json").unlink()
    next(iter(pictures)).unlink()
    label(*words, "--run-dir", tmp_path / "labels", "--resume")
    assert {file: file.read_bytes() for file in pictures} == pictures
    assert (tmp_path / "labels" / "train.json").read_bytes() == first


def test_the_scale_may_come_of_labels(teacher, preferences, tmp_path, capsys) -> None:
    file = preferences / "test.json"
    labels = json.loads(file.read_text())
    labels[0]["path1"], labels[0]["path2"] = labels[0]["path2"], labels[0]["path1"]  # one that the teacher denies
    file.write_text(json.dumps(labels))
    only = [*teacher[:6], "--dataset.path", preferences, "--dataset.split", "train"]
    label(*only, "--validation.path", preferences, "--validation.split", "test", "--run-dir", tmp_path / "labels")
    card = card_of(tmp_path / "labels")
    assert card["scale_from"] == "likelihood of validation's labels"
    assert card["validation"]["pairs"] == 6
    assert f"accuracy {card['validation']['accuracy']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--dataset.path", "SET"], "no teacher: give a scorer with a weight"),
        (["--scorers.a.path", "x"], "give a set to label anew"),
        (["--scorers.a.path", "x", "--dataset.path", "SET", "--prompts.path", "y"], "give a set to label anew"),
        (["--scorers.a.path", "x", "--dataset.path", "SET", "--split", "a/b"], "split: 'a/b' must be a name"),
        (
            ["--scorers.a.path", "x", "--dataset.path", "SET", "--dataset.kind", "prompts"],
            "no pictures that are compared",
        ),
        (["--scorers.a.path", "nowhere", "--dataset.path", "SET"], "nowhere"),
        (
            ["--scorers.a.path", "x", "--dataset.path", "SET", "--scale", "1", "--validation.path", "SET"],
            "leave out valid",
        ),
    ],
)
def test_mistakes_are_one_line(words, line, preferences, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        label(*(str(preferences) if word == "SET" else word for word in words), "--run-dir", tmp_path / "labels")
    assert ended.value.code == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    assert line in error
    assert not (tmp_path / "labels").exists()
