"""Everything an alignment run shows of itself: TensorBoard, history, measurements, pictures, the exported weights."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from tqdm import tqdm

from dina_rl.alignment.advantage import Advantages
from dina_rl.alignment.background import Background
from dina_rl.alignment.board import SHOWN_IMAGES, Board
from dina_rl.alignment.checkpoints import Checkpoint, Checkpoints
from dina_rl.alignment.evolution import Evolution, spacing
from dina_rl.alignment.history import History, gain, read_seconds, write_seconds
from dina_rl.alignment.measurement import Measurement
from dina_rl.alignment.result import exported, keep_length, note_finished
from dina_rl.alignment.watch import DivergenceWatch, DriftWatch
from dina_rl.checkpoint import load_tensors, save_tensors, write_json
from dina_rl.config import AlignRun
from dina_rl.errors import opening
from dina_rl.report import plot_curves, plot_samples
from dina_rl.scorers.mixture import weighted_sum
from dina_rl.storage import StorageFailed, check_there, patiently
from dina_rl.textfiles import read_record
from dina_rl.types import Weights

WORKING = ("rollout", "update", "publish")
"""Stages of training; the others are for those who look on."""
PICTURES = 100
"""Measurements at most whose samples TensorBoard has; it shows ten of them, and days of a run would fill a disk."""


class Recorder:
    """Writes to `run_dir` as the loop reports; a resumed run continues every file where its checkpoint left it.

    Args:
        export: writes trained weights to a directory in the format of stock diffusers.
        clock: what a second is; the wall's, unless a benchmark counts others.
    """

    def __init__(
        self,
        run: AlignRun,
        run_dir: Path,
        export: Callable[[Path, dict[str, torch.Tensor]], Path],
        *,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.run = run
        self.dir = run_dir
        self.history = History()
        self.watch = DivergenceWatch(run.watch, self.history)
        self.drift_watch = DriftWatch(run.probes, self.history)
        self.checkpoints = Checkpoints(run_dir, keep=run.checkpoint_keep)
        self.seconds: dict[str, float] = defaultdict(float)
        self._export = export
        self._clock = clock
        self._evolution = Evolution(run, run_dir)
        self._pictured = spacing(run.iterations, run.golden.every, PICTURES)
        self._worked: dict[int, float] = {}
        self._bar: tqdm[int] | None = None
        self._opened: Board | None = None
        self._writing = Background()
        self._marks: dict[str, float] = {}
        self._warned = False

    @property
    def exported(self) -> Path:
        """Where the result lies: the adapter, or after full fine-tuning the transformer."""
        return exported(self.run, self.dir)

    def recall(self) -> tuple[int, dict[str, torch.Tensor] | None]:
        """(iterations done, learner state) of the last checkpoint, (0, None) without one. Writes nothing."""
        checkpoint = self.checkpoints.last()
        if checkpoint is None:
            return 0, None
        self.history.restore(checkpoint.history)
        for stage, seconds in checkpoint.seconds.items():
            self.seconds[stage] += seconds
        return checkpoint.iteration, checkpoint.state

    @opening()
    def restore(self) -> tuple[int, dict[str, torch.Tensor] | None]:
        """`recall`, to go on from there. Opens TensorBoard."""
        done, state = self.recall()
        keep_length(self.run, self.dir)
        self._evolution.restore(done)
        self._worked = {at: seconds for at, seconds in read_seconds(self.dir).items() if at <= done}
        self._opened = Board(self.run, self.dir / "tensorboard", done=done)
        return done, state

    @property
    def _board(self) -> Board:
        assert self._opened is not None, "restore() opens it"
        return self._opened

    def checkpoint(self, done: int, state: dict[str, torch.Tensor]) -> None:
        """Save all that resuming after `done` iterations needs, while the run goes on; the one before is settled.

        With all weights of a large model it takes long: storage writes it, and reads it for its sum.
        """
        entries = [*self.history.entries]
        checkpoint = Checkpoint(iteration=done, state=state, history=entries, seconds=dict(self.seconds))
        self._writing.begin(lambda: self.checkpoints.save(checkpoint))

    def settle(self) -> None:
        """Return when the last checkpoint is whole. Raises StorageFailed."""
        self._writing.settle()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """However the block ends, nothing is written any more: whoever goes on finds the last checkpoint whole.

        Raises:
            StorageFailed: the block ended well, but for that checkpoint.
        """
        try:
            yield
        except BaseException:
            self.leave()
            raise
        self.settle()

    def leave(self) -> None:
        """`settle` where something else ends the run, which is what is raised: a failure is a line."""
        if self._writing.works:
            tqdm.write("  waiting for the last checkpoint")
        try:
            self.settle()
        except StorageFailed as failed:
            tqdm.write(f"  {failed}")

    # --- what the loop reports ---------------------------------------------------------------------------------

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's time to `stage`."""
        begin = self._clock()
        try:
            yield
        finally:
            self._marks[stage] = self._clock() - begin
            self.seconds[stage] += self._marks[stage]

    def progress(self, iterations: range) -> Iterable[int]:
        """`iterations` with a progress bar."""
        first, last = iterations.start, iterations.stop
        self._bar = tqdm(iterations, desc="align", unit="it", initial=first, total=last, dynamic_ncols=True)
        return self._bar

    def warn(self, message: str | None) -> None:
        """Say `message`, if there is one, the first time: on the terminal and in TensorBoard."""
        if message is not None and not self._warned:
            self._warned = True
            tqdm.write(f"  warning: {message}")
            self._board.text("warnings", message, len(self.history.iterations()))

    def base(self, measurements: Sequence[Measurement]) -> None:
        """The model that the run starts from, on the test prompts, one measurement per guidance scale."""
        if self.run.start != "base":
            said = f"what is called base in measurements and charts is the {self.run.start}"
            self._board.text("start", said, 0)
            tqdm.write(f"  {said}")
        self._store("base", measurements)
        for each in measurements:
            if each.guidance_scale == self.run.rollout.guidance_scale:
                self._keep_opponents("test", each)
        self._board.prompts("test", measurements[0].prompts, 0)
        self._images("base", measurements, 0)

    def measured(self, done: int, measurement: Measurement, average: Weights) -> None:
        """A point of the proxy and golden curves after `done` iterations (dev prompts, averaged weights).

        They are kept if they are the best in golden so far, and the divergence watch looks at the curves.

        Raises:
            StorageFailed: storage has no room, or stays away.
        """
        patiently(lambda: check_there(self.dir))
        self.history.add(
            "measurement",
            done,
            {
                "golden": measurement.golden_mean,
                "golden_std": measurement.golden_std,
                "proxy": measurement.proxy_mean,
                "proxy_std": measurement.proxy_std,
                "parts": measurement.parts,
                "proxy_parts": measurement.proxy_parts,
                "samples": measurement.measured,
                **({"probes": measurement.probes} if measurement.probes else {}),
            },
        )
        failed = len(measurement.golden) - measurement.measured
        if failed:
            tqdm.write(f"  iteration {done:4d}  {failed} of {len(measurement.golden)} samples have no golden score")
        points = self.history.points()
        first, point = points[0], points[-1]
        if point is first:
            self._keep_opponents("dev", measurement)
        if self.watch.improved:
            self.checkpoints.keep_best_weights(average)
        verdict = self.watch.look()
        if verdict.alarm is not None:
            self._board.text("warnings", verdict.alarm, done)
            tqdm.write(f"  iteration {done:4d}  diverged, {verdict.alarm} (watch.action {self.run.watch.action})")
        for alarm in self.drift_watch.look():
            self._board.text("warnings", alarm, done)
            tqdm.write(f"  iteration {done:4d}  {alarm}")
        self._board.scalars(done, {"watch/diverged": float(verdict.diverged), "watch/kl_scale": self.watch.kl_scale})
        self._board.scalars(done, measurement.probes)
        self._board.curves(
            done,
            golden={
                "gain": gain(point["golden"], first["golden"], first["golden_std"]),
                "golden/dev": point["golden"],
                **{f"golden_parts/{name}": value for name, value in measurement.parts.items()},
            },
            proxy={
                "gain": gain(point["proxy"], first["proxy"], first["proxy_std"]),
                "proxy/dev": point["proxy"],
                **{f"proxy_parts/{name}": value for name, value in measurement.proxy_parts.items()},
            },
        )
        if point is first:
            self._board.prompts("dev", measurement.prompts, done)
        strip = self._evolution.add(done, measurement.images, measurement.prompts)
        if done % self._pictured == 0 or done == self.run.iterations:
            self._board.images("samples/dev", measurement.images, measurement.prompts, done)
            self._board.picture("evolution", strip, done)
        self._worked[done] = sum(self.seconds.get(stage, 0.0) for stage in WORKING)
        write_seconds(self.dir, self._worked)
        self.history.save(self.dir)
        plot_curves(points, self.base_lines(), self.dir / "curves.png", start=self.run.start)
        tqdm.write(f"  iteration {done:4d}  golden {point['golden']:.3f}  proxy {point['proxy']:+.3f}")

    def iteration(
        self,
        number: int,
        scores: Mapping[str, torch.Tensor],
        advantages: Advantages,
        metrics: dict[str, float],
        *,
        beside: Mapping[str, torch.Tensor],
    ) -> None:
        """Finished iteration `number`, counted from 0: scores [P, G] by scorer and the learner's metrics.

        Args:
            beside: what else there is to see of the scorers [P, G], by name: a judge's position bias, and what is
                missing of his verdicts.

        Raises:
            StorageFailed: the last checkpoint could not be written.
        """
        if not self._writing.works:
            self.settle()  # a failure is not kept for later
        rewards = weighted_sum(self.run.rewards, scores)
        whole = rewards.isfinite().all(1)
        finite = rewards[whole]
        by_scorer = {}
        for name, score in scores.items():
            by_scorer[f"{name}_mean"] = score[whole].mean().item()
            by_scorer[f"{name}_std_in_group"] = score[whole].std(1, correction=0).mean().item()
        for name, values in beside.items():
            if values.isfinite().any():
                by_scorer[name] = values[values.isfinite()].mean().item()
        train = {
            "reward_mean": finite.mean().item(),
            "reward_std_in_group": finite.std(1, correction=0).mean().item(),
            "groups_failed": advantages.failed,
            "groups_constant": advantages.constant,
            "images": rewards.numel(),
        }
        working = sum(self._marks[stage] for stage in WORKING)
        done = number + 1
        rate = {name: metrics[name] for name in ("learning_rate",) if name in metrics}  # absent without an update
        self.history.add("iteration", done, {**train, "scorers": by_scorer, **metrics})
        if advantages.failed:
            tqdm.write(f"  iteration {done}: dropped {advantages.failed} groups whose reward is not finite")
        self._board.scalars(
            done,
            {
                **{f"train/{name}": value for name, value in train.items()},
                **{f"scorers/{name}": value for name, value in by_scorer.items()},
                **{f"update/{name}": value for name, value in metrics.items() if name not in rate},
                **{f"learner/{name}": value for name, value in rate.items()},
                **{f"seconds/{name}": value for name, value in self._marks.items()},
                "seconds/images_per_second": rewards.numel() / working,
            },
        )
        self._marks.clear()
        values = advantages.values[advantages.kept]
        if len(values.unique()) > 1:  # equal weights are no distribution
            self._board.histogram("train/advantages", values, done)
        assert self._bar is not None, "progress() draws it"
        self._bar.set_postfix(reward=f"{train['reward_mean']:+.3f}", kl=f"{metrics.get('kl', 0):.1e}")

    def aligned(self, measurements: Sequence[Measurement]) -> None:
        """The aligned model on the test prompts, one measurement per guidance scale; draws the pictures."""
        self._store("aligned", measurements)
        self._images("aligned", measurements, self.run.iterations)
        self._board.result(self.table("base"), self.table("aligned"), self.run.iterations)
        scale = self.run.rollout.guidance_scale
        before, after = self.stored("base", scale), self.stored("aligned", scale)
        plot_samples(before["images"], after["images"], self.dir / "samples.png", start=self.run.start)

    def export(self, weights: Weights) -> None:
        """Write the weights for stock diffusers, in place of those of a shorter run, and close TensorBoard.

        Raises:
            StorageFailed: they, or the last checkpoint, cannot be written.
        """
        self.settle()
        self._export(self.exported, weights.tensors)
        note_finished(self.run.iterations, self.dir)
        self.close()

    def close(self) -> None:
        """Leave the files and the terminal to another recorder of the same run."""
        if self._opened is not None:
            self._opened.close()
        if self._bar is not None:
            self._bar.close()

    # --- what the report reads -----------------------------------------------------------------------------------

    def stored(self, name: str, scale: float) -> dict[str, torch.Tensor]:
        """Per-sample golden and proxy [B], and images, of a stored measurement."""
        return load_tensors(self.dir / "measurements" / f"{name}_guidance_{scale:g}.safetensors")

    def table(self, name: str) -> dict[float, dict[str, float]]:
        """Guidance scale -> golden, proxy and component means of a stored series of measurements."""
        file = self.dir / "measurements" / f"{name}.json"
        return {float(scale): row for scale, row in read_record(dict[str, dict[str, float]], file).items()}

    def opponents(self, split: str) -> torch.Tensor | None:
        """The start's pictures [B, 3, H, W] uint8 of that split, for judges; None where the run has none."""
        return load_tensors(self._opponents(split))["images"] if self.run.compares else None

    def base_lines(self) -> dict[float, float]:
        """Guidance scale -> golden of the base on the test prompts."""
        return {scale: row["golden"] for scale, row in self.table("base").items()}

    # --- helpers -------------------------------------------------------------------------------------------------

    def _keep_opponents(self, split: str, measurement: Measurement) -> None:
        if self.run.compares:
            save_tensors(self._opponents(split), {"images": measurement.images})

    def _opponents(self, split: str) -> Path:
        return self.dir / "measurements" / f"opponents_{split}.safetensors"

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

    def _images(self, name: str, measurements: Sequence[Measurement], iteration: int) -> None:
        for m in measurements:
            self._board.images(f"samples_test/{name}_guidance_{m.guidance_scale:g}", m.images, m.prompts, iteration)
