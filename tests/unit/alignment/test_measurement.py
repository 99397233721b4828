"""A measurement some of whose samples have no score: they are left out, and none at all ends the run."""

import pytest
import torch

from dina_rl.alignment.measurement import EvaluationSamples, combine, evaluation_items
from dina_rl.config import RewardsConfig
from dina_rl.errors import RunStopped
from dina_rl.types import GoldenScores, ProbeReadings, PromptEmbeds

NAN = float("nan")


def measured(golden, proxy, probes=None):
    rewards = RewardsConfig(dina=None, clip_score={})
    (item,) = evaluation_items("dev", ["a"], len(golden), 1.0, len(golden))
    samples = EvaluationSamples(
        item=item,
        golden=GoldenScores(values=tuple(golden), parts={}),
        latents=torch.empty(len(golden), 0),
        prompt=PromptEmbeds(embeds=torch.empty(len(golden), 0, 0), pooled=torch.empty(len(golden), 0)),
        images=torch.empty(len(golden), 3, 1, 1, dtype=torch.uint8),
        probes=None if probes is None else ProbeReadings(values=probes),
    )
    return combine([samples], [{"clip_score": torch.tensor(proxy)}], rewards)


def test_samples_without_a_score_are_in_no_mean():
    found = measured([0.5, NAN, 1.0, 0.0], [1.0, 2.0, NAN, 6.0])
    assert (found.golden_mean, found.proxy_mean, found.measured) == (0.5, 3.0, 3)
    assert found.proxy_parts == {"clip_score": 3.0}
    assert found.golden_std == pytest.approx((1 / 6) ** 0.5)
    assert len(found.golden) == len(found.proxy) == 4


def test_probes_are_means_too_and_absent_where_they_are_off():
    found = measured([0.5, 0.5], [1.0, 1.0], {"probes/x": (0.25, NAN), "guard/grid": (1.0, 2.0)})
    assert found.probes == {"probes/x": 0.25, "guard/grid": 1.5}
    assert measured([0.5], [1.0]).probes == {}


@pytest.mark.parametrize(("golden", "proxy", "which"), [([NAN], [1.0], "golden"), ([1.0], [NAN], "reward")])
def test_a_measurement_without_any_score_ends_the_run(golden, proxy, which):
    with pytest.raises(RunStopped, match=f"none of the 1 samples of a measurement has a finite {which} score"):
        measured(golden, proxy)
