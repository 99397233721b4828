"""What a pretrained pipeline is worth, and the card that says so beside the weights."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from dina_rl.seeding import generator
from dina_rl.shapes.golden import GoldenParts, golden_score
from dina_rl.shapes.grammar import prompts, spec_tensor
from dina_rl.shapes.render import render
from dina_rl.shapes.sampling import Studio, decode, draw, encode

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0)
SAMPLES_PER_PROMPT = 5  # 320 samples of the 64 test prompts
NUM_STEPS = 10
COLUMNS = ("golden", "golden_standard_error", "shape_accuracy", "colour", "clean", "whole")
PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors")


def score_samples(studio: Studio, captions: Sequence[str], *, guidance: float, noise: torch.Generator) -> GoldenParts:
    """Golden parts of one 10-step sample per caption."""
    images = draw(studio, captions, num_steps=NUM_STEPS, guidance=guidance, generator=noise)
    return golden_score(images, captions)


def measure(studio: Studio, seed: int) -> dict[str, dict[str, float]]:
    """Golden score over guidance on the test prompts, and what the VAE does to clean renders."""
    captions = prompts("test") * SAMPLES_PER_PROMPT
    clean = render(spec_tensor(captions), generator(seed, "shapes clean renders"))
    decoded = decode(studio.codec, encode(studio.codec, clean))
    metrics = {
        "clean_renders": {
            "golden": golden_score(clean, captions).score.mean().item(),
            "golden_after_vae": golden_score(decoded, captions).score.mean().item(),
        }
    }
    for guidance in GUIDANCE:
        noise = generator(seed, "shapes test noise")  # the same for every guidance: paired
        parts = score_samples(studio, captions, guidance=guidance, noise=noise)
        metrics[f"guidance_{guidance:g}"] = {
            "golden": parts.score.mean().item(),
            "golden_standard_error": (parts.score.std() / len(captions) ** 0.5).item(),
            "shape_accuracy": parts.shape_right.mean().item(),
            "colour": parts.colour.mean().item(),
            "clean": parts.clean.mean().item(),
            "whole": parts.whole.mean().item(),
        }
    return metrics


def write_card(
    directory: Path,
    recipe: Mapping[str, int | float | str],
    seconds: Mapping[str, float],
    metrics: Mapping[str, Mapping[str, float]],
) -> None:
    """Write card.json and README.md into a pipeline directory."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    card = {
        "recipe": dict(recipe),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "versions": versions,
        "metrics": {name: {key: round(value, 4) for key, value in row.items()} for name, row in metrics.items()},
    }
    _write(directory / "card.json", json.dumps(card, indent=2) + "\n")
    _write(directory / "README.md", _readme(recipe, seconds, versions, metrics))


def _readme(
    recipe: Mapping[str, int | float | str],
    seconds: Mapping[str, float],
    versions: Mapping[str, str],
    metrics: Mapping[str, Mapping[str, float]],
) -> str:
    clean = metrics["clean_renders"]
    tests = len(prompts("test"))
    rows = [
        f"| {guidance:g} | " + " | ".join(f"{row[key]:.3f}" for key in COLUMNS) + " |"
        for guidance in GUIDANCE
        for row in [metrics[f"guidance_{guidance:g}"]]
    ]
    lines = [
        "# Miniature SD3.5 of the shapes world",
        "",
        "A `StableDiffusion3Pipeline` (4 blocks of width 128, 16 latent channels, 32x32 pixels)",
        "that draws `a {small|large} COLOUR {circle|triangle|cross|ring} on COLOUR`, with the defects of the",
        "crawl it has seen. Made by `python -m dina_rl.shapes.pretrain`, one run; weights in fp16.",
        "Load it with `dtype=torch.float32`, call it with `height=32, width=32, max_sequence_length=8`.",
        "",
        f"Golden score of {tests * SAMPLES_PER_PROMPT} samples of the {tests} test prompts, {NUM_STEPS} Euler",
        "steps, same noise in every row:",
        "",
        "| guidance | " + " | ".join(key.replace("_", " ") for key in COLUMNS) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
        *rows,
        "",
        f"Clean renders score {clean['golden']:.3f}, after the VAE {clean['golden_after_vae']:.3f}.",
        "",
        "Recipe: " + ", ".join(f"{key} {value}" for key, value in recipe.items()) + ".",
        "",
        "Wall time in seconds: " + ", ".join(f"{key} {value:.0f}" for key, value in seconds.items()) + ".",
        "",
        "Versions: " + ", ".join(f"{key} {value}" for key, value in versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _write(target: Path, text: str) -> None:
    temporary = target.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)
