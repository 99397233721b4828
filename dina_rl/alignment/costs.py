"""What a run computes, in floating-point operations: each part counted once on tensors without data."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.footprint import FlashAttention, empty_inputs
from dina_rl.alignment.skeletons import EmptyReward, Skeletons
from dina_rl.backbones.base import Backbone
from dina_rl.config import AlignRun, GridConfig
from dina_rl.scorers.base import EmptyImageScorer
from dina_rl.scorers.grid import crop_latents


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Operations of one sample; of `prompt`, of one prompt."""

    sampled: int  # one pass of the transformer as it samples
    forward: int  # one as it is trained, without a gradient
    trained: int  # one pass and its backward, with what gradient checkpointing computes again
    score: int  # by all rewards
    score_gradient: int  # and their gradient at the latents; 0 where nobody asks for it
    prompt: int  # text encoders, 2 a parameter and token
    golden: int  # decoded and measured


def count_costs(run: AlignRun, models: Skeletons) -> Costs:
    """Costs of the run that `models` were opened for."""
    algorithm = open_algorithm(run)
    differentiated = algorithm.wants_reward_gradients or algorithm.work().reward_passes > 0
    forward, backward = _pass(run, models)
    again = forward if run.learner.gradient_checkpointing else 0
    return Costs(
        sampled=forward if models.sampler is models.transformer else _sampled(run, models),
        forward=forward,
        trained=forward + backward + again,
        score=_score(run, models, with_gradient=False),
        score_gradient=_score(run, models, with_gradient=True) if differentiated else 0,
        prompt=sum(_encoded(encoder, models.backbone) for encoder in models.text_encoders.values()),
        golden=_seen(run, models, () if models.golden is None else (models.golden,)),
    )


@contextmanager
def operations(*, with_gradient: bool = False) -> Iterator[FlopCounterMode]:
    """Counts the block, attention as GPUs compute it. (On CPU tensors torch would count none for attention.)"""
    with FlopCounterMode(display=False) as counter, FlashAttention(), torch.set_grad_enabled(with_gradient):
        yield counter


def _pass(run: AlignRun, models: Skeletons) -> tuple[int, int]:
    """Forward and backward of the transformer."""
    with operations(with_gradient=True) as counter:
        velocity = models.backbone.velocity(models.transformer, *empty_inputs(run, models.backbone, 1))
        forward = counter.get_total_flops()
        velocity.sum().backward()
    return forward, counter.get_total_flops() - forward


def _sampled(run: AlignRun, models: Skeletons) -> int:
    with operations() as counter:
        models.backbone.velocity(models.sampler, *empty_inputs(run, models.backbone, 1))
    return counter.get_total_flops()


def _score(run: AlignRun, models: Skeletons, *, with_gradient: bool) -> int:
    """All rewards of one sample. A backward through pictures' models costs what the forward does."""
    total = _seen(run, models, models.pixel_rewards) * (2 if with_gradient else 1) if models.pixel_rewards else 0
    if run.rewards.grid is not None:
        total += _cropped(run.rewards.grid, models) * (2 if with_gradient else 1)
    dina, reward = run.rewards.dina, models.reward
    if dina is not None and reward is not None:
        total += dina.draws * _latent_score(run, models, reward, len(dina.levels), with_gradient=with_gradient)
    return total


def _latent_score(run: AlignRun, models: Skeletons, reward: EmptyReward, levels: int, *, with_gradient: bool) -> int:
    latents, sigma, prompt = empty_inputs(run, models.backbone, levels)
    latents.requires_grad_(with_gradient)
    with operations(with_gradient=with_gradient) as counter:
        features = models.backbone.features(reward.truncated, latents, sigma, prompt, reward.taps)
        score = reward.head(features, num_levels=levels).sum()
        if with_gradient:
            score.backward()
    return counter.get_total_flops()


def _seen(run: AlignRun, models: Skeletons, scorers: Sequence[EmptyImageScorer]) -> int:
    """One sample decoded and looked at by scorers of images."""
    latents, _, _ = empty_inputs(run, models.backbone, 1)
    with operations() as counter:
        models.vae.decode(latents.to(models.backbone.dtype))
    return counter.get_total_flops() + sum(map(_looked, scorers))


def _cropped(config: GridConfig, models: Skeletons) -> int:
    """The crops of one sample decoded; their spectrum is next to nothing."""
    grid = models.backbone.grid
    side = crop_latents(grid) + 2 * config.context
    with operations() as counter, torch.device("meta"):
        models.vae.decode(torch.empty(config.crops, grid.channels, side, side, dtype=models.backbone.dtype))
    return counter.get_total_flops()


@cache
def _looked(scorer: EmptyImageScorer) -> int:
    with operations() as counter:
        scorer.look()
    return counter.get_total_flops()


def _encoded(encoder: nn.Module, backbone: Backbone) -> int:
    """One prompt, padded: CLIP reads as many tokens as it has places for, other encoders as the pipeline asks."""
    tokens = backbone.max_sequence_length
    if isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
        tokens = encoder.config.max_position_embeddings
    return 2 * _used(encoder) * tokens


def _used(encoder: nn.Module) -> int:
    """Parameters that a token meets: all but the table that it is looked up in."""
    total = sum(parameter.numel() for parameter in encoder.parameters())
    return total - max((each.weight.numel() for each in encoder.modules() if isinstance(each, nn.Embedding)), default=0)
