"""KL weights and clip ranges in released units: the guide's table, computed at 10 steps and a shift of 3."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dina_rl.alignment.algorithms.clipping import regulated_log_ratio
from dina_rl.config import GRPOConfig
from dina_rl.flow.sde import gaussian_kl, log_prob, released_kl_factor, step_law
from dina_rl.seeding import normal

GUIDE = (Path(__file__).parents[3] / "docs" / "alignment.md").read_text()
STEPS = range(9)  # the last of the ten has no density


def ten_steps() -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas: torch.Tensor = scheduler.sigmas
    return sigmas


SIGMAS = ten_steps()


def row(label: str) -> list[str]:
    """Cells of a row of the guide's table."""
    return re.findall(rf"^\| {re.escape(label)} \|(.+)\|$", GUIDE, re.MULTILINE)[0].replace(" ", "").split("|")


def written(values: list[float]) -> list[str]:
    return [f"{value:.3g}" for value in values]


def exact_over_released(dynamics: str) -> list[float]:
    return [1 / released_kl_factor(dynamics, float(SIGMAS[step] - SIGMAS[step + 1])) for step in STEPS]


def cps_over_ours() -> list[float]:
    return [2 * step_law("cps", SIGMAS, step, 0.8).std ** 2 for step in STEPS]


def guarded_over_plain() -> list[float]:
    return [step_law("flow_sde", SIGMAS, step, 0.7).std for step in STEPS]


def test_the_guides_table_is_what_the_steps_say() -> None:
    assert row("exact KL over released, `flow_sde` and `dance`") == written(exact_over_released("flow_sde"))
    assert exact_over_released("dance") == exact_over_released("flow_sde")
    assert row("exact KL over released, `cps`") == written(exact_over_released("cps"))
    assert row("released log-ratio over ours, `cps` at noise 0.8") == written(cps_over_ours())
    assert row("guarded log-ratio over plain, `flow_sde` at noise 0.7") == written(guarded_over_plain())


def test_the_guides_clip_ranges_are_the_tables() -> None:
    text = " ".join(GUIDE.split())
    cps = [3e-6 / each for each in cps_over_ours()]
    assert f"3e-6 is {_short(cps[0])} to {_short(cps[4])} of ours over the steps 0 to 4" in text
    assert f"It is {cps[8]:.1e} at step 8" in text
    guarded = [2e-6 / each for each in guarded_over_plain()]
    assert f"2e-6, the released one, is {guarded[0]:.1e} at step 0 and {guarded[8]:.1e} at step 8" in text
    default = GRPOConfig().clip_range
    assert f"The default of 1e-4 is {default / 2e-6:.0f} times as wide" in text


def _short(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def test_the_reference_says_the_factors_of_the_kl() -> None:
    described = GRPOConfig.model_fields["kl"].description
    assert described is not None
    factors = ", ".join(f"{each:.1f}" for each in exact_over_released("flow_sde"))
    assert factors in " ".join(described.split())


@pytest.mark.parametrize("step", [0, 4, 8])
def test_the_rows_are_what_released_formulas_give(step: int) -> None:
    """Log-ratios and KL of one step, written as the released code writes them, over ours, in float64."""
    after, old, new = (normal((4, 2, 3, 3), "units", name).double() for name in ("after", "old", "new"))
    ours, law = step_law("cps", SIGMAS, step, 0.8), step_law("flow_sde", SIGMAS, step, 0.7)

    def cps(mean: torch.Tensor) -> torch.Tensor:
        return -((after - mean) ** 2).flatten(1).mean(1)

    log_ratio = log_prob(after, new, ours.std) - log_prob(after, old, ours.std)
    torch.testing.assert_close((cps(new) - cps(old)) / log_ratio, torch.full((4,), cps_over_ours()[step]).double())

    drawn = old + law.std * normal((4, 2, 3, 3), "units", "eps").double()
    plain = log_prob(drawn, new, law.std) - log_prob(drawn, old, law.std)
    bias = ((new - old) ** 2).flatten(1).mean(1) / (2 * law.std**2)
    guarded = regulated_log_ratio(plain, new, old, law.std)
    torch.testing.assert_close(guarded / (plain + bias), torch.full((4,), guarded_over_plain()[step]).double())

    length = float(SIGMAS[step] - SIGMAS[step + 1])
    released = ((new - old) ** 2).flatten(1).mean(1) / (2 * (law.std / length**0.5) ** 2)
    factor = torch.full((4,), exact_over_released("flow_sde")[step]).double()
    torch.testing.assert_close(gaussian_kl(new, old, law.std) / released, factor, rtol=1e-5, atol=0)
