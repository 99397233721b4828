"""UnifiedReward-Think against a real server on this machine: as judge, in an evaluation, as reward and as golden."""

import csv
import json
from time import sleep

import pytest
import torch
from PIL import Image, ImageStat

from dina_rl.alignment.advantage import group_advantages
from dina_rl.alignment.golden import open_metric
from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.loop import align
from dina_rl.alignment.planning import describe
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.alignment.rewards import ScoringWorker
from dina_rl.config import AlignRun, GoldenConfig, UnifiedRewardThinkConfig
from dina_rl.scorers.base import Pair
from dina_rl.scorers.registry import check_image_scorer
from dina_rl.scorers.server import Client, Failure, Server
from dina_rl.scorers.unified_reward_think import UnifiedRewardThink, verdict
from dina_rl.types import WorkItem
from jobs import evaluate, score
from jobs.align import exporter
from tests.answering import MODEL, answering
from tests.rollouts import Rollouts
from tests.tiny_reward import write_preferences
from tests.tiny_run import tiny_run

PROMPT = "a {shade} of grey"
SHADES = torch.tensor([0.2, 0.8, 0.5])


def brightness(picture):
    return sum(ImageStat.Stat(picture).mean)


def brighter(asked):
    """The brighter picture, after some thought."""
    first, second = map(brightness, asked.pictures)
    asked.say(f"<think>Image 1 or Image 2?</think>\n<answer>Image {1 if first > second else 2} is better</answer>")


def always_first(asked):
    asked.say("<think>The first.</think><answer>Image 1 is better</answer>")


def judge_at(url):
    server = Server(url=url, timeout_s=60, retries=0)
    return UnifiedRewardThink(Client("unified_reward_think", server, concurrency=8), MODEL)


def shades():
    return SHADES.view(3, 1, 1, 1).expand(-1, 3, 8, 8)


ORDERS = [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
PAIRS = [Pair(prompt=PROMPT, first=first, second=second) for first, second in ORDERS]


def test_each_pair_has_its_own_verdict_when_answers_come_in_another_order():
    def backwards(asked):
        sleep(0.03 * (len(PAIRS) - asked.number))
        brighter(asked)

    with answering(backwards) as server:
        verdicts = judge_at(server.url)(shades(), PAIRS)
    assert verdicts.tolist() == [float(SHADES[first] > SHADES[second]) for first, second in ORDERS]
    asked = server.asked[0]
    assert (asked.body["model"], asked.body["temperature"]) == (MODEL, 0)
    assert [picture.size for picture in asked.pictures] == [(512, 512)] * 2
    assert asked.text.endswith(f"The prompt: {PROMPT}")
    shown = {tuple(round(brightness(p) / 765, 1) for p in asked.pictures) for asked in server.asked}
    assert shown == {tuple(round(SHADES[place].item(), 1) for place in order) for order in ORDERS}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>Image 1 is better</answer>", 1),
        ("so <answer>\nImage 2  is better than image 1.\n</answer>", 0),
        ("<answer>Both images are equally good</answer>", 0.5),
        ("<think><answer>Image 1 is better</answer>? No.</think><answer>Image 2 is better</answer>", 0),
        ("Image 1 is better", None),
        ("<answer>Image 3 is better</answer>", None),
        ("<answer>Image 1 is better than Image 1</answer>", None),
        ("<answer>Image 1 is better</answer> <answer>cannot say</answer>", None),
        ("<think>Image 1 is better <answer>Image 1", None),
    ],
)
def test_the_last_decision_counts_and_anything_else_is_none(text, value):
    found = verdict(text)
    assert (None if isinstance(found, Failure) else found) == value


def test_malformed_refused_and_undecided_answers_are_failed_verdicts_of_their_pairs_alone():
    bad = {
        (0.2, 0.5): lambda asked: asked.send(200, "{"),
        (0.8, 0.5): lambda asked: asked.say("<answer>neither</answer>"),
        (0.5, 0.2): lambda asked: asked.send(400, "too long"),
    }

    def some_bad(asked):
        bad.get(tuple(round(brightness(picture) / 765, 1) for picture in asked.pictures), brighter)(asked)

    with answering(some_bad) as server:
        judge = judge_at(server.url)
        verdicts = judge(shades(), PAIRS)
    assert verdicts.isnan().tolist() == [False, False, True, True, True, False]
    assert judge.client.failures == {"malformed": 1, "no verdict": 1, "refused": 1}


def test_a_picture_that_is_not_finite_is_not_asked_about():
    images = shades().clone()
    images[1, 0, 0, 0] = torch.nan
    with answering(brighter) as server:
        verdicts = judge_at(server.url)(images, PAIRS)
    assert verdicts.isnan().tolist() == [1 in order for order in ORDERS]
    assert len(server.asked) == 2


