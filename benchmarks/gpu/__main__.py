"""`python -m benchmarks.gpu`: parity, then speed and memory, on any CUDA machine; without Ray and DeepSpeed.

    parity      the miniature's velocity, log-probabilities, scores and one update in fp32 against the CPU, within
                stated tolerances; in bf16 the ratio before any update; models that slept are as before
    settings    rollout, score, update and publish of SD3.5-medium at 512 px: Flow-GRPO-Fast without guidance, and the
                published setting (guidance 4.5, all steps but the last trained), with the images a second of the whole
                loop, and memory beside what `--plan` says
    fit         a step of the reward model's fit

Weights are random unless `--pipeline` gives some. An iteration has two groups of 18; its times grow in proportion.
Figures go into a JSON file, and as a table on the terminal. The exit code is 1 where a parity check failed, with the
list; `--device cpu --tiny` tries the command out anywhere.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu import parity
from benchmarks.gpu.models import write_random
from benchmarks.gpu.phases import Figures, measure_fit, measure_loop, measure_sleep, release
from benchmarks.gpu.settings import SMALL_REWARD, BenchmarkRun, align_run, pipeline_config, reward_config
from benchmarks.options import refuse
from benchmarks.untrained import save_untrained
from dina_rl.checkpoint import versions, write_json
from dina_rl.cli import EXIT_STOPPED, fail, load
from dina_rl.config import PipelineConfig
from dina_rl.loading import shown_bytes
from dina_rl.runtime import configure_process, device

SETTINGS = {"fast": "Flow-GRPO-Fast, no guidance", "full": "published: guidance, all steps"}


def machine() -> dict[str, str | None]:
    """The card and what drives it."""
    if not torch.cuda.is_available():
        return {"card": None, "driver": None, "cuda": None}
    smi = shutil.which("nvidia-smi")
    asked = [smi, "--query-gpu=driver_version", "--format=csv,noheader"] if smi else []
    driver = subprocess.run(asked, capture_output=True, text=True).stdout.split() if smi else []
    return {
        "card": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else None,
        "cuda": torch.version.cuda,
    }


def check_parity(scratch: Path) -> list[parity.Check]:
    """All checks; on a machine without a GPU the numbers are compared with themselves."""
    reward = save_untrained(scratch / "small_reward", PipelineConfig(), SMALL_REWARD)
    found = parity.numbers("float32", reward)
    expected = parity.numbers_on_cpu(reward, scratch) if device() == "cuda" else found
    return [*parity.compare(found, expected), *parity.on_this_device(found, reward)]


def table(figures: Mapping[str, Figures], fit: Mapping[str, float], sleep: Mapping[str, float]) -> str:
    """Times and memory of every phase."""
    columns = ("seconds", "TFLOP/s", "peak", "plan")
    lines = []
    for name, figure in figures.items():
        lines.append(f"{SETTINGS[name]:<34}" + "".join(f"{column:>12}" for column in columns))
        for phase, seconds in figure.seconds.items():
            plan, count = figure.planned, figure.planned.operations.get(phase)
            pace = "" if count is None else f"{count / seconds / 1e12:.3g}"
            peak = shown_bytes(figure.peak_bytes[phase]) if phase in figure.peak_bytes else "-"
            planned = shown_bytes(plan.bytes[phase]) if phase in plan.bytes else ""
            lines.append(f"  {phase:<32}{seconds:>12.3f}{pace:>12}{peak:>12}{planned:>12}")
        lines.append(f"  {'images/s of the whole loop':<32}{figure.images_per_second:>12.3f}")
    lines.append(f"fit step, {fit['pairs_per_second']:.3g} pairs/s".ljust(34) + f"{fit['seconds']:>12.3f}")
    asleep = f"sleep of a transformer, {shown_bytes(int(sleep['bytes']))}"
    lines.append(f"{asleep:<34}{sleep['rest_seconds']:>12.3f}{sleep['wake_seconds']:>12.3f} to wake")
    return "\n".join(lines)


def run_all(benchmark: BenchmarkRun, scratch: Path) -> list[str]:
    """Measure, write and print; returns the parity checks that failed.

    Raises:
        ValueError: a preset or pipeline that cannot be read, or batches that do not divide.
    """
    pipeline = benchmark.pipeline or str(write_random(scratch / "pipeline", tiny=benchmark.tiny))
    generator, reward = pipeline_config(benchmark, pipeline), scratch / "reward"
    presets = {"fast": benchmark.fast, "full": benchmark.full}
    runs = {name: align_run(benchmark, presets[name], pipeline, reward) for name in benchmark.settings}
    checks = check_parity(scratch)
    print(parity.table(checks), flush=True)
    save_untrained(reward, generator, reward_config(benchmark))
    figures: dict[str, Figures] = {}
    for name, run in runs.items():
        release()
        figures[name] = measure_loop(run, benchmark.repeats)
    release()
    fit = measure_fit(benchmark, pipeline)
    release()
    sleep = measure_sleep(generator)
    found = {
        **machine(),
        "versions": versions(),
        "settings": benchmark.model_dump(mode="json"),
        "parity": parity.as_json(checks),
        **{name: figure.as_json() for name, figure in figures.items()},
        "fit": fit,
        "sleep": sleep,
    }
    benchmark.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(benchmark.out, found)
    print(f"{table(figures, fit, sleep)}\n{benchmark.out}")
    return parity.failures(checks)


def main(argv: Sequence[str]) -> None:
    benchmark = load(BenchmarkRun, argv, program="python -m benchmarks.gpu")
    if benchmark.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anybody asks torch for devices
    if benchmark.device == "cuda" and not torch.cuda.is_available():
        fail("torch sees no CUDA device; --device cpu --tiny tries this command out without one")
    configure_process(threads=1)
    print(machine()["card"] or "CPU", flush=True)
    with TemporaryDirectory() as scratch:
        try:
            failed = run_all(benchmark, Path(scratch))
        except ValueError as error:
            refuse(error)
        except torch.OutOfMemoryError as error:
            first = str(error).split(". ")[0]
            fail(f"{first}; try --micro-batch-size 3, and presets of a smaller card (--fast, --full)")
    if failed:
        print("\n".join(["parity failed", *failed]), file=sys.stderr)
        raise SystemExit(EXIT_STOPPED)


if __name__ == "__main__":
    main(sys.argv[1:])
