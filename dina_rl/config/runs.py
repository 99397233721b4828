"""One tree of settings per job, and the rules that span its sections."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import model_validator

from dina_rl.config.alignment import (
    GRPOConfig,
    LearnerConfig,
    PromptsConfig,
    ReFLConfig,
    RolloutConfig,
    WatchConfig,
    WorkersConfig,
)
from dina_rl.config.base import PipelineConfig, Positive, Section
from dina_rl.config.fitting import DatasetConfig, FitConfig, RewardModelConfig
from dina_rl.config.keys import Mark
from dina_rl.config.rewards import GoldenConfig, RewardsConfig
from dina_rl.flow.sde import Dynamics


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


class AlignRun(_Run):
    """Align the generator by Flow-GRPO(-Fast) or ReFL against a fitted DiNa-LRM."""

    algorithm: Literal["grpo", "refl"] = "grpo"
    """Flow-GRPO(-Fast) or ReFL"""
    plan: bool = False
    """print batch arithmetic, actors, memory and steps, and start nothing"""
    inline: Annotated[bool, Mark.PROCESS] = False
    """run the same loop in this one process, without Ray and DeepSpeed"""
    steps: Positive = 150
    """iterations"""
    checkpoint_every: Annotated[Positive, Mark.PROCESS] = 10
    """iterations between checkpoints"""
    prompts: PromptsConfig = PromptsConfig()
    rewards: RewardsConfig = RewardsConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GRPOConfig = GRPOConfig()
    refl: ReFLConfig = ReFLConfig()
    learner: LearnerConfig = LearnerConfig()
    golden: GoldenConfig = GoldenConfig()
    watch: WatchConfig = WatchConfig()
    workers: Annotated[WorkersConfig, Mark.PROCESS] = WorkersConfig()

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
        if self.algorithm == "grpo" and rollout.dynamics == "ode":
            raise ValueError("rollout.dynamics ode has no log-probability: Flow-GRPO needs flow_sde, dance or cps")
        if self.algorithm == "refl":
            first, last = self.refl.stop_range
            if not first <= last < rollout.num_steps:
                raise ValueError(
                    f"refl.stop_range [{first}, {last}] must ascend and lie within the {rollout.num_steps} steps"
                )
            if rollout.dynamics not in ("auto", "ode"):
                raise ValueError(f"refl denoises along the ODE; rollout.dynamics {rollout.dynamics} is for grpo")
            if self.refl.reward_gradient == "service" and learner.updates_per_step * learner.epochs > 1:
                raise ValueError(
                    "refl.reward_gradient service gives the gradient at the rollout's predictions, which hold for one "
                    f"update: learner.updates_per_step x learner.epochs is {learner.updates_per_step * learner.epochs}"
                )
        golden = self.golden.scorer
        model = self.golden.clip_model
        if golden in self.rewards.scorers or (model is not None and model.path in self.rewards.clip_models):
            raise ValueError(
                f"golden.scorer {golden} is a reward too: what is optimised cannot be the held-out metric; "
                f"choose another golden.scorer or set rewards.{golden} to None"
            )
        if self.rewards.normalise == "group" and self.algorithm == "refl":
            raise ValueError("rewards.normalise group compares samples of a prompt, which refl does not; use constant")
        if self.watch.action == "raise_kl" and not self.kl_weight:
            raise ValueError(f"watch.action raise_kl multiplies {self.algorithm}.kl_weight, which is 0")
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
    def dynamics(self) -> Dynamics:
        """The step of the window: `rollout.dynamics`, with auto decided by the algorithm."""
        if self.rollout.dynamics == "auto":
            return "ode" if self.algorithm == "refl" else "flow_sde"
        return self.rollout.dynamics

    @property
    def kl_weight(self) -> float:
        """The algorithm's weight of the KL to the base."""
        return self.refl.kl_weight if self.algorithm == "refl" else self.grpo.kl_weight

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
            inline=self.inline,
            pipeline=self.pipeline,
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
