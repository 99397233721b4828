import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dina_rl.alignment.prompts import Prompts, check_captions, cut_prompts, load_prompts
from dina_rl.config import GoldenConfig, PipelineConfig, PromptsConfig
from dina_rl.runtime import open_pipeline


@pytest.fixture
def hpdv3(tmp_path: Path) -> str:
    for split, prompts in (("train", ["a cat", "a dog ", "a cat"]), ("test", ["a cow"])):
        records = [{"prompt": prompt, "path1": "a", "path2": "b"} for prompt in prompts] + [{"prompt": None}]
        (tmp_path / f"{split}.json").write_text(json.dumps(records))
    return f"hpdv3:{tmp_path}"


@pytest.fixture
def dev(tmp_path: Path) -> str:
    (tmp_path / "dev.txt").write_text("a hen\n\n a hen \na fox\n")
    return str(tmp_path / "dev.txt")


def test_sources_may_be_mixed(hpdv3: str, dev: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A repeated prompt is one prompt; images need not be there."""
    found = load_prompts(PromptsConfig(train=f"{hpdv3}:train", dev=dev, test=f"{hpdv3}:test"))
    assert (found.train, found.dev, found.test) == (("a cat", "a dog"), ("a hen", "a fox"), ("a cow",))
    reason = "prompt must be a non-empty string, got None"
    assert capsys.readouterr().out.splitlines() == [
        f"prompts.train: 1 of 4 records of {hpdv3}:train are malformed and left out, the first is record 3 of "
        f"train.json: {reason}",
        f"prompts.train: 3 prompts of {hpdv3}:train are 2 different ones; each counts once",
        f"prompts.dev: 3 prompts of {dev} are 2 different ones; each counts once",
        f"prompts.test: 1 of 2 records of {hpdv3}:test are malformed and left out, the first is record 1 of "
        f"test.json: {reason}",
    ]


def test_held_out_prompts_are_held_out(hpdv3: str, dev: str) -> None:
    with pytest.raises(ValueError, match=r"2 prompts of prompts\.test are in prompts\.train"):
        load_prompts(PromptsConfig(train=f"{hpdv3}:train", dev=dev, test=f"{hpdv3}:train"))


def test_mistakes_name_the_split(hpdv3: str, dev: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for source, message in (
        (f"{hpdv3}:validation", r"has no validation\.json"),
        (f"hpdv3:{tmp_path}/nowhere:test", "nowhere does not exist"),
        (str(tmp_path / "empty.txt"), "holds no prompts"),
        (str(tmp_path / "nowhere.txt"), "does not exist"),
        (str(tmp_path), "does not exist"),
    ):
        with pytest.raises(ValueError, match=rf"^prompts\.test: .*{message}"):
            load_prompts(PromptsConfig(train=f"{hpdv3}:train", dev=dev, test=source))


@pytest.mark.parametrize("name", ["test.txt", "test.jsonl", "test.json", "test.csv"])
def test_a_byte_order_mark_hides_no_leak(tmp_path: Path, dev: str, name: str) -> None:
    """Whether the file begins with it or, joined of several, has it in its middle."""
    (tmp_path / "train.txt").write_text("a cat\n\ufeffa dog\n", encoding="utf-8-sig")
    written = {
        ".txt": "{}\n",
        ".jsonl": '{{"prompt": "{}"}}\n',
        ".json": '["{}"]',
        ".csv": "prompt\n{}\n",
    }[Path(name).suffix]
    for prompt in ("a cat", "a dog"):
        (tmp_path / name).write_text(written.format(prompt), encoding="utf-8-sig")
        sources = PromptsConfig(train=str(tmp_path / "train.txt"), dev=dev, test=str(tmp_path / name))
        with pytest.raises(ValueError, match=rf"prompts\.test are in prompts\.train too \(first: '{prompt}'"):
            load_prompts(sources)


def test_prompts_that_are_cut_are_counted(tiny_pipeline: Path) -> None:
    backbone = open_pipeline(PipelineConfig(path=str(tiny_pipeline)))
    prompts = Prompts(train=("a red circle", "a " * 9, "a " * 30), dev=("a red ring",), test=("a " * 8,))
    lines = cut_prompts(backbone, prompts)
    assert lines[0] == (
        f"prompts.train: 2 of 3 prompts are longer than CLIP's 8 tokens and are cut there, the first is {'a ' * 9!r}"
    )
    assert [line.partition(" are ")[0] for line in lines] == [
        *("prompts.train: 2 of 3 prompts", "prompts.train: 2 of 3 prompts"),
        *("prompts.test: 1 of 1 prompts", "prompts.test: 1 of 1 prompts"),
    ]


OTHER = ("a photo of a cat", "a city at night")
WORLD = load_prompts(PromptsConfig())
LEFT = "left at the miniature world's captions (shapes): give prompts.train, prompts.dev and prompts.test"


@pytest.mark.parametrize(
    ("own", "golden", "line"),
    [
        ("train", "shapes", f"prompts.train is own.txt, but prompts.dev and prompts.test {LEFT}"),
        ("dev", "pickscore", f"prompts.dev is own.txt, but prompts.train and prompts.test {LEFT}"),
        (
            "train dev test",
            "shapes",
            "golden.scorer shapes judges the miniature world's captions alone",
        ),
        ("train dev test", "pickscore", None),
        ("", "shapes", None),
        ("", "clip_score", None),
    ],
)
def test_the_miniature_world_is_not_mixed_with_another(own: str, golden: str, line: str | None) -> None:
    config = PromptsConfig(**dict.fromkeys(own.split(), "own.txt"))
    prompts = replace(WORLD, **dict.fromkeys(own.split(), OTHER))
    if line is None:
        check_captions(config, prompts, GoldenConfig(scorer=golden))
        return
    with pytest.raises(ValueError, match=re.escape(line)):
        check_captions(config, prompts, GoldenConfig(scorer=golden))


def test_own_files_may_hold_the_worlds_captions() -> None:
    check_captions(PromptsConfig(train="own.txt"), replace(WORLD, train=WORLD.train[:9]), GoldenConfig())
