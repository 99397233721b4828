"""CLIP's two towers: PickScore (Kirstain et al., 2023), CLIPScore (Hessel et al., 2021), zero-shot probabilities."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from dina_rl.backbones.known import CLIP_MODELS
from dina_rl.config import ImageScorerConfig
from dina_rl.loading import loading
from dina_rl.scorers.base import Conditions, EmptyImageScorer, ImageKind, Space
from dina_rl.scorers.clip_input import CLIPInput, distinct

COUNTED = ".position_ids"
"""0, 1, 2, ...: older transformers kept them among the weights."""


def check_clip(path: str, processor: str) -> None:
    """Whether the model is there at all, without loading its weights.

    Raises:
        ValueError: neither a local directory nor a hub id that can be read here, or another kind of model.
    """
    try:
        kind = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
        AutoTokenizer.from_pretrained(processor, trust_remote_code=False)
        CLIPImageProcessorPil.from_pretrained(processor)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"CLIP model {path} ({processor}) cannot be read: {first_line}") from error
    if kind != "clip":
        raise ValueError(f"model {path} is a {kind}, not a clip")


def load_clip(path: str, device: str) -> CLIPModel:
    """The frozen model on the device.

    Raises:
        ValueError: weights are missing, which would be drawn at random, or left over.
    """
    with loading("the model", path):
        loaded: Any = CLIPModel.from_pretrained(path, output_loading_info=True)  # a pair, which its type does not say
        model, told = loaded
        for what in ("missing", "unexpected"):
            names = sorted(name for name in told[f"{what}_keys"] if not name.endswith(COUNTED))
            if names:
                raise ValueError(f"CLIP model {path} does not fit: {len(names)} tensors {what}: {', '.join(names[:3])}")
        return frozen(model, device)


def frozen(model: CLIPModel, device: str) -> CLIPModel:
    nn.Module.to(model, device)  # in place; transformers' wrapper around it says nothing of its arguments
    model.requires_grad_(False)
    model.eval()
    return model


def text_length(model: CLIPModel) -> int:
    """Tokens of a prompt, with what it is padded by."""
    text = model.config.text_config
    assert isinstance(text, CLIPTextConfig)
    return text.max_position_embeddings


def embedding_width(model: CLIPModel) -> int:
    width = model.config.projection_dim
    assert width is not None
    return width


class CLIPScorer:
    """`Scorer` in image space: the cosine of image and text embedding, times the model's own scale if `learned_scale`.

    Args:
        model: frozen, on the device of `given`.
    """

    space: Space = "images"

    def __init__(self, model: CLIPModel, given: CLIPInput, *, learned_scale: bool) -> None:
        self._model = model
        self._given = given
        self._learned_scale = learned_scale
        self.reduce = given.reduce

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return self.score(samples, conditions.prompts)

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1] against their prompts; a prompt is encoded once."""
        seen = self._model.get_image_features(pixel_values=self._given.pixels(images)).pooler_output
        cosine = functional.cosine_similarity(seen, self._texts(prompts), dim=-1)
        return self._model.logit_scale.exp() * cosine if self._learned_scale else cosine

    @torch.no_grad()
    def _texts(self, prompts: tuple[str, ...]) -> torch.Tensor:
        texts, rows = distinct(prompts)
        tokens = self._given.tokens(texts, text_length(self._model))
        encoded: torch.Tensor = self._model.get_text_features(**tokens).pooler_output
        return encoded[rows]


class ZeroShot:
    """Which of two texts a picture looks more like: the softmax over both of the model's own scale times cosine.

    Args:
        model: frozen, on the device of `given`.
        pairs: texts, and what each is told from; encoded once.
    """

    def __init__(self, model: CLIPModel, given: CLIPInput, pairs: Sequence[tuple[str, str]]) -> None:
        self._model, self._given = model, given
        words = [text for pair in pairs for text in pair]
        with torch.no_grad():
            read = model.get_text_features(**given.tokens(words, text_length(model))).pooler_output
        self._texts = functional.normalize(read, dim=-1).unflatten(0, (-1, 2))  # [pairs, 2, width]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, pairs] of the first text of each pair, of images [B, 3, H, W] in [0, 1]."""
        seen = self._model.get_image_features(pixel_values=self._given.pixels(images)).pooler_output
        cosine = torch.einsum("bw,ptw->bpt", functional.normalize(seen, dim=-1), self._texts)
        return (self._model.logit_scale.exp() * cosine).softmax(-1)[..., 0]


def open_zero_shot(config: ImageScorerConfig, pairs: Sequence[tuple[str, str]], *, device: str) -> ZeroShot:
    """Raises ValueError where the model cannot be read from its directory or hub id."""
    check_clip(config.path, config.processor)
    given = CLIPInput(config.processor, device=device)
    return ZeroShot(load_clip(config.path, device), given, pairs)


def open_clip_scorer(config: ImageScorerConfig, *, learned_scale: bool, device: str) -> CLIPScorer:
    """Raises ValueError where the model cannot be read from its directory or hub id."""
    check_clip(config.path, config.processor)
    given = CLIPInput(config.processor, device=device)
    return CLIPScorer(load_clip(config.path, device), given, learned_scale=learned_scale)


def clip_config(path: str) -> CLIPConfig:
    """The sizes of a CLIP model.

    Raises:
        ValueError: it cannot be read here, or is no CLIP model.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"CLIP model {path} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(config, CLIPConfig):
        raise ValueError(f"model {path} is a {config.model_type}, not a clip")
    return config


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
        config = clip_config(path)
    with torch.device("meta"):
        model = CLIPModel(config)
    picture = empty_picture(model)
    return EmptyImageScorer(model=model, look=lambda: model.get_image_features(pixel_values=picture))


def empty_picture(model: CLIPModel) -> torch.Tensor:
    """One [1, 3, h, w] on the meta device, as the model looks at it."""
    vision = model.config.vision_config
    assert isinstance(vision, CLIPVisionConfig)
    edge = vision.image_size
    assert isinstance(edge, int)
    return torch.empty(1, 3, edge, edge, device="meta")


def _kind(*, learned_scale: bool) -> ImageKind:
    return ImageKind(
        open=lambda config, device: open_clip_scorer(config, learned_scale=learned_scale, device=device),
        check=lambda config: check_clip(config.path, config.processor),
        empty=lambda config: empty_clip(config.path),
        files=("config.json", "preprocessor_config.json"),
    )


PICKSCORE, CLIP_SCORE = _kind(learned_scale=True), _kind(learned_scale=False)
