"""What cache keys are made of: every file that decides a number decides the key."""

import shutil
from pathlib import Path

import pytest

from dina_rl.config import PictureScorerConfig
from dina_rl.evaluation.identity import Identities

COMMITS = ("0123456789" * 4, "9876543210" * 4)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"])
def test_every_weight_of_a_pipeline_counts(part, tiny_pipeline, tiny_reward, tmp_path) -> None:
    pipeline = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    scorer = PictureScorerConfig(path=str(tiny_reward), pipeline=str(pipeline))
    before = Identities().of_scorer(scorer)
    assert Identities().of_scorer(scorer) == before
    (weights,) = (pipeline / part).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 3] ^= 1
    weights.write_bytes(content)
    assert Identities().of_scorer(scorer) != before
    assert Identities().of_pipeline(scorer) != {name: before[name] for name in Identities().of_pipeline(scorer)}


def test_hub_ids_are_known_by_their_commits(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    scorer = PictureScorerConfig(kind="pickscore", path="some/model", processor="some/processor")
    found = [Identities().of_scorer(scorer)]
    for name, file in (("model", "config.json"), ("processor", "preprocessor_config.json")):
        for commit in COMMITS:
            cache(tmp_path / f"models--some--{name}", commit, file)
            found.append(Identities().of_scorer(scorer))
    assert found[2] == {
        "kind": "pickscore",
        "weights": f"some/model@{COMMITS[1]}",
        "processor": "some/processor@None",
    }
    assert len(found) == 1 + 2 * len(COMMITS)
    assert all(first != second for number, first in enumerate(found) for second in found[:number])


def cache(repository: Path, commit: str, file: str) -> None:
    """The hub's cache after a download of `file`."""
    for directory in ("refs", f"snapshots/{commit}"):
        (repository / directory).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / file).write_text("{}")
