"""UnifiedReward-Think against a real server on this machine: as judge, in an evaluation, as reward and as golden."""

import csv
import json
from time import sleep

import pytest
import torch
from PIL import Image, ImageStat

from dina_rl.alignment.advantage import group_advantages
from dina_rl.alignment.golden import open_metric
from dina_rl.alignment.inline import InlineExperience
from dina_rl.alignment.loop import measure_aligned, measure_base, measure_dev
from dina_rl.alignment.planning import _requests
from dina_rl.alignment.record import Recorder
from dina_rl.config import AlignRun, EvaluateRun, GoldenConfig, PictureScorerConfig, UnifiedRewardThinkConfig
from dina_rl.evaluation.named_scorers import named_scorer
from dina_rl.evaluation.requests import PLAIN
from dina_rl.evaluation.results import measured
from dina_rl.evaluation.score_store import ScoreStore
from dina_rl.evaluation.sets import read_sets
from dina_rl.evaluation.worker import InlineWorkers
from dina_rl.scorers.base import Pair
from dina_rl.scorers.registry import check_image_scorer
from dina_rl.scorers.server import Client, Failure, Server
from dina_rl.scorers.unified_reward_think import UnifiedRewardThink, verdict
from dina_rl.types import WorkItem
from jobs import evaluate, score
from tests.answering import MODEL, answering
from tests.tiny_reward import PROMPTS, write_preferences
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
    """Pairs whose brighter image is preferred, and a group of four of those images with a tie; all are plain."""
    root = tmp_path_factory.mktemp("sets")
    write_preferences(root / "pairs", train=0, test=4)
    for side, level in (("bright", 200), ("dark", 50)):
        for index in range(4):
            shade = (level + 10 * index,) * 3
            Image.new("RGB", (8, 8), shade).save(root / "pairs" / "images" / f"test-{index}-{side}.png")
    names = [f"test-{index}-{side}.png" for index in range(2) for side in ("bright", "dark")]
    (root / "groups").mkdir()
    for name in names:
        (root / "groups" / name).write_bytes((root / "pairs" / "images" / name).read_bytes())
    group = {"id": "a", "prompt": "a circle", "generations": names, "ranking": [1, 2, 1, 3]}
    (root / "groups" / "test.json").write_text(json.dumps([group]))
    return root


def accuracies(server, sets, cache):
    """The judge's, by set, with what the cache has and the server says."""
    groups = {"kind": "imagereward", "path": str(sets / "groups")}
    run = EvaluateRun.model_validate(
        {
            "cache": cache,
            "sets": {"pairs": {"path": str(sets / "pairs")}, "groups": groups},
            **{"batch_size": 4, "records_per_part": 3, "bootstrap": {"resamples": 5}},
        }
    )
    asked = {"kind": "unified_reward_think", "path": server.url, "processor": MODEL, "server": {"retries": 0}}
    scorer = named_scorer("think", PictureScorerConfig.model_validate(asked))
    store, jobs = ScoreStore(run), [scorer.job(data, (PLAIN,)) for data in read_sets(run.sets, seed=0)]
    store.fill(store.missing(jobs), InlineWorkers())
    return {job.data.name: measured(run, store, "think", job, PLAIN).accuracy for job in jobs}


def test_pair_accuracy_comes_from_the_verdicts_and_nothing_is_asked_twice(sets, tmp_path):
    with answering(brighter) as server:
        found = accuracies(server, sets, tmp_path)
        # both orders of 4 pairs, and of the 5 of 6 that people decide
        assert len(server.asked) == 2 * (4 + 5)
        assert (found["pairs"].micro, found["pairs"].position_bias) == (1, 0)
        # of the two dark ones people prefer the darker
        assert found["groups"].micro == pytest.approx(4 / 5)
        assert found["groups"].ties == 1
        assert accuracies(server, sets, tmp_path) == found
        assert len(server.asked) == 2 * (4 + 5)


