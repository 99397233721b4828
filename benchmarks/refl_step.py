"""One ReFL step at batch 1, part by part: its operations and memory on models without data, its peak on a GPU."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from diffusers.models import ModelMixin
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from dina_rl.adamw import MOMENTS
from dina_rl.alignment.costs import operations
from dina_rl.alignment.footprint import FlashAttention, bytes_of, empty_inputs
from dina_rl.alignment.skeletons import Skeletons
from dina_rl.backbones.lora import trainable
from dina_rl.config import AlignRun
from dina_rl.flow.process import predict_clean
from dina_rl.scorers.base import EmptyImageScorer
from dina_rl.scorers.hpsv3 import HPSv3, look
from dina_rl.types import PromptEmbeds

RewardName = Literal["DiNa-LRM", "HPSv3"]
DINA: RewardName = "DiNa-LRM"
HPSV3: RewardName = "HPSv3"
REWARDS = (DINA, HPSV3)
PLAIN, APART, AGAIN, ASLEEP = "one graph", "gradient first", "and blocks again", "and the idle asleep"
ARRANGEMENTS = (PLAIN, APART, AGAIN, ASLEEP)
SIGMA = 0.1
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The parts of a ReFL step, on whatever device its models lie."""

    run: AlignRun
    models: Skeletons

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Latents, noise level and the two tensors of a prompt."""
        place = next(self.models.transformer.parameters()).device
        latents, sigma, prompt = empty_inputs(self.run, self.models.backbone, 1)
        empty = latents, sigma, prompt.embeds, prompt.pooled
        return tuple(torch.zeros_like(each, device=place) for each in empty)

    def predicted(self) -> torch.Tensor:
        """The policy's one-step prediction of the clean latents."""
        latents, sigma, embeds, pooled = self.inputs()
        prompt = PromptEmbeds(embeds=embeds, pooled=pooled)
        velocity = self.models.backbone.velocity(self.models.transformer, latents, sigma, prompt)
        return predict_clean(latents, velocity.float(), SIGMA)

    def score(self, reward: RewardName, clean: torch.Tensor) -> torch.Tensor:
        return self.latent_score(clean) if reward == DINA else self.pixel_score(clean)

    def latent_score(self, clean: torch.Tensor) -> torch.Tensor:
        _, sigma, embeds, pooled = self.inputs()
        dina, prompt = self.models.reward, PromptEmbeds(embeds=embeds, pooled=pooled)
        assert dina is not None
        features = self.models.backbone.features(dina.truncated, clean, sigma, prompt, dina.taps)
        score: torch.Tensor = dina.head(features, num_levels=1).sum()
        return score

    def pixel_score(self, clean: torch.Tensor) -> torch.Tensor:
        decoded = self.models.vae.decode(clean.to(self.models.backbone.dtype)).sample
        return look(self.judge, (decoded[0].float() / 2 + 0.5).clamp(0, 1))

    def in_one_graph(self, reward: RewardName) -> None:
        """The step as one backward."""
        (-self.score(reward, self.predicted())).sum().backward()

    def reward_alone(self, reward: RewardName) -> torch.Tensor:
        """The score's gradient at the prediction."""
        clean = self.inputs()[0].requires_grad_()
        (gradient,) = torch.autograd.grad(self.score(reward, clean).sum(), clean)
        return gradient

    def policy_alone(self) -> None:
        self.predicted().sum().backward()

    @property
    def judge(self) -> HPSv3:
        (hpsv3,) = (each.model for each in self.models.pixel_rewards)
        assert isinstance(hpsv3, HPSv3)
        return hpsv3

    def modules(self, reward: RewardName) -> tuple[nn.Module, ...]:
        """What scores."""
        dina = self.models.reward
        assert dina is not None
        return (dina.truncated, dina.head) if reward == DINA else (self.models.vae, self.judge)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyCost:
    """Operations and bytes of the policy."""

    forward: int
    backward: int
    held: int  # weights, gradients and moments
    kept: int  # for the backward
    kept_again: int  # the same where blocks are computed again, one block's share among it


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCost:
    """Operations and bytes of a reward."""

    forward: int
    backward: int
    held: int  # weights
    kept: int  # for the backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a step."""

    policy: PolicyCost
    reward: RewardCost

    def optimisation(self) -> dict[str, int]:
        """Operations by how the step is arranged."""
        policy, reward = self.policy, self.reward
        once = policy.forward + policy.backward + reward.forward + reward.backward
        return {PLAIN: once, APART: once, AGAIN: once + policy.forward, ASLEEP: once + policy.forward}

    def peaks(self) -> dict[str, int]:
        """Bytes by how the step is arranged."""
        policy, reward = self.policy, self.reward
        held = policy.held + reward.held
        return {
            PLAIN: held + policy.kept + reward.kept,
            APART: held + max(policy.kept, reward.kept),
            AGAIN: held + max(policy.kept_again, reward.kept),
            ASLEEP: max(policy.held + policy.kept_again, reward.held + reward.kept),
        }


