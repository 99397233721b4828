"""How much memory a learner rank needs, found by running its forward on tensors without data (torch's meta device)."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dina_rl.adamw import MOMENTS
from dina_rl.backbones.base import Backbone
from dina_rl.backbones.lora import trainable
from dina_rl.backbones.trained import make_trainable
from dina_rl.config import AlignRun
from dina_rl.runtime import image_size
from dina_rl.types import PromptEmbeds

FP32 = 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerFootprint:
    """Bytes on one learner rank. What kernels, allocator and communication need on top is not in it."""

    weights: int  # parameters and buffers, the reference of full fine-tuning included
    optimizer: int  # gradients and AdamW's moments of what is trained, this rank's share of them
    activations: int  # kept from forward to backward of one micro-batch
    block: int  # of them without checkpointing, one block's share of one sample

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations


def learner_footprint(run: AlignRun, backbone: Backbone) -> LearnerFootprint:
    """Footprint of one rank; builds the transformer without its weights.

    Approximations: full fine-tuning below float32 is counted with activations of `pipeline.dtype` (autocast keeps some
    in fp32) and one cast copy of the weights; gradient checkpointing adds the largest block's share, taken as the mean.
    """
    learner, ranks = run.learner, run.workers.learner_ranks
    module = backbone.empty_transformer()
    frozen = bytes_of(module)
    make_trainable(module, learner.lora, targets=backbone.lora_targets, seed=run.seed)
    trained = sum(parameter.numel() for parameter in trainable(module).values())
    activations = saved_bytes(module, backbone, run)
    plain = activations // backbone.num_blocks
    if learner.gradient_checkpointing:
        module.enable_gradient_checkpointing()
        activations = saved_bytes(module, backbone, run) + plain
    buffers = sum(_size(buffer) for buffer in module.buffers())
    parameters, whole = bytes_of(module) - buffers, buffers  # `whole` is on every rank whatever the stage
    if learner.lora is None:
        parameters = trained * FP32
        whole += frozen if run.pipeline.dtype != "float32" else 0  # the cast copy
        whole += frozen if run.kl_weight else 0  # the reference
    gradients = trained * FP32 // (ranks if learner.zero_stage >= 2 else 1)
    moments = len(MOMENTS) * trained * FP32 // (ranks if learner.zero_stage >= 1 else 1)
    weights = parameters // (ranks if learner.zero_stage == 3 else 1) + whole
    return LearnerFootprint(
        weights=weights, optimizer=gradients + moments, activations=activations, block=plain // learner.micro_batch_size
    )


def saved_bytes(module: nn.Module, backbone: Backbone, run: AlignRun) -> int:
    """Bytes of the tensors that autograd keeps of one micro-batch's forwards, each storage once, parameters apart."""
    latents, sigma, prompt = empty_inputs(run, backbone, run.learner.micro_batch_size)
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no later storage can have the same address
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), FlashAttention():
        for _ in range(2 if run.learner.guidance_in_loss else 1):
            backbone.velocity(module, latents, sigma, prompt)
    return sum(storage.nbytes() for storage in kept.values())


def empty_inputs(run: AlignRun, backbone: Backbone, size: int) -> tuple[torch.Tensor, torch.Tensor, PromptEmbeds]:
    """Latents, sigmas and prompts of `size` samples, without data."""
    shape = backbone.latent_shape(*image_size(run.pipeline, backbone))
    tokens, width, pooled = backbone.prompt_shape
    with torch.device("meta"):
        prompt = PromptEmbeds(
            embeds=torch.empty(size, tokens, width, dtype=backbone.dtype),
            pooled=torch.empty(size, pooled, dtype=backbone.dtype),
        )
        return torch.empty(size, *shape), torch.empty(size), prompt


class FlashAttention(TorchFunctionMode):
    """Attention as GPUs compute it, which keeps no attention matrix; on meta tensors torch would take the plain one."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if function is functional.scaled_dot_product_attention:
            inputs = args[:3] or [(kwargs or {})[name] for name in ("query", "key", "value")]
            return torch.ops.aten._scaled_dot_product_flash_attention(*inputs)[0]
        return function(*args, **(kwargs or {}))


def bytes_of(module: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(_size(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
