import math

import pytest
import torch

from dina_rl.config import TimestepConfig
from dina_rl.reward.timesteps import draw_timestep
from dina_rl.seeding import generator


def draws(config: TimestepConfig, count: int = 4000) -> torch.Tensor:
    source = generator("timesteps", 0)
    return torch.stack([draw_timestep(config, source) for _ in range(count)])


def test_fixed_is_its_level() -> None:
    assert draws(TimestepConfig(distribution="fixed", fixed=0.2), 10).tolist() == pytest.approx([0.2] * 10)


def test_uniform_covers_the_unit_interval() -> None:
    t = draws(TimestepConfig(distribution="uniform"))
    assert 0 <= t.min() < 0.01
    assert 0.99 < t.max() < 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.02)
    assert t.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.01)


def test_logit_normal_has_its_logit_moments() -> None:
    logits = torch.logit(draws(TimestepConfig(distribution="logit_normal", mean=0.8, std=1.0)))
    assert logits.mean().item() == pytest.approx(0.8, abs=0.06)
    assert logits.std().item() == pytest.approx(1.0, abs=0.05)


def test_same_generator_same_draws() -> None:
    config = TimestepConfig()
    assert draws(config, 5).tolist() == draws(config, 5).tolist()
