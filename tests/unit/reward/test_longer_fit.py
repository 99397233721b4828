"""When a fit may be given more steps: what is done must be what the longer fit would have done."""

from pathlib import Path

import pytest
import torch
import yaml

from dina_rl.checkpoint import resumed_values
from dina_rl.config import FitConfig, FitRun
from dina_rl.data.stores.units import Units
from dina_rl.reward import job
from dina_rl.reward.job import why_not_longer


@pytest.mark.parametrize(
    ("fit", "reason"),
    [
        ({}, None),
        ({"warmup_steps": 5}, None),
        ({"decay_start": 0.5}, "fit.decay_start 0.5"),
        ({"evaluate_every": 4}, None),
        ({"evaluate_every": 3}, "no multiple of fit.evaluate_every"),
    ],
)
def test_the_schedules_of_a_fit(tmp_path: Path, fit: dict[str, float], reason: str | None) -> None:
    found = why_not_longer(FitRun.model_validate({"fit": {"steps": 12, **fit}}), tmp_path, 8)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize(("buckets", "same"), [([0] * 40, True), ([0, 1] * 20, False)])
def test_the_order_of_a_fit(buckets: list[int], same: bool) -> None:
    """Pairs of one size come in the same order whatever the length, those of several do not."""
    places = torch.arange(41)
    units = Units(pairs=places[:40], starts=places, bucket=torch.tensor(buckets))
    shorter, run = FitConfig(steps=8, batch_size=4), FitRun(fit=FitConfig(steps=12, batch_size=4))
    assert job._same_order(units, [(16, 8, 8), (16, 8, 4)], run, shorter) == same


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (12, None),
        (7, "fit.steps 7: it has 8, which can only grow"),
        (13, "fit.steps 13 where it had 8: unlucky"),
    ],
)
def test_steps_grow_only(tmp_path: Path, steps: int, line: str | None) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FitRun(fit=FitConfig(steps=8)).model_dump(mode="json")))
    grows = {"fit.steps": lambda before: "unlucky" if steps == 13 else None}
    run = FitRun(fit=FitConfig(steps=steps))
    if line is None:
        assert resumed_values(run, tmp_path, may_change=(), may_grow=grows, unread=())["fit"]["steps"] == 12
        return
    with pytest.raises(ValueError, match=line):
        resumed_values(run, tmp_path, may_change=(), may_grow=grows, unread=())
    with pytest.raises(ValueError, match="with other values of: fit.steps"):
        resumed_values(run, tmp_path, may_change=(), may_grow=None, unread=())
