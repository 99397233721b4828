"""Settings of the alignment, section by section."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dina_rl.config.base import (
    Fraction,
    NonNegative,
    PolicyLoRAConfig,
    Positive,
    Rate,
    Section,
)
from dina_rl.config.keys import Mark
from dina_rl.flow.sde import Dynamics


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
    dynamics: Dynamics | Literal["auto"] = "auto"
    """step of the window, see dina_rl/flow/sde.py; auto: flow_sde for grpo, ode for refl, which has no window"""
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
    max_failed: Annotated[Fraction, Mark.PROCESS] = 0.1
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
    """weight of the KL to the base: the adapter switched off, or a second transformer when all weights are trained"""
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
    """weight of the KL to the base, of unit-variance Gaussians around the two velocities"""
    pretraining_weight: Annotated[float, Field(ge=0)] = 0.0
    """weight of the flow-matching loss on preferred images, ReFL's pretraining loss"""
    pretraining_latents: str = "~/dina_rl/shapes_reward/latents"
    """latent store of those images, as jobs.encode writes it"""

    @property
    def pretraining_location(self) -> Path:
        return Path(self.pretraining_latents).expanduser()


class LearnerConfig(Section):
    """The optimizer's side."""

    lora: PolicyLoRAConfig | None = PolicyLoRAConfig(rank=32, alpha=64.0)
    """None trains all weights of the transformer; they travel to the rollout actors in parts"""
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
    """decay of the averaged weights that are evaluated and exported, with warm-up min((1 + n) / (10 + n), decay)"""
    guidance_in_loss: bool = False
    """train the guided velocity, at a second forward with gradient, instead of the conditional one alone"""
    gradient_checkpointing: Annotated[bool, Mark.PROCESS] = False
    """recompute activations in the backward pass"""
    engine: Annotated[Literal["deepspeed", "torch"], Mark.PROCESS] = "deepspeed"
    """`torch` is plain AdamW on one rank; --inline always uses it"""
    zero_stage: Annotated[int, Field(ge=0, le=3), Mark.PROCESS] = 0
    """DeepSpeed ZeRO stage"""


class WatchConfig(Section):
    """The divergence watch: golden falls while proxy rises."""

    action: Literal["none", "stop", "raise_kl", "roll_back"] = "none"
    """what to do beside marking it: nothing; stop and export the weights that were best in golden; multiply the KL
    weight by kl_factor; or go on from the learner's state (policy, moments, average) at the best measurement"""
    patience: Positive = 2
    """measurements in a row that must be worse than the best one"""
    margin: Annotated[float, Field(ge=0)] = 0.02
    """how far below its best golden must lie, in its own units"""
    kl_factor: Annotated[float, Field(gt=1)] = 10.0
    """what raise_kl multiplies the algorithm's kl_weight by, each time"""


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
    weights_part_mib: Positive = 512
    """size of the parts in which the policy's weights travel to the rollout actors, in MiB"""
    max_restarts: NonNegative = 3
    """dead or hung actors replaced per pool before the run stops"""
