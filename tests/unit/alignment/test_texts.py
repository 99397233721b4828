"""Who encodes prompts: what a call is handed, and that nobody else holds text encoders."""

from pathlib import Path

import pytest
import torch

from dina_rl.alignment.measurement import EvaluationItem
from dina_rl.alignment.planning import loads
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.alignment.rollout import RolloutWorker
from dina_rl.alignment.texts import PromptEncoder
from dina_rl.backbones.sd3 import SD3
from dina_rl.config import AlignRun
from dina_rl.loading import TEXT
from dina_rl.runtime import open_pipeline
from dina_rl.types import WorkItem
from tests.tiny_run import tiny_run

NEGATIVE = "a blurred ring"
ITEMS = [
    WorkItem(iteration=0, prompt_id=i, prompt=prompt, group_size=2)
    for i, prompt in enumerate(("a red circle", "a blue cross on white", "a red circle"))
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path, tiny_reward: Path) -> AlignRun:
    directory = tmp_path_factory.mktemp("run")
    return tiny_run(directory, tiny_pipeline, tiny_reward, rollout={"negative_prompt": NEGATIVE})


def measured(guidance_scale: float) -> EvaluationItem:
    prompts = tuple(item.prompt for item in ITEMS)
    return EvaluationItem(
        split="dev", prompt_ids=(0, 1, 2), prompts=prompts, sample_ids=(0, 0, 0), guidance_scale=guidance_scale
    )


def test_a_call_gets_each_text_once_and_as_it_would_be_alone(run: AlignRun) -> None:
    encoder = PromptEncoder(run)
    together = encoder.for_rollout(ITEMS)
    assert together.texts == ("a red circle", "a blue cross on white", NEGATIVE)
    for text in together.texts:
        alone = open_pipeline(run.pipeline).load_text_encoder()([text])
        assert torch.equal(together([text]).embeds, alone.embeds)
        assert torch.equal(together([text]).pooled, alone.pooled)
    twice = together([ITEMS[0].prompt] * 2)
    assert torch.equal(twice.embeds[0], twice.embeds[1])


def test_the_negative_prompt_is_sent_where_it_is_read(run: AlignRun) -> None:
    encoder = PromptEncoder(run)
    assert NEGATIVE in encoder.for_evaluation([measured(2.0)]).texts
    assert NEGATIVE not in encoder.for_evaluation([measured(1.0)]).texts


def test_rollout_workers_and_scorers_load_no_text_encoders(run: AlignRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the reward of the generator's own backbone: the embeddings come with what it scores."""
    texts = PromptEncoder(run).for_rollout(ITEMS)
    monkeypatch.setattr(SD3, "load_text_encoder", lambda self, **options: pytest.fail("text encoders are loaded"))
    groups = RolloutWorker(run).rollout(ITEMS, texts)
    assert ScoringWorker(run).score(groups)["dina"].isfinite().all()
    with_texts = run.model_copy(update={"workers": run.workers.model_copy(update={"text_workers": 1})})
    assert [who for who, sizes in loads(with_texts).items() if TEXT in sizes] == ["1 text workers"]
    assert [who for who, sizes in loads(run).items() if TEXT in sizes] == ["1 rollout workers"]
