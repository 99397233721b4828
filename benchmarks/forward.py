"""Milliseconds of the sampler's forward: `python -m benchmarks.forward`, two minutes on a CPU, most of it compiling.

The adapter's layers beside the weights, the adapter merged into them, and that compiled (`pipeline.compile`): the same
latents and prompts, one after the other in turns. A ratio is of neighbours.

    python -m benchmarks.forward --pipeline DIR --dtype bfloat16 --batch 18 --height 512 --width 512
"""

import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Literal

import torch

from benchmarks.spread import Row, ratios, spread_table
from dina_rl.alignment.sampler import PolicySampler
from dina_rl.cli import fail, load
from dina_rl.config import AlignRun, PipelineConfig, PolicyLoRAConfig
from dina_rl.config.base import Positive, Section
from dina_rl.runtime import configure_process, device
from dina_rl.seeding import normal

SEPARATE, MERGED, COMPILED = "adapter unmerged", "merged", "merged and compiled"
PROMPT = "a small red circle on blue"


class BenchmarkRun(Section):
    """Speed of the sampler's forward."""

    pipeline: str = "shapes"
    """pipeline directory, hub id or `shapes`"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """parameter dtype"""
    height: Positive | None = None
    """image height in pixels; None: the pipeline's own"""
    width: Positive | None = None
    """image width in pixels; None: the pipeline's own"""
    batch: Positive = 24
    """samples of a forward"""
    repeats: Positive = 20
    """times that the kinds take turns, after one that does not count"""
    threads: Positive = 1
    """torch threads; with other work on the machine, more than one wait for each other"""
    lora: PolicyLoRAConfig = PolicyLoRAConfig()

    def align_run(self, *, compiled: bool) -> AlignRun:
        size = {"height": self.height, "width": self.width}
        pipeline = PipelineConfig(path=self.pipeline, dtype=self.dtype, compile=compiled, **size)
        return AlignRun.model_validate({"pipeline": pipeline.model_dump(), "learner": {"lora": self.lora.model_dump()}})


def measure(run: BenchmarkRun) -> dict[str, list[float]]:
    """Milliseconds of every repeat, by kind.

    Raises:
        ValueError: a pipeline that cannot be read, or a size that does not fit it.
    """
    kinds = {SEPARATE: (False, False), MERGED: (True, False), COMPILED: (True, True)}
    forwards = {
        kind: _forward(run, PolicySampler(run.align_run(compiled=compiled), merged=merged))
        for kind, (merged, compiled) in kinds.items()
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(run.repeats + 1):
        for kind, forward in forwards.items():
            taken = _milliseconds(forward)
            if repeat:  # the first one warms up, and compiles
                times[kind].append(taken)
    return times


def _forward(run: BenchmarkRun, sampler: PolicySampler) -> Callable[[], torch.Tensor]:
    latents = normal((run.batch, *sampler.latent_shape), "forward").to(sampler.device)
    sigma = torch.linspace(0.1, 0.9, run.batch, device=sampler.device)
    texts = sampler.backbone.load_text_encoder()
    followed = sampler.velocity(texts([PROMPT] * run.batch), 1.0, texts).followed

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return followed(latents, sigma)

    return forward


def _milliseconds(forward: Callable[[], torch.Tensor]) -> float:
    begin = perf_counter()
    forward().cpu()  # waits for the GPU
    return 1000 * (perf_counter() - begin)


def table(times: dict[str, list[float]]) -> str:
    """Minimum, median and maximum over repeats, and how many times faster than the adapter's own layers."""
    rows = {f"{kind}, ms": Row(values=values, digits=1) for kind, values in times.items()}
    for kind in (MERGED, COMPILED):
        rows[f"{SEPARATE} / {kind}"] = Row(values=ratios(times[SEPARATE], times[kind]), digits=2)
    return spread_table(rows)


def main(argv: Sequence[str]) -> None:
    run = load(BenchmarkRun, argv, program="python -m benchmarks.forward")
    configure_process(run.threads)
    try:
        times = measure(run)
    except ValueError as error:
        fail(str(error))
    where = torch.cuda.get_device_name() if device() == "cuda" else f"CPU, {run.threads} threads"
    print(f"{where}; {run.pipeline} in {run.dtype}, {run.batch} samples a forward, {run.repeats} repeats")
    print(table(times))


if __name__ == "__main__":
    main(sys.argv[1:])
