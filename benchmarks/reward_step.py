"""Pairs per second of a training step of the reward model: `python -m benchmarks.reward_step`, half a minute on a CPU.

Ours scores a pair's two images in one forward, encodes a prompt once, and keys noise by pair; its step averages the
weights too. In groups it scores every image once for all pairs of its group. The plain loop has the design of the
paper's released code: two forwards, the batch's prompts encoded at every step, one draw of noise for the batch, no
averaging. All train the same model on the same pairs with the same precision and optimizer; the kinds take turns, and
a ratio is of neighbours. New prompts cost us more: they are encoded one at a time, so that an embedding does not depend
on its batch. That weighs more in the miniature than in SD3.5, so the plain loop runs with given embeddings too.

An image of the miniature set is in 3 pairs (4 images, 6 pairs, the defaults), one of HPDv3 in 2.17 on average:
`--group-images 6 --group-pairs 6` is a little less than that. With SD3.5-medium on a GPU:

    python -m benchmarks.reward_step --groups 1 --reward.taps 4 8 12 --reward.num_heads 8 --reward.lora.rank 64 \\
        --reward.lora.alpha 128 --fit.autocast --pipeline.path stabilityai/stable-diffusion-3.5-medium \\
        --pipeline.dtype bfloat16 --pipeline.height 1024 --pipeline.width 1024 --pipeline.max_sequence_length 128
"""

import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Annotated, Self

import torch
from diffusers import StableDiffusion3Pipeline
from pydantic import Field, model_validator
from torch import nn

from benchmarks.spread import Row, ratios, spread_table
from dina_rl.backbones.base import TextEncoder
from dina_rl.backbones.registry import pipeline_class
from dina_rl.backbones.source import Source
from dina_rl.cli import fail, load
from dina_rl.config import FitConfig, LoRAConfig, PipelineConfig, RewardModelConfig
from dina_rl.config.base import Positive, Section
from dina_rl.data.stores.latents import PairBatch
from dina_rl.data.stores.units import GROUP_IMAGES, Unit, training_batch
from dina_rl.flow.process import add_noise
from dina_rl.reward.fit import RewardFit, fit
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.thurstone import comparison_variance, fidelity_loss
from dina_rl.runtime import configure_process, device, image_size, open_pipeline, sized
from dina_rl.seeding import normal
from dina_rl.types import PromptEmbeds

OURS_NEW, OURS_SEEN = "ours, new prompts", "ours, prompts seen before"
GROUPS_NEW, GROUPS_SEEN = "ours in groups, new prompts", "ours in groups, prompts seen before"
PLAIN, PLAIN_GIVEN = "two forwards", "two forwards, embeddings given"
RATIOS = (
    (OURS_NEW, PLAIN),
    (OURS_SEEN, PLAIN),
    (OURS_SEEN, PLAIN_GIVEN),
    (GROUPS_NEW, PLAIN),
    (GROUPS_SEEN, PLAIN),
    (GROUPS_SEEN, PLAIN_GIVEN),
)


Groups = list[Unit]


class BenchmarkRun(Section):
    """Speed of a training step of the reward model."""

    groups: Positive = 4
    """groups per step"""
    group_images: Annotated[int, Field(ge=2, le=GROUP_IMAGES)] = 4
    """images of a group"""
    group_pairs: Positive = 6
    """pairs between the images of a group: neighbours in a ring first, then the others"""
    steps: Positive = 3
    """steps of each kind in a repeat"""
    repeats: Positive = 5
    """times that the kinds take turns, after one that does not count"""
    threads: Positive = 1
    """torch threads; with other work on the machine, more than one wait for each other"""
    pipeline: PipelineConfig = PipelineConfig()
    reward: RewardModelConfig = RewardModelConfig(taps=(1, 2, 3), num_heads=4, lora=LoRAConfig(rank=16, alpha=32))
    fit: FitConfig = FitConfig()

    @model_validator(mode="after")
    def _so_many_pairs_exist(self) -> Self:
        most = self.group_images * (self.group_images - 1) // 2
        if self.group_pairs > most:
            raise ValueError(f"group_pairs ({self.group_pairs}): {self.group_images} images make {most} pairs")
        return self


class BatchTextEncoder:
    """A batch's prompts in one forward of the stock pipeline's encoders; nothing is remembered."""

    def __init__(self, config: PipelineConfig) -> None:
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            config.location,
            transformer=None,
            vae=None,
            dtype=getattr(torch, config.dtype),
            revision=config.revision,
            variant=config.variant,
        )
        self._pipeline = pipeline.to(device())
        self._max_sequence_length = config.max_sequence_length

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        embeds, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=torch.device(device()),
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
        )
        return PromptEmbeds(embeds=embeds, pooled=pooled)


def plain_loss(
    model: LatentRewardModel, batch: PairBatch, t: torch.Tensor, noise: torch.Tensor, prompt: PromptEmbeds
) -> torch.Tensor:
    """The mean fidelity loss of a batch by two forwards, at noise levels t [B] and noise [B, C, H, W]."""
    preferred = model.score(add_noise(batch.chosen, noise, t), t, prompt)
    other = model.score(add_noise(batch.rejected, noise, t), t, prompt)
    margin = preferred.float() - other.float()
    return fidelity_loss(margin, comparison_variance(t, model.config.thurstone), torch.ones_like(margin)).mean()


