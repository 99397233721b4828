"""Settings of the alignment, section by section."""

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
    negative_prompt: str = ""
    """what guidance leads away from, in rollouts and when measuring"""
    dynamics: Dynamics | Literal["auto"] = "auto"
    """step of the window, see dina_rl/flow/sde.py; auto: flow_sde for grpo; the other algorithms
    have no window and follow the ODE"""
    noise_level: Annotated[float, Field(ge=0)] = 0.7
    """a of the dynamics: usually 0.7 for flow_sde, 0.8 for cps, 0.2 to 0.3 for dance"""
    window_start: NonNegative = 0
    """first SDE step"""
    window_range: tuple[NonNegative, NonNegative] | None = None
    """draw each iteration's window within these steps [first, end) instead of starting it at window_start"""
    window_steps: Positive = 3
    """number of SDE steps, the ones that are trained"""
    prompts_per_iteration: Positive = 32
    """prompts (groups) per iteration"""
    group_size: Positive = 18
    """samples per prompt"""
    groups_per_call: Positive = 1
    """groups that one rollout actor samples and one scorer scores in one forward"""
    max_failed: Annotated[Fraction, Mark.PROCESS] = 0.1
    """share of an iteration's groups whose reward may fail (be not finite) before the run stops"""


class LearnerConfig(Section):
    """The optimizer's side."""

    lora: PolicyLoRAConfig | None = PolicyLoRAConfig()
    """None trains all weights of the transformer; they travel to the rollout actors in parts"""
    learning_rate: Rate = 3e-5
    """AdamW's rate, after its warm-up and at the start of its schedule"""
    warmup_updates: NonNegative = 0
    """optimizer updates (updates_per_iteration x epochs in an iteration) over which the rate rises in a line"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """the rate after the warm-up: constant, or falling to 0 over the rest of the run, in a line or half a cosine"""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's decoupled weight decay"""
    max_grad_norm: Rate = 1.0
    """gradient norm clip"""
    updates_per_iteration: Positive = 1
    """minibatches per iteration, of whole groups, one optimizer update each"""
    keep: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """train on so many samples of each group: one half those of the highest advantages, the other of the lowest; None:
    on all. Advantages are those within the whole group"""
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

    @property
    def rate_depends_on_length(self) -> bool:
        """Whether a longer run has other rates from the start: one that has begun cannot be made longer."""
        return self.schedule != "constant"


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

    layout: Literal["colocated", "split"] | None = None
    """colocated: every GPU holds a rollout actor, a scorer and a learner rank, which work in turns; split: each actor
    has GPUs of its own, as gpus_per_* say; None: colocated where workers.gpus is given"""
    gpus: NonNegative = 0
    """GPUs of the colocated layout; as many are its rollout actors, its scorers and its learner ranks"""
    sleep: bool = False
    """colocated: models whose turn it is not wait in pinned host memory; for those that --plan says do not fit a GPU
    together"""
    rollout_workers: Positive = 2
    """rollout actors"""
    text_workers: NonNegative = 0
    """actors that hold the text encoders and encode each prompt once, on the GPUs of the first rollout actors; 0: every
    rollout actor holds them itself. Left out it is 1 where rollout actors have GPUs; more are for runs with many
    prompts and few samples of each"""
    scorers: Positive = 1
    """reward scorer actors"""
    learner_ranks: Positive = 2
    """data-parallel ranks of the learner"""
    cpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    """CPUs Ray reserves for one actor; 0 lets the phases of a small machine share its cores"""
    gpus_per_rollout: Annotated[float, Field(ge=0)] = 0
    """split: GPUs of one rollout actor"""
    gpus_per_scorer: Annotated[float, Field(ge=0)] = 0
    """split: GPUs of one scorer"""
    gpus_per_rank: Annotated[float, Field(ge=0)] = 0
    """split: GPUs of one learner rank"""
    threads_per_actor: Positive = 1
    """torch threads of one actor on the CPU"""
    start_timeout_s: Rate = 300.0
    """longest wait for actors to come up"""
    call_timeout_s: Rate = 1800.0
    """longest wait for one rollout, scoring or update call"""
    weights_part_mib: Positive = 512
    """size of the parts in which the policy's weights and the learner's state travel, in MiB"""
    snapshot_every: Positive = 5
    """iterations between snapshots of the learner's whole state in the object store. If a rank is lost, the updates
    since the last one are made again; until the next one their rollouts stay in the store"""
    max_restarts: NonNegative = 3
    """dead or hung actors replaced per pool before the run stops"""

    @model_validator(mode="before")
    @classmethod
    def _one_of_each_on_a_gpu(cls, values: object) -> object:
        """Numbers of actors that are not given are the number of GPUs."""
        if not isinstance(values, dict) or values.get("layout") == "split" or not _is_count(values.get("gpus")):
            return values
        return {**dict.fromkeys(_NUMBERS, values["gpus"]), **values}

    @model_validator(mode="before")
    @classmethod
    def _text_encoders_are_large_on_gpus(cls, values: object) -> object:
        """On a machine without GPUs one process less is worth more than the memory of small encoders."""
        if not isinstance(values, dict) or not (values.get("gpus") or values.get("gpus_per_rollout")):
            return values
        return {"text_workers": 1, **values}

    @model_validator(mode="after")
    def _settings_are_of_the_layout(self) -> Self:
        if self.text_workers > self.rollout_workers:
            raise ValueError(
                f"workers.text_workers is {self.text_workers}, but there are only {self.rollout_workers} rollout "
                "actors, whose GPUs they share"
            )
        if self.colocated:
            self._check_colocated()
        elif self.gpus:
            raise ValueError("workers.gpus is of the colocated layout; the split one has workers.gpus_per_*")
        elif self.sleep:
            raise ValueError("workers.sleep is of the colocated layout: give workers.gpus")
        return self

    def _check_colocated(self) -> None:
        if not self.gpus:
            raise ValueError("workers.layout colocated needs workers.gpus, the number of GPUs")
        for name in _SHARES:
            if getattr(self, name):
                raise ValueError(f"workers.{name} is of the split layout; a colocated GPU is shared by all kinds")
        for name in _NUMBERS:
            if getattr(self, name) != self.gpus:
                raise ValueError(
                    f"workers.{name} is {getattr(self, name)}, but the colocated layout has one on each of its "
                    f"workers.gpus {self.gpus}; leave it out"
                )

    @property
    def colocated(self) -> bool:
        """Every GPU holds a rollout actor, a scorer and a learner rank."""
        return self.layout == "colocated" or (self.layout is None and self.gpus > 0)


_NUMBERS = ("rollout_workers", "scorers", "learner_ranks")
_SHARES = ("gpus_per_rollout", "gpus_per_scorer", "gpus_per_rank")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
