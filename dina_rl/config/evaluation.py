"""Settings of the evaluator: which scorers on which sets, and what is measured."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from dina_rl.config.base import MAX_PIXELS, Fraction, MaxPixels, NoiseLevels, NonNegative, Positive, Rate, Section
from dina_rl.config.fitting import SetKind
from dina_rl.config.keys import Mark
from dina_rl.config.scoring import PictureScorerConfig

PaperItem = Literal["table1", "table2", "table3", "table4", "table5", "table6", "figure2"]


class SetConfig(Section):
    """A preference set on disk."""

    kind: SetKind = "hpdv3"
    """whose published layout `path` is in; the miniature world writes HPDv3's"""
    path: str
    """directory of the set"""
    split: str = "test"
    """which part of it"""
    max_records: Positive | None = None
    """use a random sample of this many records; None: all of them"""
    max_pixels: Annotated[MaxPixels, Mark.PROCESS] = MAX_PIXELS
    """pixels beyond which an image counts as unreadable"""

    @property
    def location(self) -> Path:
        return Path(self.path).expanduser()


class UncertaintyConfig(Section):
    """Appendix A: repeated scoring at fresh noise."""

    levels: NoiseLevels = (0.01, 0.2, 0.4, 0.6, 0.8)
    """noise levels"""
    draws: Annotated[int, Field(ge=2)] = 10
    """noise draws per image, K"""
    pairs: Positive = 1000
    """comparisons looked at, a random sample of the set's (whole records, so a few more may come along)"""


class BootstrapConfig(Section):
    """Confidence intervals of accuracies."""

    resamples: Positive = 1000
    """times the set's prompts are drawn with replacement"""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """probability that the interval should cover"""


class EvaluationWorkersConfig(Section):
    """Processes that score, and how long to wait for them."""

    num_workers: Positive = 2
    """scoring actors"""
    cpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    """CPUs Ray reserves for one actor"""
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    """GPUs of one actor"""
    threads_per_actor: Positive = 1
    """torch threads of one actor on the CPU"""
    start_timeout_s: Rate = 300.0
    """longest wait for an actor to come up"""
    call_timeout_s: Rate = 1800.0
    """longest wait for one call: a model loads and one part of a set is scored"""
    max_restarts: NonNegative = 3
    """dead or hung actors replaced before the run stops"""


class EvaluateRun(Section):
    """Measure scorers on preference sets, or make a table or figure of the paper from fit runs."""

    seed: int = 0
    """seed of noise, samples and resampling"""
    run_dir: Annotated[Path, Mark.PLACE] = Path("runs/evaluate")
    """directory of this run; must not hold a run already unless --resume"""
    resume: Annotated[bool, Mark.PLACE] = False
    """continue the run that run_dir holds"""
    inline: Annotated[bool, Mark.PROCESS] = False
    """score in this one process, without Ray"""
    cache: Annotated[Path | None, Mark.PLACE] = None
    """directory of encoded images and scores, so that several evaluations share them; None: in run_dir"""
    paper: PaperItem | None = None
    """a table or figure of the paper, its rows derived from the configurations of `runs`; None: an audit"""
    runs: tuple[str, ...] = ()
    """directories of fit runs; those that differ in their seed alone are one row of a table"""
    pool_data_sets: Annotated[bool, Mark.REPORT] = False
    """runs fitted on different data are seeds of one row (each seed of the miniature world draws its own)"""
    scorers: dict[str, PictureScorerConfig] = {}
    """further scorers by name: an audit's, or rows of table1"""
    sets: dict[str, SetConfig] = {}
    """preference sets by name, the columns of a table"""
    training: SetConfig | None = None
    """an audit looks for its prompts and images in the sets; None: no leak check"""
    convention: Annotated[Literal["micro", "ties_wrong", "per_prompt"], Mark.REPORT] = "micro"
    """which accuracy a table of the paper shows, see dina_rl/evaluation/accuracy.py; all three are written beside it"""
    noise: Literal["shared", "independent"] = "shared"
    """the images of a record meet the same noise, as in training, or each its own, as in the published evaluator"""
    levels: NoiseLevels = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    """noise levels of the sweep in an audit and in figure2"""
    uncertainty: UncertaintyConfig | None = UncertaintyConfig()
    """an audit's Appendix A and table4; None: an audit without"""
    bootstrap: Annotated[BootstrapConfig, Mark.REPORT] = BootstrapConfig()
    bins: Annotated[Positive, Mark.REPORT] = 10
    """bins of equal width of the reliability curve, over the predicted winner's probability [0.5, 1]"""
    max_broken: Annotated[Fraction, Mark.PROCESS] = 0.01
    """share of a set's records that may be malformed or have unreadable images before the run stops"""
    buckets: Literal["pipeline", "published"] | tuple[tuple[Positive, Positive], ...] | None = None
    """image sizes of latent scorers: pipeline: all stretched to the reward model's height x width; published: the 13 of
    DiNa-LRM, both images of a pair in one; or [height, width]s; None: as in the fit"""
    encode_batch_size: Positive = 16
    """images per VAE forward"""
    batch_size: Positive = 32
    """images per forward of a scorer"""
    records_per_part: Positive = 256
    """records that one call scores, and that an interruption loses"""
    workers: Annotated[EvaluationWorkersConfig, Mark.PROCESS] = EvaluationWorkersConfig()

    @field_validator("runs", mode="before")
    @classmethod
    def _one_run_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.paper not in (None, "table1") and self.scorers:
            raise ValueError(f"paper {self.paper} is made of fit runs alone: give --runs DIR ... and no scorers")
        if self.paper == "table4" and self.uncertainty is None:
            raise ValueError("paper table4 is what the uncertainty section describes, which is None")
        if self.training is not None and self.training.max_records is not None:
            raise ValueError("training.max_records: a leak check looks at the whole training set")
        for name, scorer in self.scorers.items():
            if scorer.normalisation != "raw":
                raise ValueError(
                    f"scorers.{name}.normalisation {scorer.normalisation} changes no ranking; leave it raw: margins "
                    "and probabilities are those of the raw score"
                )
            if scorer.noise != "shared":
                raise ValueError(f"scorers.{name}.noise: set noise of the whole evaluation instead")
        holding = {f"sets.{name}": each for name, each in self.sets.items()} | {"training": self.training}
        for section, each in holding.items():
            if each is not None and each.kind == "preprocessed":
                raise ValueError(f"{section}.kind preprocessed holds latents without images: name the set they are of")
        for section, names in (("sets", self.sets), ("scorers", self.scorers)):
            for name in names:
                if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                    raise ValueError(f"{section}: {name!r} must be letters, digits, - and _")
        return self

    @property
    def cache_dir(self) -> Path:
        return (self.cache or self.run_dir / "cache").expanduser().resolve()
