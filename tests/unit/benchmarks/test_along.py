"""The benchmark of scores along the way: its formulas, on numbers made by hand."""

import pytest
import torch

from benchmarks.along import BenchmarkRun, Judged, finished_alone, judge, main, rank_correlation, report, signal
from benchmarks.loop import REWARD
from benchmarks.untrained import save_untrained
from dina_rl.alignment.advantage import group_advantages
from dina_rl.alignment.inline import InlineExperience
from dina_rl.alignment.loop import plan
from dina_rl.config import PipelineConfig
from dina_rl.shapes.grammar import prompts


def test_ranks_are_compared_within_a_group():
    scores = torch.tensor([[1.0, 2, 3, 4], [10.0, 20, 30, 40], [1.0, 2, 3, 4]])
    others = torch.tensor([[-1.0, 0, 5, 900], [4.0, 3, 2, 1], [2.0, 1, 3, 4]])
    torch.testing.assert_close(rank_correlation(scores, others), torch.tensor([1.0, -1.0, 0.8]).double())


def test_signal_counts_samples_where_all_are_as_good_and_falls_with_the_squared_correlation():
    golden = torch.tensor([[0.0, 1, 2, 3, 4, 5]])
    own = group_advantages(golden).values
    assert signal(own, golden) == pytest.approx(6, rel=1e-3)
    noise = torch.tensor([[1.0, -1, 0, 0, -1, 1]])  # of mean 0 and uncorrelated with golden
    mixed = own + noise * own.norm() / noise.norm()
    assert signal(mixed, golden) == pytest.approx(3, rel=1e-3)
    assert signal(3 * own, golden) == pytest.approx(6, rel=1e-3)


def test_only_the_extremes_at_the_middle_are_finished_and_compared():
    middle = torch.tensor([[5.0, 1, 2, 3, 4, 0]])
    final = torch.tensor([[1.0, 0, 7, 7, 2, 3]])
    values = finished_alone(middle, final, 4)
    expected = group_advantages(torch.tensor([[1.0, 0, 2, 3]])).values[0]
    torch.testing.assert_close(values, torch.stack([expected[0], expected[1], *torch.zeros(2), *expected[2:]])[None])


def test_the_report_has_a_row_a_state_and_finds_which_score_is_golden():
    golden = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    table = report(
        Judged(
            sigmas=torch.tensor([1.0, 0.5, 0.0]),
            native=torch.stack([-golden, golden, golden]),
            predicted=torch.stack([golden, -golden, golden]),
            golden=golden,
        )
    ).splitlines()
    first, second = (next(line for line in table if line.startswith(f"| {n} | {s}")) for n, s in ((0, 1), (1, 0.5)))
    assert [cell.strip() for cell in first.split("|")[3:7]] == [*["-1.00 ± 0.00"] * 2, *["1.00 ± 0.00"] * 2]
    assert [cell.strip() for cell in second.split("|")[3:7]] == [*["1.00 ± 0.00"] * 2, *["-1.00 ± 0.00"] * 2]
    assert table[-1].startswith("| 1 | 1.00 |")


def test_samples_and_their_last_scores_are_those_of_a_rollout(tiny_pipeline, tmp_path):
    reward = save_untrained(tmp_path / "reward", PipelineConfig(path=str(tiny_pipeline)), REWARD)
    run = BenchmarkRun.model_validate(
        {
            "groups": 1,
            "pipeline": {"path": str(tiny_pipeline)},
            "rewards": {"dina": {"path": str(reward)}},
            "rollout": {
                "num_steps": 4,
                "guidance_scale": 2.0,
                "window_start": 1,
                "window_steps": 2,
                "prompts_per_iteration": 1,
                "group_size": 2,
            },
            "learner": {"micro_batch_size": 2},
            "workers": {"learner_ranks": 1},
        }
    )
    judged = judge(run)
    (group,) = InlineExperience(run).collect(plan(run, prompts("train"), 0)[:1])
    torch.testing.assert_close(judged.final[0], group.scores["dina"])
    assert judged.native.shape == judged.predicted.shape == (5, 1, 2)
    assert judged.native.isfinite().all()


def test_another_algorithm_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--algorithm", "nft"])
    assert stopped.value.code == 2
    assert "algorithm grpo" in capsys.readouterr().err
