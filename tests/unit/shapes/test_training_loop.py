from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dina_rl.seeding import generator
from dina_rl.shapes import training_loop
from dina_rl.shapes.training_loop import Stage, linear_decay, run_stage


class Killed(Exception):
    """Stands for the signal that ends a run."""


def _stage(steps: int, *, killed_at: int | None = None) -> Stage:
    draws = generator(0, "training loop test")
    module = nn.Linear(4, 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))

    def loss() -> Tensor:
        inputs = torch.randn(8, 4, generator=draws)
        return (module(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()

    def after_step(done: int) -> None:
        if done == killed_at:
            raise Killed

    return Stage(
        name="test",
        steps=steps,
        modules={"module": module},
        optimizers=(torch.optim.AdamW(module.parameters(), lr=1e-2),),
        schedule=linear_decay(steps, warmup=3, hold=0.3, floor=0.02),
        loss=loss,
        after_step=after_step,
        generator=draws,
    )


def test_the_schedule_warms_up_holds_and_decays():
    factor = linear_decay(100, warmup=10, hold=0.3, floor=0.02)
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == factor(29) == 1
    assert factor(65) == pytest.approx(0.5)
    assert factor(99) == pytest.approx(0.02)


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(training_loop, "CHECKPOINT_EVERY", 5)
    whole = _stage(20)
    run_stage(whole, tmp_path / "whole.pt")

    with pytest.raises(Killed):
        run_stage(_stage(20, killed_at=13), tmp_path / "killed.pt")
    resumed = _stage(20)
    run_stage(resumed, tmp_path / "killed.pt")

    assert resumed.modules["module"].weight.equal(whole.modules["module"].weight)
    assert resumed.generator.get_state().equal(whole.generator.get_state())


def test_a_finished_stage_is_not_trained_again(tmp_path: Path):
    first = _stage(5)
    seconds = run_stage(first, tmp_path / "done.pt")
    again = _stage(5, killed_at=1)
    assert run_stage(again, tmp_path / "done.pt") >= seconds * 0.5
    assert again.modules["module"].weight.equal(first.modules["module"].weight)


def test_the_loss_falls(tmp_path: Path):
    stage = _stage(300)
    before = stage.loss().item()
    run_stage(stage, tmp_path / "long.pt")
    assert stage.loss().item() < 0.5 * before