def test_a_judge_who_names_one_place_is_half_right_and_all_bias(sets, tmp_path):
    with answering(always_first) as server:
        options = {"kind": "unified_reward_think", "path": server.url, "processor": MODEL, "server.retries": 0}
        evaluate.main(
            [
                *("--inline", "--paper", "table1", "--run_dir", str(tmp_path / "run")),
                *(word for key, value in options.items() for word in (f"--scorers.think.{key}", str(value))),
                *("--sets.pairs.path", str(sets / "pairs"), "--bootstrap.resamples", "5"),
            ]
        )
    with (tmp_path / "run" / "accuracies.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert (line["micro"], line["position_bias"], line["failed"]) == ("0.5", "1.0", "0")
    assert line["predicted_ties"] == line["pairs"] == "4"
    note = "think on pairs: 100.00 percent of its verdicts follow the position"
    assert note in (tmp_path / "run" / "table1.md").read_text()


def test_what_a_server_failed_to_answer_is_asked_again_by_the_next_run_alone(sets, tmp_path):
    def one_order(asked):
        first, second = map(brightness, asked.pictures)
        brighter(asked) if first > second else asked.send(500, "not now")

    with answering(one_order) as server:
        found = accuracies(server, sets, tmp_path)
        assert len(server.asked) == 18
        for name, pairs in (("pairs", 4), ("groups", 5)):
            assert (found[name].failed, found[name].micro, found[name].position_bias) == (pairs, 0, None)
        server.answer = brighter
        found = accuracies(server, sets, tmp_path)
        assert len(server.asked) == 18 + 9
    assert (found["pairs"].failed, found["pairs"].micro, found["groups"].failed) == (0, 1, 0)


def test_grades_that_a_server_failed_to_give_are_asked_for_again_too(sets, tmp_path):
    run = EvaluateRun.model_validate({"cache": tmp_path, "sets": {"pairs": {"path": str(sets / "pairs")}}})
    scorer = {"kind": "unified_reward", "processor": MODEL, "server": {"retries": 0}}
    with answering(lambda asked: asked.say("Final Score: 4" if asked.number % 2 else "no idea")) as server:
        named = named_scorer("grade", PictureScorerConfig.model_validate({**scorer, "path": server.url}))
        (data,) = read_sets(run.sets, seed=0)
        job = named.job(data, (PLAIN,))
        ScoreStore(run).fill(ScoreStore(run).missing([job]), InlineWorkers())
        first = torch.cat([scores[0] for scores in ScoreStore(run).read(job, PLAIN).scores.values()])
        assert first.isnan().sum() == 4
        server.answer = lambda asked: asked.say("Final Score: 2")
        ScoreStore(run).fill(ScoreStore(run).missing([job]), InlineWorkers())
        assert len(server.asked) == 8 + 4
        again = torch.cat([scores[0] for scores in ScoreStore(run).read(job, PLAIN).scores.values()])
        assert torch.equal(again, torch.where(first.isnan(), 0.4, first))
        assert ScoreStore(run).missing([job]) == []


def test_one_picture_has_no_score(tmp_path, capsys, sets):
    picture = str(sets / "pairs" / "images" / "test-0-dark.png")
    with pytest.raises(SystemExit) as ending:
        score.main(["--scorer.kind", "unified_reward_think", "--images", picture, "--prompt", "a"])
    assert ending.value.code == 2
    assert "compares two pictures and has no score of one: jobs.evaluate" in capsys.readouterr().err


# --- jobs.align -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_pipeline):
    """A run that win rates reward, who samples and scores for it, and the server."""
    with answering(brighter) as server:
        think = {"path": server.url, "processor": MODEL, "retries": 0}
        rewards = {"dina": None, "unified_reward_think": think}
        few = {"dev_samples": 2, "test_samples": 2}
        run = tiny_run(tmp_path_factory.mktemp("run"), tiny_pipeline, tiny_pipeline, rewards=rewards, golden=few)
        yield run, InlineExperience(run), server


@pytest.fixture
def rewarded(judged):
    """The same, whose server was asked nothing yet and prefers the brighter picture."""
    _, _, server = judged
    server.answer = brighter
    server.asked.clear()
    return judged


def test_a_group_is_judged_whole_however_groups_are_split(rewarded):
    _, experience, server = rewarded
    items = [
        WorkItem(iteration=0, prompt_id=number, prompt=prompt, group_size=3)
        for number, prompt in enumerate(PROMPTS[:2])
    ]
    apart = experience.collect(items)
    assert len(server.asked) == 2 * 3 * 2
    rates = torch.stack([group.scores["unified_reward_think"] for group in apart])
    assert rates.sort(1).values.tolist() == [[0, 0.5, 1]] * 2
    groups, scorer = [group.handle.rollout for group in apart], experience._scorer
    together = scorer.score(groups)
    assert set(together) == {f"unified_reward_think{kind}" for kind in ("", "_position_bias", "_missing")}
    assert torch.equal(together["unified_reward_think"], rates)

    server.answer = lambda asked: brighter(asked) if asked.text.endswith(PROMPTS[0]) else asked.say("I cannot say")
    scores = scorer.score(groups)
    advantages = group_advantages(scores["unified_reward_think"])
    assert (advantages.failed, advantages.kept.tolist()) == (1, [True, False])
    assert scores["unified_reward_think_missing"].tolist() == [[0] * 3, [1] * 3]

    server.asked.clear()
    server.answer = lambda asked: brighter(asked) if asked.number else asked.say("I cannot say")
    scores = scorer.score(groups)
    assert scores["unified_reward_think_missing"].sum().item() == 1, "a comparison is of two, each with two others"
    assert group_advantages(scores["unified_reward_think"]).failed == 0

    server.answer = always_first
    biased = scorer.score(groups[:1])
    assert biased["unified_reward_think_position_bias"].tolist() == [[1.0] * 3]
    assert group_advantages(biased["unified_reward_think"]).constant == 1


def test_a_run_is_measured_against_the_pictures_of_its_start(rewarded, tmp_path):
    run, experience, server = rewarded
    base = measure_base(run, PROMPTS, experience)
    assert [each.guidance_scale for each in base] == [1, 2]
    other, own = base  # the rollout's guidance is 2
    assert own.proxy == (0.5,) * 2, "over itself, without a question"
    assert own.proxy_parts == {"unified_reward_think": 0.5}
    assert len(server.asked) == 2 * 2
    assert set(other.proxy) <= {0, 0.5, 1}
    assert set(other.proxy_parts) == {"unified_reward_think", "unified_reward_think_position_bias"}

    recorder = Recorder(run, tmp_path, lambda directory, state: directory)
    assert recorder.run.compares
    recorder._keep_opponents("test", own)
    assert torch.equal(recorder.opponents("test"), own.images)
    server.answer = always_first
    (after,) = measure_aligned(run, PROMPTS, experience, recorder.opponents("test"))
    assert after.proxy == (0.5,) * 2
    assert after.proxy_parts["unified_reward_think_position_bias"] == 1
    assert measure_dev(run, PROMPTS, experience, own.images).proxy == (0.5,) * 2
    assert len(server.asked) == 3 * 2 * 2


def test_the_plan_counts_what_is_asked(judged):
    run, _, _ = judged
    text = "unified_reward_think: 12 samples x 2 others = 24 requests an iteration"
    assert list(_requests(run, 12)) == [("", text)]


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
