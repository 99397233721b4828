"""Who waits for whom, on numbers that can be worked out by hand."""

from dataclasses import replace

import pytest

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.costs import Costs
from dina_rl.alignment.layout import layout_of
from dina_rl.alignment.timeline import Operations, best_layout, count_operations, count_passes, measuring, timeline
from dina_rl.config import AlignRun

WORKERS = {"rollout_workers": 4, "scorers": 2, "learner_ranks": 2}
SHARES = {"gpus_per_rollout": 1, "gpus_per_scorer": 1, "gpus_per_rank": 1}
SPLIT = {**WORKERS, **SHARES}
COSTS = Costs(sampled=10, forward=10, trained=30, score=5, score_gradient=11, prompt=100, golden=7)
UNITS = Operations(text=0, rollout=5760, scorer=288, learner=8640)  # transformer passes of the published recipe


def run_with(**values) -> AlignRun:
    """32 prompts x 18 samples, 10 steps of which 3 are trained."""
    learner = {"micro_batch_size": 9, **values.pop("learner", {})}
    return AlignRun.model_validate({"learner": learner, "workers": SPLIT, **values})


def line_of(run: AlignRun, operations: Operations = UNITS):
    return timeline(run, layout_of(run.workers), operations)


def test_split_gpus_wait_for_each_other():
    line = line_of(run_with())
    assert line.length == 5760 / 4 + 288 / 32 + 8640 / 2  # scoring lags behind sampling by one call
    assert line.busy == pytest.approx([4320 / 5769] * 2 + [1440 / 5769] * 3 + [144 / 5769] * 2 + [1440 / 5769])
    assert line.mean_busy == pytest.approx(0.318, abs=1e-3)


def test_colocated_gpus_do_not():
    line = line_of(run_with(workers={"gpus": 8}))
    assert line.length == pytest.approx(14688 / 8)
    assert line.busy == pytest.approx([1.0] * 8)


TEXTS = replace(UNITS, text=320)


def test_who_encodes_keeps_colocated_gpus_waiting_unless_each_does():
    line = line_of(run_with(workers={"gpus": 8}), TEXTS)
    assert line.length == pytest.approx(320 + 14688 / 8)
    assert line.busy == pytest.approx([1.0] + [1836 / 2156] * 7)
    assert line_of(run_with(workers={"gpus": 8, "text_workers": 8}), TEXTS).busy == pytest.approx([1.0] * 8)


def test_split_encoding_overlaps_with_sampling_on_the_gpu_that_it_shares():
    line = line_of(run_with(), TEXTS)
    assert line.length == 5760 / 4 + 320 + 8640 / 2
    assert line.busy[-1] == pytest.approx(1760 / 6080)
    few = replace(TEXTS, text=32)
    assert line_of(run_with(), few).length == 5760 / 4 + 32 + 8640 / 2  # more than one call of texts and one of scores


def test_calls_that_do_not_divide_leave_gpus_waiting():
    run = run_with(workers={"gpus": 64}, learner={"micro_batch_size": 9})
    line = line_of(run)
    assert line.length == pytest.approx(5760 / 32 + 288 / 32 + 8640 / 64)
    assert line.busy[0] == pytest.approx(1)
    assert line.busy[63] == pytest.approx(8640 / 64 / line.length)


def test_actors_that_share_a_gpu_add_up():
    workers = {**WORKERS, **SHARES, "gpus_per_rollout": 0.5, "gpus_per_scorer": 0.5}
    line = line_of(run_with(workers=workers))
    assert len(line.busy) == 5
    assert line.length == 5760 / 2 + 288 / 32 + 8640 / 2


def test_without_gpus_there_is_no_timeline():
    assert line_of(run_with(workers=WORKERS)) is None


def test_the_better_layout_is_found_among_those_that_the_batches_divide_over():
    workers, line = best_layout(run_with(), 8, UNITS)
    assert workers.colocated
    assert line.mean_busy == pytest.approx(1)
    # 576 samples in micro-batches of 9 do not divide over 10 ranks, but over 4 of the 10 GPUs.
    workers, _ = best_layout(run_with(), 10, UNITS)
    assert (workers.rollout_workers, workers.scorers, workers.learner_ranks) == (5, 1, 4)


def test_passes_and_operations_of_each_algorithm():
    run = run_with(pipeline={"dtype": "bfloat16"}, learner={"updates_per_iteration": 2, "epochs": 2})
    passes = count_passes(run, open_algorithm(run).work())
    assert (passes.sampled, passes.scored, passes.trained, passes.reference) == (5760, 576, 3456, 3456)
    assert passes.prepared == 576 * 3 / 2  # the first minibatch's old log-probabilities are its first forward's
    operations = count_operations(run, passes, COSTS, with_gradient=False)
    assert (operations.text, operations.rollout) == (3200, 57600)
    assert operations.scorer == 2880
    assert operations.learner == 3456 * 30 + (3456 + 864) * 10

    guided = {"rollout": {"guidance_scale": 2.0}, "learner": {"guidance_in_loss": True}, "grpo": {"kl_weight": 0}}
    passes = count_passes(run_with(**guided), open_algorithm(run_with(**guided)).work())
    assert (passes.sampled, passes.trained, passes.reference, passes.prepared) == (11520, 3456, 0, 0)

    nft = run_with(algorithm="nft", nft={"levels": 4})
    passes = count_passes(nft, open_algorithm(nft).work())
    assert (passes.sampled, passes.trained, passes.prepared) == (5760, 2304, 2304)

    refl = {"stop_range": [4, 8], "reward_gradient": "learner", "pretraining_weight": 0.1}
    run = run_with(algorithm="refl", refl=refl)
    passes = count_passes(run, open_algorithm(run).work())
    assert (passes.sampled, passes.trained, passes.rewarded) == (576 * 7, 1152, 576)
    assert passes.encoded == 32 + 576  # prompts of the pretraining images
    assert count_operations(run, passes, COSTS, with_gradient=True).scorer == 576 * 11


def test_measurements_are_counted():
    golden = {"every": 10, "dev_samples": 8, "test_samples": 4, "guidances": [1.0, 2.0], "aligned_guidances": [2.0]}
    run = run_with(iterations=25, golden=golden)
    at_1, at_2 = 10 * 10 + 5 + 7, 20 * 10 + 5 + 7
    assert measuring(run, COSTS) == 4 * 8 * at_1 + 4 * (at_1 + at_2) * 2