# --- jobs.evaluate and jobs.score ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Pairs whose brighter image is preferred, and a group of four of those images with a tie."""
    root = tmp_path_factory.mktemp("sets")
    write_preferences(root / "pairs", train=0, test=4)
    names = [f"test-{index}-{side}.png" for index in range(2) for side in ("bright", "dark")]
    (root / "groups").mkdir()
    for name in names:
        (root / "groups" / name).write_bytes((root / "pairs" / "images" / name).read_bytes())
    group = {"id": "a", "prompt": "a circle", "generations": names, "ranking": [1, 2, 1, 3]}
    (root / "groups" / "test.json").write_text(json.dumps([group]))
    return root


def table1(server, sets, run_dir, cache):
    """The lines of accuracies.csv by set."""
    options = {"kind": "unified_reward_think", "path": server.url, "processor": MODEL, "server.retries": 0}
    evaluate.main(
        [
            *("--inline", "--paper", "table1", "--run_dir", str(run_dir), "--cache", str(cache)),
            *(word for key, value in options.items() for word in (f"--scorers.think.{key}", str(value))),
            *("--sets.pairs.path", str(sets / "pairs")),
            *("--sets.groups.kind", "imagereward", "--sets.groups.path", str(sets / "groups")),
            *("--bootstrap.resamples", "20", "--batch_size", "4", "--records_per_part", "3"),
        ]
    )
    with (run_dir / "accuracies.csv").open() as file:
        return {line["set"]: line for line in csv.DictReader(file)}


def test_a_table_has_pair_accuracy_and_position_bias(sets, tmp_path):
    with answering(brighter) as server:
        lines = table1(server, sets, tmp_path / "fair", tmp_path / "cache")
        # both orders of 4 pairs, and of the 5 of 6 that people decide
        assert len(server.asked) == 2 * (4 + 5)
        assert (lines["pairs"]["micro"], lines["pairs"]["position_bias"]) == ("1.0", "0.0")
        # two bright images are before two dark ones, and the third rank, a dark one, loses to all
        assert float(lines["groups"]["micro"]) == pytest.approx(
            sum(expected(sets, better, worse) for better, worse in ((0, 1), (0, 3), (2, 1), (2, 3), (1, 3))) / 5
        )
        assert lines["groups"]["ties"] == "1"
        table1(server, sets, tmp_path / "again", tmp_path / "cache")
        assert len(server.asked) == 2 * (4 + 5), "nothing is asked twice"


def expected(sets, better, worse):
    names = [f"test-{index}-{side}.png" for index in range(2) for side in ("bright", "dark")]
    better, worse = (brightness(Image.open(sets / "groups" / names[place])) for place in (better, worse))
    return better > worse


def test_a_judge_who_names_one_place_is_half_right_and_all_bias(sets, tmp_path):
    with answering(always_first) as server:
        lines = table1(server, sets, tmp_path / "run", tmp_path / "cache")
    for line in lines.values():
        assert (line["micro"], line["position_bias"], line["failed"]) == ("0.5", "1.0", "0")
        assert line["predicted_ties"] == line["pairs"]
    assert (
        "think on pairs: 100.00 percent of its verdicts follow the position"
        in (tmp_path / "run" / "table1.md").read_text()
    )


def test_what_a_server_failed_to_answer_is_asked_again_by_the_next_run_alone(sets, tmp_path):
    def some(asked):
        brighter(asked) if asked.number % 3 else asked.send(500, "not now")

    with answering(some) as server:
        lines = table1(server, sets, tmp_path / "first", tmp_path / "cache")
        failed = int(lines["pairs"]["failed"]) + int(lines["groups"]["failed"])
        assert failed == 6, "of 18 questions, each of another pair"
        server.answer = brighter
        lines = table1(server, sets, tmp_path / "second", tmp_path / "cache")
        assert len(server.asked) == 18 + 6
    assert (lines["pairs"]["failed"], lines["pairs"]["micro"], lines["groups"]["failed"]) == ("0", "1.0", "0")


def test_one_picture_has_no_score(tmp_path, capsys, sets):
    picture = str(sets / "pairs" / "images" / "test-0-dark.png")
    with pytest.raises(SystemExit) as ending:
        score.main(["--scorer.kind", "unified_reward_think", "--images", picture, "--prompt", "a"])
    assert ending.value.code == 2
    assert "compares two pictures and has no score of one: jobs.evaluate" in capsys.readouterr().err


# --- jobs.align -----------------------------------------------------------------------------------------------------


def aligned_by(server, run_dir, pipeline, **changes):
    think = {"path": server.url, "processor": MODEL, "retries": 0}
    rewards = {"dina": None, "unified_reward_think": think}
    return tiny_run(run_dir, pipeline, pipeline, rewards=rewards, iterations=1, **changes)


