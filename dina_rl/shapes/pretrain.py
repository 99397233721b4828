"""Pretrain the miniature SD3.5: `python -m dina_rl.shapes.pretrain --out DIR`.

One run of one recipe, counted in steps: a VAE on crawl images, 40,000 crawl latents, then the transformer by
flow matching with 10 % empty captions. Half an hour on two idle cores. A killed run continues with
`--resume`. The result is a `StableDiffusion3Pipeline` directory in fp16 with a card of what was done and measured.
"""

import argparse
import copy
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.models import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor, nn
from tqdm import tqdm

from dina_rl.backbones.base import LatentCodec
from dina_rl.backbones.codec import KLCodec
from dina_rl.checkpoint import replaced_directory
from dina_rl.seeding import generator
from dina_rl.shapes.card import measure, score_samples, write_card
from dina_rl.shapes.grammar import prompts, spec_tensor
from dina_rl.shapes.pipeline import build_pipeline
from dina_rl.shapes.render import crawl
from dina_rl.shapes.sampling import Studio, encode, open_studio
from dina_rl.shapes.training_loop import Stage, linear_decay, run_stage

VAE_BATCH = 16
VAE_RATE = 3e-3
KL_WEIGHT = 5e-4
CACHE_SIZE = 40_000
BATCH = 96
ADAMW_RATE = 2e-3
MUON_RATE = 6e-3
EMA_DECAY = 0.995
CAPTION_DROPOUT = 0.1
DEV_EVERY = 1000
DEV_GUIDANCE = (1.0, 2.0, 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the command line chooses; everything else is this module's constants."""

    seed: int
    vae_steps: int
    steps: int
    threads: int


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new directory for the pipeline")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data and noise (default 0)")
    parser.add_argument("--vae-steps", type=int, default=4300, help="VAE steps (default 4300)")
    parser.add_argument("--steps", type=int, default=3700, help="transformer steps (default 3700)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--resume", action="store_true", help="continue the run that was started in OUT.work")
    options = parser.parse_args()
    work = options.out.with_name(f"{options.out.name}.work")
    if options.out.exists() or (work.exists() and not options.resume):
        used = options.out if options.out.exists() else work
        print(
            f"--out: {used} exists already: choose a new directory, or --resume an unfinished run",
            file=sys.stderr,
        )
        return 2
    recipe = Recipe(seed=options.seed, vae_steps=options.vae_steps, steps=options.steps, threads=options.threads)
    pretrain(recipe, options.out, work)
    return 0


def pretrain(recipe: Recipe, out: Path, work: Path) -> None:
    """Run the recipe, with checkpoints in `work`, and save the finished pipeline and its card as `out`."""
    torch.set_num_threads(recipe.threads)
    torch.set_flush_denormal(True)  # late in training denormal gradients slow a CPU down several times
    pipeline = build_pipeline(recipe.seed)
    seconds = {"vae": train_vae(pipeline.components["vae"], recipe, work / "vae.pt")}

    started = time.monotonic()
    studio = _studio_of(pipeline, work / "untrained")
    rows, latents = encode_crawl(studio.codec, recipe.seed)
    seconds["latents"] = time.monotonic() - started
    seconds["transformer"] = train_transformer(studio, rows, latents, recipe, work / "transformer.pt")
    pipeline.components["transformer"].load_state_dict(studio.transformer.state_dict())

    unfinished = work / "pipeline"
    stored = _studio_of(pipeline.to(torch.float16), unfinished)
    started = time.monotonic()
    metrics = measure(stored, recipe.seed)
    seconds["measuring"] = time.monotonic() - started
    write_card(unfinished, recipe_of(recipe), seconds, metrics)
    os.replace(unfinished, out)


def recipe_of(recipe: Recipe) -> dict[str, int | float | str]:
    """The recipe as the card states it."""
    return {
        "seed": recipe.seed,
        "threads": recipe.threads,
        "vae_steps": recipe.vae_steps,
        "vae_batch": VAE_BATCH,
        "vae_rate": VAE_RATE,
        "vae_kl_weight": KL_WEIGHT,
        "crawl_latents": CACHE_SIZE,
        "transformer_steps": recipe.steps,
        "transformer_batch": BATCH,
        "adamw_rate": ADAMW_RATE,
        "muon_rate": MUON_RATE,
        "ema_decay": EMA_DECAY,
        "caption_dropout": CAPTION_DROPOUT,
    }


