"""The three conventions by hand, and the bootstrap against known distributions."""

import numpy
import pytest
import torch

from dina_rl.data.sets.records import PreferenceRecord
from dina_rl.evaluation.accuracy import Comparisons, bootstrap, by_category, by_models, compare, measure


def record(index: int, ranks: tuple[int, ...], *, prompt: str | None = None, **values) -> PreferenceRecord:
    return PreferenceRecord(
        index=index,
        prompt=prompt or f"prompt {index}",
        images=tuple(f"{index}-{number}.png" for number in range(len(ranks))),
        ranks=ranks,
        **values,
    )


def scored(*values: tuple[float, ...]) -> dict[int, torch.Tensor]:
    return {index: torch.tensor(scores) for index, scores in enumerate(values)}


def pairs(margins: list[float], prompts: list[int]) -> Comparisons:
    return Comparisons(
        margins=torch.tensor(margins, dtype=torch.float64),
        tied=torch.zeros(len(margins), dtype=torch.bool),
        prompts=torch.tensor(prompts),
        records=torch.arange(len(margins)),
        models=None,
        categories=None,
    )


def test_conventions_by_hand() -> None:
    """Group 0: 3 comparisons, 2 right. Group 1: 1 people's tie and 2 right. Group 2: 1 wrong, being a predicted tie."""
    records = [record(0, (1, 2, 3)), record(1, (2, 1, 2)), record(2, (1, 2))]
    result = measure(compare(records, scored((2.0, 3.0, 1.0), (0.0, 5.0, 1.0), (4.0, 4.0))))
    assert (result.pairs, result.ties, result.predicted_ties, result.prompts) == (6, 1, 1, 3)
    assert result.micro == pytest.approx(4 / 6)
    assert result.ties_wrong == pytest.approx(4 / 7)
    assert result.per_prompt == pytest.approx((2 / 3 + 3 / 3 + 0 / 1) / 3)


def test_verdicts_of_both_orders_are_halves_by_hand() -> None:
    """Pair 0: right in both orders. 1: the place decides. 2: a tie, and right. 3: one verdict is missing. 4: a tie."""
    none = float("nan")
    records = [record(index, (1, 2)) for index in range(4)] + [record(4, (1, 1))]
    answers = ((1.0, 0.0), (0.0, 0.0), (0.5, 0.0), (1.0, none), (none, none))  # better first, worse first
    verdicts = {index: torch.tensor([[none, first], [second, none]]) for index, (first, second) in enumerate(answers)}
    result = measure(compare(records, verdicts))
    assert (result.pairs, result.ties, result.predicted_ties, result.failed) == (4, 1, 1, 1)
    assert result.micro == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert result.ties_wrong == pytest.approx(2 / 5)
    assert result.position_bias == pytest.approx(1 / 3)
    assert measure(compare(records, scored(*[(2.0, 1.0)] * 5))).position_bias is None


