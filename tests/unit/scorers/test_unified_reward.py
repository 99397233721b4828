"""UnifiedReward against a real server on this machine: right, slow, silent, wrong, busy, broken, and gone."""

import logging
from email.utils import formatdate
from time import perf_counter, sleep, time

import pytest
import torch
from PIL import Image

from dina_rl.alignment.golden import open_metric
from dina_rl.config import AlignRun, GoldenConfig, PictureScorerConfig, UnifiedRewardConfig
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.registry import check_image_scorer, empty_image_scorer, image_scorer_bytes
from dina_rl.scorers.server import API_KEY, Client, Server, _seconds
from dina_rl.scorers.unified_reward import UnifiedRewardScorer, grade
from dina_rl.scoring import open_scorer
from tests.answering import MODEL, answering

SHADES = 6
PROMPTS = tuple(f"a {{shade}} of {number}" for number in range(SHADES))
TIMEOUT_S = 0.4


def shades(count=SHADES):
    """Plain pictures [count, 3, 24, 16], each brighter than the one before."""
    return (torch.arange(count) / count).view(-1, 1, 1, 1).expand(-1, 3, 24, 16)


def shade(asked):
    """Which of `shades` a question shows."""
    return round(asked.picture.getpixel((0, 0))[0] / 255 * SHADES)


def graded(asked):
    """A grade by both the picture and the prompt, so that neither can be another sample's."""
    prompt = next(number for number, text in enumerate(PROMPTS) if text in asked.text)
    asked.say(f"sky (object): 1\nFinal Score: {1 + 0.5 * shade(asked) + 0.1 * prompt:.1f}")


EXPECTED = torch.tensor([(1 + 0.6 * number) / 5 for number in range(SHADES)])


def scorer_at(url, *, retries=2, concurrency=SHADES, timeout_s=TIMEOUT_S):
    server = Server(url=url, timeout_s=timeout_s, retries=retries, pause_s=0.01)
    return UnifiedRewardScorer(Client("unified_reward", server, concurrency=concurrency), MODEL)


def score(scorer, images=None):
    images = shades() if images is None else images
    return scorer(images, Conditions.of_images(PROMPTS[: len(images)]))


def test_each_sample_has_its_own_grade_when_answers_come_in_another_order():
    def backwards(asked):
        sleep(0.02 * (SHADES - shade(asked)))
        graded(asked)

    with answering(backwards) as server:
        scores = score(scorer_at(server.url, timeout_s=5))
    torch.testing.assert_close(scores, EXPECTED)
    asked = server.asked[0]
    assert (asked.body["model"], asked.body["temperature"], asked.picture.size) == (MODEL, 0, (512, 512))
    assert asked.picture.format == "PNG"
    assert asked.text.endswith(f"Text Caption: [{PROMPTS[shade(asked)]}]")


def test_no_more_are_asked_at_a_time_than_may_be():
    at_work, seen = [], []

    def slowly(asked):
        at_work.append(asked)
        seen.append(len(at_work))
        sleep(0.05)
        at_work.pop()
        graded(asked)

    with answering(slowly) as server:
        scores = score(scorer_at(server.url, concurrency=2, timeout_s=5))
    torch.testing.assert_close(scores, EXPECTED)
    assert max(seen) == 2


@pytest.mark.parametrize("dripping", [False, True], ids=["slow", "dripping"])
def test_one_slow_answer_fails_one_sample(dripping):
    def one_slow(asked):
        if shade(asked) != 3:
            return graded(asked)
        if dripping:
            asked.send_response(200)
        while not asked.server.closing.wait(TIMEOUT_S / 4):
            if dripping:
                asked.send_header("More", "to come")
                asked.flush_headers()
        return None

    with answering(one_slow) as server:
        scorer = scorer_at(server.url, retries=0)
        begin = perf_counter()
        scores = score(scorer)
    assert perf_counter() - begin < 20
    assert scores.isnan().tolist() == [number == 3 for number in range(SHADES)]
    assert scorer.client.failures == {"no answer": 1}


def test_a_silent_server_is_given_up_for_the_rest_of_a_batch(caplog):
    with answering(lambda asked: asked.server.closing.wait()) as server:
        scorer = scorer_at(server.url, retries=1, concurrency=2)
        assert score(scorer).isnan().all()
    assert len(server.asked) < SHADES * 2
    assert scorer.client.failures == {"no answer": SHADES}
    (said,) = caplog.messages
    assert said.startswith(f"unified_reward: no answer from {server.url}: ")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda asked: asked.send(200, "{"), "malformed"),
        (lambda asked: asked.send(200, '{"choices": []}'), "malformed"),
        (lambda asked: asked.send(200, '{"choices": [{"message": {"content": null}}]}'), "malformed"),
        (lambda asked: asked.say("It is a fine picture. Score: 4"), "no score"),
        (lambda asked: asked.say("Final Score: 0"), "no score"),
        (lambda asked: asked.send(400, "too long"), "refused"),
    ],
)
def test_a_bad_answer_is_a_failed_reward_and_not_asked_for_again(answer, kind, caplog):
    def one_bad(asked):
        graded(asked) if shade(asked) % 3 else answer(asked)

    with answering(one_bad) as server:
        scorer = scorer_at(server.url, timeout_s=5)
        scores = score(scorer)
    assert scores.isnan().tolist() == [number % 3 == 0 for number in range(SHADES)]
    assert len(server.asked) == SHADES
    assert scorer.client.failures == {kind: 2}
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("status", "kind"), [(429, "busy"), (500, "server error"), (503, "server error")])
def test_what_may_pass_is_asked_again(status, kind):
    def first_refused(asked):
        graded(asked) if asked.number else asked.send(status, "not now")

    with answering(first_refused) as server:
        torch.testing.assert_close(score(scorer_at(server.url, timeout_s=5)), EXPECTED)
    assert len(server.asked) == SHADES + 1

    with answering(lambda asked: asked.send(status, "never")) as server:
        scorer = scorer_at(server.url, retries=1, timeout_s=5)
        assert score(scorer).isnan().all()
    assert len(server.asked) == 2 * SHADES
    assert scorer.client.failures == {kind: SHADES}


