"""What HPSv3 reads: a picture in patches, and the instruction with the prompt in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from dina_rl.textfiles import parse_json, read_text

REWARD_TOKEN = "<|Reward|>"  # hpsv3/train.py: added to the base's tokens; the head reads what stands there
IMAGE_TOKEN = "<|image_pad|>"
PIXELS = 256 * 28 * 28  # hpsv3/inference.py: of a picture, at least and at most
INSTRUCTION = "\n".join(parse_json(read_text(Path(__file__).parent / "hpsv3_instruction.json"))["lines"])
LONGEST = 200
"""Times the short edge that the base takes a picture to be long; of a longer one the ends go."""

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token ids before and after the picture."""

    before: torch.Tensor
    after: torch.Tensor
    place: int  # in `after`, of the token of the reward


def tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tokens:
    """The instruction in the base's chat template. What a prompt has of the model's own words changes no place."""
    words = INSTRUCTION.replace("{prompt}", prompt)
    turn: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
    text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in text.split(IMAGE_TOKEN, 1))
    reward = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    place = len(after) - 1 - after[::-1].index(reward)
    return Tokens(before=torch.tensor(before), after=torch.tensor(after), place=place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Qwen2-VL's preprocessing as tensor operations, so that a score has a gradient.

    Its bicubic resize is torch's antialiased one rather than PIL's on 8-bit images: an approximation of rounding only.
    """

    mean: tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    std: tuple[float, ...] = tuple(OPENAI_CLIP_STD)
    patch: int = 14  # pixels
    merge: int = 2  # patches of a token and side
    repeats: int = 2  # times that a patch is seen, as the frames of a film

    @staticmethod
    def of(processor: Qwen2VLImageProcessorPil) -> "Pictures":
        return Pictures(
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            patch=processor.patch_size,
            merge=processor.merge_size,
            repeats=processor.temporal_patch_size,
        )

    def patches(self, image: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        """Patches [h * w, values] of an image [3, H, W] in [0, 1], token by token, and (h, w)."""
        mean, std = (torch.tensor(each, device=image.device).view(3, 1, 1) for each in (self.mean, self.std))
        pixels = (self.resized(image) - mean) / std
        rows, columns = (edge // self.patch for edge in pixels.shape[1:])
        shape = 3, rows // self.merge, self.merge, self.patch, columns // self.merge, self.merge, self.patch
        by_token = pixels.reshape(shape).permute(1, 4, 2, 5, 0, 3, 6)
        seen_once = by_token.reshape(rows * columns, 3, 1, self.patch, self.patch)
        return seen_once.expand(-1, -1, self.repeats, -1, -1).reshape(rows * columns, -1), (rows, columns)

    def resized(self, image: torch.Tensor) -> torch.Tensor:
        """To the size that the base gives it, unless it has one that may come of that."""
        whole = middle(image)
        height, width = whole.shape[1:]
        if self._is_resized(height, width):
            return whole
        size = smart_resize(height, width, factor=self._step, min_pixels=PIXELS, max_pixels=PIXELS)
        return functional.interpolate(whole[None], size=size, mode="bicubic", antialias=True).clamp(0, 1)[0]

    @property
    def _step(self) -> int:
        return self.patch * self.merge

    def _is_resized(self, height: int, width: int) -> bool:
        """Whole tokens, as near to the number of pixels as these allow."""
        step = self._step
        near = (height - step) * (width - step) < PIXELS < (height + step) * (width + step)
        return height % step == width % step == 0 and near


def middle(image: torch.Tensor) -> torch.Tensor:
    """The image [3, H, W] without the ends of a strip."""
    *_, height, width = image.shape
    most = LONGEST * min(height, width)
    rows, columns = (max(0, edge - most + 1) // 2 for edge in (height, width))
    return image[..., rows : height - rows, columns : width - columns]
