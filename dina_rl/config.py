"""Every setting of a run: frozen pydantic models, one tree per job. `cli.py` reads them from YAML and overrides.

Defaults are the paper's values where the paper gives one (Tables 7 and 8, sections 5 and C.2); the miniature world's
values live in `configs/`. Each rule that spans several fields has its own message.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

SHIPPED_PIPELINE = Path(__file__).parent / "shapes" / "pipeline"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NoiseLevel = Annotated[float, Field(ge=0, lt=1)]


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


NoiseLevels = Annotated[tuple[NoiseLevel, ...], BeforeValidator(_as_list), Field(min_length=1)]
Indices = Annotated[tuple[Positive, ...], BeforeValidator(_as_list), Field(min_length=1)]
Guidances = Annotated[tuple[Annotated[float, Field(ge=1)], ...], BeforeValidator(_as_list), Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, use_attribute_docstrings=True)


class PipelineConfig(Section):
    """The generator: a diffusers pipeline, also the backbone of the reward model."""

    path: str = "shapes"
    """local pipeline directory, hub id, or `shapes` for the miniature SD3.5 that ships with the package"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """parameter dtype of the frozen weights; adapters, schedules and log-probabilities are fp32 always"""
    # No float16: the policy loss's gradient at the velocity is about 1e-9 and would be flushed to 0.
    height: Positive = 32
    """image height in pixels"""
    width: Positive = 32
    """image width in pixels"""
    max_sequence_length: Positive = 8
    """T5 tokens per prompt, for the generator and the reward model alike"""

    @property
    def location(self) -> str:
        """`path`, with `shapes` replaced by the shipped pipeline's directory."""
        return str(SHIPPED_PIPELINE) if self.path == "shapes" else str(Path(self.path).expanduser())


class LoRAConfig(Section):
    rank: Positive = 32
    """rank of every adapter matrix"""
    alpha: Rate = 64.0
    """scale numerator: the update is (alpha / rank) B A"""


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
    num_queries: Positive = 4
    """learnable query tokens"""
    num_heads: Positive = 8
    """attention heads of the scoring head"""
    lora: LoRAConfig | None = LoRAConfig(rank=64, alpha=128.0)
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


class DatasetConfig(Section):
    """A preference set in HPDv3's on-disk format."""

    path: str = "~/dina_rl/shapes_preferences"
    """directory with train.json, test.json and the images they name"""
    max_skipped: Fraction = 0.01
    """share of records that may be malformed or have unreadable images before the run stops"""
    encode_batch_size: Positive = 64
    """images per VAE forward"""

    @property
    def location(self) -> Path:
        return Path(self.path).expanduser()


class FitConfig(Section):
    """Training of the reward model, Algorithm 1."""

    steps: Positive = 12500
    """optimizer steps (HPDv3's 0.8M pairs at batch 64: one epoch)"""
    batch_size: Positive = 64
    """pairs per step over all workers"""
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
    """decay of the averaged weights that are evaluated and saved"""
    checkpoint_every: Positive = 500
    """steps between checkpoints"""
    num_workers: Positive = 2
    """Ray Train workers; must divide batch_size"""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """GPUs of one worker"""
    cpus_per_worker: Rate = 0.5
    """CPUs Ray reserves for one worker (leave some for Ray Data)"""
    threads_per_worker: Positive = 1
    """torch threads of one worker on the CPU"""
    max_failures: NonNegative = 3
    """crashes of a worker after which the fit continues from its last checkpoint"""

    @model_validator(mode="after")
    def _workers_divide_batch(self) -> Self:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"num_workers ({self.num_workers}) must divide batch_size ({self.batch_size}) for equal shards"
            )
        return self


class RewardScorerConfig(Section):
    """The fitted reward model as it is used in alignment (the proxy)."""

    path: str = "~/dina_rl/shapes_reward/reward"
    """directory that fit_reward wrote"""
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


class PromptsConfig(Section):
    """Prompt files, one prompt a line, or `shapes` for the miniature world's own splits."""

    train: str = "shapes"
    """prompts of the rollouts"""
    dev: str = "shapes"
    """prompts of the golden curve during the run"""
    test: str = "shapes"
    """prompts of the reported before/after numbers"""


