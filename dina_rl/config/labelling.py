"""Settings of a teacher that labels pairs: which scorers, on what, and how sure they are."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from dina_rl.config.base import Fraction, PipelineConfig, Positive, Rate, Section
from dina_rl.config.evaluation import EvaluateRun, EvaluationWorkersConfig, SetConfig
from dina_rl.config.keys import Mark
from dina_rl.config.rewards import ScorerConfig
from dina_rl.config.scoring import PictureScorerConfig


class TeacherConfig(PictureScorerConfig, ScorerConfig):
    """A scorer of pictures and its part in the teacher."""

    @property
    def scorer(self) -> PictureScorerConfig:
        """The scorer alone."""
        return PictureScorerConfig(**{name: dict(self)[name] for name in PictureScorerConfig.model_fields})


class SamplesConfig(Section):
    """Pictures that the generator, `pipeline`, makes to be compared."""

    path: str
    """file of prompts (text, .jsonl, .json, .csv), or a directory of such files"""
    split: str = "train"
    """of a directory: which of its files"""
    per_prompt: Annotated[int, Field(ge=2)] = 4
    """pictures of each prompt; all pairs of them are labelled"""
    num_steps: Positive = 40
    """steps of the ODE"""
    guidance_scale: Annotated[float, Field(ge=1)] = 4.5
    """classifier-free guidance; 1: none"""
    negative_prompt: str = ""
    """what guidance leads away from"""
    batch_size: Positive = 8
    """pictures made at a time"""

    @property
    def location(self) -> Path:
        return Path(self.path).expanduser()


class ValidationConfig(SetConfig):
    """People's labels, by which the teacher's scale is found."""

    split: str = "train"
    """which part of it; one that is evaluated on later is no longer held out"""


class LabelRun(Section):
    """Label pairs of pictures by a teacher, softly: a preference set's, or those of the generator's samples."""

    seed: int = 0
    """seed of the samples and of the scorers' noise"""
    run_dir: Annotated[Path, Mark.PLACE] = Path("runs/label")
    """directory of the labelled set; must not hold a run already unless --resume"""
    resume: Annotated[bool, Mark.PLACE] = False
    """continue the run that run_dir holds"""
    inline: Annotated[bool, Mark.PROCESS] = False
    """score in this one process, without Ray"""
    plan: bool = False
    """print what would be drawn, scored and written, and start nothing"""
    scorers: dict[str, TeacherConfig] = {}
    """the teacher: scorers by name, whose weighted sum is the score"""
    dataset: SetConfig | None = None
    """preference set whose pairs are labelled anew; None: see prompts"""
    prompts: SamplesConfig | None = None
    """prompts of which the generator makes the pictures; None: see dataset"""
    pipeline: PipelineConfig = PipelineConfig()
    """the generator of the samples"""
    split: str = "train"
    """the split that is written: its file is <split>.json"""
    scale: Rate | None = None
    """deviation of one picture's score that counts as a judge's doubt (sigma_u of Eq. 5); None: by validation"""
    validation: ValidationConfig | None = None
    """labelled pairs to which the scale is fitted by maximum likelihood; None: see median_confidence"""
    median_confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.75
    """without scale and validation: the probability that the pair of median margin gets"""
    max_broken: Annotated[Fraction, Mark.PROCESS] = 0.01
    """share of a set's records that may be malformed, and of its pairs that may have no score, before the run stops"""
    batch_size: Positive = 32
    """images per forward of a scorer"""
    encode_batch_size: Positive = 16
    """images per VAE forward, for scorers of latents"""
    records_per_part: Positive = 64
    """groups of connected pairs that one call scores, and that an interruption loses"""
    workers: Annotated[EvaluationWorkersConfig, Mark.PROCESS] = EvaluationWorkersConfig()

    @model_validator(mode="after")
    def _there_is_one_thing_to_label(self) -> Self:
        if (self.dataset is None) == (self.prompts is None):
            raise ValueError(
                "give a set to label anew, --dataset.path DIR, or prompts to draw, --prompts.path FILE: one"
            )
        if not self.scorers or not any(each.weight for each in self.scorers.values()):
            raise ValueError(
                "no teacher: give a scorer with a weight as --scorers.NAME.kind KIND --scorers.NAME.path DIR"
            )
        if self.scale is not None and self.validation is not None:
            raise ValueError("scale is given: leave out validation, which would find it")
        if not self.split.isidentifier():
            raise ValueError(f"split: {self.split!r} must be a name of letters, digits and _")
        for name, scorer in self.scorers.items():
            if scorer.of_images is not None and scorer.of_images.pairwise:
                raise ValueError(f"scorers.{name}: {scorer.kind} compares two pictures; a teacher has a score of each")
            if scorer.normalisation != "raw" or scorer.noise != "shared":
                raise ValueError(
                    f"scorers.{name}: normalisation and noise stay raw and shared; mean and std normalise a teacher"
                )
        for section, each in (("dataset", self.dataset), ("validation", self.validation)):
            if each is not None and each.kind in ("preprocessed", "prompts"):
                raise ValueError(f"{section}.kind {each.kind} holds no pictures that are compared")
        return self

    @property
    def evaluation(self) -> EvaluateRun:
        """How the evaluator is asked for the scores, which are kept in the run's directory."""
        sets = {"dataset": self.dataset, "validation": self.validation}
        return EvaluateRun(
            seed=self.seed,
            run_dir=self.run_dir,
            inline=self.inline,
            cache=self.run_dir / "cache",
            scorers={name: each.scorer for name, each in self.scorers.items()},
            sets={name: each for name, each in sets.items() if each is not None},
            batch_size=self.batch_size,
            encode_batch_size=self.encode_batch_size,
            records_per_part=self.records_per_part,
            workers=self.workers,
        )
