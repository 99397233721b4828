"""The whole loop on one machine: `python -m dina_rl.local` (the only library module that may import jobs and ray).

world -> preferences -> latents -> DiNa-LRM -> rollouts, rewards, updates -> curves, samples, adapter, summary
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

from typing_extensions import TypedDict  # typing's own cannot be read from a file before Python 3.12

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.planning import describe
from dina_rl.alignment.prompts import check_captions, load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.alignment.result import finished, why_not_longer
from dina_rl.backbones.files import EVERYTHING
from dina_rl.checkpoint import versions, write_json
from dina_rl.cli import fail, interruptible, load
from dina_rl.config import LocalRun
from dina_rl.errors import opening
from dina_rl.memory import PeakMemory
from dina_rl.reward.inputs import check_fit
from dina_rl.reward.outcome import read_result
from dina_rl.run_directory import run_directory
from dina_rl.runtime import configure_process, open_pipeline
from dina_rl.textfiles import read_record
from jobs import align
from jobs.fit_reward import fit_reward_model
from jobs.submitted import check_results

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "local.yaml"
SUMMARY = "summary.json"
ALIGN = "align"


def main(argv: Sequence[str]) -> None:
    run = load(LocalRun, argv, program="python -m dina_rl.local", default_config=str(DEFAULT_CONFIG))
    if run.plan:
        print(describe(run))
        return
    check_results(run_dir=run.run_dir)
    try:
        run, backbone = align.with_sizes(run), open_pipeline(run.pipeline)
        backbone.check(*EVERYTHING)
        check_fit(run.fit_run(run.run_dir, run.run_dir), backbone)
        align.check_adapter(run, backbone)
        align.check_room(run)
        check_captions(run.prompts, load_prompts(run.prompts), run.golden)
        align.check_image_scorers(run)
        align.check_grid(run, backbone)
    except ValueError as error:
        fail(str(error))
    with interruptible(run.run_dir), ExitStack() as stack:
        done, align_dir = partial(_finished, run), run.run_dir.expanduser().resolve() / ALIGN
        grows = {"iterations": partial(why_not_longer, run, align_dir)}
        directory = run_directory(run, run.run_dir, resume=run.resume, may_grow=grows, finished=done)
        try:
            run_dir = stack.enter_context(directory)
            summary = read_record(Summary, run_dir / SUMMARY) if done(run_dir) else None
        except ValueError as error:
            fail(str(error))
        summary = summary or run_all(run, run_dir)
    print(table(summary, run_dir))


def _finished(run: LocalRun, run_dir: Path) -> bool:
    return (run_dir / SUMMARY).is_file() and finished(run, run_dir / ALIGN)


def run_all(run: LocalRun, run_dir: Path) -> "Summary":
    """Every stage that is not done yet."""
    configure_process(run.workers.threads_per_actor * run.workers.rollout_workers)
    (run_dir / SUMMARY).unlink(missing_ok=True)  # of a shorter run
    begin = perf_counter()
    with PeakMemory() as memory:
        if not run.inline:
            from jobs.cluster import start_ray

            start_ray(run_dir)
        stages = Stages(run_dir)
        preferences = make_preferences(run, run_dir, stages)
        reward = fit_reward(run, preferences, run_dir, stages)
        recorder = align_generator(run, run_dir, stages)
    summary = summarise(run, reward, recorder, stages.seconds, memory.peak_bytes, perf_counter() - begin)
    write_json(run_dir / SUMMARY, summary)
    return summary


class RewardSummary(TypedDict):
    accuracy_single: float
    accuracy_ensemble: float
    label_ceiling: float


class AlignSummary(TypedDict):
    """Proxy, golden and shape accuracy are means on the test prompts."""

    guidance_scale: float
    proxy_before: float
    proxy_after: float
    golden_before: float
    golden_after: float
    golden_best: float  # over the guidance scales at which the aligned model was measured
    golden_base_best_guidance: float
    base_best_guidance: float
    shape_accuracy_before: float
    shape_accuracy_after: float
    first_ratio_gap_max: float
    diverged_at: int | None
    groups_failed: float
    groups_constant: float
    base_over_guidance: dict[str, float]
    aligned_over_guidance: dict[str, float]


class Summary(TypedDict):
    """`summary.json`: what was reached, in how long."""

    seed: int
    result: str  # what was exported: the adapter, or the transformer
    reward: RewardSummary
    align: AlignSummary
    images_per_second: float
    seconds: dict[str, float]
    peak_rss_bytes: int
    versions: dict[str, str | None]


class Stages:
    """One line per stage, and its wall time, kept across resumes."""

    @opening()
    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "stages.json"
        self.seconds: dict[str, float] = read_record(dict[str, float], self._file) if self._file.is_file() else {}
        self._begin = 0.0

    def start(self, name: str, what: str) -> None:
        print(f"[{name}] {what}", flush=True)
        self._begin = perf_counter()

    def finish(self, name: str, outcome: str) -> None:
        seconds = perf_counter() - self._begin
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        write_json(self._file, self.seconds)
        print(f"[{name}] {outcome} ({seconds:.0f} s)", flush=True)


def make_preferences(run: LocalRun, run_dir: Path, stages: Stages) -> Path:
    """The miniature world's preference set in HPDv3's format."""
    from dina_rl.shapes.preferences import write_preferences

    target = run_dir / "preferences"
    if (target / "stats.json").is_file():
        return target
    stages.start("preferences", f"drawing {4 * (run.world.train_groups + run.world.test_groups)} images and labels")
    stats = write_preferences(
        Path(run.pipeline.location),
        target,
        train_groups=run.world.train_groups,
        test_groups=run.world.test_groups,
        seed=run.seed,
    )
    stages.finish(
        "preferences",
        f"{stats.train.pairs} training and {stats.test.pairs} test pairs, label-noise ceiling {stats.test.ceiling:.3f}",
    )
    return target


def fit_reward(run: LocalRun, preferences: Path, run_dir: Path, stages: Stages) -> dict[str, float]:
    """DiNa-LRM by Ray Train (in this process with --inline); returns its held-out numbers."""
    fit_run = run.fit_run(preferences, run_dir / "fit")
    metrics = run_dir / "fit" / "metrics.json"
    if not metrics.is_file():
        stages.start("reward", f"fitting DiNa-LRM, {run.fit.steps} steps of {run.fit.batch_size} pairs")
        result = fit_reward_model(fit_run)
        stages.finish(
            "reward",
            f"accuracy {result.accuracy_single:.3f} at t={run.reward.single_level:g}, "
            f"{result.accuracy_ensemble:.3f} ensemble, ceiling {result.label_ceiling:.3f}",
        )
    with opening():
        return asdict(read_result(metrics))


def align_generator(run: LocalRun, run_dir: Path, stages: Stages) -> Recorder:
    """The alignment against the reward model just fitted."""
    align_run = run.align_run(run_dir / "fit" / "reward", run_dir / ALIGN)
    prompts = align.preflight(align_run)  # the reward model is there only now
    title = open_algorithm(run).work().title
    with align.opened(align_run, prompts) as align_dir:
        stages.start("align", f"{title}, {run.iterations} iterations of {run.rollout.prompts_per_iteration} groups")
        recorder = align.align_generator(align_run, prompts, align_dir)
    points = recorder.history.points()
    stages.finish("align", f"golden on dev prompts {points[0]['golden']:.3f} -> {points[-1]['golden']:.3f}")
    return recorder


def summarise(
    run: LocalRun,
    reward: dict[str, float],
    recorder: Recorder,
    stage_seconds: dict[str, float],
    peak_bytes: int,
    total_seconds: float,
) -> Summary:
    """Everything a script would want to know of the run; before/after are on the test prompts."""
    scale = run.rollout.guidance_scale
    base, aligned = recorder.table("base"), recorder.table("aligned")
    best_scale = max(base, key=lambda s: base[s]["golden"])
    iterations = recorder.history.iterations()
    trained = sum(entry["images"] for entry in iterations)
    loop_seconds = sum(recorder.seconds[name] for name in ("rollout", "update", "publish"))
    return {
        "seed": run.seed,
        "result": recorder.exported.name,
        "reward": {
            "accuracy_single": reward["accuracy_single"],
            "accuracy_ensemble": reward["accuracy_ensemble"],
            "label_ceiling": reward["label_ceiling"],
        },
        "align": {
            "guidance_scale": scale,
            "proxy_before": base[scale]["proxy"],
            "proxy_after": aligned[scale]["proxy"],
            "golden_before": base[scale]["golden"],
            "golden_after": aligned[scale]["golden"],
            "golden_best": max(row["golden"] for row in aligned.values()),
            "golden_base_best_guidance": base[best_scale]["golden"],
            "base_best_guidance": best_scale,
            "shape_accuracy_before": base[scale]["shape_right"],
            "shape_accuracy_after": aligned[scale]["shape_right"],
            "first_ratio_gap_max": max(entry.get("first_ratio_gap", 0.0) for entry in iterations),
            "diverged_at": recorder.watch.diverged_at,
            "groups_failed": sum(entry["groups_failed"] for entry in iterations),
            "groups_constant": sum(entry["groups_constant"] for entry in iterations),
            "base_over_guidance": {f"{s:g}": row["golden"] for s, row in base.items()},
            "aligned_over_guidance": {f"{s:g}": row["golden"] for s, row in aligned.items()},
        },
        "images_per_second": trained / loop_seconds,
        "seconds": {
            **stage_seconds,
            **{f"align/{name}": value for name, value in recorder.seconds.items()},
            "total": total_seconds,
        },
        "peak_rss_bytes": peak_bytes,
        "versions": versions(),
    }


def table(summary: Summary, run_dir: Path) -> str:
    """The closing lines: what was reached, how long it took, and where everything lies."""
    reward, align, seconds = summary["reward"], summary["align"], summary["seconds"]
    scale = align["guidance_scale"]
    gain = align["golden_after"] - align["golden_before"]
    after = ", ".join(f"{golden:.3f} at {s}" for s, golden in align["aligned_over_guidance"].items())
    rows = [
        (
            "reward accuracy",
            f"{reward['accuracy_single']:.3f} single level, {reward['accuracy_ensemble']:.3f} ensemble",
        ),
        ("  label-noise ceiling", f"{reward['label_ceiling']:.3f}"),
        ("proxy", f"{align['proxy_before']:+.3f} -> {align['proxy_after']:+.3f}"),
        (f"golden, guidance {scale:g}", f"{align['golden_before']:.3f} -> {align['golden_after']:.3f} ({gain:+.3f})"),
        ("  base at its best", f"{align['golden_base_best_guidance']:.3f} at guidance {align['base_best_guidance']:g}"),
        ("  aligned by guidance", after),
        ("shape accuracy", f"{align['shape_accuracy_before']:.3f} -> {align['shape_accuracy_after']:.3f}"),
        ("time", ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if "/" not in name)),
        ("throughput", f"{summary['images_per_second']:.1f} images/s"),
        ("peak memory", f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB over all processes"),
        (summary["result"], str(run_dir / "align" / summary["result"])),
        ("curves, samples", f"{run_dir / 'align' / 'curves.png'}, {run_dir / 'align' / 'samples.png'}"),
        ("summary", str(run_dir / SUMMARY)),
        ("look at it with", f"tensorboard --logdir {run_dir}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    main(sys.argv[1:])
