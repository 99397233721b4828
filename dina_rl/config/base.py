"""What all parts of the configuration share: ranges, the frozen section, the pipeline, LoRA."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from dina_rl.config.keys import Mark

SHIPPED_PIPELINE = Path(__file__).parents[1] / "shapes" / "pipeline"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NoiseLevel = Annotated[float, Field(ge=0, lt=1)]


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


NoiseLevels = Annotated[tuple[NoiseLevel, ...], BeforeValidator(_as_list), Field(min_length=1)]
Indices = Annotated[tuple[Positive, ...], BeforeValidator(_as_list), Field(min_length=1)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Guidances = Annotated[tuple[Annotated[float, Field(ge=1)], ...], BeforeValidator(_as_list), Field(min_length=1)]


MAX_PIXELS = 89_478_485
"""Pillow's own limit, a quarter of a GiB of RGB; at twice that it opens nothing."""
MaxPixels = Annotated[int, Field(gt=0, le=2 * MAX_PIXELS)]


def _leaves(annotation: object) -> Iterator[object]:
    """The plain types that an annotation is made of."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)


def _holds_a_boolean(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_a_boolean, value)))


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _a_boolean_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # YAML's yes and no are booleans, and Python's booleans are 1 and 0.
        assert info.field_name is not None
        kinds = set(_leaves(cls.model_fields[info.field_name].annotation))
        if kinds & {int, float} and bool not in kinds and _holds_a_boolean(value):
            raise ValueError("Input should be a number, not a boolean: YAML reads yes, no, on and off as booleans")
        return value


class PipelineConfig(Section):
    """The generator: a diffusers pipeline, also the backbone of the reward model."""

    path: str = "shapes"
    """local pipeline directory, hub id, or `shapes` for the miniature SD3.5 that ships with the package"""
    revision: str | None = None
    """branch, tag or commit of a hub id; None: its main branch"""
    variant: str | None = None
    """variant of the weight files, for parts that have it: fp16 reads model.fp16.safetensors; None: those without"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """parameter dtype of the frozen weights; adapters, schedules and log-probabilities are fp32 always"""
    # No float16: the policy loss's gradient at the velocity is about 1e-9 and would be flushed to 0.
    compile: bool = False
    """alignment: torch.compile of the blocks that the transformer repeats, where it samples, is trained and scores.
    Faster after minutes of compiling, and rounded otherwise, so that grpo recomputes old log-probabilities"""
    height: Positive | None = None
    """image height in pixels; None: the pipeline's own (1024 for SD3.5, FLUX.1 and Z-Image, 32 for the miniature)"""
    width: Positive | None = None
    """image width in pixels; None: the pipeline's own"""
    max_sequence_length: Positive | None = None
    """text tokens per prompt (T5's; Z-Image's chat), for the generator and the reward model alike; None: the pipeline's
    own (256 for SD3.5, 512 for FLUX.1 and Z-Image, 8 for the miniature)"""
    distilled_guidance: Annotated[float, Field(ge=0)] | None = None
    """FLUX.1-dev: the guidance scale that the generator has as an input, beside rollout.guidance_scale; None: 3.5,
    which is what a reward model always sees"""
    decode_batch: Annotated[Positive, Mark.PROCESS] = 8
    """most latents that the VAE decodes at once, for rewards and metrics that look at images"""
    vae_tiling: bool = False
    """the VAE works in tiles on images beyond its own size, as stock pipelines do it: less memory, but other pixels"""

    @property
    def place(self) -> tuple[str, str | None, str | None]:
        """(location, revision, variant): which files are read."""
        return self.location, self.revision, self.variant

    @property
    def location(self) -> str:
        """`path`, with `shapes` replaced by the shipped pipeline's directory."""
        return str(SHIPPED_PIPELINE) if self.path == "shapes" else str(Path(self.path).expanduser())

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a pipeline whose sizes are all given, as `runtime.sized` makes it."""
        assert self.height is not None, "sizes left to the pipeline are filled in first"
        assert self.width is not None, "sizes left to the pipeline are filled in first"
        return self.height, self.width

    def absolute(self) -> Self:
        """The same pipeline for a process with another working directory: a local one by its absolute path."""
        if self.path == "shapes" or not Path(self.location).is_dir():
            return self
        return self.model_copy(update={"path": str(Path(self.location).resolve())})


class LoRAConfig(Section):
    """An adapter, the reward model's (Table 7)."""

    rank: Positive = 64
    """rank of every adapter matrix"""
    alpha: Rate = 128.0
    """scale numerator: the update is (alpha / rank) B A"""


class PolicyLoRAConfig(LoRAConfig):
    """The generator's adapter (Table 8, section C.2)."""

    rank: Positive = 32
    """rank of every adapter matrix"""
    alpha: Rate = 64.0
    """scale numerator: the update is (alpha / rank) B A"""
    targets: Texts | None = None
    """linear layers to adapt, by the ends of their diffusers names, e.g. attn.to_q; None: all attention projections"""
    init: Path | None = None
    """adapter to start from, of these layers and this rank: its directory or file, as `jobs.export`, diffusers or peft
    write it; None: one that changes nothing"""
