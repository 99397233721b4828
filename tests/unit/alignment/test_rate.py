"""The policy's learning rate: warm-up and schedule, and the rules on them."""

import pytest
import torch
from pydantic import ValidationError
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from dina_rl.alignment.planning import describe
from dina_rl.alignment.rate import learning_rate
from dina_rl.config import AlignRun, LearnerConfig

FALLING = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}


def test_by_default_the_rate_is_the_configured_one():
    config = LearnerConfig()
    assert {learning_rate(config, update, 7) for update in range(7)} == {config.learning_rate}
    assert not config.rate_depends_on_length


def test_the_warm_up_is_a_line_to_the_rate():
    config = LearnerConfig(learning_rate=0.4, warmup_updates=4)
    assert [learning_rate(config, update, 6) for update in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert not config.rate_depends_on_length


@pytest.mark.parametrize("schedule", FALLING)
def test_schedules_fall_as_those_of_transformers(schedule):
    config = LearnerConfig(learning_rate=0.1, warmup_updates=3, schedule=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    theirs = FALLING[schedule](optimizer, config.warmup_updates, 10)
    expected = []
    for _ in range(10):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    # Their warm-up begins with an update at rate 0, which does nothing; ours with one that does.
    assert [learning_rate(config, update, 10) for update in range(3, 10)] == pytest.approx(expected[3:])
    assert learning_rate(config, 2, 10) == config.learning_rate
    assert config.rate_depends_on_length


def test_a_warm_up_as_long_as_the_run_is_a_mistake():
    learner = {"updates_per_iteration": 2, "epochs": 3, "warmup_updates": 60, "micro_batch_size": 18}
    with pytest.raises(ValidationError, match=r"learner.warmup_updates \(60\) must be fewer than the run's 60 updates"):
        AlignRun.model_validate({"iterations": 10, "learner": learner})
    run = AlignRun.model_validate({"iterations": 11, "learner": {**learner, "schedule": "cosine"}})
    assert "66 in all, rate 3e-05 after 60 updates of warm-up, cosine" in describe(run)