def test_agrees_with_a_plain_count_over_random_groups() -> None:
    draws = numpy.random.default_rng(0)
    records, scores = [], {}
    right = untied = total = 0
    shares = []
    for index in range(60):
        size = int(draws.integers(2, 7))
        ranks, values = draws.integers(1, 4, size), draws.integers(0, 4, size).astype(float)
        records.append(record(index, tuple(int(rank) for rank in ranks)))
        scores[index] = torch.tensor(values)
        agree, credit = 0, 0
        for a in range(size):
            for b in range(a):
                order, opinion = numpy.sign(ranks[b] - ranks[a]), numpy.sign(values[a] - values[b])
                agree += order != 0 and order == opinion
                credit += order == 0 or order == opinion
                untied += order != 0
        right, total = right + agree, total + size * (size - 1) // 2
        shares.append(credit / (size * (size - 1) // 2))
    result = measure(compare(records, scores))
    assert result.micro == pytest.approx(right / untied)
    assert result.ties_wrong == pytest.approx(right / total)
    assert result.per_prompt == pytest.approx(numpy.mean(shares))
    assert (result.pairs, result.ties) == (untied, total - untied)


def test_records_of_one_prompt_are_one_prompt() -> None:
    """HPDv3 lists a prompt's pairs one by one: the per-prompt mean weighs prompts, not records."""
    records = [record(0, (1, 2), prompt="a"), record(1, (1, 2), prompt="a"), record(2, (1, 2), prompt="b")]
    result = measure(compare(records, scored((1.0, 0.0), (1.0, 0.0), (0.0, 1.0))))
    assert result.micro == pytest.approx(2 / 3)
    assert result.per_prompt == pytest.approx(1 / 2)
    assert result.prompts == 2


def test_failed_scores_are_wrong_and_counted() -> None:
    result = measure(compare([record(0, (1, 2)), record(1, (1, 2))], scored((float("nan"), 0.0), (1.0, 0.0))))
    assert (result.micro, result.failed, result.predicted_ties) == (0.5, 1, 0)


def test_records_without_scores_are_left_out() -> None:
    comparisons = compare([record(0, (1, 2)), record(1, (1, 2))], {1: torch.tensor([1.0, 0.0])})
    assert comparisons.records.tolist() == [1]


def test_margins_point_to_the_preferred_image() -> None:
    comparisons = compare([record(0, (3, 1, 2))], scored((0.0, 1.0, 5.0)))
    assert comparisons.margins.tolist() == [1.0, 5.0, -4.0]


def test_scores_must_match_the_images() -> None:
    with pytest.raises(ValueError, match="record 0 has 2 images and 3 scores"):
        compare([record(0, (1, 2))], scored((1.0, 2.0, 3.0)))


def test_nothing_but_ties_is_no_accuracy() -> None:
    with pytest.raises(ValueError, match="none of 1"):
        measure(compare([record(0, (1, 1))], scored((1.0, 2.0))))


def test_breakdowns_count_both_orders_of_a_model_pair_together() -> None:
    records = [
        record(0, (1, 2), models=("x", "y"), category="arts"),
        record(1, (1, 2), models=("y", "x"), category="food"),
        record(2, (1, 2), models=("x", "x")),
    ]
    comparisons = compare(records, scored((1.0, 0.0), (0.0, 1.0), (1.0, 0.0)))
    assert {name: measure(part).micro for name, part in by_models(comparisons).items()} == {"x vs y": 0.5, "x vs x": 1}
    assert {name: len(part) for name, part in by_category(comparisons).items()} == {
        "(unnamed)": 1,
        "arts": 1,
        "food": 1,
    }
    plain = compare([record(0, (1, 2))], scored((1.0, 0.0)))
    assert by_models(plain) == by_category(plain) == {}


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    draws = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        margins = torch.where(torch.rand(120, generator=draws) < 0.7, 1.0, -1.0)
        interval = bootstrap(pairs(margins.tolist(), list(range(120))), resamples=300, confidence=0.9, seed=trial)
        covered += interval["micro"].low <= 0.7 <= interval["micro"].high
    assert 0.83 <= covered / 200 <= 0.96  # 0.9, within the binomial error of 200 trials and a discrete statistic


def test_bootstrap_resamples_prompts_not_pairs() -> None:
    """Ten copies of every comparison are no more evidence than one: the interval stays as wide."""
    margins = [1.0 if number % 3 else -1.0 for number in range(60)]
    once = bootstrap(pairs(margins, list(range(60))), resamples=500, confidence=0.95, seed=0)["micro"]
    copied = bootstrap(pairs(margins * 10, list(range(60)) * 10), resamples=500, confidence=0.95, seed=0)["micro"]
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    apart = bootstrap(pairs(margins * 10, list(range(600))), resamples=500, confidence=0.95, seed=0)["micro"]
    assert apart.high - apart.low < (once.high - once.low) / 2


def test_bootstrap_is_seeded() -> None:
    some = pairs([1.0, -1.0, 1.0, 1.0, -1.0], [0, 1, 2, 3, 4])
    first, again = (bootstrap(some, resamples=100, confidence=0.95, seed=3) for _ in range(2))
    assert first == again


def test_resamples_without_a_decision_leave_micro_defined() -> None:
    comparisons = compare([record(0, (1, 2)), record(1, (1, 1))], scored((1.0, 0.0), (1.0, 0.0)))
    intervals = bootstrap(comparisons, resamples=100, confidence=0.95, seed=0)
    assert (intervals["micro"].low, intervals["micro"].high) == (1, 1)
    assert intervals["ties_wrong"].low < 1
