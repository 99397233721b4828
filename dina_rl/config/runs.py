"""One tree of settings per job, and the rules that span its sections."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import model_validator

from dina_rl.config.algorithms import AlgorithmConfig, AlgorithmName, GRPOConfig, NFTConfig, ReFLConfig
from dina_rl.config.alignment import (
    LearnerConfig,
    PromptsConfig,
    RolloutConfig,
    WatchConfig,
    WorkersConfig,
)
from dina_rl.config.base import PipelineConfig, Positive, Rate, Section
from dina_rl.config.fitting import DatasetConfig, FitConfig, RewardModelConfig
from dina_rl.config.keys import Mark
from dina_rl.config.measuring import GoldenConfig, ProbesConfig
from dina_rl.config.rewards import ImageScorerConfig, RewardsConfig


class _Run(Section):
    seed: int = 0
    """seed of everything that is drawn"""
    run_dir: Annotated[Path, Mark.PLACE] = Path("runs/run")
    """directory of this run; must not hold a run already unless --resume"""
    resume: Annotated[bool, Mark.PLACE] = False
    """continue the run that run_dir holds"""
    pipeline: PipelineConfig = PipelineConfig()


class FitRun(_Run):
    """Fit DiNa-LRM on a preference set by Ray Train."""

    inline: Annotated[bool, Mark.PROCESS] = False
    """do the same in this one process, without Ray"""
    latents: Path | None = None
    """encoded pairs to fit on, so that fits share them: a complete `latents` directory of jobs.encode, or the authors'
    preprocessed files; None: encode into run_dir"""
    dataset: DatasetConfig = DatasetConfig()
    reward: RewardModelConfig = RewardModelConfig()
    fit: FitConfig = FitConfig()

    @model_validator(mode="after")
    def _compiles_nothing(self) -> Self:
        if self.pipeline.compile:
            raise ValueError("pipeline.compile is of the alignment; a fit resumes to the last digit and runs without")
        return self


class AlignRun(_Run):
    """Align the generator against a fitted DiNa-LRM."""

    algorithm: AlgorithmName = "grpo"
    """grpo: Flow-GRPO(-Fast); refl: ReFL; nft: DiffusionNFT. Each has a section of its own; the others' are not read"""
    plan: bool = False
    """print work, busy share of the GPUs, memory and steps, and start nothing"""
    plan_tflops: Annotated[Rate | None, Mark.PROCESS] = None
    """what one GPU does of this in practice, in 10^12 operations a second: the plan tells times too"""
    plan_gib: Annotated[Rate, Mark.PROCESS] = 79.0
    """memory of one GPU that the plan is held against, in GiB; one of 80 GB has about 79"""
    inline: Annotated[bool, Mark.PROCESS] = False
    """run the same loop in this one process, without Ray and DeepSpeed"""
    iterations: Positive = 150
    """rollouts, each followed by its updates"""
    checkpoint_every: Annotated[Positive, Mark.PROCESS] = 10
    """iterations between checkpoints"""
    checkpoint_keep: Annotated[Positive, Mark.PROCESS] = 2
    """last checkpoints that stay; while one is written there are as many and that one. With 1 nothing is left to go on
    from where it turns out broken"""
    prompts: PromptsConfig = PromptsConfig()
    rewards: RewardsConfig = RewardsConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GRPOConfig = GRPOConfig()
    refl: ReFLConfig = ReFLConfig()
    nft: NFTConfig = NFTConfig()
    learner: LearnerConfig = LearnerConfig()
    golden: GoldenConfig = GoldenConfig()
    probes: ProbesConfig | None = None
    watch: WatchConfig = WatchConfig()
    workers: Annotated[WorkersConfig, Mark.PROCESS] = WorkersConfig()

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        rollout, learner = self.rollout, self.learner
        if rollout.prompts_per_iteration % learner.updates_per_iteration:
            raise ValueError(
                f"learner.updates_per_iteration ({learner.updates_per_iteration}) must divide "
                f"rollout.prompts_per_iteration ({rollout.prompts_per_iteration}): every minibatch holds whole groups"
            )
        for misfit in self.algorithm_section.misfits(self.pipeline, rollout, learner, self.rewards):
            raise ValueError(misfit)
        golden = self.golden.scorer
        metric, rewarded = self.golden.of_images, {each.weights for each in self.rewards.of_images}
        if golden in self.rewards.scorers or (metric is not None and metric.weights in rewarded):
            raise ValueError(
                f"golden.scorer {golden} is a reward too: what is optimised cannot be the held-out metric; "
                f"choose another golden.scorer or set rewards.{golden} to None"
            )
        if self.watch.action == "raise_kl" and not self.kl_weight:
            raise ValueError(f"watch.action raise_kl multiplies {self.algorithm}.kl_weight, which is 0")
        if self.learner.guidance_in_loss and rollout.guidance_scale == 1:
            raise ValueError("learner.guidance_in_loss without guidance: rollout.guidance_scale is 1")
        if learner.warmup_updates >= self.updates:
            raise ValueError(
                f"learner.warmup_updates ({learner.warmup_updates}) must be fewer than the run's {self.updates} "
                "updates: the rate would never be reached"
            )
        guidances = (rollout.guidance_scale, *self.golden.guidances, *self.golden.aligned_guidances)
        if rollout.negative_prompt and max(guidances) == 1:
            raise ValueError("rollout.negative_prompt without guidance: every guidance scale is 1")
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
        if learner.zero_stage == 3 and self.pipeline.compile:
            raise ValueError(
                "pipeline.compile cannot follow how learner.zero_stage 3 gathers weights inside a block; use "
                "learner.zero_stage 2"
            )
        if self.workers.gpus_per_rank % 1 and self.workers.learner_ranks > 1:
            raise ValueError(
                f"workers.gpus_per_rank {self.workers.gpus_per_rank:g} may put two of the "
                f"{self.workers.learner_ranks} learner ranks on one GPU, which NCCL refuses; use whole GPUs"
            )
        samples = rollout.prompts_per_iteration // learner.updates_per_iteration * self.kept_of_group
        share = learner.micro_batch_size * self.workers.learner_ranks
        if samples % share:
            raise ValueError(
                f"a minibatch of {samples} samples does not split into learner.micro_batch_size "
                f"({learner.micro_batch_size}) x workers.learner_ranks ({self.workers.learner_ranks})"
            )
        return self

    @property
    def algorithm_section(self) -> AlgorithmConfig:
        """The settings of the algorithm in use."""
        section: AlgorithmConfig = dict(self)[self.algorithm]
        return section

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run, if no iteration drops all its groups."""
        return self.iterations * self.learner.updates_per_iteration * self.learner.epochs

    @property
    def kept_of_group(self) -> int:
        """Samples of each group that are trained on."""
        return self.learner.keep or self.rollout.group_size

    @property
    def compares(self) -> bool:
        """Whether the proxy or golden is a judge's, who is shown a measurement's pictures beside the start's."""
        asked = (*self.rewards.of_images, self.golden.of_images)
        return any(scorer is not None and scorer.pairwise for scorer in asked)

    @property
    def start(self) -> str:
        """What the run starts from, and what its measurements called base are of: the base, or an adapter on it."""
        lora = self.learner.lora
        return "base" if lora is None or lora.init is None else f"start ({lora.init})"

    @property
    def probe_model(self) -> ImageScorerConfig | None:
        """The CLIP model of the probes, if they need one."""
        return None if self.probes is None else self.probes.model

    @property
    def kl_weight(self) -> float:
        """The algorithm's weight of the KL to the base."""
        return self.algorithm_section.kl_weight


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
            inline=self.inline,
            pipeline=self.pipeline.model_copy(update={"compile": False}),
            dataset=DatasetConfig(path=str(dataset)),
            reward=self.reward,
            fit=self.fit,
        )

    def align_run(self, reward: Path, run_dir: Path) -> AlignRun:
        """The alignment's part of this run, against the reward model fitted before."""
        shared = {name: getattr(self, name) for name in AlignRun.model_fields}
        if self.rewards.dina is not None:
            dina = self.rewards.dina.model_copy(update={"path": str(reward)})
            shared["rewards"] = self.rewards.model_copy(update={"dina": dina})
        latents = str(reward.parent / "latents")  # the fit's own
        shared["refl"] = self.refl.model_copy(update={"pretraining_latents": latents})
        return AlignRun(**{**shared, "run_dir": run_dir})