class RolloutConfig(Section):
    """Sampling during training: SDE inside the window, ODE after it (Flow-GRPO-Fast, section C.2)."""

    num_steps: Annotated[int, Field(ge=2)] = 10
    """denoising steps"""
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    """classifier-free guidance of the rollout; see learner.guidance_in_loss for the log-probabilities"""
    dynamics: Literal["flow_sde", "dance", "cps"] = "flow_sde"
    """stochastic step of the window; see dina_rl/flow/sde.py"""
    noise_level: Annotated[float, Field(ge=0)] = 0.7
    """a of the dynamics: usually 0.7 for flow_sde, 0.8 for cps, 0.2 to 0.3 for dance"""
    window_start: NonNegative = 0
    """first SDE step"""
    window_range: tuple[NonNegative, NonNegative] | None = None
    """draw each iteration's window within these steps [first, end) instead of starting it at window_start"""
    window_steps: Positive = 3
    """number of SDE steps, the ones that are trained"""
    prompts_per_step: Positive = 32
    """prompts (groups) per iteration"""
    group_size: Positive = 18
    """samples per prompt; Flow-GRPO compares them and needs at least 2"""
    groups_per_call: Positive = 1
    """groups that one rollout actor samples and one scorer scores in one forward"""
    max_failed: Fraction = 0.1
    """share of an iteration's groups whose reward may fail (be not finite) before the run stops"""

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.window_start + self.window_steps >= self.num_steps:
            raise ValueError(
                f"SDE window [{self.window_start}, {self.window_start + self.window_steps}) must end before the last "
                f"of the {self.num_steps} steps: at sigma_next = 0 a log-probability is undefined"
            )
        if self.window_range is not None:
            first, end = self.window_range
            if end - first < self.window_steps or end >= self.num_steps:
                raise ValueError(
                    f"window_range [{first}, {end}) must hold window_steps ({self.window_steps}) and end before the "
                    f"last of the {self.num_steps} steps"
                )
        if self.dynamics == "cps" and self.noise_level >= 1:
            raise ValueError(
                f"noise_level {self.noise_level} with dynamics cps: it is an angle in (0, 1) of a quarter turn"
            )
        if self.noise_level == 0:
            raise ValueError("noise_level 0 leaves no exploration: every log-probability would be undefined")
        return self


class GRPOConfig(Section):
    """Clipped policy optimisation over the SDE window (Flow-GRPO)."""

    advantage_std: Literal["group", "global"] = "group"
    """standard deviation that divides the centred rewards: of the group, or of the whole batch"""
    advantage_clip: Rate = 5.0
    """bound on |advantage|"""
    clip_range: Rate = 1e-4
    """bound on |ratio - 1| of the mean log-probability per latent dimension"""
    kl_weight: Annotated[float, Field(ge=0)] = 0.01
    """weight of the KL to the adapter-off reference"""
    guard: bool = False
    """GRPO-Guard's regulated clipping: ratios normalised per step and freed of their bias (flow_sde and dance)"""
    old_log_probs: Literal["auto", "rollout", "recompute"] = "auto"
    """whose old log-probabilities: the rollout's, or recomputed by the learner at its own forward geometry before the
    first update; auto recomputes below float32 and for the guard, which needs the old means too"""
    ratio_gate: Literal["warn", "strict"] = "warn"
    """what to do when |ratio - 1| before any update exceeds clip_range: say so once, or stop before the update"""


class ReFLConfig(Section):
    """Reward feedback learning: the reward's gradient through one-step predictions (Eq. 18, section B.3)."""

    stop_range: tuple[NonNegative, NonNegative] = (30, 39)
    """first and last step, counted from 0, at which an iteration may stop denoising and take the gradient"""
    reward_gradient: Literal["service", "learner"] = "service"
    """who differentiates the reward: the scorer actors, so that the learner never holds the reward model, or it"""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """weight of the KL to the adapter-off reference, of unit-variance Gaussians around the two velocities"""


