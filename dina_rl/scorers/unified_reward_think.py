"""UnifiedReward-Think (Wang et al., 2025): a vision-language model's reasoned choice between two pictures of a prompt.

It is asked of a server as UnifiedReward is (pictures of 512 x 512 as PNG, temperature 0, 4096 tokens), and answers as
published (CodeGoat24/UnifiedReward, UnifiedReward-Think/inference_llava/.../infer_cot_image_generation.py): reasoning,
then one of two sentences in <answer>. The question is in our own words, so verdicts differ from those of the published
one.
"""

import re
from collections.abc import Sequence

import torch

from dina_rl.config import ImageScorerConfig, UnifiedRewardThinkConfig
from dina_rl.scorers.base import ImageKind, Judge, Pair
from dina_rl.scorers.server import SHOWN, Client, Failure
from dina_rl.scorers.unified_reward import (
    as_pixels,
    check_served,
    data_url,
    empty_served,
    open_client,
    reduced,
    request_body,
)

QUESTION = """\
Two pictures were made for the same prompt. The first one you see is called Image 1, the second one Image 2.
Find out which of them is the better picture for that prompt. Look at each in turn: does it show what the prompt asks \
for (things, how many, what they look like, where they are, the style), is it well made (shapes, bodies, perspective, \
light, fine detail, no artifacts), and is it good to look at? Weigh what you found.
Write your reasoning between <think> and </think>. After it write your decision, which is one of these two lines:
<answer>Image 1 is better</answer>
<answer>Image 2 is better</answer>
The prompt: """
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FIRST = re.compile(r"Image 1 is better(?: than Image 2)?\.?", re.IGNORECASE)
SECOND = re.compile(r"Image 2 is better(?: than Image 1)?\.?", re.IGNORECASE)
TIE = re.compile(r"Both images are equally good\.?", re.IGNORECASE)  # not asked for; its sister models may say it


class UnifiedRewardThink:
    """`Judge` by a server. One request a pair and order; an answer without a decision is a failed verdict, NaN."""

    def __init__(self, client: Client, model: str) -> None:
        self.client = client
        self._model = model

    def __call__(self, images: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
        whole = images.isfinite().flatten(1).all(1).tolist()
        shown = {place for pair in pairs for place in (pair.first, pair.second) if whole[place]}
        pixels = as_pixels(images)
        urls = {place: data_url(pixels[place]) for place in shown}  # once, however many pairs it is of
        rows = [row for row, pair in enumerate(pairs) if whole[pair.first] and whole[pair.second]]

        def body(pair: Pair) -> bytes:
            return request_body(self._model, [urls[pair.first], urls[pair.second]], QUESTION + pair.prompt)

        verdicts = torch.full((len(pairs),), torch.nan)
        verdicts[rows] = torch.tensor(self.client.ask([pairs[row] for row in rows], body, verdict))
        return verdicts

    def reduce(self, pixels: torch.Tensor) -> torch.Tensor:
        return reduced(pixels)


def verdict(text: str) -> float | Failure:
    """The decision in an answer, the last if there are several: 1 for Image 1, 0 for Image 2, .5 for a tie."""
    decisions = [" ".join(found.split()) for found in ANSWER.findall(text)]
    for pattern, value in ((FIRST, 1.0), (SECOND, 0.0), (TIE, 0.5)):
        if decisions and pattern.fullmatch(decisions[-1]):
            return value
    return Failure(kind="no verdict", reason=f"the answer ends with {text[-SHOWN:]!r}")


def _judge(config: ImageScorerConfig, device: str) -> Judge:
    assert isinstance(config, UnifiedRewardThinkConfig)
    return UnifiedRewardThink(open_client(config), config.processor)


UNIFIED_REWARD_THINK = ImageKind(
    open=None, judge=_judge, check=check_served, empty=empty_served, files=None, backbone="server"
)
