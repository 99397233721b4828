"""The loop that ours is measured against, written from the description of flow_grpo's script, without code of ours.

One process on the stock pipeline: a batch's prompts are encoded with the batch, guidance is one forward of the doubled
batch, in sampling and in the loss alike, every batch is decoded, and every step of every micro-batch has a forward of
the policy, one of the base (the adapter switched off) and a backward of its own. What it decodes nobody scores: the
reward is ours, on latents, so that both loops pay for the same one.

Shapes: B samples of a batch, W steps of the window, C H W latent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.clocks import Clock
from benchmarks.iteration import SAMPLE, UPDATE, Seconds
from dina_rl.backbones.sd3 import SD3
from dina_rl.config import AlignRun
from dina_rl.runtime import device, open_pipeline
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.dina import open_dina
from dina_rl.types import PromptEmbeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A batch, or several put together."""

    states: torch.Tensor  # [B, W + 1, C, H, W]
    log_probs: torch.Tensor  # [B, W]
    embeds: torch.Tensor
    pooled: torch.Tensor
    rewards: torch.Tensor  # [B]


def sde_step(
    latents: torch.Tensor, velocity: torch.Tensor, sigmas: torch.Tensor, step: int, noise_level: float
) -> tuple[torch.Tensor, float]:
    """(mean, standard deviation) of Flow-GRPO's stochastic step (its Eq. 9)."""
    sigma, following = sigmas[step].item(), sigmas[step + 1].item()
    dt = following - sigma
    scale = math.sqrt(sigma / (1 - (sigmas[1].item() if sigma == 1 else sigma))) * noise_level
    drift = velocity + scale**2 / (2 * sigma) * (latents + (1 - sigma) * velocity)
    return latents + drift * dt, scale * math.sqrt(-dt)


