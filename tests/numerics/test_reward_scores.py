"""Batching the reward model changes no score: ensembles against single levels, pairs against single images (Alg. 2)."""

from pathlib import Path

import pytest
import torch

from dina_rl.backbones.base import Features
from dina_rl.backbones.registry import open_backbone
from dina_rl.flow.process import add_noise
from tests.tiny_reward import PROMPTS, latents, stirred_model

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
LEVELS = (0.2, 0.5, 0.7)


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path):
    return open_backbone(tiny_pipeline, max_sequence_length=8)


@pytest.fixture(scope="module")
def model(backbone):
    return stirred_model(backbone).requires_grad_(False)


@pytest.fixture(scope="module")
def prompt(backbone):
    return backbone.load_text_encoder()(PROMPTS)


def test_ensemble_of_one_level_is_the_single_level_score(model, prompt) -> None:
    x, noise = latents(3, 0), latents(3, 1)
    t = torch.full((3,), 0.4)
    single = model.score(add_noise(x, noise, t), t, prompt)
    assert torch.equal(model.score_clean(x, prompt, (0.4,), noise), single)


def test_batched_ensemble_is_the_sequential_one(model, backbone, prompt) -> None:
    """Algorithm 2 as written: one backbone forward per level, tokens appended, one pass of the query attention."""
    x, noise = latents(3, 0), latents(3, 1)
    per_level = []
    for level in LEVELS:
        t = torch.full((3,), level)
        per_level.append(backbone.features(model.truncated, add_noise(x, noise, t), t, prompt, model.config.taps))
    taps = range(len(model.config.taps))

    def side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts, 1).flatten(0, 1)  # sample 0 at its levels, then sample 1

    sequential = Features(
        visual=tuple(side_by_side([features.visual[tap] for features in per_level]) for tap in taps),
        text=tuple(side_by_side([features.text[tap] for features in per_level]) for tap in taps),
        time_embedding=side_by_side([features.time_embedding for features in per_level]),
    )
    expected = model.head(sequential, num_levels=len(LEVELS))
    torch.testing.assert_close(model.score_clean(x, prompt, LEVELS, noise), expected, **TOLERANCE)


def test_ensemble_attends_to_the_tokens_of_all_levels(model, prompt) -> None:
    """Concatenated tokens by hand, through the head's own parts (Eq. 13)."""
    x, noise, head = latents(1, 0), latents(1, 1), model.head
    visual, text = [], []
    for level in LEVELS:
        t = torch.full((1,), level)
        one = prompt.select(slice(0, 1))
        features = model.backbone.features(model.truncated, add_noise(x, noise, t), t, one, model.config.taps)
        for adapters, aggregate, taps, tokens in (
            (head.layer_adapters_visual, head.agg_visual, features.visual, visual),
            (head.layer_adapters_text, head.agg_text, features.text, text),
        ):
            adapted = [a(tap, features.time_embedding) for a, tap in zip(adapters, taps, strict=True)]
            tokens.append(aggregate(torch.cat(adapted, -1)))
    queries = head.attn1(head.query_tokens, torch.cat(visual, 1), torch.cat(text, 1))
    queries = head.attn2(queries, torch.cat(visual, 1))
    queries = queries + head.ff(head.norm_ff(queries))
    expected = head.head(queries).mean(1)[:, 0]
    actual = model.score_clean(x, prompt.select(slice(0, 1)), LEVELS, noise)
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_ensemble_is_not_the_mean_of_single_levels(model, prompt) -> None:
    x, noise = latents(3, 0), latents(3, 1)
    mean = torch.stack([model.score_clean(x, prompt, (level,), noise) for level in LEVELS]).mean(0)
    assert (model.score_clean(x, prompt, LEVELS, noise) - mean).abs().max() > 1e-4


def test_units_in_one_forward_score_as_images_by_themselves(model, prompt) -> None:
    """Images of a unit share its noise level, noise and prompt."""
    x, noise = latents(5, 0), latents(3, 1)
    t = torch.tensor([0.1, 0.4, 0.9])
    unit = torch.tensor([0, 1, 2, 0, 0])
    together = model.unit_scores(x, unit, t, prompt, noise)
    for position, number in enumerate(unit.tolist()):
        image, of_unit = slice(position, position + 1), slice(number, number + 1)
        alone = model.score(add_noise(x[image], noise[of_unit], t[of_unit]), t[of_unit], prompt.select(of_unit))
        torch.testing.assert_close(together[image], alone, **TOLERANCE)


def test_the_same_latent_ties_with_itself_in_a_unit(model, prompt) -> None:
    x, noise, unit = latents(3, 0), latents(3, 1), torch.arange(3)
    scores = model.unit_scores(torch.cat([x, x]), unit.repeat(2), torch.tensor([0.1, 0.4, 0.9]), prompt, noise)
    torch.testing.assert_close(scores[:3], scores[3:], **TOLERANCE)
