"""Settings of the algorithms, one section each, with the rules that they lay on the rest of a run."""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dina_rl.config.alignment import LearnerConfig, RolloutConfig
from dina_rl.config.base import NonNegative, PipelineConfig, Positive, Rate, Section
from dina_rl.config.rewards import RewardsConfig

AlgorithmName = Literal["grpo", "refl", "nft"]


class AlgorithmConfig(Section):
    """What every algorithm has."""

    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """weight of the KL to the base: the adapter switched off, or a second transformer when all weights are trained"""

    @abstractmethod
    def misfits(
        self, pipeline: PipelineConfig, rollout: RolloutConfig, learner: LearnerConfig, rewards: RewardsConfig
    ) -> Iterator[str]:
        """A line for every setting of the run that this algorithm cannot go with."""
        ...


class GRPOConfig(AlgorithmConfig):
    """Clipped policy optimisation over the SDE window (Flow-GRPO)."""

    advantage_std: Literal["group", "global"] = "group"
    """standard deviation that divides the centred rewards: of the group, or of the whole batch"""
    advantage_clip: Rate = 5.0
    """bound on |advantage|"""
    clip_range: Rate = 1e-4
    """bound on |ratio - 1| of the mean log-probability per latent dimension. Released: 1e-4 over all steps, 1e-5 over a
    window, 3e-6 with cps (DiNa-LRM), 2e-6 or 4e-6 with the guard. Ratios of cps and the guard have units of their own:
    see the table in docs/alignment.md"""
    kl_weight: Annotated[float, Field(ge=0)] = 0.01
    """weight of the KL to the base: the adapter switched off, or a second transformer when all weights are trained"""
    kl: Literal["exact", "released"] = "exact"
    """unit of kl_weight: exact, a step's KL; released, flow_grpo's, which leaves out the length of a step: for flow_sde
    and dance exact times -dt (at SD3's shift of 3 and 10 steps 1 / 25.1, 21.4, 18.0, 14.9, 12.0, 9.5, 7.3, 5.4, 3.7 of
    it at steps 0 to 8), for cps the same number"""
    guard: bool = False
    """GRPO-Guard's regulated clipping: ratios normalised per step and freed of their bias (flow_sde and dance).
    They are smaller than plain ones: set clip_range with it, to 2e-6 as released"""
    old_log_probs: Literal["auto", "rollout", "recompute"] = "auto"
    """whose old log-probabilities: the rollout's, or recomputed by the learner at its own forward geometry before the
    first update; auto recomputes below float32, with pipeline.compile, and for the guard, which needs the old means
    too"""
    ratio_gate: Literal["warn", "strict"] = "warn"
    """what to do when |ratio - 1| before any update exceeds clip_range: say so once, or stop before the update"""
    judge_after: Positive | None = None
    """sampling steps after which a rollout ends: DiNa-LRM, the only reward, judges the noisy state as it is, at its own
    noise level (Eq. 11), and the remaining steps are saved; None: finished samples are judged"""

    def misfits(
        self, pipeline: PipelineConfig, rollout: RolloutConfig, learner: LearnerConfig, rewards: RewardsConfig
    ) -> Iterator[str]:
        if rollout.group_size < 2:
            yield "rollout.group_size 1 leaves nothing to compare: Flow-GRPO needs 2 or more"
        yield from _keep_misfits(rollout, learner)
        if self.judge_after is not None:
            yield from _judging_misfits(self.judge_after, rollout, rewards)
        if rollout.dynamics == "ode":
            yield "rollout.dynamics ode has no log-probability: Flow-GRPO needs flow_sde, dance or cps"
        yield from _window_misfits(rollout)
        if rollout.dynamics == "cps" and rollout.noise_level >= 1:
            yield (
                f"rollout.noise_level {rollout.noise_level} with dynamics cps: it is an angle in (0, 1) of a quarter "
                "turn"
            )
        if rollout.noise_level == 0:
            yield "rollout.noise_level 0 leaves no exploration: every log-probability would be undefined"
        if self.guard and rollout.dynamics == "cps":
            yield "grpo.guard normalises ratios of an SDE's steps; rollout.dynamics cps is not one"
        if self.guard and self.old_log_probs == "rollout":
            yield "grpo.guard needs the old means: set grpo.old_log_probs to auto or recompute"
        if pipeline.compile and self.old_log_probs == "rollout":
            yield (
                "pipeline.compile rounds the learner's forward otherwise than the rollout's: set grpo.old_log_probs to "
                "auto or recompute"
            )


def _keep_misfits(rollout: RolloutConfig, learner: LearnerConfig) -> Iterator[str]:
    """Of the algorithms that compare the samples of a group."""
    if learner.keep is not None and learner.keep > rollout.group_size:
        yield f"learner.keep {learner.keep} exceeds the {rollout.group_size} samples of rollout.group_size"


def _window_misfits(rollout: RolloutConfig) -> Iterator[str]:
    """What is wrong with the SDE window."""
    start, end = rollout.window_start, rollout.window_start + rollout.window_steps
    if end >= rollout.num_steps:
        yield (
            f"rollout: SDE window [{start}, {end}) must end before the last of the {rollout.num_steps} steps: at "
            "sigma_next = 0 a log-probability is undefined"
        )
    if rollout.window_range is not None:
        first, last = rollout.window_range
        if last - first < rollout.window_steps or last >= rollout.num_steps:
            yield (
                f"rollout.window_range [{first}, {last}) must hold window_steps ({rollout.window_steps}) and end "
                f"before the last of the {rollout.num_steps} steps"
            )


