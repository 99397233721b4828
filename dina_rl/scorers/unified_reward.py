"""UnifiedReward (Wang et al., 2025): a vision-language model's grade of one picture, asked of a server.

The question is the one that the model is published with (CodeGoat24/UnifiedReward,
inference_qwen/image_generation/qwen_point_score_image_generation.py); pictures of 512 x 512 as PNG, the pattern of the
grade and its fifth are flow_grpo's (yifan123/flow_grpo, flow_grpo/rewards.py, unifiedreward_score_sglang).
"""

import base64
import json
import re
from collections.abc import Sequence
from io import BytesIO

import torch
from PIL import Image
from torch import nn

from dina_rl.config import ImageScorerConfig, ServedScorerConfig, UnifiedRewardConfig
from dina_rl.scorers.base import Conditions, EmptyImageScorer, ImageKind, Space
from dina_rl.scorers.server import SHOWN, Client, Failure, Server, check_server

QUESTION = """\
You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on \
two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of \
depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color \
accuracy, and overall aesthetic appeal.
Extract key elements from the provided text caption, evaluate their presence in the generated image using the format: \
'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a score from 1 to \
5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: """
GRADE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")
BEST = 5.0
EDGE = 512
MAX_TOKENS = 4096  # of an answer, as published


class UnifiedRewardScorer:
    """`Scorer` in image space: a grade over 5. An answer without a grade is a failed reward, NaN.

    One request a picture, at temperature 0: what else is scored is not part of it. It has no gradient.
    """

    space: Space = "images"

    def __init__(self, client: Client, model: str) -> None:
        self.client = client
        self._model = model

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        assert not samples.requires_grad, "a server's answer has no gradient"
        scores = torch.full((len(samples),), torch.nan)
        whole = samples.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        pictures = as_pixels(samples)
        asked = [(pictures[row], conditions.prompts[row]) for row in whole]
        scores[whole] = torch.tensor(self.client.ask(asked, self._body, grade))
        return scores.to(samples.device)

    def reduce(self, pixels: torch.Tensor) -> torch.Tensor:
        return reduced(pixels)

    def _body(self, asked: tuple[torch.Tensor, str]) -> bytes:
        pixels, prompt = asked
        return request_body(self._model, [data_url(pixels)], f"{QUESTION}[{prompt}]")


def grade(text: str) -> float | Failure:
    """The grade in an answer, in fifths."""
    found = GRADE.search(text)
    if found is None:
        return Failure(kind="no score", reason=f"the answer ends with {text[-SHOWN:]!r}")
    return float(found[1]) / BEST


def reduced(pixels: torch.Tensor) -> torch.Tensor:
    """A picture [3, H, W] uint8 as it is sent, in [0, 1]. It counts as the whole: that size is not resized again."""
    resized = torch.frombuffer(bytearray(_sent(pixels).tobytes()), dtype=torch.uint8)
    return resized.view(EDGE, EDGE, 3).permute(2, 0, 1).float() / 255


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as uint8 on the CPU."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def data_url(pixels: torch.Tensor) -> str:
    """A picture [3, H, W] uint8 as a request has it."""
    png = BytesIO()
    _sent(pixels).save(png, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def request_body(model: str, pictures: Sequence[str], text: str) -> bytes:
    """A question: pictures as data URLs, in order, and a text after them."""
    shown: list[dict[str, object]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    request = {
        "model": model,
        "messages": [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    return json.dumps(request).encode()


def _sent(pixels: torch.Tensor) -> Image.Image:
    """A picture [3, H, W] uint8, stretched as published."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).resize((EDGE, EDGE))


def _server(config: ServedScorerConfig) -> Server:
    return Server(url=config.path, timeout_s=config.timeout_s, retries=config.retries)


def open_client(config: ServedScorerConfig) -> Client:
    """Raises ValueError where the server is not there, or does not serve the model."""
    check_served(config)
    return Client(config.name, _server(config), concurrency=config.concurrency)


def _open(config: ImageScorerConfig, device: str) -> UnifiedRewardScorer:
    assert isinstance(config, UnifiedRewardConfig)
    return UnifiedRewardScorer(open_client(config), config.processor)


def check_served(config: ImageScorerConfig) -> None:
    """`ImageKind.check` of a scorer behind a server."""
    assert isinstance(config, ServedScorerConfig)
    check_server(_server(config), config.processor)


def empty_served(config: ImageScorerConfig) -> EmptyImageScorer:
    """`ImageKind.empty` of one: nothing of it is here."""
    return EmptyImageScorer(model=nn.Module(), look=lambda: None)


UNIFIED_REWARD = ImageKind(open=_open, check=check_served, empty=empty_served, files=None, backbone="server")
