"""Settings of the rewards."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dina_rl.config.base import NoiseLevels, NonNegative, Positive, Rate, Section
from dina_rl.config.keys import Mark

PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "openai/clip-vit-large-patch14"
HPSV2 = "xswu/HPSv2"
IMAGEREWARD, BERT = "THUDM/ImageReward", "google-bert/bert-base-uncased"
HPSV3, HPSV3_BASE = "MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"
LRM_RELEASE = "casiatao/LRM"


class ScorerConfig(Section):
    """A scorer's part in the reward: weight * (score - mean) / std."""

    weight: float = 1.0
    """factor of the normalised score"""
    mean: float = 0.0
    """constant subtracted from the score"""
    std: Rate = 1.0
    """constant that the score is divided by"""


class DiNaScorerConfig(ScorerConfig):
    """The fitted DiNa-LRM."""

    path: str = "~/dina_rl/shapes_reward/reward"
    """directory or hub id of a reward model: what fit_reward writes, or the published layout"""
    pipeline: str | None = None
    """pipeline that the reward model was fitted on, in whose transformer it scores and by whose text encoders it reads
    prompts: a directory, hub id or `shapes`; None: the generator's if that holds the same weights, else the one that
    the reward model names. Its VAE must be the generator's"""
    levels: NoiseLevels = (0.4,)
    """one level: Eq. 12; several: the noise ensemble of Eq. 13, concatenated inside the head"""
    noise: Literal["shared", "independent"] = "shared"
    """the scorer's noise is one draw for a whole group (common random numbers), or one for each sample"""
    draws: Positive = 1
    """noise draws whose scores are averaged"""
    uncertainty_weight: Annotated[float, Field(ge=0)] = 0.0
    """weight of the standard deviation over the draws, subtracted from their mean"""

    @model_validator(mode="after")
    def _uncertainty_has_draws(self) -> Self:
        if self.uncertainty_weight and self.draws < 2:
            raise ValueError(
                f"uncertainty_weight {self.uncertainty_weight:g} needs a spread: draws is {self.draws}, use 2 or more"
            )
        return self

    @property
    def location(self) -> Path:
        return Path(self.path).expanduser()


ImageScorerName = Literal[
    "pickscore",
    "clip_score",
    "hpsv2",
    "hpsv2_1",
    "aesthetic",
    "mps",
    "imagereward",
    "hpsv3",
    "unified_reward",
    "unified_reward_think",
    "lrm_sd15",
    "lrm_sdxl",
]


class ImageScorerConfig(ScorerConfig):
    """A scorer of decoded images: a model, and what turns pictures and prompts into its input."""

    name: ClassVar[ImageScorerName]
    differentiable: ClassVar[bool] = True  # in the image
    pairwise: ClassVar[bool] = False  # it compares two pictures of a prompt, and has no score of one
    path: str
    """directory or hub id of the weights"""
    processor: str
    """directory or hub id of its tokenizer and image processor"""

    @property
    def weights(self) -> tuple[str, ...]:
        """What knows one model from another."""
        return (self.path,)


class PickScoreConfig(ImageScorerConfig):
    """PickScore: learned scale times cosine, on the decoded image."""

    name = "pickscore"

    path: str = PICKSCORE
    """directory or hub id of the CLIPModel"""
    processor: str = CLIP_H
    """directory or hub id of its tokenizer and image processor"""


class CLIPScoreConfig(ImageScorerConfig):
    """CLIPScore: cosine, on the decoded image."""

    name = "clip_score"

    path: str = CLIP_L
    """directory or hub id of the CLIPModel"""
    processor: str = CLIP_L
    """directory or hub id of its tokenizer and image processor"""


class HPSv2Config(ImageScorerConfig):
    """HPSv2 (2.0): cosine of a CLIP model fine-tuned on comparisons, on the decoded image."""

    name = "hpsv2"

    path: str = HPSV2
    """HPS_v2_compressed.pt, or a directory or hub id that has it"""
    processor: str = CLIP_H
    """directory or hub id of the CLIP model that was fine-tuned: its sizes, tokenizer and image processor"""


class HPSv21Config(ImageScorerConfig):
    """HPSv2.1: the same, fine-tuned on more comparisons."""

    name = "hpsv2_1"

    path: str = HPSV2
    """HPS_v2.1_compressed.pt, or a directory or hub id that has it"""
    processor: str = CLIP_H
    """directory or hub id of the CLIP model that was fine-tuned: its sizes, tokenizer and image processor"""


