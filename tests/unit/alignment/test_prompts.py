import json
from pathlib import Path

import pytest

from dina_rl.alignment.prompts import load_prompts
from dina_rl.config import PromptsConfig


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
