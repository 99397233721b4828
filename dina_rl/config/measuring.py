"""Settings of what is measured beside the rewards and never optimised: the held-out metric, and probes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dina_rl.config.base import Fraction, Guidances, Positive, Section
from dina_rl.config.keys import Mark
from dina_rl.config.rewards import (
    CLIP_L,
    CLIPScoreConfig,
    ImageScorerConfig,
    ImageScorerName,
    ServerConfig,
    check_served,
    image_scorer,
)


class GoldenConfig(Section):
    """The held-out metric. It is measured, never optimised."""

    scorer: Literal["shapes"] | ImageScorerName = "shapes"
    """which metric: the miniature world's rules, or a model's opinion of the decoded image"""
    path: str | None = None
    """directory or hub id of its weights, or its server's address; None: the published ones"""
    processor: str | None = None
    """directory or hub id of its tokenizer and image processor, or its name at the server; None: the published one"""
    server: Annotated[ServerConfig | None, Mark.PROCESS] = None
    """of a metric behind a server; None: the defaults"""
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
            raise ValueError("golden.path and golden.processor name a model; golden.scorer shapes uses none")
        check_served("golden.server", self.server, self.scorer)
        return self

    @property
    def of_images(self) -> ImageScorerConfig | None:
        """The scorer behind the metric, if there is one."""
        return None if self.scorer == "shapes" else image_scorer(self.scorer, self.path, self.processor, self.server)


class ProbePairConfig(Section):
    """A question about a picture."""

    text: str
    """what may be in it more and more, e.g. a photo with a person"""
    against: str
    """what it is told from, e.g. a photo without people"""


class ProbesConfig(Section):
    """What is watched on the dev samples beside golden: signs of a reward that is being hacked. Measured, never
    optimised."""

    pairs: dict[str, ProbePairConfig] = {}
    """by name: zero-shot probability of a text against another, by a CLIP model"""
    path: str = CLIP_L
    """directory or hub id of the CLIPModel; none is loaded without pairs"""
    processor: str = CLIP_L
    """directory or hub id of its tokenizer and image processor"""
    grid: bool = True
    """the grid that the generator leaves in its pictures, see rewards.grid"""
    margin: Fraction = 0.1
    """alarm: how far a mean probability must lie from that of the base, and of golden's best, up or down"""
    grid_margin: Annotated[float, Field(ge=0)] = 0.3
    """alarm: how far the mean grid must lie above that of the base, and of golden's best, in nats of power"""
    patience: Positive = 2
    """alarm: measurements in a row that must lie there, none of which is golden's best"""

    @model_validator(mode="after")
    def _something_is_watched(self) -> Self:
        if not self.pairs and not self.grid:
            raise ValueError("neither pairs nor the grid: set probes to None where nothing is watched")
        return self

    @property
    def model(self) -> ImageScorerConfig | None:
        """The CLIP model behind the pairs, if there are any."""
        return CLIPScoreConfig(path=self.path, processor=self.processor) if self.pairs else None