def log_density(latents: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """[B], the mean over dimensions."""
    density = -((latents - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=(1, 2, 3))


class PlainLoop:
    """Models, adapter and optimizer of one run; see the module's docstring."""

    def __init__(self, run: AlignRun) -> None:
        assert run.learner.lora is not None
        assert run.rewards.dina is not None
        self._run, self._device = run, torch.device(device())
        pipeline = StableDiffusion3Pipeline.from_pretrained(run.pipeline.location, dtype=torch.float32)
        self._pipeline = pipeline.to(self._device)
        pipeline.transformer.requires_grad_(False)
        pipeline.vae.requires_grad_(False)
        adapter = LoraConfig(
            r=run.learner.lora.rank,
            lora_alpha=int(run.learner.lora.alpha),
            init_lora_weights="gaussian",
            target_modules=list(SD3.lora_targets),
        )
        self._transformer = get_peft_model(pipeline.transformer, adapter)
        self._trained = [each for each in self._transformer.parameters() if each.requires_grad]
        self._average = [each.detach().clone() for each in self._trained]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=run.learner.learning_rate, weight_decay=run.learner.weight_decay
        )
        backbone = open_pipeline(run.pipeline)
        self._text_length, self._shape = backbone.max_sequence_length, backbone.latent_shape(*backbone.image_size)
        self._scorer = open_dina(run.rewards.dina, backbone)
        pipeline.scheduler.set_timesteps(run.rollout.num_steps)
        self._sigmas = pipeline.scheduler.sigmas
        self._negative = self._encode([""])

    def iterate(self, prompts: Sequence[str], clock: Clock = perf_counter) -> Seconds:
        """One iteration on these prompts, a group each."""
        rollout, begin = self._run.rollout, clock()
        repeated = [prompt for prompt in prompts for _ in range(rollout.group_size)]
        size = rollout.groups_per_call * rollout.group_size
        batches = [self._sample(repeated[first : first + size]) for first in range(0, len(repeated), size)]
        samples = Samples(
            states=torch.cat([batch.states for batch in batches]),
            log_probs=torch.cat([batch.log_probs for batch in batches]),
            embeds=torch.cat([batch.embeds for batch in batches]),
            pooled=torch.cat([batch.pooled for batch in batches]),
            rewards=torch.cat([batch.rewards for batch in batches]),
        )
        groups = samples.rewards.view(len(prompts), -1)
        spread = groups.std(1, keepdim=True, correction=0)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()
        sampled = clock()
        self._train(samples, advantages.clamp(-5, 5))
        return {SAMPLE: sampled - begin, UPDATE: clock() - sampled}

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._text_length,
        )
        return embeds, pooled

    def _velocity(
        self, module: nn.Module, latents: torch.Tensor, step: int, embeds: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """The velocity that is followed; a guided one by a doubled batch."""
        scale, count = self._run.rollout.guidance_scale, len(latents)
        if scale != 1:
            latents = torch.cat([latents, latents])
            embeds = torch.cat([self._negative[0].repeat(count, 1, 1), embeds])
            pooled = torch.cat([self._negative[1].repeat(count, 1), pooled])
        velocity: torch.Tensor = module(
            hidden_states=latents,
            timestep=(1000 * self._sigmas[step]).expand(len(latents)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        if scale == 1:
            return velocity
        away, towards = velocity.chunk(2)
        return away + scale * (towards - away)

    @torch.no_grad()
    def _sample(self, prompts: Sequence[str]) -> Samples:
        """A batch: encoded, denoised, decoded, scored."""
        rollout, sigmas = self._run.rollout, self._sigmas
        embeds, pooled = self._encode(prompts)
        latents = torch.randn(len(prompts), *self._shape, device=self._device)
        states, log_probs = [latents], []
        for step in range(rollout.num_steps):
            velocity = self._velocity(self._transformer, latents, step, embeds, pooled)
            if step < rollout.window_steps:
                mean, std = sde_step(latents, velocity, sigmas, step, rollout.noise_level)
                latents = mean + std * torch.randn_like(mean)
                states.append(latents)
                log_probs.append(log_density(latents, mean, std))
            else:
                latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
        self._decode(latents)
        return Samples(
            states=torch.stack(states, 1),
            log_probs=torch.stack(log_probs, 1),
            embeds=embeds,
            pooled=pooled,
            rewards=self._score(latents, prompts, embeds, pooled),
        )

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self._pipeline.vae
        pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        images: torch.Tensor = self._pipeline.image_processor.postprocess(pixels, output_type="pt")
        return images

    def _score(
        self, latents: torch.Tensor, prompts: Sequence[str], embeds: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        conditions = Conditions(
            prompts=tuple(prompts),
            embeds=PromptEmbeds(embeds=embeds, pooled=pooled),
            noise=torch.randn(len(latents), 1, *self._shape, device=self._device),
        )
        return self._scorer(latents, conditions)

    def _train(self, samples: Samples, advantages: torch.Tensor) -> None:
        """The updates of an iteration, on shuffled samples."""
        learner, window = self._run.learner, samples.log_probs.shape[1]
        for minibatch in torch.randperm(len(advantages)).chunk(learner.updates_per_iteration):
            for rows in minibatch.split(learner.micro_batch_size):
                for step in range(window):
                    loss = self._loss(samples, advantages, rows, step)
                    (loss * len(rows) / (len(minibatch) * window)).backward()
            nn.utils.clip_grad_norm_(self._trained, learner.max_grad_norm)
            self._optimizer.step()
            self._optimizer.zero_grad()
            for average, parameter in zip(self._average, self._trained, strict=True):
                average.lerp_(parameter.detach(), 1 - learner.ema_decay)

    def _loss(self, samples: Samples, advantages: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        grpo, noise_level = self._run.grpo, self._run.rollout.noise_level
        before, after = samples.states[rows, step], samples.states[rows, step + 1]
        inputs = before, step, samples.embeds[rows], samples.pooled[rows]
        mean, std = sde_step(before, self._velocity(self._transformer, *inputs), self._sigmas, step, noise_level)
        with torch.no_grad(), self._transformer.disable_adapter():
            base = self._velocity(self._transformer, *inputs)
            base_mean, _ = sde_step(before, base, self._sigmas, step, noise_level)
        ratio = torch.exp(log_density(after, mean, std) - samples.log_probs[rows, step])
        unclipped = -advantages[rows] * ratio
        clipped = -advantages[rows] * ratio.clamp(1 - grpo.clip_range, 1 + grpo.clip_range)
        divergence = ((mean - base_mean) ** 2).mean() / (2 * std**2)
        return torch.maximum(unclipped, clipped).mean() + grpo.kl_weight * divergence
