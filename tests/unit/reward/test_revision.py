"""Which weights a pipeline has: a commit, a fingerprint, or nothing that can be said."""

import json
import shutil
from pathlib import Path

import pytest

from dina_rl.reward.revision import pipeline_revision

COMMIT = "0123456789" * 4
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline(tmp_path) -> Path:
    (tmp_path / "pipeline" / "transformer").mkdir(parents=True)
    (tmp_path / "pipeline" / "transformer" / "config.json").write_text(json.dumps({"num_layers": 4}))
    (tmp_path / "pipeline" / "transformer" / WEIGHTS).write_bytes(bytes(range(256)) * 16384)  # 4 MiB
    return tmp_path / "pipeline"


def test_a_copy_has_the_same_revision_and_a_change_another(pipeline, tmp_path):
    before = pipeline_revision(str(pipeline))
    assert before.startswith("files:")
    assert pipeline_revision(str(shutil.copytree(pipeline, tmp_path / "copy"))) == before
    weights = pipeline / "transformer" / WEIGHTS
    content = weights.read_bytes()
    for changed in (b"x" + content[1:], content[:-1] + b"x", content + b"x"):
        weights.write_bytes(changed)
        assert pipeline_revision(str(pipeline)) != before
    weights.write_bytes(content)
    assert pipeline_revision(str(pipeline)) == before
    (pipeline / "transformer" / "config.json").write_text(json.dumps({"num_layers": 5}))
    assert pipeline_revision(str(pipeline)) != before


def test_a_hub_snapshot_has_its_commit(pipeline, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    repository = cache / "models--someone--pipeline"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = shutil.copytree(pipeline, repository / "snapshots" / COMMIT)
    (snapshot / "model_index.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert pipeline_revision("someone/pipeline") == COMMIT
    assert pipeline_revision(str(snapshot)) == COMMIT


def test_nothing_is_said_of_what_is_not_there(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for location in ("someone/pipeline", str(tmp_path / "nowhere"), str(tmp_path)):
        assert pipeline_revision(location) is None
