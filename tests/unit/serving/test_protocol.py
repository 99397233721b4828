"""What is read of a request and what is refused, each in one line."""

import json
from http import HTTPStatus

import pytest
import torch
from safetensors.torch import save

from dina_rl.config import ServeRun
from dina_rl.scoring import PictureScorer, open_scorer
from dina_rl.serving.protocol import LONGEST_PROMPT, Refused, answer, read_question
from tests.serving import packed
from tests.tiny_reward import PROMPTS, latents

RUN = ServeRun(max_samples=3, max_levels=3, max_draws=2, seed=7)
GOOD = {"latents": latents(2)}


@pytest.fixture(scope="module")
def scorer(tiny_reward) -> PictureScorer:
    return open_scorer(tiny_reward)


def test_what_a_request_does_not_say_is_the_scorers_own(scorer):
    question = read_question(packed(GOOD, prompts="a red circle"), scorer, RUN)
    assert (question.levels, question.draws, question.seed) == ((0.4,), 1, 7)
    assert question.prompts == ("a red circle",) * 2
    assert torch.equal(question.samples, GOOD["latents"])
    said = packed({"latents": latents(2).half()}, prompts=PROMPTS[:2], levels=0.2, draws=2, seed=3)
    question = read_question(said, scorer, RUN)
    assert (question.levels, question.draws, question.seed) == ((0.2,), 2, 3)
    assert question.prompts == PROMPTS[:2]
    assert torch.equal(question.samples, GOOD["latents"].half())


def test_a_sample_without_a_score_is_null_with_a_reason_and_leaves_the_others(scorer):
    broken = latents(3)
    broken[1, 0, 0, 0] = float("nan")
    question = read_question(packed({"latents": broken}, prompts=PROMPTS, draws=2), scorer, RUN)
    assert question.rows == (0, 2)
    assert question.prompts == (PROMPTS[0], PROMPTS[2])
    assert torch.equal(question.samples, broken[[0, 2]])
    assert answer(question, torch.tensor([1.5, float("inf")]), torch.tensor([0.5, 0.25])) == {
        "scores": [1.5, None, None],
        "deviations": [0.5, None, None],
        "failed": {"1": "the latent is not finite", "2": "its score is inf"},
    }


def test_a_single_draw_has_no_deviation(scorer):
    question = read_question(packed(GOOD, prompts=PROMPTS[:2]), scorer, RUN)
    assert answer(question, torch.ones(2), torch.zeros(2)) == {"scores": [1.0, 1.0], "failed": {}}


WHOLE = packed(GOOD, prompts="x")
HALF_A_PAIR = save(GOOD, metadata={"prompts": '"\\ud800"'})
NESTED = save(GOOD, metadata={"prompts": "[" * 100_000})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no safetensors file"),
        (b"\xff" * 64, "no safetensors file"),
        (WHOLE[:-1], "no safetensors file"),
        (WHOLE + b"\0", "no safetensors file"),
        (b"PK\x03\x04" + bytes(60), "no safetensors file"),
        (packed({"images": latents(2)}, prompts="x"), "a dina scorer takes one tensor `latents`, this has ['images']"),
        (packed({**GOOD, "more": latents(1)}, prompts="x"), "takes one tensor"),
        (packed({"latents": latents(2)[0]}, prompts="x"), "latents are [B, 16, 8, 8], these are [16, 8, 8]"),
        (packed({"latents": latents(2)[..., :7].contiguous()}, prompts="x"), "these are [2, 16, 8, 7]"),
        (packed({"latents": torch.empty(0, 16, 8, 8)}, prompts="x"), "these are [0, 16, 8, 8]"),
        (packed({"latents": latents(1).double()}, prompts="x"), "latents are of F32, F16, BF16, these are F64"),
        (packed({"latents": latents(4)}, prompts="x"), "4 samples, more than 3"),
        (packed(GOOD), "prompts: Field required"),
        (packed(GOOD, prompts=[]), "prompts"),
        (packed(GOOD, prompts=["x"] * 3), "prompts: 3 for 2 samples"),
        (packed(GOOD, prompts={"x": 1}), "prompts"),
        (packed(GOOD, prompts="x" * (LONGEST_PROMPT + 1)), f"more than {LONGEST_PROMPT}"),
        (HALF_A_PAIR, "is no text: surrogates not allowed"),
        (NESTED, "metadata 'prompts' is not JSON"),
        (save(GOOD, metadata={"prompts": "a circle"}), "metadata 'prompts' is not JSON"),
        (packed(GOOD, prompts="x", level=0.2), "level: unknown key"),
        (packed(GOOD, prompts="x", levels=[0.2, 1.0]), "levels.1: Input should be less than 1"),
        (packed(GOOD, prompts="x", levels=float("nan")), "levels.0"),
        (packed(GOOD, prompts="x", levels=[0.1] * 4), "levels: 4, more than 3"),
        (packed(GOOD, prompts="x", draws=3), "draws: 3, more than 2"),
        (packed(GOOD, prompts="x", draws=True), "not a boolean"),
        (packed(GOOD, prompts="x", seed=2**63), "seed"),
    ],
)
def test_what_is_no_question_is_told_in_one_line(scorer, body, message):
    with pytest.raises(Refused) as refused:
        read_question(body, scorer, RUN)
    assert refused.value.status == HTTPStatus.BAD_REQUEST
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(json.dumps(str(refused.value))) < 600


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0", "token": False}, "others reach 0.0.0.0"),
        ({"host": "scorer.example", "token": False}, "others reach"),
        ({"scorer": {"noise": "independent"}}, "share their prompt's noise"),
        ({"scorer": {"draws": 17}}, "beyond max_levels and max_draws"),
        ({"max_held_mib": 8}, "has no room for a request of 64 MiB"),
        ({"scorer": {"kind": "pickscore"}, "same_bits": True}, "only a dina scorer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ServeRun.model_validate(settings)


def test_a_loopback_needs_no_token():
    assert not any(ServeRun(host=host, token=False).token for host in ("127.0.0.1", "::1", "localhost"))