def plain_step(progress: RewardFit, batch: PairBatch, encoder: TextEncoder) -> float:
    """One optimizer step of the plain loop; returns its loss."""
    config, place = progress.config, device()
    batch = PairBatch(
        pair_ids=batch.pair_ids,
        chosen=batch.chosen.to(place),
        rejected=batch.rejected.to(place),
        prompts=batch.prompts,
    )
    prompt = encoder(batch.prompts)
    t = torch.rand(len(batch), device=place)
    noise = torch.randn_like(batch.chosen)
    with torch.autocast(place, dtype=torch.bfloat16, enabled=config.autocast):
        loss = plain_loss(progress.model, batch, t, noise, prompt)
    progress.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(progress.parameters.values(), config.max_grad_norm)
    progress.optimizer.step()
    return loss.item()


def group(run: BenchmarkRun, number: int, prompt: str, shape: tuple[int, int, int]) -> Unit:
    """A group of images and its pairs."""
    count = run.group_images
    ring = [(first, (first + step) % count) for step in range(1, count // 2 + 1) for first in range(count)]
    pairs = list({tuple(sorted(pair)): pair for pair in ring}.values())[: run.group_pairs]
    return Unit(
        key=number * run.group_pairs,
        prompt=prompt,
        latents=normal((count, *shape), "group", number),
        chosen=tuple(first for first, _ in pairs),
        rejected=tuple(second for _, second in pairs),
    )


def one_by_one(groups: Groups) -> list[Unit]:
    """Every pair of the groups as a unit of its own."""
    return [
        Unit(key=each.key + n, prompt=each.prompt, latents=each.latents[[chosen, rejected]], chosen=(0,), rejected=(1,))
        for each in groups
        for n, (chosen, rejected) in enumerate(zip(each.chosen, each.rejected, strict=True))
    ]


def as_pairs(groups: Groups) -> PairBatch:
    """The pairs of the groups as the plain loop takes them."""
    pairs = one_by_one(groups)
    return PairBatch(
        pair_ids=torch.tensor([pair.key for pair in pairs]),
        chosen=torch.stack([pair.latents[0] for pair in pairs]),
        rejected=torch.stack([pair.latents[1] for pair in pairs]),
        prompts=tuple(pair.prompt for pair in pairs),
    )


def measure(run: BenchmarkRun) -> dict[str, list[float]]:
    """Pairs per second of every repeat, by kind of step.

    Raises:
        ValueError: a pipeline that cannot be read or is not SD3's, or a reward model that does not fit it.
    """
    if (
        pipeline_class(Source(path=run.pipeline.location, revision=run.pipeline.revision))
        != StableDiffusion3Pipeline.__name__
    ):
        raise ValueError(f"the plain loop encodes prompts as SD3 does; {run.pipeline.path} is another family")
    backbone = open_pipeline(run.pipeline)
    shape = backbone.latent_shape(*image_size(run.pipeline, backbone))
    ours, plain = (RewardFit(LatentRewardModel(backbone, run.reward, seed=0), run.fit) for _ in range(2))
    encoder, batch_encoder = backbone.load_text_encoder(), BatchTextEncoder(sized(run.pipeline, backbone))

    def groups(number: int, prompt: str) -> Groups:
        return [
            group(run, number * run.groups + index, f"{prompt} number {index}", shape) for index in range(run.groups)
        ]

    def our_steps(steps: list[list[Unit]]) -> None:
        pairs = run.groups * run.group_pairs
        for _ in fit(ours, (training_batch(units, step_pairs=pairs) for units in steps), encoder, seed=0):
            pass

    def our_pairs(steps: list[Groups]) -> None:
        our_steps([one_by_one(each) for each in steps])

    def plain_steps(steps: list[Groups]) -> None:
        for each in steps:
            plain_step(plain, as_pairs(each), batch_encoder)

    given = batch_encoder(as_pairs(groups(0, "a familiar scene")).prompts)

    def plain_steps_of_given(steps: list[Groups]) -> None:
        for each in steps:
            plain_step(plain, as_pairs(each), lambda prompts: given)

    kinds: dict[str, tuple[Callable[[list[Groups]], None], bool]] = {
        OURS_NEW: (our_pairs, True),
        PLAIN: (plain_steps, True),
        GROUPS_NEW: (our_steps, True),
        OURS_SEEN: (our_pairs, False),
        PLAIN_GIVEN: (plain_steps_of_given, False),
        GROUPS_SEEN: (our_steps, False),
    }
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(run.repeats + 1):
        for kind, (steps, new) in kinds.items():
            prompt = f"a scene of {kind} in {repeat}" if new else "a familiar scene"
            given_steps = [
                groups(repeat * run.steps + step, f"{prompt} at {step}" if new else prompt) for step in range(run.steps)
            ]
            begin = perf_counter()
            steps(given_steps)
            if repeat:  # the first one warms up
                speeds[kind].append(run.groups * run.group_pairs * run.steps / (perf_counter() - begin))
    return speeds


def table(speeds: dict[str, list[float]]) -> str:
    """Minimum, median and maximum over repeats of every kind's speed, and of ours over the plain loop's."""
    rows = {f"{kind}, pairs/s": Row(values=values, digits=1) for kind, values in speeds.items()}
    for ours, plain in RATIOS:
        rows[f"{ours} / {plain}"] = Row(values=ratios(speeds[ours], speeds[plain]), digits=2)
    return spread_table(rows)


def main(argv: Sequence[str]) -> None:
    run = load(BenchmarkRun, argv, program="python -m benchmarks.reward_step")
    configure_process(run.threads)
    try:
        speeds = measure(run)
    except ValueError as error:
        fail(str(error))
    where = torch.cuda.get_device_name() if device() == "cuda" else f"CPU, {run.threads} threads"
    print(
        f"{where}; {run.groups} groups of {run.group_images} images and {run.group_pairs} pairs a step, "
        f"{run.steps} steps a repeat, {run.repeats} repeats"
    )
    print(table(speeds))


if __name__ == "__main__":
    main(sys.argv[1:])
