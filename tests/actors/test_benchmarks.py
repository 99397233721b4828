"""The benchmarks that need actors, at smoke sizes: they run, and have something to say."""

import os
from pathlib import Path

import pytest

from benchmarks import layouts, ray_overhead, state_way
from benchmarks.clocks import CLOCKS

pytestmark = pytest.mark.usefixtures("ray_local")


def test_the_iterations_of_a_layout_are_timed_on_cores_of_their_own():
    if len(os.sched_getaffinity(0)) < layouts.CORES:
        # Each core stands for a GPU that works while others do: on one core there is nothing to measure.
        pytest.skip("cores stand for GPUs")
    small = layouts.BenchmarkRun(iterations=1, prompts=2, group_size=2, micro_batch_size=2)
    result = layouts.in_turns(small, [layouts.SPLIT])
    (seconds,) = result.seconds[layouts.SPLIT]
    assert seconds > 0
    assert 0 < result.planned[layouts.SPLIT].mean_busy < 1


def test_an_iteration_through_ray_is_timed_beside_one_in_this_process(tiny_reward: Path, tiny_pipeline: Path):
    sizes = {"prompts": 1, "group_size": 2, "groups_per_call": 1, "micro_batch_size": 2, "updates": 1}
    small = ray_overhead.BenchmarkRun.model_validate({**sizes, "pipeline": {"path": str(tiny_pipeline)}})
    measured = ray_overhead.measure(ray_overhead.run_of(small, tiny_reward), 1, CLOCKS["wall"])
    assert {kind: len(every) for kind, every in measured.seconds.items()} == {
        ray_overhead.INLINE: 1,
        ray_overhead.RAY: 1,
    }
    assert "through Ray / in one process" in ray_overhead.report(measured)


def test_a_state_goes_both_ways_and_comes_back():
    small = state_way.BenchmarkRun(mib=72, part_mib=36, repeats=1)
    kept, got = state_way.measure(small)
    assert kept.keys() == got.keys() == {state_way.WHOLE, state_way.SHARES}
    assert "whole / shares, got again" in state_way.report(small, kept, got)