class AestheticConfig(ImageScorerConfig):
    """LAION's aesthetic predictor: of the decoded image alone, the prompt is not read."""

    name = "aesthetic"

    path: str = "camenduru/improved-aesthetic-predictor"
    """sac+logos+ava1-l14-linearMSE.pth, or a directory or hub id that has it"""
    processor: str = CLIP_L
    """directory or hub id of the CLIPModel whose image embedding it reads, with its image processor"""


class MPSConfig(ImageScorerConfig):
    """MPS (overall): learned scale times cosine, on the decoded image, whose tokens look at the words."""

    name = "mps"

    path: str = "~/dina_rl/MPS_overall.safetensors"
    """what `python -m jobs.convert_mps` makes of the released MPS_overall_checkpoint.pth"""
    processor: str = CLIP_H
    """directory or hub id of the CLIP model that was fine-tuned: its sizes, tokenizer and image processor"""


class ImageRewardConfig(ImageScorerConfig):
    """ImageReward: BLIP fine-tuned on rankings, on the decoded image."""

    name = "imagereward"

    path: str = IMAGEREWARD
    """ImageReward.pt with med_config.json beside it, or a directory or hub id that has both"""
    processor: str = BERT
    """directory or hub id of its tokenizer"""


class HPSv3Config(ImageScorerConfig):
    """HPSv3: mean preference of a vision-language model, on the decoded image."""

    name = "hpsv3"

    path: str = HPSV3
    """directory or hub id with HPSv3.safetensors, or the file"""
    processor: str = HPSV3_BASE
    """directory or hub id of the Qwen2-VL that it was trained from: sizes, tokenizer and image processor"""


class ServerConfig(Section):
    """How much is asked of a server at a time, and how patiently."""

    concurrency: Annotated[Positive, Mark.PROCESS] = 16
    """requests that one process has open at a time"""
    timeout_s: Annotated[Rate, Mark.PROCESS] = 120.0
    """longest wait for one answer"""
    retries: Annotated[NonNegative, Mark.PROCESS] = 3
    """repetitions of a request that was not answered, or refused for the moment (HTTP 429, 5xx)"""


class ServedScorerConfig(ImageScorerConfig, ServerConfig):
    """A scorer behind an OpenAI-compatible server (vLLM, SGLang); it has no gradient."""

    differentiable = False

    path: Annotated[str, Mark.PLACE] = "http://127.0.0.1:8080/v1"
    """address of an OpenAI-compatible server (vLLM, SGLang), as those who score reach it. A key that it asks for goes
    into DINA_RL_SERVER_KEY in their environment"""

    @property
    def weights(self) -> tuple[str, ...]:
        return self.path, self.processor


class UnifiedRewardConfig(ServedScorerConfig):
    """UnifiedReward: grade of a vision-language model, on the decoded image, by a server; it has no gradient."""

    name = "unified_reward"

    processor: str = "UnifiedReward"
    """name under which it serves the model"""


class JudgeConfig(ServedScorerConfig):
    """What compares two pictures."""

    pairwise = True

    min_compared: Annotated[float, Field(gt=0, le=1)] = 0.5
    """as a reward: the least share of the group's others with whom a sample must have been compared in both orders. Its
    win rate is over those; with fewer it has failed, and its group is dropped"""


class UnifiedRewardThinkConfig(JudgeConfig):
    """UnifiedReward-Think: which of two decoded images is better, by a server, in both orders. As a reward the share of
    the group's others that a sample wins over, for group_size x (group_size - 1) requests a group; no gradient."""

    name = "unified_reward_think"

    processor: str = "UnifiedReward-Think"
    """name under which it serves the model"""


class LRMSD15Config(ImageScorerConfig):
    """LRM-SD1.5: learned scale times cosine of noisy latents of its own VAE, here of the decoded image."""

    name = "lrm_sd15"

    path: str = LRM_RELEASE
    """directory of the released layout (unet/, text_encoder/, state_dict.pt), or hub id or directory that has it as
    lrm_sd15/"""
    processor: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """directory or hub id of the pipeline that lends vae/, tokenizer/ and scheduler/"""


