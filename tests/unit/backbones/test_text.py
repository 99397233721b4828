"""An embedding is the prompt's own: the same bits whatever is encoded beside it, and each prompt is encoded once."""

from collections.abc import Sequence

import pytest
import torch

from dina_rl.backbones.text import TOGETHER, CachedTextEncoder
from dina_rl.config import PipelineConfig
from dina_rl.runtime import open_pipeline
from dina_rl.types import PromptEmbeds

PROMPTS = tuple(f"picture {number}" + " of it" * (number % 4) for number in range(TOGETHER + 3))


def assert_equal(ours: PromptEmbeds, theirs: PromptEmbeds) -> None:
    assert torch.equal(ours.embeds, theirs.embeds)
    assert torch.equal(ours.pooled, theirs.pooled)
    assert (ours.lengths is None) == (theirs.lengths is None)
    if ours.lengths is not None:
        assert torch.equal(ours.lengths, theirs.lengths)


@pytest.mark.parametrize(("pipeline", "length"), [("tiny_pipeline", 8), ("tiny_flux", 16), ("tiny_z_image", 64)])
def test_a_row_does_not_depend_on_its_batch(pipeline: str, length: int, request: pytest.FixtureRequest) -> None:
    path = str(request.getfixturevalue(pipeline))
    backbone = open_pipeline(PipelineConfig(path=path, max_sequence_length=length))
    together = backbone.load_text_encoder()(PROMPTS)
    alone = backbone.load_text_encoder()
    for row, prompt in enumerate(PROMPTS):
        assert_equal(together.select(slice(row, row + 1)), alone([prompt]))
    reverse = backbone.load_text_encoder()(PROMPTS[::-1])
    assert_equal(reverse.select(torch.arange(len(PROMPTS)).flip(0)), together)


class Counting:
    """Embeds a prompt as its length, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        self.asked.append(list(prompts))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return PromptEmbeds(embeds=lengths.view(-1, 1, 1), pooled=lengths.view(-1, 1))


def test_every_prompt_is_encoded_once_in_batches_of_one_size() -> None:
    encode = Counting()
    encoder = CachedTextEncoder(encode, "cpu", cached=100)
    rows = encoder([*PROMPTS, PROMPTS[0]])
    assert rows.pooled.flatten().tolist() == [len(prompt) for prompt in (*PROMPTS, PROMPTS[0])]
    assert [len(asked) for asked in encode.asked] == [TOGETHER, TOGETHER]
    assert encode.asked[1] == [*PROMPTS[TOGETHER:], *[PROMPTS[-1]] * (2 * TOGETHER - len(PROMPTS))]
    encoder(PROMPTS[3:5])
    assert len(encode.asked) == 2


def test_the_least_recently_used_go() -> None:
    encode = Counting()
    encoder = CachedTextEncoder(encode, "cpu", cached=2)
    encoder(["a", "b"])
    encoder(["a"])
    assert encoder(["ccc", "a"]).pooled.flatten().tolist() == [3, 1]
    assert len(encode.asked) == 2, "a was kept"
    encoder(["b"])
    assert len(encode.asked) == 3, "b was not"
