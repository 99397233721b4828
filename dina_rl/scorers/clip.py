"""Rewards on CLIP's two towers: PickScore (Kirstain et al., 2023) and CLIPScore (Hessel et al., 2021)."""

from functools import cache

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

from dina_rl.backbones.known import CLIP_MODELS
from dina_rl.config import ImageScorerConfig
from dina_rl.loading import loading
from dina_rl.scorers.base import Conditions, EmptyImageScorer, ImageKind, Space

LONGEST = 16
"""Times the short edge that a picture may be long before its ends, which the crop leaves out, go before resizing."""


def check_clip(config: ImageScorerConfig) -> None:
    """Whether the model is there at all, without loading its weights.

    Raises:
        ValueError: neither a local directory nor a hub id that can be read here, or another kind of model.
    """
    try:
        kind = AutoConfig.from_pretrained(config.path).model_type
        AutoTokenizer.from_pretrained(config.processor)
        CLIPImageProcessorPil.from_pretrained(config.processor)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"CLIP model {config.path} ({config.processor}) cannot be read: {first_line}") from error
    if kind != "clip":
        raise ValueError(f"model {config.path} is a {kind}, not a clip")


class CLIPScorer:
    """`Scorer` in image space: the cosine of image and text embedding, times the model's own scale if `learned_scale`.

    The image goes through CLIP's preprocessing as tensor operations, so that the score has a gradient. Its bicubic
    resize is torch's antialiased one rather than PIL's on 8-bit images: an approximation of rounding only.

    Raises:
        ValueError: the model cannot be read from its directory or hub id.
    """

    space: Space = "images"

    def __init__(self, config: ImageScorerConfig, *, learned_scale: bool, device: str) -> None:
        self._device = device
        self._learned_scale = learned_scale
        check_clip(config)
        with loading("the model", config.path):
            model = CLIPModel.from_pretrained(config.path)
            nn.Module.to(model, device)  # in place; transformers' wrapper around it says nothing of its arguments
        self._tokenizer = AutoTokenizer.from_pretrained(config.processor)
        processor = CLIPImageProcessorPil.from_pretrained(config.processor)
        self._model = model.requires_grad_(False).eval()
        self._edge = processor.size["shortest_edge"]
        self._crop = processor.crop_size["height"], processor.crop_size["width"]
        self._mean = torch.tensor(processor.image_mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(processor.image_std, device=device).view(3, 1, 1)

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return self.score(samples, conditions.prompts)

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1] against their prompts; a prompt is encoded once."""
        seen = self._model.get_image_features(pixel_values=self._preprocess(images)).pooler_output
        cosine = functional.cosine_similarity(seen, self._texts(prompts), dim=-1)
        return self._model.logit_scale.exp() * cosine if self._learned_scale else cosine

    @torch.no_grad()
    def _texts(self, prompts: tuple[str, ...]) -> torch.Tensor:
        distinct = list(dict.fromkeys(prompts))
        tokens = self._tokenizer(
            distinct,
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        encoded: torch.Tensor = self._model.get_text_features(**tokens).pooler_output
        return encoded[[distinct.index(prompt) for prompt in prompts]]

    @torch.no_grad()
    def reduce(self, pixels: torch.Tensor) -> torch.Tensor:
        """The resized and cropped picture [3, h, w] in [0, 1] of one [3, H, W] uint8: memory of one large picture.

        Its score is that of the whole: resizing it again to the size that it has changes nothing. Where the crop is not
        as large as the resized edge that does not hold, and the picture stays whole.
        """
        if self._crop != (self._edge, self._edge):
            return _middle(pixels).float() / 255
        image = _middle(pixels).to(self._device).float() / 255
        return self._cropped(image[None])[0].cpu()

    def _preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Shortest edge to the model's size (bicubic), centre crop, normalisation."""
        return (self._cropped(_middle(images).to(self._device)) - self._mean) / self._std

    def _cropped(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        short = min(height, width)
        size = int(self._edge * height / short), int(self._edge * width / short)
        resized = functional.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self._crop[0]) // 2, (size[1] - self._crop[1]) // 2
        return resized[:, :, top : top + self._crop[0], left : left + self._crop[1]]


def _middle(images: torch.Tensor) -> torch.Tensor:
    """The middle of a strip, `LONGEST` times as long as high: resized whole, one of 1 x 200000 takes gigabytes.

    Less than that is untouched. An even number of pixels goes, so that the middle stays where it was.
    """
    *_, height, width = images.shape
    most = LONGEST * min(height, width)
    rows, columns = (max(0, edge - most) // 2 for edge in (height, width))
    return images[..., rows : height - rows, columns : width - columns]


@cache
def empty_clip(path: str) -> EmptyImageScorer:
    """A CLIP model without weights, known by its hub id or read from where it is.

    Raises:
        ValueError: it is neither known nor can be read here, or is no CLIP model.
    """
    known = CLIP_MODELS.get(path)
    if known is not None:
        config = CLIPConfig(projection_dim=known.projection, text_config=known.text, vision_config=known.vision)
    else:
        try:
            config = AutoConfig.from_pretrained(path)
        except OSError as error:
            raise ValueError(f"CLIP model {path} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(config, CLIPConfig):
        raise ValueError(f"model {path} is a {config.model_type}, not a clip")
    with torch.device("meta"):
        model = CLIPModel(config)
    vision = model.config.vision_config
    assert isinstance(vision, CLIPVisionConfig)
    edge = vision.image_size
    assert isinstance(edge, int)
    picture = torch.empty(1, 3, edge, edge, device="meta")
    return EmptyImageScorer(model=model, look=lambda: model.get_image_features(pixel_values=picture))


def _kind(*, learned_scale: bool) -> ImageKind:
    return ImageKind(
        open=lambda config, device: CLIPScorer(config, learned_scale=learned_scale, device=device),
        check=check_clip,
        empty=lambda config: empty_clip(config.path),
        files=("config.json", "preprocessor_config.json"),
    )


PICKSCORE, CLIP_SCORE = _kind(learned_scale=True), _kind(learned_scale=False)