def test_a_group_is_judged_whole_however_groups_are_split(tmp_path, tiny_pipeline):
    with answering(brighter) as server:
        run = aligned_by(server, tmp_path, tiny_pipeline)
        items = [WorkItem(iteration=0, prompt_id=i, prompt=f"shape {i}", group_size=3) for i in range(2)]
        groups = Rollouts(run).rollout(items)
        worker = ScoringWorker(run)
        together = worker.score(groups)
        assert len(server.asked) == 2 * 3 * 2
        assert set(together) == {"unified_reward_think", "unified_reward_think_position_bias"}
        rates = together["unified_reward_think"]
        assert rates.sort(1).values.tolist() == [[0, 0.5, 1]] * 2
        for number, group in enumerate(groups):
            assert torch.equal(worker.score([group])["unified_reward_think"], rates[number : number + 1])

        server.answer = lambda asked: brighter(asked) if asked.number % 5 else asked.say("I cannot say")
        del server.asked[:]
        failed = worker.score(groups)["unified_reward_think"]  # of 12 questions 0, 5 and 10
        advantages = group_advantages(failed)
        assert (advantages.failed, advantages.kept.any().item()) == (2, False)
        assert failed.isnan().any()

        server.answer = always_first
        biased = worker.score(groups)
        assert biased["unified_reward_think_position_bias"].tolist() == [[1.0] * 3] * 2
        assert group_advantages(biased["unified_reward_think"]).constant == 2


def test_a_run_is_rewarded_by_win_rates_and_measured_against_its_start(tmp_path, tiny_pipeline):
    with answering(brighter) as server:
        run = aligned_by(server, tmp_path, tiny_pipeline, golden={"every": 1})
        recorder = Recorder(run, run.run_dir, exporter(run))
        align(run, load_prompts(run.prompts), InlineExperience(run), InlineLearner(run), recorder)
    (entry,) = [entry for entry in recorder.history.entries if entry["kind"] == "iteration"]
    assert entry["scorers"]["unified_reward_think_mean"] == pytest.approx(0.5)
    assert entry["scorers"]["unified_reward_think_position_bias"] == 0
    start, end = recorder.history.points()
    assert (start["proxy"], start["proxy_parts"]) == (0.5, {"unified_reward_think": 0.5})
    assert end["proxy_parts"] == {"unified_reward_think": end["proxy"], "unified_reward_think_position_bias": 0}
    base = recorder.stored("base", run.rollout.guidance_scale)["proxy"]
    assert base.unique().tolist() == [0.5], "over itself"
    assert set(recorder.stored("base", 1.0)["proxy"].tolist()) <= {0, 1}
    for split in ("dev", "test"):
        assert recorder.opponents(split).shape == (4, 3, 32, 32)
    # a group of 3 is 6 questions, and a measured sample 2: dev once, test at another guidance, and aligned at one
    assert len(server.asked) == 4 * 6 + 2 * 4 + 2 * 4 + 2 * 4
    assert "unified_reward_think: 12 samples x 2 others = 24 requests an iteration" in describe(run)


def test_it_measures_wins_over_the_start(tmp_path):
    with answering(brighter) as server:
        golden = {"scorer": "unified_reward_think", "path": server.url, "processor": MODEL, "server": {"retries": 0}}
        metric = open_metric(GoldenConfig.model_validate(golden))
        opponents = torch.full((3, 3, 8, 8), 120, dtype=torch.uint8)
        scores = metric(shades(), ["a", "b", "c"], opponents)
        assert scores.values == (0, 1, 1)
        assert scores.parts == {"position_bias": (0, 0, 0)}
        check_image_scorer(UnifiedRewardThinkConfig(path=server.url, processor=MODEL))


def test_limits_are_of_scorers_behind_a_server():
    metric = GoldenConfig.model_validate({"scorer": "unified_reward", "server": {"timeout_s": 3, "concurrency": 2}})
    assert (metric.of_images.timeout_s, metric.of_images.concurrency, metric.of_images.retries) == (3, 2, 3)
    with pytest.raises(ValueError, match=r"golden.server is of a scorer behind a server \(unified_reward, "):
        GoldenConfig.model_validate({"scorer": "pickscore", "server": {}})


def test_refl_has_no_use_for_it_and_the_same_model_is_not_golden():
    think = {"unified_reward_think": {}}
    with pytest.raises(ValueError, match="rewards.unified_reward_think has no gradient, which refl follows"):
        AlignRun.model_validate({"algorithm": "refl", "refl": {"stop_range": (3, 8)}, "rewards": think})
    with pytest.raises(ValueError, match="golden.scorer unified_reward_think is a reward too"):
        AlignRun.model_validate({"rewards": think, "golden": {"scorer": "unified_reward_think"}})
    AlignRun.model_validate({"rewards": think, "golden": {"scorer": "unified_reward"}})  # another model, one address
