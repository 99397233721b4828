from pathlib import Path

import pytest
import torch

from dina_rl.backbones.registry import open_backbone
from dina_rl.config import FitConfig, TimestepConfig
from dina_rl.reward.fit import RewardFit, fit, rate_factor, training_noise
from dina_rl.reward.model import LatentRewardModel
from tests.tiny_reward import TINY_REWARD, pair_batch

CONFIG = FitConfig(steps=12, batch_size=8, learning_rate=3e-3, ema_decay=0.5)


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path):
    return open_backbone(tiny_pipeline, max_sequence_length=8)


@pytest.fixture(scope="module")
def encoder(backbone):
    return backbone.load_text_encoder()


def test_loss_falls_on_pairs_that_can_be_learned(backbone, encoder) -> None:
    progress = RewardFit(LatentRewardModel(backbone, TINY_REWARD, seed=0), CONFIG)
    reports = list(fit(progress, (pair_batch(8, step) for step in range(12)), encoder, seed=0))
    assert [report.step for report in reports] == list(range(1, 13))
    assert sum(r.loss for r in reports[-4:]) < sum(r.loss for r in reports[:4])
    assert all(report.grad_norm > 0 for report in reports)


def test_only_trainable_weights_move(backbone, encoder) -> None:
    model = LatentRewardModel(backbone, TINY_REWARD, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    list(fit(RewardFit(model, CONFIG), [pair_batch(8, 0), pair_batch(8, 1)], encoder, seed=0))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_averages_follow_the_recursion_and_are_swapped_in_and_out(backbone, encoder) -> None:
    progress = RewardFit(LatentRewardModel(backbone, TINY_REWARD, seed=0), CONFIG)
    name = "head.head.weight"
    expected = progress.parameters[name].detach().clone()
    for n, _ in enumerate(fit(progress, (pair_batch(8, step) for step in range(8)), encoder, seed=0)):
        decay = min((1 + n) / (10 + n), 0.5)  # 0.1, 0.18, ... until 0.5 is reached at n = 8
        expected = decay * expected + (1 - decay) * progress.parameters[name].detach()
    torch.testing.assert_close(progress.averages[name], expected)
    current = progress.parameters[name].detach().clone()
    assert not torch.allclose(current, expected)
    with progress.averaged_weights() as model:
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)
    assert torch.equal(progress.parameters[name], current)


def test_a_pairs_noise_does_not_depend_on_its_neighbours() -> None:
    whole = pair_batch(4, 0)
    part = pair_batch(2, 0)
    t, noise = training_noise(whole, TimestepConfig(), seed=3, step=5)
    t_part, noise_part = training_noise(part, TimestepConfig(), seed=3, step=5)
    assert torch.equal(t[:2], t_part)
    assert torch.equal(noise[:2], noise_part)
    assert len(set(t.tolist())) == 4
    other = training_noise(whole, TimestepConfig(), seed=3, step=6)
    assert (other[0] != t).all()


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (4, 0.5), (9, 1.0), (49, 1.0), (50, 1.0), (75, 0.525), (99, 0.069)]
)
def test_learning_rate_warms_up_and_decays(step: int, factor: float) -> None:
    config = FitConfig(steps=100, warmup_steps=10, decay_start=0.5)
    assert rate_factor(step, config) == pytest.approx(factor)


def test_learning_rate_is_constant_by_default() -> None:
    assert {rate_factor(step, FitConfig(steps=100)) for step in range(100)} == {1.0}
