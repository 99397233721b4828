"""Pairs that share images form groups: every pair in one, every image of a group once, no group too large."""

from dataclasses import replace

import pytest
import torch

from dina_rl.data.stores.latents import PairTable
from dina_rl.data.stores.units import GROUP_IMAGES, Layout, Unit, fit_units, layout, training_batch

PAIRS = (  # (chosen, rejected, prompt, bucket)
    (0, 1, 0, 0),
    (10, 11, 1, 0),
    (1, 2, 0, 0),
    (3, 4, 0, 0),  # of the same prompt, but of other images
    (0, 20, 0, 1),  # of the same prompt, but of another size
    (2, 0, 0, 0),
    (10, 12, 1, 0),
    (0, 1, 2, 0),  # the same images under another prompt
)


def table(pairs: tuple[tuple[int, int, int, int], ...]) -> PairTable:
    chosen, rejected, prompt, bucket = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return PairTable(
        pair_ids=torch.arange(len(pairs)) + 100,
        chosen=chosen,
        rejected=rejected,
        bucket=bucket,
        prompt=prompt,
        prompts=tuple(f"prompt {number}" for number in range(int(prompt.max()) + 1)),
    )


def members(pairs: tuple[tuple[int, int, int, int], ...]) -> list[list[int]]:
    units = fit_units(table(pairs), "groups")
    return [units.pairs_of(unit).tolist() for unit in range(len(units))]


def test_a_pair_is_a_unit() -> None:
    units = fit_units(table(PAIRS), "pairs")
    assert [units.pairs_of(unit).tolist() for unit in range(len(units))] == [[n] for n in range(len(PAIRS))]
    assert units.bucket.tolist() == [pair[3] for pair in PAIRS]


def test_pairs_of_one_prompt_and_size_that_share_images_are_a_group() -> None:
    units = fit_units(table(PAIRS), "groups")
    assert members(PAIRS) == [[0, 2, 5], [1, 6], [3], [4], [7]]
    assert units.bucket.tolist() == [0, 0, 0, 1, 0]
    assert units.sizes().tolist() == [3, 2, 1, 1, 1]


@pytest.mark.parametrize(
    "sides",
    [
        [(a, b) for a in range(20) for b in range(a)],
        [(0, b) for b in range(1, 30)],
        [(b, b + 1) for b in range(40)],
    ],
    ids=["all with all", "star", "chain"],
)
def test_a_large_group_is_cut(sides: list[tuple[int, int]]) -> None:
    pairs = tuple((a, b, 0, 0) for a, b in sides)
    groups = members(pairs)
    assert sorted(sum(groups, [])) == list(range(len(pairs)))
    images = [{image for position in group for image in sides[position]} for group in groups]
    assert max(map(len, images)) == GROUP_IMAGES
    passes = sum(map(len, images))
    assert passes < 2 * len(pairs) * 0.7  # of the passes that pairs cost


def test_a_layout_names_every_image_once() -> None:
    units = fit_units(table(PAIRS), "groups")
    expected = Layout(key=100, prompt=0, rows=(0, 1, 2), chosen=(0, 1, 2), rejected=(1, 2, 0))
    assert layout(table(PAIRS), units, 0) == expected


def unit(key: int, images: int, *pairs: tuple[int, int]) -> Unit:
    latents = torch.arange(images).view(-1, 1, 1, 1).float() + 10 * key
    chosen, rejected = zip(*pairs, strict=True)
    return Unit(key=key, prompt=f"prompt {key}", latents=latents, chosen=chosen, rejected=rejected)


UNITS = (unit(1, 2, (0, 1)), unit(2, 3, (0, 1), (2, 1)), unit(3, 1, (0, 0)), unit(4, 2, (1, 0)))


def test_probabilities_stay_with_their_pairs() -> None:
    told = replace(table(PAIRS), probability=torch.linspace(0.1, 0.8, len(PAIRS), dtype=torch.float64))
    units = fit_units(told, "groups")
    layouts = [layout(told, units, number) for number in (1, 0)]
    assert told.probability is not None
    by_position = [tuple(told.probability[units.pairs_of(number)].tolist()) for number in (1, 0)]
    assert [each.probability for each in layouts] == by_position
    batch = training_batch(
        [
            replace(unit(n, 3, *((0, 1) for _ in each.chosen)), probability=each.probability)
            for n, each in enumerate(layouts)
        ],
        step_pairs=5,
    )
    assert batch.probability is not None
    assert batch.probability.tolist() == [*by_position[0], *by_position[1]]
    part = batch.part(1, 2).probability
    assert part is not None
    assert part.tolist() == list(by_position[1])


def test_a_batch_holds_its_units_pairs() -> None:
    batch = training_batch(UNITS, step_pairs=9)
    assert len(batch) == 5
    assert batch.latents[batch.chosen].flatten().tolist() == [10, 20, 22, 30, 41]
    assert batch.latents[batch.rejected].flatten().tolist() == [11, 21, 21, 30, 40]
    assert batch.unit.tolist() == [0, 1, 2, 3, 0, 1, 3, 1]  # pairs: all chosen ones, then all rejected ones
    assert batch.step_pairs == 9


@pytest.mark.parametrize(("first", "stop"), [(0, 4), (1, 3), (3, 4)])
def test_a_part_is_the_batch_of_its_units(first: int, stop: int) -> None:
    part, expected = (
        training_batch(UNITS, step_pairs=9).part(first, stop),
        training_batch(UNITS[first:stop], step_pairs=9),
    )
    assert (part.keys, part.prompts, part.step_pairs) == (expected.keys, expected.prompts, 9)
    for name in ("unit", "latents", "chosen", "rejected"):
        assert torch.equal(getattr(part, name), getattr(expected, name)), name
