"""Settings of the rewards and of the held-out metric."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dina_rl.config.base import Guidances, NoiseLevels, Positive, Rate, Section

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "openai/clip-vit-large-patch14"


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


class CLIPModelConfig(Section):
    path: str
    """directory or hub id of the CLIPModel"""
    processor: str
    """directory or hub id of its tokenizer and image processor"""


class PickScoreConfig(ScorerConfig, CLIPModelConfig):
    """PickScore: learned scale times cosine, on the decoded image."""

    path: str = PICKSCORE
    """directory or hub id of the CLIPModel"""
    processor: str = PICKSCORE_PROCESSOR
    """directory or hub id of its tokenizer and image processor"""


class CLIPScoreConfig(ScorerConfig, CLIPModelConfig):
    """CLIPScore: cosine, on the decoded image."""

    path: str = CLIP_L
    """directory or hub id of the CLIPModel"""
    processor: str = CLIP_L
    """directory or hub id of its tokenizer and image processor"""


class RewardsConfig(Section):
    """The optimised reward (the proxy): a weighted sum of the scorers that are not None."""

    dina: DiNaScorerConfig | None = DiNaScorerConfig()
    pickscore: PickScoreConfig | None = None
    clip_score: CLIPScoreConfig | None = None
    normalise: Literal["constant", "group", "advantage"] = "constant"
    """constant: scores by each scorer's mean and std; group: by its own mean and standard deviation inside each group;
    advantage: each scorer has a clipped advantage of its own, and their weighted sum is not standardised again (the
    last two not for refl, which compares nothing)"""

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> Self:
        if not self.scorers:
            raise ValueError("no scorer is switched on: set one of dina, pickscore, clip_score")
        return self

    @property
    def scorers(self) -> dict[str, ScorerConfig]:
        """The scorers that take part, by name, in a fixed order."""
        every = {"dina": self.dina, "pickscore": self.pickscore, "clip_score": self.clip_score}
        return {name: scorer for name, scorer in every.items() if scorer is not None}

    @property
    def clip_models(self) -> set[str]:
        """Paths of the CLIP models that take part."""
        return {each.path for each in (self.pickscore, self.clip_score) if each is not None}

    @property
    def draws(self) -> int:
        """Noise draws that one sample's score needs."""
        return 0 if self.dina is None else self.dina.draws


class GoldenConfig(Section):
    """The held-out metric. It is measured, never optimised."""

    scorer: Literal["shapes", "pickscore", "clip_score"] = "shapes"
    """which metric: the miniature world's rules, or a CLIP model's opinion of the decoded image"""
    path: str | None = None
    """directory or hub id of the CLIPModel; None: the published one"""
    processor: str | None = None
    """directory or hub id of its tokenizer and image processor; None: the published one"""
    every: Positive = 10
    """iterations between measurements on the dev prompts"""
    dev_samples: Positive = 128
    """samples of one measurement on the dev prompts"""
    test_samples: Positive = 320
    """samples of one before/after measurement on the test prompts"""
    guidances: Guidances = (1.0, 2.0, 3.0, 4.5, 6.0)
    """guidance scales at which the base is measured, so that alignment is compared with the base at its best"""
    aligned_guidances: Guidances = (2.0, 3.0)
    """guidance scales at which the aligned model is measured, beside the rollout's own"""
    num_steps: Annotated[int, Field(ge=2)] | None = None
    """denoising steps when measuring; None: rollout.num_steps"""
    batch_size: Positive = 32
    """samples per forward when measuring"""

    @model_validator(mode="after")
    def _model_is_used(self) -> Self:
        if self.scorer == "shapes" and (self.path or self.processor):
            raise ValueError("golden.path and golden.processor name a CLIP model; golden.scorer shapes uses none")
        return self

    @property
    def clip_model(self) -> CLIPModelConfig | None:
        """The CLIP model behind the metric, if there is one."""
        if self.scorer == "shapes":
            return None
        published = PickScoreConfig() if self.scorer == "pickscore" else CLIPScoreConfig()
        return CLIPModelConfig(path=self.path or published.path, processor=self.processor or published.processor)
