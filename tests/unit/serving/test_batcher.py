"""Many requests in one forward: the same scores as alone, and nobody waits for another's trouble."""

from concurrent.futures import Future
from threading import Event

import pytest
import torch

from dina_rl.config import PictureScorerConfig
from dina_rl.scoring import NoiseKey, PictureScorer, Sample, open_scorer
from dina_rl.serving.batcher import Batcher
from dina_rl.serving.protocol import Question
from tests.tiny_reward import PROMPTS, latents

PATIENCE_S = 60


def question(samples: torch.Tensor, prompts: tuple[str, ...], levels=(0.4,), draws=1, seed=0) -> Question:
    rows = tuple(range(len(samples)))
    return Question(samples=samples, prompts=prompts, rows=rows, failed={}, levels=levels, draws=draws, seed=seed)


def parts(count: int, levels=(0.4,), draws=1) -> list[Question]:
    """Requests of a sample each."""
    texts = [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    return [
        question(latents(count)[index : index + 1], (text,), levels, draws, seed=index // 2)
        for index, text in enumerate(texts)
    ]


def scores(batcher: Batcher, questions: list[Question]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of questions that are all asked before the first is answered."""
    outcomes = [batcher.ask(each) for each in questions]
    found = [outcome.result(PATIENCE_S) for outcome in outcomes]
    return torch.cat([score for score, _ in found]), torch.cat([deviation for _, deviation in found])


class Slow:
    """A scorer of images that tells of each forward and waits for a sign; a picture's score is its first number."""

    space = "images"

    def __init__(self) -> None:
        self.forwards: list[list[float]] = []
        self.began, self.go = Event(), Event()

    def picture(self, pixels: torch.Tensor) -> Sample:
        return Sample(space="images", tensor=pixels)

    def score_images(self, images, prompts, keys) -> torch.Tensor:
        found = images[:, 0, 0, 0]
        self.forwards.append(found.tolist())
        self.began.set()
        assert self.go.wait(PATIENCE_S)
        if -1 in found:
            raise ValueError("a picture that it cannot bear")
        if -2 in found:
            raise TypeError("a mistake of ours")
        return found


def pictures(*values: float) -> Question:
    return question(torch.tensor(values).reshape(-1, 1, 1, 1), ("x",) * len(values), levels=())


@pytest.fixture
def slow():
    """A scorer whose first forward, of a picture 0, is under way, and its batcher of three rows."""
    scorer = Slow()
    batcher = Batcher(scorer, rows=3, wait_s=0.0, same_bits=False)
    first = batcher.ask(pictures(0.0))
    assert scorer.began.wait(PATIENCE_S)
    yield scorer, batcher, first
    scorer.go.set()
    batcher.close(PATIENCE_S)
    assert not batcher.alive


@pytest.fixture(scope="module")
def scorer(tiny_reward) -> PictureScorer:
    return open_scorer(PictureScorerConfig(path=str(tiny_reward), normalisation="readme"))


@pytest.mark.parametrize(("levels", "draws"), [((0.4,), 1), ((0.2, 0.6), 2)])
def test_a_score_is_the_scorers_own_alone_and_in_a_crowd(scorer, levels, draws):
    crowd = parts(3, levels, draws)
    own = scorer.at(levels, draws=draws)
    expected = [
        own.score_draws(each.samples, each.prompts, [NoiseKey(group=each.prompts, member="", seed=each.seed)])
        for each in crowd
    ]
    plain, filled = (Batcher(scorer, rows=4, wait_s=0.05, same_bits=same_bits) for same_bits in (False, True))
    for batcher in (plain, filled):
        for column, found in enumerate(scores(batcher, crowd)):
            wanted = torch.cat([each[column] for each in expected])
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert (found > 0).all() == (draws > 1), "a deviation, where there are draws to deviate"
    together = scores(filled, crowd)
    apart = [scores(filled, [each]) for each in crowd]
    for column in range(2):
        assert torch.equal(torch.cat([each[column] for each in apart]), together[column]), "to the bit"
    alone = [scores(plain, [each])[0] for each in crowd]
    assert torch.equal(torch.cat(alone), torch.cat([each[0] for each in expected])), "a forward of one is the scorer's"
    for batcher in (plain, filled):
        batcher.close(PATIENCE_S)


def test_what_waits_shares_forwards_in_the_order_of_arrival(slow):
    scorer, batcher, first = slow
    others = [batcher.ask(each) for each in (pictures(1, 2), pictures(3, 4, 5, 6), pictures(7))]
    scorer.go.set()
    found = [outcome.result(PATIENCE_S)[0].tolist() for outcome in (first, *others)]
    assert found == [[0], [1, 2], [3, 4, 5, 6], [7]]
    assert scorer.forwards == [[0], [1, 2, 3], [4, 5, 6], [7]]


def test_other_shapes_are_other_forwards(slow):
    scorer, batcher, _ = slow
    wide = question(torch.full((1, 1, 1, 2), 9.0), ("x",), levels=())
    outcomes = [batcher.ask(each) for each in (pictures(1), wide, pictures(2))]
    scorer.go.set()
    assert [outcome.result(PATIENCE_S)[0].item() for outcome in outcomes] == [1, 9, 2]
    assert scorer.forwards == [[0], [1, 2], [9]]


def test_who_waits_no_more_is_not_scored(slow):
    scorer, batcher, _ = slow
    gone, there = batcher.ask(pictures(1)), batcher.ask(pictures(2))
    assert gone.cancel()
    scorer.go.set()
    assert there.result(PATIENCE_S)[0].item() == 2
    assert scorer.forwards == [[0], [2]]


def test_a_forward_that_fails_fails_its_requests_and_no_other(slow):
    scorer, batcher, _ = slow
    bad = [batcher.ask(each) for each in (pictures(1, -1), pictures(2, 3))]
    good = batcher.ask(pictures(4, 5))
    scorer.go.set()
    for outcome in bad:
        with pytest.raises(ValueError, match="cannot bear"):
            outcome.result(PATIENCE_S)
    assert good.result(PATIENCE_S)[0].tolist() == [4, 5]
    assert scorer.forwards == [[0], [1, -1, 2], [4, 5]], "the rest of a failed request is left"


def test_closed_it_answers_everybody(slow):
    scorer, batcher, first = slow
    waiting = batcher.ask(pictures(1))
    batcher.close(0)
    scorer.go.set()
    assert first.result(PATIENCE_S)[0].item() == 0
    for outcome in (waiting, batcher.ask(pictures(2))):
        with pytest.raises(RuntimeError, match="has ended"):
            outcome.result(PATIENCE_S)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_of_ours_ends_it_and_keeps_nobody_waiting(slow):
    scorer, batcher, _ = slow
    outcomes = [batcher.ask(pictures(-2, 1)), batcher.ask(pictures(2, 3))]
    scorer.go.set()
    for outcome in (*outcomes, batcher.ask(pictures(4))):
        with pytest.raises(RuntimeError, match="has ended"):
            outcome.result(PATIENCE_S)


def test_nothing_to_score_needs_no_forward(slow):
    _, batcher, _ = slow
    outcome: Future = batcher.ask(question(torch.empty(0, 1, 1, 1), (), levels=()))
    assert [len(each) for each in outcome.result(0)] == [0, 0]
