"""When the watch calls a run diverged, and when it does not."""

import pytest

from dina_rl.alignment.watch import diverged

RISING = [-11.2, -10.1, -8.8, -6.6, 0.6]
CASES = {
    "hacking": ([0.442, 0.481, 0.472, 0.346, 0.008], RISING, True),
    "both rise": ([0.44, 0.57, 0.77, 0.85, 0.88], RISING, False),
    "one bad measurement": ([0.44, 0.57, 0.77, 0.85, 0.60], RISING, False),
    "within the margin": ([0.44, 0.57, 0.77, 0.76, 0.76], RISING, False),
    "the proxy falls too": ([0.44, 0.57, 0.77, 0.60, 0.50], [-11.2, -10.1, -8.8, -9.0, -9.5], False),
    "golden has come back": ([0.44, 0.77, 0.50, 0.50, 0.76], RISING, False),
    "never above the base": ([0.44, 0.40, 0.35, 0.30, 0.20], RISING, True),
    "too early to say": ([0.44, 0.30], RISING[:2], False),
}


@pytest.mark.parametrize(("golden", "proxy", "expected"), CASES.values(), ids=CASES)
def test_divergence_needs_a_lasting_fall_of_golden_under_a_rising_proxy(golden, proxy, expected):
    assert diverged(golden, proxy, patience=2, margin=0.02) is expected