class LearnerConfig(Section):
    """The optimizer's side."""

    lora: LoRAConfig = LoRAConfig(rank=32, alpha=64.0)
    learning_rate: Rate = 3e-5
    """AdamW's rate"""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's decoupled weight decay"""
    max_grad_norm: Rate = 1.0
    """gradient norm clip"""
    updates_per_step: Positive = 1
    """minibatches per iteration, of whole groups, one optimizer update each"""
    epochs: Positive = 1
    """passes over an iteration's minibatches, in fresh order"""
    micro_batch_size: Positive = 18
    """samples per forward of one rank"""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """decay of the averaged adapter that is evaluated and exported, with warm-up min((1 + n) / (10 + n), decay)"""
    guidance_in_loss: bool = False
    """train the guided velocity, at a second forward with gradient, instead of the conditional one alone"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass"""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is plain AdamW on one rank; --inline always uses it"""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage"""


class GoldenConfig(Section):
    """The held-out metric. It is measured, never optimised."""

    scorer: Literal["shapes"] = "shapes"
    """which metric"""
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
    batch_size: Positive = 32
    """samples per forward when measuring"""


class WatchConfig(Section):
    """The divergence watch: golden falls while proxy rises."""

    action: Literal["none", "stop"] = "none"
    """what to do beside marking it: nothing, or stop and go back to the adapter that was best in golden"""
    patience: Positive = 2
    """measurements in a row that must be worse than the best one"""
    margin: Annotated[float, Field(ge=0)] = 0.02
    """how far below its best golden must lie, in its own units"""


class WorkersConfig(Section):
    """Processes of the alignment run and how long to wait for them."""

    rollout_workers: Positive = 2
    """rollout actors"""
    scorers: Positive = 1
    """reward scorer actors"""
    learner_ranks: Positive = 2
    """data-parallel ranks of the learner"""
    cpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    """CPUs Ray reserves for one actor; 0 lets the phases of a small machine share its cores"""
    gpus_per_rollout: Annotated[float, Field(ge=0)] = 0
    """GPUs of one rollout actor"""
    gpus_per_scorer: Annotated[float, Field(ge=0)] = 0
    """GPUs of one scorer"""
    gpus_per_rank: Annotated[float, Field(ge=0)] = 0
    """GPUs of one learner rank"""
    threads_per_actor: Positive = 1
    """torch threads of one actor on the CPU"""
    start_timeout_s: Rate = 300.0
    """longest wait for actors to come up"""
    call_timeout_s: Rate = 1800.0
    """longest wait for one rollout, scoring or update call"""
    max_restarts: NonNegative = 3
    """dead or hung actors replaced per pool before the run stops"""


class _Run(Section):
    seed: int = 0
    """seed of everything that is drawn"""
    run_dir: Path = Path("runs/run")
    """directory of this run; must not hold a run already unless --resume"""
    resume: bool = False
    """continue the run that run_dir holds"""
    pipeline: PipelineConfig = PipelineConfig()


class FitRun(_Run):
    """Fit DiNa-LRM on a preference set by Ray Train."""

    dataset: DatasetConfig = DatasetConfig()
    reward: RewardModelConfig = RewardModelConfig()
    fit: FitConfig = FitConfig()