def test_a_busy_server_says_when_it_may_be_asked_again():
    def later(asked):
        graded(asked) if asked.number else asked.send(429, "", Retry_After="0.3")

    with answering(later) as server:
        begin = perf_counter()
        assert score(scorer_at(server.url, timeout_s=5), shades()[:1]).isfinite().all()
        assert perf_counter() - begin >= 0.3

    with answering(lambda asked: asked.send(429, "", Retry_After="3600")) as server:
        assert score(scorer_at(server.url, timeout_s=5), shades()[:1]).isnan().all()
    assert len(server.asked) == 1, "longer than a request may take: given up"


def test_retry_after_is_a_number_or_a_date():
    assert [_seconds(value) for value in (None, "7", " 0.5 ", "soon", "-3")] == [0, 7, 0.5, 0, 0]
    assert _seconds(formatdate(time() + 60, usegmt=True)) == pytest.approx(60, abs=2)
    assert _seconds(formatdate(time() - 60, usegmt=True)) == 0


def test_a_server_that_goes_fails_all_from_then_on_and_is_said_once(caplog):
    with answering(graded) as server:
        scorer = scorer_at(server.url)
        torch.testing.assert_close(score(scorer), EXPECTED)
    begin = perf_counter()
    for _ in range(2):
        assert score(scorer).isnan().all()
    assert perf_counter() - begin < 20
    assert scorer.client.failures == {"no answer": 2 * SHADES}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_pauses_double_and_are_the_same_each_time():
    server = Server(url="http://nowhere/v1", timeout_s=1, retries=3, pause_s=1)
    pauses = [server.pause(attempt, b"question") for attempt in range(8)]
    assert pauses == [server.pause(attempt, b"question") for attempt in range(8)]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, (1, 2, 4, 8, 16, 32, 60, 60), strict=True))
    assert server.pause(0, b"another") != pauses[0]


def test_the_key_comes_from_the_environment_and_is_not_told(monkeypatch, caplog):
    monkeypatch.setenv(API_KEY, "secret-key")
    with answering(lambda asked: asked.send(401, f"wrong: {asked.headers['Authorization']}")) as server:
        assert score(scorer_at(server.url, timeout_s=5), shades()[:1]).isnan().all()
    assert server.asked[0].headers["Authorization"] == "Bearer secret-key"
    assert "HTTP 401 wrong: Bearer ***" in caplog.text
    assert "secret" not in caplog.text
    assert "secret" not in UnifiedRewardConfig().model_dump_json()


def test_a_picture_that_is_not_finite_is_not_asked_about():
    images = shades().clone()
    images[2, 0, 0, 0] = torch.nan
    with answering(graded) as server:
        scores = score(scorer_at(server.url, timeout_s=5), images)
    assert scores.isnan().tolist() == [number == 2 for number in range(SHADES)]
    assert len(server.asked) == SHADES - 1


def test_a_reduced_picture_is_sent_as_the_whole():
    scorer = scorer_at("http://nowhere/v1")
    pixels = torch.randint(0, 256, (3, 40, 25), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reduced = scorer.reduce(pixels)
    assert reduced.shape == (3, 512, 512)
    again = scorer._body(((reduced * 255).round().to(torch.uint8), "a"))
    assert scorer._body((pixels, "a")) == again


def test_the_first_published_grade_counts():
    assert grade("cat (animal): 1\nFinal Score: 3.5\nFinal Score: 1") == pytest.approx(0.7)


def test_it_scores_files_and_measures(tmp_path):
    Image.new("RGB", (24, 16), (170, 170, 170)).save(tmp_path / "grey.png")
    with answering(graded) as server:
        scorer = open_scorer(PictureScorerConfig(kind="unified_reward", path=server.url))
        assert scorer.score([tmp_path / "grey.png"], [PROMPTS[1]]).tolist() == pytest.approx([(1 + 2 + 0.1) / 5])
        metric = open_metric(GoldenConfig(scorer="unified_reward", path=server.url))
        assert metric(shades(), PROMPTS).values == pytest.approx(EXPECTED.tolist())


def test_what_is_wrong_with_a_server_is_one_line():
    with answering(graded) as server:
        check_image_scorer(UnifiedRewardConfig(path=server.url))
        with pytest.raises(ValueError, match=f"serves {MODEL}, not Other"):
            check_image_scorer(UnifiedRewardConfig(path=server.url, processor="Other"))
    for path, message in (
        (server.url, r"server http://127.0.0.1:\d+/v1 cannot be asked: ConnectionRefusedError"),
        ("127.0.0.1:8080", "no address of a server"),
        ("http://127.0.0.1:many/v1", "[Pp]ort"),
        ("http://me:word@host/v1", f"server host holds a secret: a key goes into {API_KEY}"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            check_image_scorer(UnifiedRewardConfig(path=path))
        assert "word" not in str(raised.value)


def test_nothing_of_it_is_here():
    assert list(empty_image_scorer(UnifiedRewardConfig()).model.parameters()) == []
    assert image_scorer_bytes(UnifiedRewardConfig()) == 0


def test_refl_has_no_use_for_it():
    with pytest.raises(ValueError, match="rewards.unified_reward has no gradient, which refl follows"):
        AlignRun.model_validate(
            {"algorithm": "refl", "refl": {"stop_range": (3, 8)}, "rewards": {"unified_reward": {}}}
        )
