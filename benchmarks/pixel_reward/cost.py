"""What a score costs: `python -m benchmarks.pixel_reward.cost --dina FIT/reward --pixel PIXEL`, half a minute on a CPU.

Scores of latents by DiNa-LRM and by the pixel reward, decoding among it and alone, without and with the gradient at the
latents. They take turns, and a ratio is of neighbours; seconds are the processor's.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import process_time
from typing import Annotated

import torch
from pydantic import Field

from benchmarks.spread import Row, ratios, spread_table
from dina_rl.cli import fail, load
from dina_rl.config import PipelineConfig, RewardsConfig
from dina_rl.config.base import Positive, Section
from dina_rl.runtime import configure_process, image_size, open_pipeline
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.registry import open_scorers
from dina_rl.seeding import normal
from dina_rl.shapes.grammar import prompts

DINA, PIXEL, DECODING, GRADIENT = "DiNa-LRM", "pixel reward", "decoding alone", " with gradient"


class CostRun(Section):
    """Processor seconds of a score by DiNa-LRM and by the pixel reward."""

    dina: Path = Path("runs/local/fit/reward")
    """directory of a DiNa-LRM"""
    pixel: Path = Path("runs/pixel_reward")
    """what `python -m benchmarks.pixel_reward.fit` writes"""
    samples: Annotated[Positive, Field(le=464)] = 48
    """latents scored at once"""
    repeats: Positive = 5
    """times that the kinds take turns, after one that does not count"""
    threads: Positive = 1
    """torch threads"""


def main(argv: Sequence[str]) -> None:
    run = load(CostRun, argv, program="python -m benchmarks.pixel_reward.cost")
    configure_process(run.threads)
    try:
        print(table(measure(run)))
    except ValueError as error:
        fail(str(error))


def measure(run: CostRun) -> dict[str, list[float]]:
    """Processor milliseconds of a sample in every repeat.

    Raises:
        ValueError: a reward that cannot be read.
    """
    pickscore = {"path": str(run.pixel), "processor": str(run.pixel)}
    rewards = {DINA: {"dina": {"path": str(run.dina)}}, PIXEL: {"dina": None, "pickscore": pickscore}}
    pipeline = PipelineConfig()
    backbone = open_pipeline(pipeline)
    codec = backbone.load_codec()
    scorers = {
        name: next(iter(open_scorers(RewardsConfig.model_validate(given), pipeline, backbone).values()))
        for name, given in rewards.items()
    }
    latents = normal((run.samples, *backbone.latent_shape(*image_size(pipeline, backbone))), "what a score costs")
    texts = prompts("train")[: run.samples]
    given = Conditions(prompts=texts, embeds=backbone.load_text_encoder()(texts), noise=latents[:, None])

    def score(name: str) -> torch.Tensor:
        scorer = scorers[name]
        return scorer(codec.decode(latents) if scorer.space == "images" else latents, given)

    works: Mapping[str, Callable[[], torch.Tensor]] = {
        DINA: lambda: score(DINA),
        PIXEL: lambda: score(PIXEL),
        DECODING: lambda: codec.decode(latents),
    }
    spent: dict[str, list[float]] = {name + what: [] for what in ("", GRADIENT) for name in works}
    for repeat in range(run.repeats + 1):
        for name, values in spent.items():
            with_gradient = name.endswith(GRADIENT)
            latents.requires_grad_(with_gradient)
            begin = process_time()
            with torch.set_grad_enabled(with_gradient):
                result = works[name.removesuffix(GRADIENT)]()
                if with_gradient:
                    torch.autograd.grad(result.sum(), latents)
            if repeat:  # the first one warms up
                values.append(1000 * (process_time() - begin) / run.samples)
    return spent


def table(spent: Mapping[str, Sequence[float]]) -> str:
    """Minimum, median and maximum over repeats, and of the pixel reward over DiNa-LRM."""
    rows = {f"{name}, ms": Row(values=values, digits=2) for name, values in spent.items()}
    for what in ("", GRADIENT):
        rows[f"{PIXEL} / {DINA}{what}"] = Row(values=ratios(spent[PIXEL + what], spent[DINA + what]), digits=2)
    return spread_table(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
