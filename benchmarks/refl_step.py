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
from dina_rl.alignment.footprint import FP32, FlashAttention, bytes_of, empty_inputs
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
class Memory:
    """Bytes."""

    policy: int  # weights, gradients and moments
    reward: int  # weights
    policy_kept: int  # for the policy's backward
    policy_kept_again: int  # the same where blocks are computed again, one block's share among it
    reward_kept: int  # for the reward's

    def peaks(self) -> dict[str, int]:
        """By how the step is arranged."""
        held = self.policy + self.reward
        again = self.policy_kept_again
        return {
            PLAIN: held + self.policy_kept + self.reward_kept,
            APART: held + max(self.policy_kept, self.reward_kept),
            AGAIN: held + max(again, self.reward_kept),
            ASLEEP: max(self.policy + again, self.reward + self.reward_kept),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a step with one reward."""

    score: int  # operations
    score_backward: int
    policy: int
    policy_backward: int
    memory: Memory

    def optimisation(self) -> dict[str, int]:
        """Operations by how the step is arranged."""
        once = self.policy + self.policy_backward + self.score + self.score_backward
        return {PLAIN: once, APART: once, AGAIN: once + self.policy, ASLEEP: once + self.policy}


def cost(step: Step, reward: RewardName) -> Cost:
    """Counted on the models' shapes."""
    with operations(with_gradient=True) as counter:
        clean = step.predicted()
        policy = counter.get_total_flops()
        clean.sum().backward()
        policy_backward = counter.get_total_flops() - policy
    with operations(with_gradient=True) as counter:
        score = step.score(reward, torch.zeros_like(clean).requires_grad_())
        forward = counter.get_total_flops()
        score.backward()
        backward = counter.get_total_flops() - forward
    return Cost(
        score=forward,
        score_backward=backward,
        policy=policy,
        policy_backward=policy_backward,
        memory=memory(step, reward),
    )


def memory(step: Step, reward: RewardName) -> Memory:
    transformer = step.models.transformer
    trained = sum(parameter.numel() for parameter in trainable(transformer).values())
    clean = torch.zeros_like(step.inputs()[0]).requires_grad_()
    plain = kept_bytes(step.predicted, transformer)
    block = plain // step.models.backbone.num_blocks
    with checkpointed(transformer):
        again = kept_bytes(step.predicted, transformer) + block
    return Memory(
        policy=bytes_of(transformer) + (1 + len(MOMENTS)) * FP32 * trained,
        reward=sum(map(bytes_of, step.modules(reward))),
        policy_kept=plain,
        policy_kept_again=again,
        reward_kept=kept_bytes(lambda: step.score(reward, clean), *step.modules(reward)),
    )


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
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


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