def _judging_misfits(after: int, rollout: RolloutConfig, rewards: RewardsConfig) -> Iterator[str]:
    """Of rollouts that are judged before they are finished."""
    trained = rollout.window_start + rollout.window_steps if rollout.window_range is None else rollout.window_range[1]
    if not trained <= after < rollout.num_steps:
        yield (
            f"grpo.judge_after {after} must lie behind the {trained} steps that hold the trained ones and before the "
            f"last of the {rollout.num_steps}"
        )
    dina = rewards.dina
    if dina is None or len(rewards.scorers) > 1:
        yield "grpo.judge_after needs rewards.dina and no other reward: only it can judge a noisy state"
    elif dina.uncertainty_weight:
        yield (
            "rewards.dina.uncertainty_weight needs several noise draws: with grpo.judge_after a state brings its own "
            "noise, and is scored once"
        )


class ReFLConfig(AlgorithmConfig):
    """Reward feedback learning: the reward's gradient through one-step predictions (Eq. 18, section B.3)."""

    stop_range: tuple[NonNegative, NonNegative] = (30, 39)
    """first and last step, counted from 0, at which an iteration may stop denoising and take the gradient"""
    reward_gradient: Literal["service", "learner"] = "service"
    """who differentiates the reward: the scorer actors, so that the learner never holds the reward model, or it"""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """weight of the KL to the base, of unit-variance Gaussians around the two velocities"""
    pretraining_weight: Annotated[float, Field(ge=0)] = 0.0
    """weight of the flow-matching loss on preferred images, ReFL's pretraining loss"""
    pretraining_latents: str = "~/dina_rl/shapes_reward/latents"
    """latent store of those images, as jobs.encode writes it"""

    @property
    def pretraining_location(self) -> Path:
        return Path(self.pretraining_latents).expanduser()

    def misfits(
        self, pipeline: PipelineConfig, rollout: RolloutConfig, learner: LearnerConfig, rewards: RewardsConfig
    ) -> Iterator[str]:
        first, last = self.stop_range
        if not first <= last < rollout.num_steps:
            yield f"refl.stop_range [{first}, {last}] must ascend and lie within the {rollout.num_steps} steps"
        if rollout.dynamics not in ("auto", "ode"):
            yield f"refl denoises along the ODE; rollout.dynamics {rollout.dynamics} is for grpo"
        updates = learner.updates_per_iteration * learner.epochs
        if self.reward_gradient == "service" and updates > 1:
            yield (
                "refl.reward_gradient service gives the gradient at the rollout's predictions, which hold for one "
                f"update: learner.updates_per_iteration x learner.epochs is {updates}"
            )
        if learner.keep is not None:
            yield f"learner.keep {learner.keep} chooses by advantage; refl weighs all samples alike and has none"
        if rewards.normalise != "constant":
            yield (
                f"rewards.normalise {rewards.normalise} compares samples of a prompt, which refl does not; use constant"
            )
        for scorer in rewards.of_images:
            if not scorer.differentiable:
                yield f"rewards.{scorer.name} has no gradient, which refl follows; use grpo or nft, or set it to None"


class NFTConfig(AlgorithmConfig):
    """DiffusionNFT: better and worse samples contrasted on the forward process (arXiv 2509.16117)."""

    beta: Rate = 1.0
    """how far v+ and v- lie from the sampling copy's velocity, in steps from it to the policy's; the smaller, the less
    the policy is pulled back to that copy (released: 1, or 0.1)"""
    advantage_std: Literal["group", "global"] = "global"
    """standard deviation that divides the centred rewards: of the group, or of the whole batch"""
    advantage_clip: Rate = 5.0
    """C: (reward - mean) / std is clipped to [-C, C] and mapped to [0, 1]"""
    levels: Positive = 9
    """noise levels at which each sample is trained, drawn from the sampler's own without repeats"""
    weighting: Literal["adaptive", "velocity"] = "adaptive"
    """adaptive: each sample's error in x0 over its own mean absolute error, as the released code has it; velocity: the
    paper's plain squared error"""
    old_rate: Annotated[float, Field(ge=0)] = 0.001
    """the sampling copy keeps min(old_rate x (updates - old_delay), old_most) of itself after an iteration"""
    old_most: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """most that the sampling copy keeps of itself"""
    old_delay: NonNegative = 0
    """updates before the sampling copy begins to lag behind the policy"""
    kl_weight: Annotated[float, Field(ge=0)] = 2e-4
    """weight of the KL to the base, of unit-variance Gaussians around the two velocities: half of their mean squared
    distance, which the released code weighs by 1e-4"""

    def misfits(
        self, pipeline: PipelineConfig, rollout: RolloutConfig, learner: LearnerConfig, rewards: RewardsConfig
    ) -> Iterator[str]:
        if rollout.group_size < 2:
            yield "rollout.group_size 1 leaves nothing to compare: DiffusionNFT needs 2 or more"
        yield from _keep_misfits(rollout, learner)
        if rollout.dynamics not in ("auto", "ode"):
            yield f"nft samples along the ODE; rollout.dynamics {rollout.dynamics} is for grpo"
        if self.levels > rollout.num_steps:
            yield f"nft.levels {self.levels} exceeds the {rollout.num_steps} noise levels of rollout.num_steps"
        if learner.guidance_in_loss:
            yield "learner.guidance_in_loss: nft trains the conditional velocity alone"
