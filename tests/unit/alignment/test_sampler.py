"""What guidance leads away from, in rollouts, in the loss and when measuring."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dina_rl.alignment.sampler import PolicySampler
from dina_rl.alignment.texts import PromptEncoder
from dina_rl.config.keys import explain
from dina_rl.seeding import normal
from dina_rl.types import PromptEmbeds, WorkItem
from tests.rollouts import Rollouts
from tests.tiny_run import tiny_run

NEGATIVE = "a blurred ring"
ITEM = WorkItem(iteration=0, prompt_id=0, prompt="a small red circle", group_size=2)


def test_guidance_leads_away_from_the_negative_prompt(tmp_path: Path, tiny_pipeline: Path) -> None:
    run = tiny_run(
        tmp_path / "run",
        tiny_pipeline,
        tiny_pipeline,
        rollout={"negative_prompt": NEGATIVE},
        learner={"guidance_in_loss": True},
    )
    sampler = PolicySampler(run)
    texts = PromptEncoder(run).for_rollout([ITEM])
    prompt, negative = (texts([text] * 2) for text in (ITEM.prompt, NEGATIVE))
    x, sigma = normal((2, *sampler.latent_shape), "negative"), torch.tensor([0.4, 0.9])

    def velocity(text: PromptEmbeds) -> torch.Tensor:
        return sampler.backbone.velocity(sampler.transformer, x, sigma, text)

    with torch.no_grad():
        followed = sampler.velocity(prompt, 3.0, texts).followed(x, sigma)
        assert torch.equal(followed, velocity(negative) + 3 * (velocity(prompt) - velocity(negative)))
        assert torch.equal(sampler.velocity(prompt, 1.0, texts).followed(x, sigma), velocity(prompt))
    assert torch.equal(sampler.trained_negative(texts).embeds, negative.embeds[:1])


def test_rollouts_differ_by_it(tmp_path: Path, tiny_pipeline: Path) -> None:
    runs = [
        tiny_run(tmp_path / "run", tiny_pipeline, tiny_pipeline, rollout={"negative_prompt": text})
        for text in ("", NEGATIVE)
    ]
    plain, led = (Rollouts(run).rollout([ITEM])[0].latents for run in runs)
    assert not torch.allclose(plain, led)


def test_a_negative_prompt_without_guidance_is_refused(tmp_path: Path, tiny_pipeline: Path) -> None:
    golden = {"guidances": [1.0], "aligned_guidances": [1.0]}
    rollout = {"negative_prompt": NEGATIVE, "guidance_scale": 1.0}
    with pytest.raises(ValidationError) as error:
        tiny_run(tmp_path / "run", tiny_pipeline, tiny_pipeline, rollout=rollout, golden=golden)
    assert explain(error.value) == ["rollout.negative_prompt without guidance: every guidance scale is 1"]
    assert tiny_run(tmp_path / "run", tiny_pipeline, tiny_pipeline, rollout=rollout)
