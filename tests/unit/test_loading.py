"""What is said of loading: a line a part with its size, and nothing of what is there at once."""

import re
from pathlib import Path

import pytest

from dina_rl import loading
from dina_rl.alignment.planning import loads
from dina_rl.config import PictureScorerConfig, PipelineConfig
from dina_rl.loading import TEXT, TRANSFORMER, VAE, announce, sizes
from dina_rl.runtime import open_pipeline
from dina_rl.scoring import loads as scorer_loads
from tests.tiny_run import tiny_run


@pytest.fixture
def large(monkeypatch) -> None:
    """Miniatures count as large."""
    monkeypatch.setattr(loading, "LARGE", 1)


def load_all(path: Path) -> None:
    backbone = open_pipeline(PipelineConfig(path=str(path), max_sequence_length=8))
    backbone.load_text_encoder()
    backbone.load_transformer()
    backbone.load_codec()


@pytest.mark.parametrize("family", ["tiny_pipeline", "tiny_flux", "tiny_z_image"])
def test_every_part_of_every_family_is_told_as_it_is_loaded(large, family, request, capsys):
    path = request.getfixturevalue(family)
    load_all(path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("load")]
    assert len(lines) == 6
    for part, before, after in zip((TEXT, TRANSFORMER, VAE), lines[::2], lines[1::2], strict=True):
        size = sizes(path, part)[part]
        assert before == f"loading {part} of {path}, {size / 2**20:.1f} MiB on disk"
        assert re.fullmatch(rf"loaded {part} in \d+ s", after)


def test_what_is_small_is_not_worth_a_line(tiny_pipeline, capsys):
    load_all(tiny_pipeline)
    assert not announce("64 rollout workers", sizes(tiny_pipeline, TRANSFORMER, TEXT, VAE))
    assert capsys.readouterr().err == ""


def test_sizes_are_those_of_the_files(tiny_pipeline):
    whole = sum(file.stat().st_size for file in tiny_pipeline.rglob("*.safetensors"))
    assert sum(sizes(tiny_pipeline, TRANSFORMER, TEXT, VAE).values()) == whole


def test_many_actors_that_load_the_same_are_one_line(large, tiny_pipeline, tiny_reward, tmp_path, capsys):
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, workers={"rollout_workers": 64, "text_workers": 1})
    assert all([announce(who, sizes) for who, sizes in loads(run).items()])
    text, rollout, scorer, learner = capsys.readouterr().err.splitlines()
    assert rollout.startswith("64 rollout workers load transformer, ")
    assert text.startswith("1 text workers load text encoders, ")
    assert rollout.count(" on disk") == 2
    assert TEXT not in rollout, "embeddings are sent to them"
    assert scorer.startswith("1 scorers load transformer, ")
    assert VAE not in scorer, "no pixel scorer, no decoding"
    assert learner.startswith("1 learner ranks load transformer, ")


def test_a_scorers_parts_are_those_of_its_own_pipeline(tiny_pipeline, tiny_reward):
    assert scorer_loads(PictureScorerConfig(path=str(tiny_reward))) == sizes(tiny_pipeline, TRANSFORMER, TEXT, VAE)


def test_what_must_be_downloaded_first_is_said(capsys):
    assert announce("8 scorers", sizes("no-such-owner/no-such-pipeline", VAE))
    assert capsys.readouterr().err == "8 scorers load VAE, to be downloaded first\n"
