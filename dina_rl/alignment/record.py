"""Everything an alignment run leaves behind: TensorBoard, history, measurements, checkpoints, the exported weights."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from statistics import pstdev
from time import perf_counter

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dina_rl.alignment.advantage import Advantages
from dina_rl.alignment.measurement import Measurement
from dina_rl.alignment.watch import diverged
from dina_rl.checkpoint import load_tensors, save_tensors, write_json, write_text
from dina_rl.config import AlignRun
from dina_rl.report import image_grid, plot_curves, plot_samples
from dina_rl.scorers.mixture import weighted_sum
from dina_rl.types import PolicyWeights, Weights

SHOWN_IMAGES = 16
ADAPTER, TRANSFORMER = "adapter", "transformer"
BEST = "best/weights.safetensors"
BEST_STATE = "best/state.safetensors"
LAYOUT = {
    "alignment": {
        "proxy and golden: gain over the base, in its standard deviations": [
            "Multiline",
            ["gain/proxy", "gain/golden"],
        ],
        "golden (held out)": ["Multiline", ["golden/dev"]],
        "proxy (optimised)": ["Multiline", ["proxy/dev", "train/reward_mean"]],
        "policy ratio": ["Multiline", ["update/ratio_mean", "update/first_ratio_gap", "update/largest_ratio_gap"]],
    }
}


class Recorder:
    """Writes to `run_dir` as the loop reports; a resumed run continues every file where its checkpoint left it.

    Args:
        export: writes trained weights to a directory in the format of stock diffusers.
    """

    def __init__(self, run: AlignRun, run_dir: Path, export: Callable[[Path, dict[str, torch.Tensor]], Path]) -> None:
        self.run = run
        self.dir = run_dir
        self._export = export
        self.seconds: dict[str, float] = defaultdict(float)
        self.history: list[dict] = []
        self._bar: tqdm | None = None
        self._writer: SummaryWriter | None = None
        self._marks: dict[str, float] = {}
        self._warned = False

    @property
    def finished(self) -> bool:
        """Whether the run in this directory has exported its weights, the last thing it does."""
        return any(self.exported.glob("*.safetensors"))

    @property
    def exported(self) -> Path:
        """Where the result lies: the adapter, or after full fine-tuning the transformer."""
        return self.dir / (TRANSFORMER if self.run.learner.lora is None else ADAPTER)

    # --- state -------------------------------------------------------------------------------------------------

    def restore(self) -> tuple[int, dict[str, torch.Tensor] | None]:
        """(iterations done, learner state) of the last checkpoint, (0, None) without one. Opens TensorBoard."""
        checkpoints = sorted((self.dir / "checkpoints").glob("step_*/state.json"))
        done, state = 0, None
        if checkpoints:
            record = json.loads(checkpoints[-1].read_text())
            done, self.history = record["step"], record["history"]
            for stage, seconds in record["seconds"].items():
                self.seconds[stage] += seconds
            state = load_tensors(checkpoints[-1].with_name("state.safetensors"))
        # What was written after the checkpoint is about to be written again.
        self._writer = SummaryWriter(str(self.dir / "tensorboard"), purge_step=done + 1 if done else None)
        self._writer.add_custom_scalars(LAYOUT)
        return done, state

    def checkpoint(self, done: int, state: dict[str, torch.Tensor]) -> None:
        """Save all that resuming needs; the directory appears whole or not at all. The last two are kept."""
        root = self.dir / "checkpoints"
        writing = root / f".writing_{done:06d}"
        shutil.rmtree(writing, ignore_errors=True)
        save_tensors(writing / "state.safetensors", state)
        write_json(writing / "state.json", {"step": done, "seconds": dict(self.seconds), "history": self.history})
        final = root / f"step_{done:06d}"
        shutil.rmtree(final, ignore_errors=True)
        writing.rename(final)
        for old in sorted(root.glob("step_*"))[:-2]:
            shutil.rmtree(old)

    # --- what the loop reports ---------------------------------------------------------------------------------

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to `stage`."""
        begin = perf_counter()
        try:
            yield
        finally:
            self._marks[stage] = perf_counter() - begin
            self.seconds[stage] += self._marks[stage]

    def progress(self, steps: Sequence[int]) -> Iterable[int]:
        """`steps` with a progress bar."""
        self._bar = tqdm(steps, desc="align", unit="it", initial=steps.start, total=steps.stop, dynamic_ncols=True)
        return self._bar

    def warn(self, message: str | None) -> None:
        """Say `message`, if there is one, the first time: on the terminal and in TensorBoard."""
        if message is not None and not self._warned:
            self._warned = True
            tqdm.write(f"  warning: {message}")
            self._writer.add_text("warnings", message)

    def base(self, measurements: Sequence[Measurement]) -> None:
        """The unaligned model on the test prompts, one measurement per guidance scale."""
        self._store("base", measurements)
        self._images("base", measurements, 0)

    def measured(self, done: int, measurement: Measurement, average: Weights) -> None:
        """A point of the proxy and golden curves after `done` iterations (dev prompts, averaged weights).

        They are kept if they are the best in golden so far, and the divergence watch looks at the curves.
        """
        point = {
            "step": done,
            "golden": measurement.golden_mean,
            "golden_std": pstdev(measurement.golden),
            "proxy": measurement.proxy_mean,
            "proxy_std": pstdev(measurement.proxy),
            "parts": measurement.parts,
            "proxy_parts": measurement.proxy_parts,
            "samples": len(measurement.golden),
        }
        self.history.append({"kind": "measurement", **point})
        points = self.points()
        first = points[0]
        if point["golden"] > max((each["golden"] for each in points[:-1]), default=-inf):
            state = {"version": torch.tensor(average.version), **average.tensors}
            save_tensors(self.dir / BEST, state)
        watch = self.run.watch
        watched = self._watched()
        golden, proxy = [each["golden"] for each in watched], [each["proxy"] for each in watched]
        alarm = diverged(golden, proxy, patience=watch.patience, margin=watch.margin)
        if alarm and (self.diverged_at is None or watch.action in ("raise_kl", "roll_back")):
            self.history.append({"kind": "diverged", "step": done})
            message = f"golden falls while proxy rises: {max(golden):.3f} at its best, {golden[-1]:.3f} now"
            self._writer.add_text("warnings", message, done)
            tqdm.write(f"  iteration {done:4d}  diverged, {message} (watch.action {watch.action})")
        self._scalars(
            done,
            {
                "golden/dev": point["golden"],
                "proxy/dev": point["proxy"],
                "watch/diverged": float(alarm),
                "watch/kl_scale": self.kl_scale,
                "gain/golden": (point["golden"] - first["golden"]) / max(first["golden_std"], 1e-6),
                "gain/proxy": (point["proxy"] - first["proxy"]) / max(first["proxy_std"], 1e-6),
                **{f"golden_parts/{name}": value for name, value in measurement.parts.items()},
                **{f"proxy_parts/{name}": value for name, value in measurement.proxy_parts.items()},
            },
        )
        self._writer.add_image("samples/dev", image_grid(measurement.images[:SHOWN_IMAGES]), done)
        self._save_history()
        plot_curves(self.points(), self.base_lines(), self.dir / "curves.png")
        tqdm.write(f"  iteration {done:4d}  golden {point['golden']:.3f}  proxy {point['proxy']:+.3f}")

    def iteration(
        self, step: int, scores: Mapping[str, torch.Tensor], advantages: Advantages, metrics: dict[str, float]
    ) -> None:
        """One finished iteration: scores [P, G] by scorer and the learner's metrics."""
        rewards = weighted_sum(self.run.rewards, scores)
        whole = rewards.isfinite().all(1)
        finite = rewards[whole]
        by_scorer = {}
        for name, score in scores.items():
            by_scorer[f"{name}_mean"] = score[whole].mean().item()
            by_scorer[f"{name}_std_in_group"] = score[whole].std(1, correction=0).mean().item()
        train = {
            "reward_mean": finite.mean().item(),
            "reward_std_in_group": finite.std(1, correction=0).mean().item(),
            "groups_failed": advantages.failed,
            "groups_constant": advantages.constant,
            "images": rewards.numel(),
        }
        working = sum(self._marks[stage] for stage in ("rollout", "update", "publish"))
        self.history.append({"kind": "iteration", "step": step + 1, **train, "scorers": by_scorer, **metrics})
        if advantages.failed:
            tqdm.write(f"  iteration {step + 1}: dropped {advantages.failed} groups whose reward is not finite")
        self._scalars(
            step + 1,
            {
                **{f"train/{name}": value for name, value in train.items()},
                **{f"scorers/{name}": value for name, value in by_scorer.items()},
                **{f"update/{name}": value for name, value in metrics.items()},
                **{f"seconds/{name}": value for name, value in self._marks.items()},
                "seconds/images_per_second": rewards.numel() / working,
            },
        )
        self._marks.clear()
        if advantages.kept.any() and self.run.algorithm == "grpo":
            self._writer.add_histogram("train/advantages", advantages.values[advantages.kept], step + 1)
        self._bar.set_postfix(reward=f"{train['reward_mean']:+.3f}", kl=f"{metrics.get('kl', 0):.1e}")

    def aligned(self, measurements: Sequence[Measurement]) -> None:
        """The aligned model on the test prompts, one measurement per guidance scale; draws the pictures."""
        self._store("aligned", measurements)
        self._images("aligned", measurements, self.run.steps)
        scale = self.run.rollout.guidance_scale
        before, after = self.stored("base", scale), self.stored("aligned", scale)
        plot_samples(before["images"], after["images"], self.dir / "samples.png")

    def export(self, weights: Weights) -> None:
        """Write the weights for stock diffusers and close TensorBoard."""
        self._export(self.exported, weights.tensors)
        self._writer.close()

    # --- what the report reads -----------------------------------------------------------------------------------

    def points(self) -> list[dict]:
        """The measured points of the curves, in order."""
        return [entry for entry in self.history if entry["kind"] == "measurement"]

    @property
    def alarms(self) -> list[int]:
        """The iterations at which the watch called the run diverged and acted on it."""
        return [entry["step"] for entry in self.history if entry["kind"] == "diverged"]

    @property
    def diverged_at(self) -> int | None:
        """The iteration at which the watch first called the run diverged."""
        return self.alarms[0] if self.alarms else None

    @property
    def kl_scale(self) -> float:
        """What the watch has multiplied the KL weight by."""
        return self.run.watch.kl_factor ** len(self.alarms) if self.run.watch.action == "raise_kl" else 1.0

    @property
    def best_at(self) -> int:
        """The first iteration whose weights were best in golden on the dev prompts."""
        return max(self.points(), key=lambda point: point["golden"])["step"]

    def keep_best(self, state: dict[str, torch.Tensor]) -> None:
        """Store the learner's whole state as that of the best measurement."""
        save_tensors(self.dir / BEST_STATE, state)

    def kept_best(self) -> dict[str, torch.Tensor]:
        return load_tensors(self.dir / BEST_STATE)

    def _watched(self) -> list[dict]:
        """The measurements that the watch compares: the best one and, where it acts, those since it last did."""
        points = self.points()
        if self.run.watch.action not in ("raise_kl", "roll_back") or not self.alarms:
            return points
        best = self.best_at
        return [point for point in points if point["step"] == best or point["step"] > self.alarms[-1]]

    @property
    def stopped(self) -> bool:
        """Whether the watch has ended the run."""
        return self.run.watch.action == "stop" and self.diverged_at is not None

    def best(self) -> PolicyWeights:
        """The averaged weights that were best in golden on the dev prompts."""
        tensors = load_tensors(self.dir / BEST)
        return PolicyWeights(version=int(tensors.pop("version")), tensors=tensors)

    def iterations(self) -> list[dict]:
        return [entry for entry in self.history if entry["kind"] == "iteration"]

    def stored(self, name: str, scale: float) -> dict[str, torch.Tensor]:
        """Per-sample golden and proxy [B], and images, of a stored measurement."""
        return load_tensors(self.dir / "measurements" / f"{name}_guidance_{scale:g}.safetensors")

    def table(self, name: str) -> dict[float, dict[str, float]]:
        """Guidance scale -> golden, proxy and component means of a stored series of measurements."""
        text = (self.dir / "measurements" / f"{name}.json").read_text()
        return {float(scale): row for scale, row in json.loads(text).items()}

    def base_lines(self) -> dict[float, float]:
        """Guidance scale -> golden of the base on the test prompts."""
        return {scale: row["golden"] for scale, row in self.table("base").items()}

    # --- helpers -------------------------------------------------------------------------------------------------

    def _store(self, name: str, measurements: Sequence[Measurement]) -> None:
        root = self.dir / "measurements"
        for m in measurements:
            tensors = {
                "golden": torch.tensor(m.golden),
                "proxy": torch.tensor(m.proxy),
                "images": m.images[:SHOWN_IMAGES],
            }
            save_tensors(root / f"{name}_guidance_{m.guidance_scale:g}.safetensors", tensors)
        rows = {
            f"{m.guidance_scale:g}": {"golden": m.golden_mean, "proxy": m.proxy_mean, **m.parts} for m in measurements
        }
        write_json(root / f"{name}.json", rows)

    def _images(self, name: str, measurements: Sequence[Measurement], step: int) -> None:
        for m in measurements:
            grid = image_grid(m.images[:SHOWN_IMAGES])
            self._writer.add_image(f"samples_test/{name}_guidance_{m.guidance_scale:g}", grid, step)

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def _save_history(self) -> None:
        write_text(self.dir / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history))
