"""Settings of one scorer that is asked about pictures, outside a training run."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import model_validator

from dina_rl.config.base import MAX_PIXELS, MaxPixels, NoiseLevels, Positive, Section, Texts
from dina_rl.config.keys import Mark
from dina_rl.config.rewards import (
    DiNaScorerConfig,
    ImageScorerConfig,
    ImageScorerName,
    ServerConfig,
    check_served,
    image_scorer,
)


class PictureScorerConfig(Section):
    """A scorer of pictures: a DiNa-LRM, or a model that looks at images."""

    kind: Literal["dina"] | ImageScorerName = "dina"
    """dina: a reward model directory, of this project or in the published layout; the others: a scorer of images"""
    path: str | None = None
    """directory or hub id, or address of a server; None: what `fit_reward` writes by default, or published weights"""
    processor: str | None = None
    """all but dina: directory or hub id of tokenizer and image processor, or the model's name at the server; None: the
    published ones"""
    server: Annotated[ServerConfig | None, Mark.PROCESS] = None
    """of a scorer behind a server; None: the defaults"""
    levels: NoiseLevels | None = None
    """dina: one level (Eq. 12) or an ensemble (Eq. 13); None: the reward model's own single level"""
    draws: Positive = 1
    """dina: noise draws whose scores are averaged"""
    noise: Literal["shared", "independent"] = "shared"
    """dina: the pictures that are compared with each other share their noise, or each has its own"""
    normalisation: Literal["raw", "readme", "grpo_reward"] = "raw"
    """what becomes of a score s: raw: s; readme: (s + 10) / 10; grpo_reward: (s + 12) / 10"""
    pipeline: str | None = None
    """pipeline directory, hub id or `shapes`, in place of the one that the reward model names; a scorer of images
    needs one only to decode latents"""
    revision: str | None = None
    """branch, tag or commit of the pipeline, if that is a hub id; None: the fit's, of the fit's own pipeline"""
    variant: str | None = None
    """variant of the pipeline's weight files; None: the fit's, of the fit's own pipeline"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """parameter dtype of the frozen weights; None: the one the reward model was fitted with"""
    max_sequence_length: Positive | None = None
    """T5 tokens per prompt; None: as many as in the fit (another number is another input)"""
    height: Positive | None = None
    """dina: height in pixels to which image files are stretched; None: sized as in the fit"""
    width: Positive | None = None
    """dina: width in pixels to which image files are stretched; None: sized as in the fit"""

    @model_validator(mode="after")
    def _settings_apply(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together")
        check_served("server", self.server, self.kind)
        if self.kind == "dina":
            if self.processor is not None:
                raise ValueError("processor belongs to a scorer of images; kind is dina")
            return self
        wrong = [name for name in ("levels", "max_sequence_length", "height") if dict(self)[name] is not None]
        wrong += ["draws"] if self.draws > 1 else []
        wrong += ["normalisation"] if self.normalisation != "raw" else []
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: only a dina scorer has that; kind is {self.kind}")
        return self

    @property
    def dina(self) -> DiNaScorerConfig:
        """The registry's section for a dina scorer."""
        assert self.kind == "dina"
        given = {"path": self.path, "levels": self.levels, "draws": self.draws, "noise": self.noise}
        return DiNaScorerConfig(**{name: value for name, value in given.items() if value is not None})

    @property
    def of_images(self) -> ImageScorerConfig | None:
        """The registry's section for a scorer of images; None for a dina scorer."""
        return None if self.kind == "dina" else image_scorer(self.kind, self.path, self.processor, self.server)


class ScoreRun(Section):
    """Score pictures."""

    scorer: PictureScorerConfig = PictureScorerConfig()
    images: Texts = ()
    """image files, .safetensors files of one latent, directories with all below them, manifests (.jsonl or .csv: image,
    prompt)"""
    prompt: str | None = None
    """prompt of every picture for which no manifest gives one"""
    root: Path | None = None
    """directory that a manifest's images may not leave; None: the manifest's own"""
    out: Path | None = None
    """.csv or .json file to write; None: a table on standard output"""
    max_pixels: MaxPixels = MAX_PIXELS
    """pixels beyond which an image counts as unreadable"""
    batch_size: Positive = 8
    """pictures per forward"""
    seed: int = 0
    """seed of the noise"""

    @model_validator(mode="after")
    def _format_is_known(self) -> Self:
        if self.out is not None and self.out.suffix not in (".csv", ".json"):
            raise ValueError(f"out: {self.out} must end in .csv or .json")
        return self