def policy_cost(step: Step) -> PolicyCost:
    """Counted on the models' shapes."""
    transformer = step.models.transformer
    with operations(with_gradient=True) as counter:
        clean = step.predicted()
        forward = counter.get_total_flops()
        clean.sum().backward()
    kept = kept_bytes(step.predicted, transformer)
    with checkpointed(transformer):
        again = kept_bytes(step.predicted, transformer) + kept // step.models.backbone.num_blocks
    return PolicyCost(
        forward=forward,
        backward=counter.get_total_flops() - forward,
        held=bytes_of(transformer) + (1 + len(MOMENTS)) * tensor_bytes(trainable(transformer).values()),
        kept=kept,
        kept_again=again,
    )


def reward_cost(step: Step, reward: RewardName) -> RewardCost:
    """Counted on the models' shapes."""
    clean = step.inputs()[0].requires_grad_()
    with operations(with_gradient=True) as counter:
        score = step.score(reward, clean)
        forward = counter.get_total_flops()
        score.backward()
    modules = step.modules(reward)
    return RewardCost(
        forward=forward,
        backward=counter.get_total_flops() - forward,
        held=sum(map(bytes_of, modules)),
        kept=kept_bytes(lambda: step.score(reward, clean), *modules),
    )


def costs(step: Step) -> dict[RewardName, Cost]:
    """Of the step with either reward."""
    policy = policy_cost(step)
    return {reward: Cost(policy=policy, reward=reward_cost(step, reward)) for reward in REWARDS}


def kept_bytes(work: Callable[[], object], *owners: nn.Module) -> int:
    """Bytes that autograd keeps of `work`, each storage once, without the weights of `owners`."""
    own = {tensor.untyped_storage()._cdata for owner in owners for tensor in (*owner.parameters(), *owner.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), FlashAttention():
        result = work()
    del result  # held until here, so that what it keeps has addresses of its own
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def checkpointed(transformer: nn.Module) -> Iterator[None]:
    assert isinstance(transformer, ModelMixin)
    transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        transformer.disable_gradient_checkpointing()


def filled(step: Step, reward: RewardName, device: str) -> Step:
    """The same step with models of zeros on a device, those of one reward."""
    models, dina = step.models, step.models.reward
    assert dina is not None
    with_policy = replace(models, transformer=_filled(models.transformer, device))
    if reward == DINA:
        own = replace(dina, truncated=_filled(dina.truncated, device), head=_filled(dina.head, device))
        return replace(step, models=replace(with_policy, reward=own))
    judge = EmptyImageScorer(model=_filled(step.judge, device), look=models.pixel_rewards[0].look)
    vae = _filled(models.vae, device)
    return replace(step, models=replace(with_policy, vae=vae, pixel_rewards=(judge,)))


def _filled(module: Module, device: str) -> Module:
    on_device: Module = deepcopy(module).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*on_device.parameters(), *on_device.buffers()):
            tensor.zero_()
    return on_device


def measured_peaks(step: Step, reward: RewardName) -> dict[str, int]:
    """Peak bytes on the GPU, where the step's models are, by arrangement; with gradients and moments."""
    transformer = step.models.transformer
    parameters = list(trainable(transformer).values())
    moments = [torch.zeros_like(parameter) for parameter in parameters for _ in MOMENTS]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    policy = bytes_of(transformer) + tensor_bytes(parameters) + tensor_bytes(moments)  # gradients are as large
    scorer = sum(map(bytes_of, step.modules(reward)))
    plain = peak(lambda: step.in_one_graph(reward))
    scoring, update = peak(lambda: step.reward_alone(reward)), peak(step.policy_alone)
    with checkpointed(transformer):
        again = peak(step.policy_alone)
    return {
        PLAIN: plain,
        APART: max(scoring, update),
        AGAIN: max(scoring, again),
        ASLEEP: max(scoring - policy, again - scorer),
    }


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak(work: Callable[[], object]) -> int:
    """Most bytes that were allocated in a second round of `work`."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
