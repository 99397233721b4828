"""Scores of pictures, or of latents, by one scorer: for a person, `jobs.score` and `jobs.evaluate` alike.

    scorer = dina_rl.scoring.open_scorer("runs/local/fit/reward")
    scorer.score(["a.png", "b.png"], ["a small red circle on blue", "a small red circle on blue"])

Shapes: B pictures, C h w latent.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from dina_rl import runtime
from dina_rl.backbones.base import Backbone, LatentCodec, TextEncoder
from dina_rl.config import PictureScorerConfig, PipelineConfig
from dina_rl.data.hpdv3 import load_image
from dina_rl.reward.checkpoint import RewardCard, read_card
from dina_rl.reward.revision import pipeline_revision
from dina_rl.scorers.base import Conditions, Scorer
from dina_rl.scorers.dina import DiNaScorer, open_dina
from dina_rl.scorers.registry import open_image_scorer
from dina_rl.seeding import normal

log = logging.getLogger(__name__)

NORMALISATIONS = {"raw": (0.0, 1.0), "readme": (10.0, 10.0), "grpo_reward": (12.0, 10.0)}
"""name -> (offset, scale) of (score + offset) / scale. The published model scores around -10: its README shows
them by `readme`, and the reward function of its released alignment code optimises `grpo_reward`."""

LATENTS_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseKey:
    """What a picture's noise is drawn by. Its place in a batch is not part of it."""

    group: tuple[int | str, ...]  # the pictures it is compared with: e.g. the name of a set and a record's index
    member: int | str  # which of them it is; drawn by only if the noise is independent


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture as it is scored."""

    space: Literal["images", "latents"]
    tensor: torch.Tensor  # [3, H, W] in [0, 1], or [C, h, w] normalised as the backbone takes it


class PictureScorer:
    """A scorer and what it takes to feed it: codec, text encoder, noise. Parts load when first needed.

    Scores are fp32 on the CPU. One that is not finite stays so. Make it by `open_scorer`.

    Attributes:
        space: what the scorer itself reads, "latents" or "images"; the other is encoded or decoded first.
        card: of the reward model; None for a CLIP model.
    """

    def __init__(
        self,
        config: PictureScorerConfig,
        scorer: Scorer,
        *,
        parts: "Parts",
        card: RewardCard | None,
        size: tuple[int, int] | None,
        seed: int,
    ) -> None:
        self.config = config
        self.card = card
        self.space = scorer.space
        self._scorer = scorer
        self._parts = parts
        self._size = size
        self._seed = seed

    def at(self, levels: Sequence[float], *, draws: int = 1) -> "PictureScorer":
        """The same DiNa-LRM, weights and all, asked at other noise levels or with other draws.

        Raises:
            ValueError: a scorer without noise, or levels outside [0, 1).
        """
        if not isinstance(self._scorer, DiNaScorer):
            raise ValueError(f"a {self.config.kind} scorer has no noise levels")
        config = PictureScorerConfig(**{**self.config.model_dump(), "levels": tuple(levels), "draws": draws})
        scorer = DiNaScorer(config.reward, self._scorer.model)
        return PictureScorer(config, scorer, parts=self._parts, card=self.card, size=self._size, seed=self._seed)

    def score(self, paths: Sequence[str | Path], prompts: Sequence[str]) -> torch.Tensor:
        """Scores [B] of image files, or of `.safetensors` files with one latent [C, h, w] each, against B prompts.

        Pictures of one prompt share their noise, unless it is independent; a score does not depend on what else is
        scored beside it.

        Raises:
            ValueError: a file that cannot be read, or another number of prompts.
        """
        keys = [NoiseKey(group=(prompt,), member=str(path)) for path, prompt in zip(paths, prompts, strict=True)]
        return self.score_samples([self.read(path) for path in paths], prompts, keys)

    def read(self, path: str | Path) -> Sample:
        """The picture or latent in a file.

        Raises:
            ValueError: it cannot be read, or its size does not fit the backbone.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"{file} does not exist")
        try:
            if file.suffix == LATENTS_SUFFIX:
                return Sample(space="latents", tensor=_read_latent(file))
            height, width = self._picture_size(file)
            pixels = torch.tensor(load_image(file, height=height, width=width))
            return Sample(space="images", tensor=pixels.permute(2, 0, 1).float() / 255)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def score_samples(
        self, samples: Sequence[Sample], prompts: Sequence[str], keys: Sequence[NoiseKey]
    ) -> torch.Tensor:
        """Scores [B] of pictures of any size and space; those that are alike run in one forward."""
        if not len(samples) == len(prompts) == len(keys):
            raise ValueError(f"{len(samples)} pictures, {len(prompts)} prompts and {len(keys)} keys do not match")
        alike: dict[tuple, list[int]] = {}
        for row, sample in enumerate(samples):
            alike.setdefault((sample.space, *sample.tensor.shape), []).append(row)
        scores = torch.empty(len(samples))
        for (space, *_), rows in alike.items():
            batch = torch.stack([samples[row].tensor for row in rows])
            chosen = [prompts[row] for row in rows], [keys[row] for row in rows]
            score = self.score_latents if space == "latents" else self.score_images
            scores[rows] = score(batch, *chosen)
        return scores

    @torch.no_grad()
    def score_images(self, images: torch.Tensor, prompts: Sequence[str], keys: Sequence[NoiseKey]) -> torch.Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        if self.space == "latents":
            return self.score_latents(self.encode(images), prompts, keys)
        return self._normalised(self._scorer(images, Conditions.of_images(prompts)))

    @torch.no_grad()
    def score_latents(self, latents: torch.Tensor, prompts: Sequence[str], keys: Sequence[NoiseKey]) -> torch.Tensor:
        """Scores [B] of clean, normalised latents [B, C, h, w]."""
        if self.space == "images":
            return self.score_images(self._parts.codec.decode(latents.float()), prompts, keys)
        shape = (self.config.draws, *latents.shape[1:])
        conditions = Conditions(
            prompts=tuple(prompts),
            embeds=self._parts.text_encoder(prompts),
            noise=torch.stack([normal(shape, *self._noise_key(key)) for key in keys]),
        )
        return self._normalised(self._scorer(latents.float(), conditions))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w], fp32, of images [B, 3, H, W] in [0, 1]."""
        return self._parts.codec.encode(images)

    def _noise_key(self, key: NoiseKey) -> tuple[int | str, ...]:
        own = (key.member,) if self.config.noise == "independent" else ()
        return self._seed, "picture-score", *key.group, *own

    def _normalised(self, scores: torch.Tensor) -> torch.Tensor:
        offset, scale = NORMALISATIONS[self.config.normalisation]
        return (scores.float().cpu() + offset) / scale

    def _picture_size(self, file: Path) -> tuple[int, int]:
        """(height, width) to which an image file is resized: the one place where its bucket is chosen.

        A CLIP model, which has a preprocessing of its own, gets the image as it is.
        """
        if self._size is not None:
            return self._size
        with Image.open(file) as image:
            return image.height, image.width


class Parts:
    """What of a backbone a scorer needs beside its own model, loaded when first asked for.

    Raises:
        ValueError: there is no backbone.
    """

    def __init__(self, backbone: Backbone | None) -> None:
        self._backbone = backbone

    @cached_property
    def codec(self) -> LatentCodec:
        return self._opened().load_codec()

    @cached_property
    def text_encoder(self) -> TextEncoder:
        return self._opened().load_text_encoder()

    def _opened(self) -> Backbone:
        if self._backbone is None:
            raise ValueError("latents are decoded for this scorer, which takes a pipeline: name one")
        return self._backbone


def open_scorer(
    scorer: PictureScorerConfig | str | Path, *, pipeline: str | Path | None = None, seed: int = 0
) -> PictureScorer:
    """The scorer of a configuration, or the reward model in a directory (or hub id) at its own single level.

    Args:
        pipeline: directory, hub id or `shapes`, in place of the one that the reward model names.
        seed: of the noise.

    Raises:
        ValueError: a model or pipeline that cannot be read, or parts that do not fit together.
    """
    config = scorer if isinstance(scorer, PictureScorerConfig) else PictureScorerConfig(path=str(scorer))
    if pipeline is not None:
        config = config.model_copy(update={"pipeline": str(pipeline)})
    return _open_dina(config, seed) if config.kind == "dina" else _open_images(config, seed)


def dina_pipeline(config: PictureScorerConfig, card: RewardCard) -> PipelineConfig:
    """The pipeline that a dina scorer runs on: the fit's, but for what the configuration says.

    Raises:
        ValueError: nobody says at which size images are scored.
    """
    size = (config.height, config.width) if config.height else card.image_size
    if size is None:
        raise ValueError(f"reward model {config.reward.path} does not say its image size; give height and width")
    return PipelineConfig(
        path=config.pipeline or card.pipeline,
        dtype=config.dtype or card.dtype or "float32",
        height=size[0],
        width=size[1],
        max_sequence_length=config.max_sequence_length or card.max_sequence_length,
    )


def _open_dina(config: PictureScorerConfig, seed: int) -> PictureScorer:
    card = read_card(config.reward.location)
    pipeline = dina_pipeline(config, card)
    size = pipeline.height, pipeline.width
    backbone = runtime.open_pipeline(pipeline)
    backbone.latent_shape(*size)
    revision = pipeline_revision(pipeline.location)
    if None not in (card.revision, revision) and revision != card.revision:
        log.warning(
            "reward model %s was fitted on revision %s of %s, %s has %s",
            config.reward.path, card.revision, card.pipeline, pipeline.path, revision,
        )  # fmt: skip
    config = config.model_copy(update={"levels": config.levels or (card.reward.single_level,)})
    dina = open_dina(config.reward, backbone)
    return PictureScorer(config, dina, parts=Parts(backbone), card=card, size=size, seed=seed)


def _open_images(config: PictureScorerConfig, seed: int) -> PictureScorer:
    backbone = None
    if config.pipeline is not None:
        backbone = runtime.open_pipeline(PipelineConfig(path=config.pipeline, dtype=config.dtype or "float32"))
    scorer = open_image_scorer(config.kind, config.reward, device=runtime.device())
    return PictureScorer(config, scorer, parts=Parts(backbone), card=None, size=None, seed=seed)


def _read_latent(file: Path) -> torch.Tensor:
    """The one tensor of a safetensors file, [C, h, w] or [1, C, h, w], fp32."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(tensors) != 1:
        raise ValueError(f"one latent is expected, it holds {len(tensors)} tensors")
    (latent,) = tensors.values()
    if latent.dim() == 4 and len(latent) == 1:
        latent = latent[0]
    if latent.dim() != 3:
        raise ValueError(f"a latent is [C, h, w], this is {shapes}")
    return latent.float()
