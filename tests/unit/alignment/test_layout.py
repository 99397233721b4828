"""Who sits on which GPU, as the configuration asks for it."""

import pytest
from pydantic import ValidationError

from dina_rl.alignment.layout import KINDS, layout_of
from dina_rl.config import WorkersConfig


def kinds(workers: WorkersConfig) -> list[str]:
    """Of who sits on each GPU, by their initials and numbers."""
    return [" ".join(f"{seat.kind[0]}{seat.number}" for seat in gpu) for gpu in layout_of(workers).gpus()]


def test_colocated_gpus_hold_one_of_each():
    """And the first of them a text actor, or as many as there are."""
    workers = WorkersConfig(gpus=3)
    assert (workers.rollout_workers, workers.scorers, workers.learner_ranks) == (3, 3, 3)
    layout = layout_of(workers)
    assert layout.in_turns
    assert [bundle.gpus for bundle in layout.bundles] == [1, 1, 1]
    assert kinds(workers) == ["t0 r0 s0 l0", "r1 s1 l1", "r2 s2 l2"]
    assert [seat.kind for seat in layout.bundles[0].seats] == list(KINDS)
    assert all(sum(seat.gpus for seat in bundle.seats) <= 1 for bundle in layout.bundles)
    assert kinds(WorkersConfig(gpus=2, text_workers=2)) == ["t0 r0 s0 l0", "t1 r1 s1 l1"]


def test_split_actors_have_gpus_of_their_own_or_share_one_by_shares():
    whole = WorkersConfig(rollout_workers=2, learner_ranks=2, gpus_per_rollout=1, gpus_per_scorer=1, gpus_per_rank=2)
    assert kinds(whole) == ["l0", "", "l1", "", "r1", "s0", "t0 r0"]
    several = WorkersConfig(rollout_workers=2, gpus_per_rollout=2, gpus_per_rank=1, gpus_per_scorer=1)
    assert kinds(several) == ["l0", "l1", "t0", "r0", "r1", "", "s0"]
    shared = WorkersConfig(rollout_workers=3, scorers=1, gpus_per_rollout=0.5, gpus_per_scorer=0.5)
    assert kinds(shared) == ["t0 r0 r1", "r2 s0"]
    assert kinds(WorkersConfig()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpus": 8, "scorers": 2}, "workers.scorers is 2, but the colocated layout has one on each"),
        ({"gpus": 2, "gpus_per_rank": 1}, "workers.gpus_per_rank is of the split layout"),
        ({"gpus": 2, "text_workers": 3}, "text_workers is 3, but there are only 2 rollout actors"),
        ({"layout": "colocated"}, "workers.layout colocated needs workers.gpus"),
        ({"layout": "split", "gpus": 2}, "workers.gpus is of the colocated layout"),
        ({"sleep": True}, "workers.sleep is of the colocated layout"),
    ],
)
def test_settings_of_the_other_layout_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        WorkersConfig.model_validate(values)
