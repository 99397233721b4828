"""Renderer and golden rule are each other's test: the golden score must see what the renderer did."""

from dataclasses import fields

import pytest
import torch

from dina_rl.seeding import generator
from dina_rl.shapes.foreign import FOREIGN_DEFECTS, add_foreign_defects, foreign_crawl
from dina_rl.shapes.golden import GoldenParts, golden_score
from dina_rl.shapes.grammar import ATTRIBUTE_COUNTS, COLOUR, GROUND, SHAPE, SIZE, all_prompts, spec_tensor
from dina_rl.shapes.render import DEFECTS, crawl, render, with_wrong_attribute

PROMPTS = all_prompts()[::3]
SPECS = spec_tensor(PROMPTS)


def _defective(kind: str, severity: float) -> GoldenParts:
    severities = torch.zeros(len(SPECS), len(DEFECTS))
    severities[:, DEFECTS.index(kind)] = severity
    return golden_score(render(SPECS, generator(1, kind), severities), PROMPTS)


def _wrong(attribute: int) -> torch.Tensor:
    return with_wrong_attribute(SPECS, torch.full((len(SPECS),), attribute), generator(2, attribute))


def test_images_are_rgb_in_the_unit_interval():
    images = crawl(SPECS, generator(0))
    assert images.shape == (len(SPECS), 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_rendering_depends_on_the_generator_alone():
    torch.manual_seed(0)
    first = crawl(SPECS, generator(5))
    torch.manual_seed(1)
    assert crawl(SPECS, generator(5)).equal(first)
    assert not crawl(SPECS, generator(6)).equal(first)


def test_clean_renders_are_golden():
    parts = golden_score(render(SPECS, generator(0)), PROMPTS)
    assert parts.score.mean() > 0.985
    assert parts.score.quantile(0.05) > 0.95
    assert parts.shape_right.mean() == 1
    for field in fields(GoldenParts):
        assert getattr(parts, field.name).shape == (len(PROMPTS),)


@pytest.mark.parametrize(("attribute", "mean_limit"), [(COLOUR, 0.06), (GROUND, 0.04), (SHAPE, 0.12), (SIZE, 0.25)])
def test_a_wrong_attribute_is_not_golden(attribute, mean_limit):
    images = render(_wrong(attribute), generator(3))
    assert golden_score(images, PROMPTS).score.mean() < mean_limit


def test_no_shape_passes_for_another():
    for drawn in range(ATTRIBUTE_COUNTS[SHAPE]):
        specs = SPECS.clone()
        specs[:, SHAPE] = drawn
        parts = golden_score(render(specs, generator(4, drawn)), PROMPTS)
        asked = SPECS[:, SHAPE] == drawn
        assert parts.shape_right[asked].mean() == 1
        assert parts.shape_right[~asked].mean() < 0.02
        assert parts.score[~asked].quantile(0.95) < 0.15


@pytest.mark.parametrize("kind", DEFECTS)
def test_every_defect_costs_and_a_worse_one_costs_more(kind):
    mild, severe = _defective(kind, 0.01), _defective(kind, 1.0)
    assert mild.score.mean() < 0.9
    assert severe.score.mean() < 0.6 * mild.score.mean() or kind == "stamp"
    assert severe.score.mean() < mild.score.mean()


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("stripe", "clean"),
        ("mottle", "clean"),
        ("fade", "contrast"),
        ("blur", "sharp"),
        ("frame", "frame"),
        ("stamp", "whole"),
        ("bars", "whole"),
    ],
)
def test_each_defect_lowers_the_part_that_watches_it(kind, part):
    clean = golden_score(render(SPECS, generator(0)), PROMPTS)
    assert getattr(_defective(kind, 1.0), part).mean() < 0.6 * getattr(clean, part).mean()


def test_noise_and_an_empty_ground_are_worth_nothing():
    noise = torch.rand(len(SPECS), 3, 32, 32, generator=generator(8))
    empty = render(SPECS, generator(0))[:, :, :1, :1].expand(-1, -1, 32, 32)  # a corner is always ground
    assert golden_score(noise, PROMPTS).score.max() < 0.05
    assert golden_score(empty, PROMPTS).score.max() < 0.05


def test_the_crawl_is_mostly_defective():
    parts = golden_score(crawl(SPECS.repeat(3, 1), generator(9)), PROMPTS * 3)
    assert 0.13 < parts.score.mean() < 0.27
    assert 0.83 < parts.shape_right.mean() < 0.96


def test_a_wrong_attribute_is_the_only_change():
    for attribute in (COLOUR, GROUND, SHAPE, SIZE):
        changed = _wrong(attribute)
        differs = changed != SPECS
        assert differs[:, attribute].all()
        assert differs.sum() == len(SPECS)
        assert (changed[:, COLOUR] != changed[:, GROUND]).all()
        assert changed[:, attribute].max() < ATTRIBUTE_COUNTS[attribute]


def test_scores_do_not_depend_on_the_neighbours():
    images = crawl(SPECS, generator(10))
    together = golden_score(images, PROMPTS)
    order = torch.randperm(len(SPECS), generator=generator(11))
    shuffled = golden_score(images[order], [PROMPTS[index] for index in order.tolist()])
    alone = golden_score(images[:1], PROMPTS[:1])
    for field in fields(GoldenParts):
        expected = getattr(together, field.name)
        torch.testing.assert_close(getattr(shuffled, field.name), expected[order], rtol=0, atol=1e-6)
        torch.testing.assert_close(getattr(alone, field.name), expected[:1], rtol=0, atol=1e-6)


def test_larger_images_are_scored_at_the_worlds_size():
    images = render(SPECS, generator(0))
    enlarged = images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    expected = golden_score(images, PROMPTS).score
    torch.testing.assert_close(golden_score(enlarged, PROMPTS).score, expected, rtol=0, atol=1e-5)


def test_scores_carry_no_gradient():
    images = render(SPECS[:2], generator(0)).requires_grad_(True)
    assert not golden_score(images, PROMPTS[:2]).score.requires_grad


def test_bad_input_is_refused():
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        golden_score(images, PROMPTS[:1])
    with pytest.raises(ValueError, match="RGB images"):
        golden_score(images[:, :1], PROMPTS[:2])
    with pytest.raises(ValueError, match="outside the shapes grammar"):
        golden_score(images, ["a cat", PROMPTS[0]])


@pytest.mark.parametrize("kind", FOREIGN_DEFECTS)
def test_the_golden_score_sees_foreign_defects_too(kind):
    clean = render(SPECS, generator(3))
    severities = torch.zeros(len(SPECS), len(FOREIGN_DEFECTS))
    scores = []
    for severity in (0.0, 0.1, 1.0):
        severities[:, FOREIGN_DEFECTS.index(kind)] = severity
        scores.append(golden_score(add_foreign_defects(clean, severities, generator(4, kind)), PROMPTS).score.mean())
    assert scores[0] > 0.95
    assert scores[0] > scores[1] + 0.02
    assert scores[1] > scores[2] + 0.05


def test_some_out_of_domain_pictures_are_clean():
    images = foreign_crawl(SPECS, generator(0), caption_error_rate=0.0)
    scores = golden_score(images, PROMPTS).score
    assert 0.03 < (scores > 0.9).float().mean() < 0.4
    assert images.min() >= 0
    assert images.max() <= 1
