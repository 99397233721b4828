"""What a CLIP model takes: tokens, and pictures through tensor operations, so that a score has a gradient."""

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import AutoTokenizer, BatchEncoding, CLIPImageProcessorPil

LONGEST = 16
"""Times the short edge that a picture may be long before its ends, which the crop leaves out, go before resizing."""


class SquareCrop:
    """Pictures as CLIP, and whoever follows it, crops them.

    The bicubic resize is torch's antialiased one rather than PIL's on 8-bit images: an approximation of rounding only.

    Args:
        edge: pixels of the shortest one before the crop.
    """

    def __init__(
        self, edge: int, crop: tuple[int, int], mean: Sequence[float], std: Sequence[float], *, device: str
    ) -> None:
        self._edge, self._crop, self._device = edge, crop, device
        self._mean, self._std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (mean, std))

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1]: shortest edge to the model's size (bicubic), centre crop, normalisation."""
        return (self.cropped(_middle(images).to(self._device)) - self._mean) / self._std

    @torch.no_grad()
    def reduce(self, pixels: torch.Tensor) -> torch.Tensor:
        """The resized and cropped picture [3, h, w] in [0, 1] of one [3, H, W] uint8: memory of one large picture.

        Its score is that of the whole: resizing it again to the size that it has changes nothing. Where the crop is not
        as large as the resized edge that does not hold, and the picture stays whole.
        """
        if self._crop != (self._edge, self._edge):
            return _middle(pixels).float() / 255
        image = _middle(pixels).to(self._device).float() / 255
        return self.cropped(image[None])[0].cpu()

    def cropped(self, images: torch.Tensor) -> torch.Tensor:
        """The same without the normalisation, in [0, 1]."""
        height, width = images.shape[2:]
        short = min(height, width)
        size = int(self._edge * height / short), int(self._edge * width / short)
        resized = functional.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self._crop[0]) // 2, (size[1] - self._crop[1]) // 2
        return resized[:, :, top : top + self._crop[0], left : left + self._crop[1]]


class CLIPInput:
    """The tokenizer and the image processor of a CLIP model.

    Args:
        processor: directory or hub id of both.
    """

    def __init__(self, processor: str, *, device: str) -> None:
        images = CLIPImageProcessorPil.from_pretrained(processor)
        crop = images.crop_size["height"], images.crop_size["width"]
        self._device = device
        self._pictures = SquareCrop(
            images.size["shortest_edge"], crop, images.image_mean, images.image_std, device=device
        )
        self.pixels, self.reduce, self.cropped = self._pictures.pixels, self._pictures.reduce, self._pictures.cropped
        self._tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False)

    def tokens(self, prompts: Sequence[str], length: int) -> BatchEncoding:
        """`input_ids` and `attention_mask` [B, length]."""
        tokens: BatchEncoding = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return tokens.to(self._device)


def distinct(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Each prompt once, and for every prompt which of those it is."""
    texts = list(dict.fromkeys(prompts))
    return texts, [texts.index(prompt) for prompt in prompts]


def _middle(images: torch.Tensor) -> torch.Tensor:
    """The middle of a strip, `LONGEST` times as long as high: resized whole, one of 1 x 200000 takes gigabytes.

    Less than that is untouched. An even number of pixels goes, so that the middle stays where it was.
    """
    *_, height, width = images.shape
    most = LONGEST * min(height, width)
    rows, columns = (max(0, edge - most) // 2 for edge in (height, width))
    return images[..., rows : height - rows, columns : width - columns]
