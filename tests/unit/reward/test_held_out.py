from pathlib import Path

import pytest
import torch

from dina_rl.backbones.registry import open_backbone
from dina_rl.reward.held_out import label_ceiling, pairwise_accuracy, score_pairs
from tests.tiny_reward import pair_batch, stirred_model


def test_a_predicted_tie_is_wrong() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0, 1.0])
    assert pairwise_accuracy(chosen, rejected) == 0.5


def test_scores_that_are_not_numbers_are_wrong() -> None:
    assert pairwise_accuracy(torch.tensor([float("nan"), 1.0]), torch.tensor([0.0, 0.0])) == 0.5


def test_no_pairs_no_accuracy() -> None:
    with pytest.raises(ValueError, match="scores"):
        pairwise_accuracy(torch.zeros(0), torch.zeros(0))


def test_ceiling_is_the_share_of_labels_that_the_golden_order_confirms() -> None:
    golden = {"a": 0.1, "b": 0.7, "c": 0.7}
    assert label_ceiling(golden, [("b", "a"), ("a", "b"), ("b", "c"), ("c", "a")]) == 0.5


def test_ceiling_needs_every_score() -> None:
    with pytest.raises(ValueError, match="2 images .* first is x"):
        label_ceiling({"a": 1.0}, [("x", "a"), ("a", "y")])


@pytest.mark.parametrize("levels", [(0.4,), (0.2, 0.7)])
def test_scores_do_not_depend_on_batching_and_share_noise(tiny_pipeline: Path, levels: tuple[float, ...]) -> None:
    backbone = open_backbone(tiny_pipeline, max_sequence_length=8)
    model, encoder = stirred_model(backbone), backbone.load_text_encoder()
    whole, part = pair_batch(4, 0), pair_batch(2, 0)
    chosen, rejected = score_pairs(model, [whole], encoder, levels=levels, seed=0)
    first, second = score_pairs(model, [part], encoder, levels=levels, seed=0)
    torch.testing.assert_close(chosen[:2], first)
    torch.testing.assert_close(rejected[:2], second)
    other, _ = score_pairs(model, [whole], encoder, levels=levels, seed=1)
    assert not torch.allclose(chosen, other)