class LRMSDXLConfig(ImageScorerConfig):
    """LRM-SDXL: learned scale times cosine of noisy latents of its own VAE, here of the decoded image."""

    name = "lrm_sdxl"

    path: str = LRM_RELEASE
    """directory of the released layout (unet/, text_encoder/, text_encoder_2/, state_dict.pt), or hub id or directory
    that has it as lrm_sdxl/"""
    processor: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """directory or hub id of the pipeline that lends vae/, tokenizer/, tokenizer_2/ and scheduler/"""


IMAGE_SCORERS: dict[ImageScorerName, type[ImageScorerConfig]] = {
    section.name: section
    for section in (
        PickScoreConfig,
        CLIPScoreConfig,
        HPSv2Config,
        HPSv21Config,
        AestheticConfig,
        MPSConfig,
        ImageRewardConfig,
        HPSv3Config,
        UnifiedRewardConfig,
        UnifiedRewardThinkConfig,
        LRMSD15Config,
        LRMSDXLConfig,
    )
}
"""Scorers of decoded images: each a section of `RewardsConfig`, a `golden.scorer` and a `kind` to score with."""


class GridConfig(ScorerConfig):
    """A penalty on the grid that a generator leaves in its pictures: minus what their spectrum has of it, on decoded
    crops. A reward beside others; the latent ones cannot see a grid."""

    free: Annotated[float, Field(ge=0)] = 0.5
    """what is not punished, in nats of power: single pictures scatter by some tenths around 0 without any grid"""
    crops: Positive = 1
    """crops of each sample that are decoded and averaged, of 4 tokens to a side (64 pixels for SD3.5)"""
    context: NonNegative = 4
    """latents around a crop that are decoded with it"""


class RewardsConfig(Section):
    """The optimised reward (the proxy): a weighted sum of the scorers that are not None."""

    dina: DiNaScorerConfig | None = DiNaScorerConfig()
    grid: GridConfig | None = None
    pickscore: PickScoreConfig | None = None
    clip_score: CLIPScoreConfig | None = None
    hpsv2: HPSv2Config | None = None
    hpsv2_1: HPSv21Config | None = None
    aesthetic: AestheticConfig | None = None
    mps: MPSConfig | None = None
    imagereward: ImageRewardConfig | None = None
    hpsv3: HPSv3Config | None = None
    unified_reward: UnifiedRewardConfig | None = None
    unified_reward_think: UnifiedRewardThinkConfig | None = None
    lrm_sd15: LRMSD15Config | None = None
    lrm_sdxl: LRMSDXLConfig | None = None
    normalise: Literal["constant", "group", "advantage"] = "constant"
    """constant: scores by each scorer's mean and std; group: by its own mean and standard deviation inside each group;
    advantage: each scorer has a clipped advantage of its own, and their weighted sum is not standardised again (the
    last two not for refl, which compares nothing)"""

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> Self:
        if not self.scorers.keys() - {"grid"}:
            raise ValueError(f"no scorer is switched on: set one of dina, {', '.join(IMAGE_SCORERS)}")
        return self

    @property
    def scorers(self) -> dict[str, ScorerConfig]:
        """The scorers that take part, by name, in a fixed order."""
        given: dict[str, ScorerConfig | None] = {"dina": self.dina, "grid": self.grid}
        latent = {name: scorer for name, scorer in given.items() if scorer is not None}
        return {**latent, **{scorer.name: scorer for scorer in self.of_images}}

    @property
    def of_images(self) -> tuple[ImageScorerConfig, ...]:
        """Those of them that look at decoded images."""
        return tuple(scorer for name in IMAGE_SCORERS if (scorer := dict(self)[name]) is not None)

    @property
    def draws(self) -> int:
        """Noise draws that one sample's score needs."""
        return 0 if self.dina is None else self.dina.draws


def image_scorer(
    name: ImageScorerName, path: str | None, processor: str | None, server: ServerConfig | None = None
) -> ImageScorerConfig:
    """The section of a scorer of images, as published where nothing is given."""
    given = {"path": path, "processor": processor, **({} if server is None else server.model_dump())}
    return IMAGE_SCORERS[name].model_validate({key: value for key, value in given.items() if value is not None})


def check_served(key: str, server: ServerConfig | None, scorer: str) -> None:
    """Raises ValueError where the section `key` is given for a scorer without a server."""
    served = [name for name, section in IMAGE_SCORERS.items() if issubclass(section, ServedScorerConfig)]
    if server is not None and scorer not in served:
        raise ValueError(f"{key} is of a scorer behind a server ({', '.join(served)}); this one is {scorer}")
