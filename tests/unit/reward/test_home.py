"""A reward scores inside the backbone that it was fitted on, whatever generator made the latents."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.config import DiNaScorerConfig, PictureScorerConfig, PipelineConfig
from dina_rl.evaluation.named_scorers import named_scorer
from dina_rl.reward.card import CARD_FILE
from dina_rl.reward.checkpoint import save_reward
from dina_rl.reward.home import check_home, find_home
from dina_rl.runtime import open_pipeline
from dina_rl.scoring import open_scorer
from dina_rl.types import WorkItem
from jobs.align import preflight
from tests.rollouts import Rollouts
from tests.tiny_reward import stirred_model
from tests.tiny_run import tiny_run

ITEMS = [WorkItem(iteration=0, prompt_id=0, prompt="a small red circle on blue", group_size=4)]


@pytest.fixture(scope="module")
def reward(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiNa-LRM on `tiny_pipeline` all of whose parts matter."""
    directory, pipeline = tmp_path_factory.mktemp("home") / "reward", PipelineConfig(path=str(tiny_pipeline))
    save_reward(stirred_model(open_pipeline(pipeline)), directory, pipeline=pipeline)
    return directory


def tuned(pipeline: Path, directory: Path, part: str) -> PipelineConfig:
    """A copy whose part was trained on."""
    copy = shutil.copytree(pipeline, directory / part)
    (file,) = (copy / part).glob("*.safetensors")
    source = torch.Generator().manual_seed(0)
    tensors = {name: t + 0.05 * torch.randn(t.shape, generator=source) for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return PipelineConfig(path=str(copy), height=32, width=32, max_sequence_length=8)


def without_fingerprint(reward: Path, directory: Path, **changes: object) -> Path:
    """A copy with the card of an earlier version."""
    copy = shutil.copytree(reward, directory / "old")
    card = json.loads((copy / CARD_FILE).read_text()) | {"version": 2} | changes
    del card["fingerprint"]
    (copy / CARD_FILE).write_text(json.dumps(card))
    return copy


def scores(run_dir: Path, generator: Path, reward: Path, groups: list, **dina: str) -> torch.Tensor:
    rewards = {"dina": {"path": str(reward), **dina}}
    return ScoringWorker(tiny_run(run_dir, generator, reward, rewards=rewards)).score(groups)["dina"]


@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
def test_another_generators_latents_are_scored_as_its_own_would_be(
    tiny_pipeline: Path, reward: Path, tmp_path: Path, part: str
) -> None:
    generator = Path(tuned(tiny_pipeline, tmp_path, part).path)
    groups = Rollouts(tiny_run(tmp_path / "run", generator, reward)).rollout(ITEMS)
    found = scores(tmp_path / "run", generator, reward, groups)
    own = open_pipeline(PipelineConfig(path=str(tiny_pipeline))).load_text_encoder()([ITEMS[0].prompt])
    at_home = [replace(groups[0], prompt=own)]
    assert torch.equal(found, scores(tmp_path / "run", tiny_pipeline, reward, at_home))
    old = without_fingerprint(reward, tmp_path, pipeline=str(generator), revision=None)
    inside = scores(tmp_path / "run", generator, old, groups)  # as it was without a word
    assert not torch.allclose(inside - inside.mean(), found - found.mean(), atol=1e-4)
    named = scores(tmp_path / "run", generator, old, groups, pipeline=str(tiny_pipeline))
    assert torch.equal(named, found)


def test_equal_weights_are_the_generators_own_wherever_they_lie(
    tiny_pipeline: Path, reward: Path, tmp_path: Path
) -> None:
    moved = PipelineConfig(path=str(shutil.copytree(tiny_pipeline, tmp_path / "moved")))
    dina = DiNaScorerConfig(path=str(reward))
    for section in (dina, dina.model_copy(update={"pipeline": str(tiny_pipeline)})):
        home = find_home(section, moved)
        assert (home.pipeline, home.reads_prompts, home.notes) == (moved, False, ())


def test_its_own_text_encoders_are_loaded_for_other_texts_alone(
    tiny_pipeline: Path, reward: Path, tmp_path: Path
) -> None:
    dina = DiNaScorerConfig(path=str(reward))
    for part, reads in (("transformer", False), ("text_encoder", True)):
        home = find_home(dina, tuned(tiny_pipeline, tmp_path, part))
        assert (home.pipeline.path, home.reads_prompts) == (str(tiny_pipeline), reads)
        assert any("scores inside its own backbone" in note for note in home.notes)
    longer = tuned(tiny_pipeline, tmp_path / "longer", "transformer").model_copy(update={"max_sequence_length": 16})
    home = find_home(dina, longer)
    assert (home.reads_prompts, home.pipeline.max_sequence_length) == (True, 8)


def test_another_vae_is_refused_everywhere(
    tiny_pipeline: Path, reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tuned(tiny_pipeline, tmp_path, "vae")
    line = "scores latents of another VAE than that of .*vae: fit one on latents of this generator"
    with pytest.raises(ValueError, match=line):
        preflight(tiny_run(tmp_path / "run", Path(other.path), reward))
    old = without_fingerprint(reward, tmp_path, pipeline="gone")
    dina = DiNaScorerConfig(path=str(old), pipeline=str(tiny_pipeline))
    with pytest.raises(ValueError, match=line):
        find_home(dina, other)
    with pytest.raises(ValueError, match="was fitted on another VAE than .*vae holds .* as pipeline$"):
        open_scorer(reward, pipeline=other.path)
    config = PictureScorerConfig(path=str(reward), pipeline=other.path)
    with pytest.raises(ValueError, match=r"was fitted on another VAE .* as scorers\.mine\.pipeline$"):
        named_scorer("mine", config)


def test_weights_that_changed_under_their_name_are_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    pipeline = PipelineConfig(path=str(shutil.copytree(tiny_pipeline, tmp_path / "pipeline")))
    save_reward(stirred_model(open_pipeline(pipeline)), tmp_path / "reward", pipeline=pipeline)
    changed = tuned(tiny_pipeline, tmp_path, "transformer")
    shutil.rmtree(pipeline.path)
    dina = DiNaScorerConfig(path=str(tmp_path / "reward"))
    with pytest.raises(ValueError, match=r"pipeline does not exist \(reward model .* name a copy as rewards.dina.pip"):
        check_home(dina, changed, open_pipeline(changed))
    Path(changed.path).rename(pipeline.path)
    with pytest.raises(ValueError, match=r"another transformer than .* holds .* as rewards\.dina\.pipeline"):
        find_home(dina, pipeline)
    named = dina.model_copy(update={"pipeline": str(tiny_pipeline)})
    assert find_home(named, pipeline).pipeline.path == str(tiny_pipeline)
    with pytest.raises(ValueError, match="another transformer than"):
        open_scorer(tmp_path / "reward")


def test_a_card_without_a_fingerprint_is_believed_and_that_is_said(
    tiny_pipeline: Path, reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    old = without_fingerprint(reward, tmp_path)
    preflight(tiny_run(tmp_path / "run", tiny_pipeline, old))
    line = f"reward model {old} has no fingerprint; it is taken to be fitted on what {tiny_pipeline} holds\n"
    assert capsys.readouterr().out == line
    other = tuned(tiny_pipeline, tmp_path, "transformer")  # its card has a revision, which is another's
    assert find_home(DiNaScorerConfig(path=str(old)), other).pipeline.path == str(tiny_pipeline)
