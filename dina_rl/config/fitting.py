"""Settings of the reward model, its data and its fit."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dina_rl.config.base import (
    MAX_PIXELS,
    Fraction,
    Indices,
    LoRAConfig,
    MaxPixels,
    NoiseLevel,
    NoiseLevels,
    NonNegative,
    Positive,
    Rate,
    Section,
)
from dina_rl.config.keys import Mark

OWN_TEST = "test"
"""Among a fit's held-out sets, the test pairs of the store that it trains on."""

Labels = Literal["hard", "soft", "soft_matched"]
"""What y of a pair is in Eq. 9."""

BatchOf = Literal["pairs", "groups"]
"""What a training step is made of."""

Split = Literal["train", "test"]
"""The parts of a latent store."""

SetKind = Literal["hpdv3", "hpdv2", "imagereward", "genai_bench", "pickapic", "prompts", "preprocessed"]


def _as_mapping(value: object) -> object:
    """`name directory name directory` from a command line, as a mapping."""
    return dict(zip(value[::2], value[1::2], strict=True)) if isinstance(value, list) and len(value) % 2 == 0 else value


Directories = Annotated[dict[str, str], BeforeValidator(_as_mapping)]


class ThurstoneConfig(Section):
    """Preference likelihood, Eq. 5-8."""

    variance: Literal["noise_calibrated", "fixed"] = "noise_calibrated"
    """noise_calibrated: k sigma(t)^2 + sigma_u^2 (Eq. 7); fixed: sigma_u^2 at every t (Table 2)"""
    k: Annotated[float, Field(ge=0)] = 2.0
    """growth of the comparison variance with the diffusion noise"""
    sigma_u: Rate = 0.1
    """ambiguity of clean samples, a standard deviation"""


class TimestepConfig(Section):
    """q(t), section 4.1."""

    distribution: Literal["uniform", "fixed", "logit_normal"] = "uniform"
    """how training noise levels are drawn"""
    fixed: NoiseLevel = 0.0
    """the level of `fixed`"""
    mean: float = 0.0
    """logit-space mean of `logit_normal`"""
    std: Rate = 1.0
    """logit-space standard deviation of `logit_normal`"""


class RewardModelConfig(Section):
    """DiNa-LRM, section 4.2 and Table 7."""

    taps: Indices = (4, 8, 12)
    """1-based blocks whose outputs are read; blocks after the last one are neither kept nor computed"""
    head_width: Annotated[int | None, Field(gt=0)] = None
    """width of the scoring head; None: the backbone's. Where they differ the head projects the tokens first"""
    num_queries: Positive = 4
    """learnable query tokens"""
    num_heads: Positive = 8
    """attention heads of the scoring head"""
    lora: LoRAConfig | None = LoRAConfig()
    """adapter on the backbone; None trains the head on a frozen backbone (Table 3)"""
    thurstone: ThurstoneConfig = ThurstoneConfig()
    timestep: TimestepConfig = TimestepConfig()
    single_level: NoiseLevel = 0.4
    """noise level of the single-level score (Eq. 12)"""
    ensemble_levels: NoiseLevels = (0.2, 0.5, 0.7)
    """noise levels of the ensemble score (Eq. 13)"""

    @model_validator(mode="after")
    def _taps_ascend(self) -> Self:
        if list(self.taps) != sorted(set(self.taps)):
            raise ValueError(f"taps must ascend without repeats, got {self.taps}")
        return self


class FilterConfig(Section):
    """Which pairs are encoded. All but min_area concern the training split alone: held-out numbers stay comparable."""

    min_area: NonNegative | None = None
    """pixels below which an image drops its pairs; None: 65536 with published buckets (the released code), else 0"""
    min_vote_share: Fraction | None = None
    """share of the votes for the preferred image that a pair must exceed (the released code's option: 0.6)"""
    unvoted: Literal["keep", "drop"] = "keep"
    """pairs without votes, where min_vote_share is set"""
    min_confidence: Fraction | None = None
    """annotators' confidence that a pair must have (HPSv3 trains with 0.95)"""
    unrated: Literal["keep", "drop"] = "keep"
    """pairs without a confidence, where min_confidence is set"""
    duplicates: Literal["keep", "drop"] = "drop"
    """pairs that repeat prompt, preferred and other image of an earlier one"""
    max_per_prompt: NonNegative | None = None
    """pairs of one prompt, drawn by the seed; 0: all; None: 8 with published buckets (the released code), else all"""