class AlignRun(_Run):
    """Align the generator by Flow-GRPO(-Fast) or ReFL against a fitted DiNa-LRM."""

    algorithm: Literal["grpo", "refl"] = "grpo"
    """Flow-GRPO(-Fast) or ReFL"""
    inline: bool = False
    """run the same loop in this one process, without Ray and DeepSpeed"""
    steps: Positive = 150
    """iterations"""
    checkpoint_every: Positive = 10
    """iterations between checkpoints"""
    prompts: PromptsConfig = PromptsConfig()
    scorer: RewardScorerConfig = RewardScorerConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GRPOConfig = GRPOConfig()
    refl: ReFLConfig = ReFLConfig()
    learner: LearnerConfig = LearnerConfig()
    golden: GoldenConfig = GoldenConfig()
    watch: WatchConfig = WatchConfig()
    workers: WorkersConfig = WorkersConfig()

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        rollout, learner = self.rollout, self.learner
        if rollout.prompts_per_step % learner.updates_per_step:
            raise ValueError(
                f"learner.updates_per_step ({learner.updates_per_step}) must divide rollout.prompts_per_step "
                f"({rollout.prompts_per_step}): every minibatch holds whole groups"
            )
        if self.algorithm == "grpo" and rollout.group_size < 2:
            raise ValueError("rollout.group_size 1 leaves nothing to compare: Flow-GRPO needs 2 or more")
        if self.algorithm == "refl":
            first, last = self.refl.stop_range
            if not first <= last < rollout.num_steps:
                raise ValueError(
                    f"refl.stop_range [{first}, {last}] must ascend and lie within the {rollout.num_steps} steps"
                )
            if self.refl.reward_gradient == "service" and learner.updates_per_step * learner.epochs > 1:
                raise ValueError(
                    "refl.reward_gradient service gives the gradient at the rollout's predictions, which hold for one "
                    f"update: learner.updates_per_step x learner.epochs is {learner.updates_per_step * learner.epochs}"
                )
        if self.grpo.guard and rollout.dynamics == "cps":
            raise ValueError("grpo.guard normalises ratios of an SDE's steps; rollout.dynamics cps is not one")
        if self.grpo.guard and self.grpo.old_log_probs == "rollout":
            raise ValueError("grpo.guard needs the old means: set grpo.old_log_probs to auto or recompute")
        if self.learner.guidance_in_loss and rollout.guidance_scale == 1:
            raise ValueError("learner.guidance_in_loss without guidance: rollout.guidance_scale is 1")
        if learner.engine == "torch" and self.workers.learner_ranks > 1:
            raise ValueError(
                f"learner.engine torch runs on one rank, workers.learner_ranks is {self.workers.learner_ranks}; "
                "use deepspeed for more"
            )
        if learner.zero_stage == 3 and self.pipeline.dtype != "float32":
            raise ValueError(
                "learner.zero_stage 3 rounds a bfloat16 forward differently from the rollout's, beyond the clip range; "
                "use learner.zero_stage 2 or pipeline.dtype float32"
            )
        if self.workers.gpus_per_rank % 1 and self.workers.learner_ranks > 1:
            raise ValueError(
                f"workers.gpus_per_rank {self.workers.gpus_per_rank:g} may put two of the "
                f"{self.workers.learner_ranks} learner ranks on one GPU, which NCCL refuses; use whole GPUs"
            )
        samples = rollout.prompts_per_step // learner.updates_per_step * rollout.group_size
        share = learner.micro_batch_size * self.workers.learner_ranks
        if samples % share:
            raise ValueError(
                f"a minibatch of {samples} samples does not split into learner.micro_batch_size "
                f"({learner.micro_batch_size}) x workers.learner_ranks ({self.workers.learner_ranks})"
            )
        return self

    @property
    def wants_reward_gradients(self) -> bool:
        """Whether the scorers are asked for the reward's gradient too."""
        return self.algorithm == "refl" and self.refl.reward_gradient == "service"

    @property
    def recomputes_old_log_probs(self) -> bool:
        """Whether the learner recomputes old log-probabilities; see `GRPOConfig.old_log_probs`."""
        if self.grpo.old_log_probs == "auto":
            return self.grpo.guard or self.pipeline.dtype != "float32"
        return self.grpo.old_log_probs == "recompute"


class WorldConfig(Section):
    """The preference set that `python -m dina_rl.local` makes of the miniature world."""

    train_groups: Positive = 2000
    """training prompts drawn, four images and six labelled pairs each"""
    test_groups: Positive = 400
    """held-out prompts drawn, two labelled pairs each"""


class LocalRun(AlignRun):
    """The whole loop on one machine: world, preferences, reward model, alignment, report."""

    world: WorldConfig = WorldConfig()
    reward: RewardModelConfig = RewardModelConfig()
    fit: FitConfig = FitConfig()

    def fit_run(self, dataset: Path, run_dir: Path) -> FitRun:
        """The reward model's part of this run."""
        return FitRun(
            seed=self.seed,
            run_dir=run_dir,
            resume=self.resume,
            pipeline=self.pipeline,
            dataset=DatasetConfig(path=str(dataset)),
            reward=self.reward,
            fit=self.fit,
        )

    def align_run(self, reward: Path, run_dir: Path) -> AlignRun:
        """The alignment's part of this run, against the reward model fitted before."""
        shared = {name: getattr(self, name) for name in AlignRun.model_fields}
        shared["scorer"] = self.scorer.model_copy(update={"path": str(reward)})
        return AlignRun(**{**shared, "run_dir": run_dir})
