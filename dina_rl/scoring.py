"""Scores of pictures, or of latents, by one scorer: for a person, `jobs.score` and `jobs.evaluate` alike.

    import dina_rl.scoring
    scorer = dina_rl.scoring.open_scorer("runs/local/fit/reward")
    scorer.score(["a.png", "b.png"], ["a small red circle on blue", "a small red circle on blue"])

Shapes: B pictures, C h w latent.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dina_rl import loading, runtime
from dina_rl.backbones.base import Backbone, LatentCodec, TextEncoder
from dina_rl.config import ImageScorerConfig, PictureScorerConfig, PipelineConfig
from dina_rl.data.buckets import Size, assign
from dina_rl.data.images import MAX_PIXELS, image_size, load_image
from dina_rl.loading import TEXT, TRANSFORMER, VAE, Sizes
from dina_rl.pictures import LATENTS_SUFFIX
from dina_rl.reward.checkpoint import RewardCard, read_card
from dina_rl.reward.home import check_fingerprint
from dina_rl.reward.revision import pipeline_revision
from dina_rl.scorers.base import Conditions, Scorer, Space
from dina_rl.scorers.dina import DiNaScorer, cautious_mean, open_dina
from dina_rl.scorers.registry import image_scorer_bytes, open_image_scorer
from dina_rl.seeding import normal
from dina_rl.textfiles import regular

log = logging.getLogger(__name__)

NORMALISATIONS = {"raw": (0.0, 1.0), "readme": (10.0, 10.0), "grpo_reward": (12.0, 10.0)}
"""name -> (offset, scale) of (score + offset) / scale. The published model scores around -10: its README shows
them by `readme`, and the reward function of its released alignment code optimises `grpo_reward`."""

PROBE = 64  # pixels; every backbone has images of that edge


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseKey:
    """What a picture's noise is drawn by. Its place in a batch is not part of it."""

    group: tuple[int | str, ...]  # the pictures it is compared with: e.g. the name of a set and a record's index
    member: int | str  # which of them it is; drawn by only if the noise is independent
    seed: int | None = None  # None: the scorer's


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture as it is scored."""

    space: Space
    tensor: torch.Tensor  # [3, H, W] in [0, 1], or [C, h, w] normalised as the backbone takes it


class PictureScorer:
    """A scorer and what it takes to feed it: codec, text encoder, noise. Parts load when first needed.

    Scores are fp32 on the CPU. One that is not finite stays so. Make it by `open_scorer`. Pictures are read upright and
    on white, as `dina_rl.data.images` says.

    Attributes:
        config: what it was opened with; for a DiNa-LRM with what the card decided filled in.
        space: what the scorer itself reads, "latents" or "images"; the other is encoded or decoded first.
        card: of the reward model; None for a scorer of images.
    """

    def __init__(
        self,
        config: PictureScorerConfig,
        scorer: Scorer,
        *,
        parts: "Parts",
        card: RewardCard | None,
        sizes: tuple[Size, ...],
        seed: int,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.config = config
        self.card = card
        self.space = scorer.space
        self._scorer = scorer
        self._parts = parts
        self._sizes = sizes
        self._seed = seed
        self._reduce = reduce

    def at(self, levels: Sequence[float], *, draws: int = 1) -> "PictureScorer":
        """The same DiNa-LRM, weights and all, asked at other noise levels or with other draws.

        Raises:
            ValueError: a scorer without noise, or levels outside [0, 1).
        """
        if not isinstance(self._scorer, DiNaScorer):
            raise ValueError(f"a {self.config.kind} scorer has no noise levels")
        config = PictureScorerConfig(**{**self.config.model_dump(), "levels": tuple(levels), "draws": draws})
        scorer = DiNaScorer(config.dina, self._scorer.model)
        return PictureScorer(config, scorer, parts=self._parts, card=self.card, sizes=self._sizes, seed=self._seed)

    def score(self, paths: Sequence[str | Path], prompts: Sequence[str], *, batch_size: int = 8) -> torch.Tensor:
        """Scores [B] of image files, or of `.safetensors` files with one latent [C, h, w] each, against B prompts.

        Pictures of one prompt share their noise, unless it is independent; a score does not depend on what else is
        scored beside it. At most `batch_size` of them are in memory at a time.

        Raises:
            ValueError: a file that cannot be read, or another number of prompts.
        """
        if len(paths) != len(prompts):
            raise ValueError(f"{len(paths)} pictures and {len(prompts)} prompts do not match")
        scores = [torch.empty(0)]
        for first in range(0, len(paths), batch_size):
            files, texts = paths[first : first + batch_size], prompts[first : first + batch_size]
            keys = [file_key(path, prompt) for path, prompt in zip(files, texts, strict=True)]
            scores.append(self.score_samples([self.read(path) for path in files], texts, keys))
        return torch.cat(scores)

    def read(self, path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Sample:
        """The picture or latent in a file.

        Raises:
            ValueError: it cannot be read, has more pixels than that, or its size does not fit the backbone.
        """
        file = Path(path).expanduser()
        try:
            if not file.is_file():
                raise ValueError("does not exist")
            if file.suffix == LATENTS_SUFFIX:
                return Sample(space="latents", tensor=self._parts.checked(_read_latent(file)))
            return self.sample(file.read_bytes(), max_pixels=max_pixels)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error

    def sample(self, content: bytes, *, max_pixels: int = MAX_PIXELS) -> Sample:
        """An encoded picture, as large as the scorer looks at it.

        Raises:
            ValueError: as `read`.
        """
        height, width = self._picture_size(image_size(content))
        pixels = torch.tensor(load_image(content, height=height, width=width, max_pixels=max_pixels)).permute(2, 0, 1)
        return self.picture(pixels)

    def picture(self, pixels: torch.Tensor) -> Sample:
        """What is looked at of a picture [3, H, W] uint8."""
        tensor = pixels.float() / 255 if self._reduce is None else self._reduce(pixels)
        return Sample(space="images", tensor=tensor)

    def score_samples(
        self, samples: Sequence[Sample], prompts: Sequence[str], keys: Sequence[NoiseKey]
    ) -> torch.Tensor:
        """Scores [B] of pictures of any size and space; those that are alike run in one forward."""
        if not len(samples) == len(prompts) == len(keys):
            raise ValueError(f"{len(samples)} pictures, {len(prompts)} prompts and {len(keys)} keys do not match")
        alike: dict[tuple[Space, torch.Size], list[int]] = {}
        for row, sample in enumerate(samples):
            alike.setdefault((sample.space, sample.tensor.shape), []).append(row)
        scores = torch.empty(len(samples))
        for (space, _), rows in alike.items():
            batch = torch.stack([samples[row].tensor for row in rows])
            chosen = [prompts[row] for row in rows], [keys[row] for row in rows]
            score = self.score_latents if space == "latents" else self.score_images
            scores[rows] = score(batch, *chosen)
        return scores

    @torch.no_grad()
    def score_images(self, images: torch.Tensor, prompts: Sequence[str], keys: Sequence[NoiseKey]) -> torch.Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        if self.space == "latents":
            scores: torch.Tensor = self.score_latents(self.encode(images), prompts, keys)
            return scores
        return self._normalised(self._scorer(images, Conditions.of_images(prompts)))

    @torch.no_grad()
    def score_latents(self, latents: torch.Tensor, prompts: Sequence[str], keys: Sequence[NoiseKey]) -> torch.Tensor:
        """Scores [B] of clean, normalised latents [B, C, h, w]."""
        if self.space == "images":
            scores: torch.Tensor = self.score_images(self._parts.codec.decode(latents.float()), prompts, keys)
            return scores
        scores, _ = self.score_draws(latents, prompts, keys)
        return scores

    @torch.no_grad()
    def score_draws(
        self, latents: torch.Tensor, prompts: Sequence[str], keys: Sequence[NoiseKey]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [B] of clean latents [B, C, h, w] by a DiNa-LRM, and their (population) standard deviation over the
        draws [B].

        Raises:
            ValueError: a scorer without noise.
        """
        if not isinstance(self._scorer, DiNaScorer):
            raise ValueError(f"a {self.config.kind} scorer draws no noise")
        shape = (self.config.draws, *latents.shape[1:])
        conditions = Conditions(
            prompts=tuple(prompts),
            embeds=self._parts.text_encoder(prompts),
            noise=torch.stack([normal(shape, *self._noise_key(key)) for key in keys]),
        )
        draws = self._scorer.by_draw(latents.float(), conditions)
        scores = self._normalised(cautious_mean(draws, self._scorer.config.uncertainty_weight))
        _, scale = NORMALISATIONS[self.config.normalisation]
        return scores, draws.cpu().std(0, correction=0) / scale

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """[C, h, w] of the pictures as the fit had them, or as the configuration stretches them.

        Raises:
            ValueError: there is no backbone.
        """
        return tuple(self._parts.latent_shape(size) for size in self._sizes)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w], fp32, of images [B, 3, H, W] in [0, 1]."""
        return self._parts.codec.encode(images)

    def _noise_key(self, key: NoiseKey) -> tuple[int | str, ...]:
        own = (key.member,) if self.config.noise == "independent" else ()
        return self._seed if key.seed is None else key.seed, "picture-score", *key.group, *own

    def _normalised(self, scores: torch.Tensor) -> torch.Tensor:
        offset, scale = NORMALISATIONS[self.config.normalisation]
        return (scores.float().cpu() + offset) / scale

    def _picture_size(self, size: Size) -> Size:
        """(height, width) at which an image file of that size is scored.

        As in the fit: stretched to its one size, or to the bucket of its aspect. A scorer of images, which has its own
        preprocessing, gets the image as it is.
        """
        if not self._sizes:
            return size
        bucket = 0 if len(self._sizes) == 1 else assign(size, self._sizes)
        if bucket is None:
            raise ValueError(
                f"none of the fit's {len(self._sizes)} sizes has the aspect of {size[0]}x{size[1]}; give height and "
                "width to stretch it"
            )
        return self._sizes[bucket]


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

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[C, h, w] of pictures of that (height, width)."""
        return self._opened().latent_shape(*size)

    def checked(self, latent: torch.Tensor) -> torch.Tensor:
        """`latent` [C, h, w]; ValueError if the backbone has no latents of that shape."""
        backbone = self._opened()
        channels, rows, _ = backbone.latent_shape(PROBE, PROBE)
        height, width = (edge * PROBE // rows for edge in latent.shape[1:])
        if len(latent) != channels:
            raise ValueError(f"a latent of this pipeline is [{channels}, h, w], this is {list(latent.shape)}")
        backbone.latent_shape(height, width)
        return latent

    def _opened(self) -> Backbone:
        if self._backbone is None:
            raise ValueError("latents are decoded for this scorer, which takes a pipeline: name one")
        return self._backbone


def file_key(path: str | Path, prompt: str) -> NoiseKey:
    """The noise key of a file that is scored by itself: pictures of one prompt are compared with each other."""
    return NoiseKey(group=(prompt,), member=str(path))


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
    images = config.of_images
    return _open_dina(config, seed) if images is None else _open_images(config, images, seed)


def loads(config: PictureScorerConfig) -> Sizes:
    """What a process loads that scores images by `config`. Raises ValueError where there is no such reward model."""
    if config.of_images is not None:
        return {config.kind: image_scorer_bytes(config.of_images)}
    pipeline = dina_pipeline(config, read_card(config.dina.location))
    return loading.sizes(pipeline.location, TRANSFORMER, TEXT, VAE, variant=pipeline.variant)


def dina_pipeline(config: PictureScorerConfig, card: RewardCard) -> PipelineConfig:
    """The pipeline that a dina scorer runs on: the fit's, but for what the configuration says.

    Raises:
        ValueError: nobody says at which size images are scored.
    """
    size = (config.height, config.width) if config.height else card.image_size
    if size is None:
        raise ValueError(f"reward model {config.dina.path} does not say its image size; give height and width")
    return PipelineConfig(
        path=config.pipeline or card.pipeline,
        revision=config.revision or (None if config.pipeline else card.pipeline_revision),
        variant=config.variant or (None if config.pipeline else card.variant),
        dtype=config.dtype or card.dtype or "float32",
        height=size[0],
        width=size[1],
        max_sequence_length=config.max_sequence_length or card.max_sequence_length,
    )


def _open_dina(config: PictureScorerConfig, seed: int) -> PictureScorer:
    card = read_card(config.dina.location)
    pipeline = dina_pipeline(config, card)
    sizes = (pipeline.size,) if config.height or not card.buckets else card.buckets
    try:
        backbone = runtime.open_pipeline(pipeline)
    except ValueError as error:
        if config.pipeline is not None:
            raise
        raise ValueError(
            f"{error} (reward model {config.dina.path} was fitted on it; a copy may be named as its pipeline)"
        ) from error
    backbone.check("transformer", "text")
    for size in sizes:
        backbone.latent_shape(*size)
    check_fingerprint(str(config.dina.path), card, pipeline, "pipeline")
    revision = pipeline_revision(pipeline.location, pipeline.revision)
    if card.fingerprint is None and None not in (card.revision, revision) and revision != card.revision:
        log.warning(
            "reward model %s was fitted on revision %s of %s, %s has %s",
            config.dina.path, card.revision, card.pipeline, pipeline.path, revision,
        )  # fmt: skip
    resolved = {
        "levels": config.levels or (card.reward.single_level,),
        "pipeline": pipeline.path,
        "revision": pipeline.revision,
        "variant": pipeline.variant,
        "dtype": pipeline.dtype,
        "max_sequence_length": pipeline.max_sequence_length,
    }
    config = config.model_copy(update=resolved)
    dina = open_dina(config.dina, backbone)
    return PictureScorer(config, dina, parts=Parts(backbone), card=card, sizes=sizes, seed=seed)


def _open_images(config: PictureScorerConfig, images: ImageScorerConfig, seed: int) -> PictureScorer:
    backbone = None
    if config.pipeline is not None:
        backbone = runtime.open_pipeline(
            PipelineConfig(
                path=config.pipeline,
                revision=config.revision,
                variant=config.variant,
                dtype=config.dtype or "float32",
            )
        )
    scorer = open_image_scorer(images, device=runtime.device())
    parts = Parts(backbone)
    return PictureScorer(config, scorer, parts=parts, card=None, sizes=(), seed=seed, reduce=scorer.reduce)


def _read_latent(file: Path) -> torch.Tensor:
    """The one tensor of a safetensors file, [C, h, w] or [1, C, h, w], fp32."""
    try:
        tensors = load_file(regular(file))
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
