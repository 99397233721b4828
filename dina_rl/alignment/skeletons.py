"""All models of a run on torch's meta device, shapes without weights: what a plan counts by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from diffusers.models import AutoencoderKL
from torch import nn

from dina_rl.alignment.algorithms.registry import merges
from dina_rl.backbones.base import Backbone
from dina_rl.backbones.known import PIPELINES
from dina_rl.backbones.lora import add_lora
from dina_rl.backbones.source import Source, index_file, read_json
from dina_rl.backbones.trained import make_trainable
from dina_rl.config import AlignRun, RewardModelConfig
from dina_rl.reward.checkpoint import read_card
from dina_rl.reward.head import RewardHead
from dina_rl.runtime import open_pipeline
from dina_rl.scorers.base import EmptyImageScorer
from dina_rl.scorers.registry import empty_image_scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyReward:
    """A DiNa-LRM."""

    truncated: nn.Module
    head: nn.Module
    taps: tuple[int, ...]
    assumed: bool  # it is not there yet, and taken for the paper's


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeletons:
    """The models, with the adapters that they have at work."""

    backbone: Backbone
    transformer: nn.Module  # as it is trained
    sampler: nn.Module  # as it samples: where the adapter is merged, without one
    text_encoders: Mapping[str, nn.Module]  # by component
    vae: AutoencoderKL
    reward: EmptyReward | None
    pixel_rewards: tuple[EmptyImageScorer, ...]
    golden: EmptyImageScorer | None
    probes: EmptyImageScorer | None


@contextmanager
def open_skeletons(run: AlignRun) -> Iterator[tuple[AlignRun, Skeletons]]:
    """The models of `run`, and the run as it is to be counted: a known hub id's files are written out for the block.

    Raises:
        ValueError: a pipeline or model that is neither known nor can be read here.
    """
    known = PIPELINES.get(run.pipeline.path)
    with TemporaryDirectory() as scratch:
        reward = _paper_reward(run.pipeline.path)
        if known is not None:
            directory = Path(scratch) / run.pipeline.path
            known.write(directory)
            there = {"path": str(directory), "revision": None, "variant": None}
            run = run.model_copy(update={"pipeline": run.pipeline.model_copy(update=there)})
        yield run, _skeletons(run, reward)


def _skeletons(run: AlignRun, paper: RewardModelConfig | None) -> Skeletons:
    location, revision, variant = run.pipeline.place
    source = Source(path=location, revision=revision, variant=variant)
    backbone = open_pipeline(run.pipeline)
    transformer = backbone.empty_transformer()
    reward = _empty_reward(run, backbone, transformer, paper)
    make_trainable(transformer, run.learner.lora, targets=backbone.lora_targets, seed=run.seed)
    sampler = backbone.empty_transformer() if merges(run) else transformer
    golden, probe = run.golden.of_images, run.probe_model
    with torch.device("meta"):
        config = AutoencoderKL.load_config(source.path, **source.config("vae"))
        vae: AutoencoderKL = AutoencoderKL.from_config(config).to(backbone.dtype).requires_grad_(False)
    return Skeletons(
        backbone=backbone,
        transformer=transformer,
        sampler=sampler,
        text_encoders=_text_encoders(source, backbone.dtype),
        vae=vae,
        reward=reward,
        pixel_rewards=tuple(empty_image_scorer(each) for each in run.rewards.of_images),
        golden=None if golden is None else empty_image_scorer(golden),
        probes=None if probe is None else empty_image_scorer(probe),
    )


def _paper_reward(path: str) -> RewardModelConfig | None:
    """The reward model that the paper builds on a known pipeline."""
    known = PIPELINES.get(path)
    return None if known is None else RewardModelConfig(taps=known.taps, head_width=known.head_width)


def _empty_reward(
    run: AlignRun, backbone: Backbone, transformer: nn.Module, paper: RewardModelConfig | None
) -> EmptyReward | None:
    """The fitted model where it is, else the paper's, or on another backbone one on half of its blocks."""
    dina = run.rewards.dina
    if dina is None:
        return None
    there = dina.location.is_dir()
    half = RewardModelConfig(taps=(max(1, backbone.last_tap // 2),))
    config = read_card(dina.location).reward if there else paper or half
    truncated = backbone.truncated(transformer, config.taps[-1])
    if config.lora is not None:
        lora = config.lora
        add_lora(truncated, rank=lora.rank, alpha=lora.alpha, targets=backbone.lora_targets, seed=0)
    with torch.device("meta"):
        head = RewardHead(
            config.head_width or backbone.width,
            token_width=backbone.width,
            time_width=backbone.time_width,
            num_taps=len(config.taps),
            num_queries=config.num_queries,
            num_heads=config.num_heads,
        )
    frozen = truncated.requires_grad_(False)
    return EmptyReward(truncated=frozen, head=head.requires_grad_(False), taps=config.taps, assumed=not there)


def _text_encoders(source: Source, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The text encoders that the pipeline's index names."""
    found = {}
    for name, entry in read_json(index_file(source)).items():
        if name.startswith("text_encoder") and isinstance(entry, list) and entry[1] is not None:
            kind = getattr(transformers, entry[1])
            config = kind.config_class.from_pretrained(source.path, **source.config(name))
            with torch.device("meta"):
                found[name] = kind(config).to(dtype)
    return found