def train_vae(vae: AutoencoderKL, recipe: Recipe, checkpoint: Path) -> float:
    """Fit the VAE to crawl images (L1 + MSE + KL) and set its latent shift and scale; returns seconds."""
    vae.to(memory_format=torch.channels_last).train()  # type: ignore[call-arg]  # diffusers' types of it lack `self`
    specs = spec_tensor(prompts("train"))
    draws = generator(recipe.seed, "shapes vae")

    def loss() -> Tensor:
        chosen = specs[torch.randint(0, len(specs), (VAE_BATCH,), generator=draws)]
        images = (crawl(chosen, draws) * 2 - 1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample(generator=draws)
        difference = vae.decode(latents).sample - images
        kl = posterior.kl().mean() / latents[0].numel()
        total: Tensor = difference.abs().mean() + difference.square().mean() + KL_WEIGHT * kl
        return total

    stage = Stage(
        name="vae",
        steps=recipe.vae_steps,
        modules={"vae": vae},
        optimizers=(torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.99), weight_decay=1e-4),),
        schedule=linear_decay(recipe.vae_steps, warmup=50, hold=0.0, floor=0.01),
        loss=loss,
        after_step=lambda _: None,
        generator=draws,
    )
    seconds = run_stage(stage, checkpoint)
    vae.eval().requires_grad_(False)
    _standardise_latents(vae, recipe.seed)
    return seconds


def encode_crawl(codec: LatentCodec, seed: int) -> tuple[Tensor, Tensor]:
    """The transformer's data: training prompt indices [N] and latents [N, 16, 8, 8] of crawl images."""
    draws = generator(seed, "shapes crawl latents")
    specs = spec_tensor(prompts("train"))
    rows = torch.randint(0, len(specs), (CACHE_SIZE,), generator=draws)
    chunks = tqdm(rows.split(1000), "latents")
    return rows, torch.cat([encode(codec, crawl(specs[chunk], draws)) for chunk in chunks])


def train_transformer(studio: Studio, rows: Tensor, latents: Tensor, recipe: Recipe, checkpoint: Path) -> float:
    """Flow matching on the latents; the studio's transformer ends with the averaged weights. Returns seconds."""
    transformer = studio.transformer.requires_grad_(True).train()
    average = copy.deepcopy(transformer).eval().requires_grad_(False)
    texts = studio.text_encoder([*prompts("train"), ""])
    empty = len(texts) - 1
    draws = generator(recipe.seed, "shapes transformer")

    def loss() -> Tensor:
        chosen = torch.randint(0, len(latents), (BATCH,), generator=draws)
        clean = latents[chosen]
        caption = rows[chosen]
        dropped = torch.rand(BATCH, generator=draws) < CAPTION_DROPOUT
        prompt = texts.select(torch.where(dropped, empty, caption))
        sigma = torch.sigmoid(torch.randn(BATCH, generator=draws))  # logit-normal
        noise = torch.randn(clean.shape, generator=draws)
        level = sigma.view(-1, 1, 1, 1)
        noisy = (1 - level) * clean + level * noise
        predicted = studio.backbone.velocity(transformer, noisy, sigma, prompt)
        return (predicted - (noise - clean)).square().mean()

    @torch.no_grad()
    def after_step(done: int) -> None:
        # Early weights leave the average quickly: the decay grows with the number of steps.
        decay = min(EMA_DECAY, (1 + done) / (10 + done))
        torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)
        if done % DEV_EVERY == 0 or done == recipe.steps:
            _print_dev(replace(studio, transformer=average), recipe.seed, done)

    stage = Stage(
        name="transformer",
        steps=recipe.steps,
        modules={"transformer": transformer, "average": average},
        optimizers=_optimizers(transformer),
        schedule=linear_decay(recipe.steps, warmup=60, hold=0.3, floor=0.02),
        loss=loss,
        after_step=after_step,
        generator=draws,
    )
    seconds = run_stage(stage, checkpoint)
    transformer.load_state_dict(average.state_dict())
    transformer.eval().requires_grad_(False)
    return seconds


def _standardise_latents(vae: AutoencoderKL, seed: int) -> None:
    """Set the VAE's shift and scaling factors so that crawl latents have mean 0 and standard deviation 1."""
    draws = generator(seed, "shapes latent statistics")
    specs = spec_tensor(prompts("train"))
    chosen = specs[torch.randint(0, len(specs), (1000,), generator=draws)]
    raw = encode(KLCodec(vae), crawl(chosen, draws))  # the factors are still 0 and 1
    vae.register_to_config(shift_factor=raw.mean().item(), scaling_factor=1 / raw.std().item())


def _optimizers(transformer: nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the blocks (half the steps of AdamW here), AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in transformer.named_parameters():
        is_block_matrix = parameter.ndim == 2 and name.startswith("transformer_blocks.")
        (matrices if is_block_matrix else others).append(parameter)
    return (
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.99), weight_decay=0.01),
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    )


def _print_dev(studio: Studio, seed: int, done: int) -> None:
    for guidance in DEV_GUIDANCE:
        noise = generator(seed, "shapes dev noise")
        parts = score_samples(studio, prompts("dev") * 4, guidance=guidance, noise=noise)
        golden, right = parts.score.mean().item(), parts.shape_right.mean().item()
        tqdm.write(f"step {done}: dev golden {golden:.3f}, shape accuracy {right:.3f} at guidance {guidance}")


def _studio_of(pipeline: StableDiffusion3Pipeline, directory: Path) -> Studio:
    """Save a pipeline and open it as everything else opens one."""
    with replaced_directory(directory) as fresh:
        pipeline.save_pretrained(fresh)
    return open_studio(directory)


if __name__ == "__main__":
    sys.exit(main())