class DatasetConfig(Section):
    """A preference set, and how it is encoded to latents."""

    kind: SetKind = "hpdv3"
    """whose published layout `path` is in (the miniature world writes HPDv3's); preprocessed: the authors' latents"""
    path: str = "~/dina_rl/shapes_preferences"
    """directory of the set"""
    train: str | None = "train"
    """the set's split to train on; None: no training pairs"""
    test: str | None = "test"
    """the set's split to hold out; None: no held-out pairs"""
    filter: FilterConfig = FilterConfig()
    buckets: Literal["pipeline", "published"] | tuple[tuple[Positive, Positive], ...] = "pipeline"
    """image sizes: pipeline: all stretched to its height x width; published: the 13 of DiNa-LRM; or [height, width]s"""
    latent_dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of stored latents"""
    max_skipped: Annotated[Fraction, Mark.PROCESS] = 0.01
    """share of records that may be malformed or have unreadable images before the run stops"""
    max_pixels: Annotated[MaxPixels, Mark.PROCESS] = MAX_PIXELS
    """pixels beyond which an image counts as unreadable"""
    encode_batch_size: Annotated[Positive, Mark.FILES] = 64
    """images per VAE forward"""
    batches_per_shard: Annotated[Positive, Mark.FILES] = 1
    """VAE forwards whose latents share a file"""
    prompt_embeddings: Annotated[bool, Mark.PROCESS] = False
    """store every prompt's embeddings too, so that a fit needs no text encoders in memory"""

    @property
    def location(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def splits(self) -> dict[Split, str]:
        """Split of the latent store -> split of the set, those there are."""
        named: dict[Split, str | None] = {"train": self.train, "test": self.test}
        return {ours: theirs for ours, theirs in named.items() if theirs is not None}

    @model_validator(mode="after")
    def _there_is_something_to_encode(self) -> Self:
        if not self.splits:
            raise ValueError("train and test are both None: there is nothing to encode")
        if not self.buckets:
            raise ValueError("buckets must hold at least one [height, width]")
        return self


class FitConfig(Section):
    """Training of the reward model, Algorithm 1."""

    steps: Positive = 12500
    """optimizer steps (HPDv3's 0.8M pairs at batch 64: one epoch)"""
    labels: Labels = "hard"
    """hard: y = 1, the preferred image is the better one; soft: y is the pair's own probability (jobs.label), in Eq. 9
    as it stands; soft_matched: the same y in the loss that is least where the model says y"""
    batch_of: BatchOf = "pairs"
    """groups: pairs of a prompt that share images share noise too, and each image goes through the model once a step"""
    batch_size: Positive = 64
    """pairs, or groups of them, per step over all workers, after accumulation"""
    bucket_batch: Literal["constant", "tokens"] = "constant"
    """constant: batch_size in every step; tokens: floor(largest area / its area) x batch_size in a bucket's steps"""
    micro_batch_size: Annotated[int | None, Field(gt=0), Mark.PROCESS] = None
    """pairs of images of the largest bucket in a forward of one worker; gradients accumulate over a step; None: all"""
    learning_rate: Rate = 5e-5
    """AdamW's peak rate"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay"""
    warmup_steps: NonNegative = 0
    """steps of linear warm-up"""
    decay_start: Fraction = 1.0
    """share of the steps after which the rate falls linearly to 5 percent; 1 keeps it constant, as the paper does"""
    max_grad_norm: Rate = 1.0
    """gradient norm clip"""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """decay of the averaged weights that are evaluated and saved; 0: no averaging, the last weights themselves"""
    autocast: bool = False
    """compute matrix products in bfloat16, LoRA's and the head's too; their weights and optimizer stay fp32"""
    gradient_checkpointing: Annotated[bool, Mark.PROCESS] = False
    """recompute the backbone's blocks in the backward pass: memory of one block instead of all, a third more work"""
    checkpoint_every: Annotated[Positive, Mark.PROCESS] = 500
    """steps between checkpoints"""
    checkpoint_keep: Annotated[Positive, Mark.PROCESS] = 2
    """last checkpoints that stay; with 1 nothing is left to go on from where it turns out broken"""
    evaluate_every: Annotated[NonNegative, Mark.REPORT] = 0
    """steps between evaluations on the held-out sets; the best weights so far are kept too; 0: only at the end"""
    held_out: Annotated[Directories, Mark.REPORT] = {}
    """name -> directory of further encoded pairs: their test split is evaluated beside the fit's own, called `test`"""
    evaluation_batch_size: Annotated[Positive, Mark.PROCESS] = 64
    """pairs per forward of one worker in evaluations"""
    num_workers: Annotated[Positive, Mark.PROCESS] = 2
    """Ray Train workers; must divide batch_size"""
    gpus_per_worker: Annotated[float, Field(ge=0), Mark.PROCESS] = 0
    """GPUs of one worker"""
    cpus_per_worker: Annotated[Rate, Mark.PROCESS] = 0.5
    """CPUs Ray reserves for one worker (leave some for Ray Data)"""
    threads_per_worker: Annotated[Positive, Mark.PROCESS] = 1
    """torch threads of one worker on the CPU"""
    start_timeout_s: Annotated[Rate, Mark.PROCESS] = 300.0
    """longest wait for a cluster that has room for the workers, and a CPU more for Ray Data"""
    max_failures: Annotated[NonNegative, Mark.PROCESS] = 3
    """crashes of a worker after which the fit continues from its last checkpoint"""

    @model_validator(mode="after")
    def _workers_divide_batch(self) -> Self:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"num_workers ({self.num_workers}) must divide batch_size ({self.batch_size}) for equal shards"
            )
        return self

    @model_validator(mode="after")
    def _names_are_file_names(self) -> Self:
        for name in self.held_out:
            if name == OWN_TEST or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"held_out: {name!r} must be letters, digits, - and _, and not {OWN_TEST!r}")
        return self
