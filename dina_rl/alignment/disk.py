"""How much of a disk a run takes: it does not grow with the run's length but for lines of text."""

from dataclasses import dataclass
from pathlib import Path

from dina_rl.alignment.algorithms.registry import open_algorithm
from dina_rl.alignment.board import SHOWN_IMAGES, SIDE
from dina_rl.alignment.checkpoints import Checkpoints
from dina_rl.alignment.evolution import COLUMNS, ROWS, THUMBNAIL, spacing
from dina_rl.alignment.footprint import FP32, bytes_of
from dina_rl.alignment.record import PICTURES
from dina_rl.backbones.base import Backbone
from dina_rl.backbones.lora import trainable
from dina_rl.backbones.trained import make_trainable
from dina_rl.config import AlignRun
from dina_rl.loading import shown_bytes
from dina_rl.runtime import image_size
from dina_rl.storage import free_bytes

COPIES = 4
"""Of what is trained, in a learner's state: the weights, their average and AdamW's two moments."""
RGB = 3  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUse:
    """Bytes at most, before compression."""

    checkpoint: int  # one
    checkpoints: int  # those that stay, and the one that is being written
    best: int  # the best weights; the whole state too where the watch may go back to it
    result: int  # adapter or transformer
    pictures: int  # samples of measurements, on disk and in TensorBoard

    @property
    def total(self) -> int:
        return self.checkpoints + self.best + self.result + self.pictures

    @property
    def words(self) -> str:
        return (
            f"{shown_bytes(self.total)} at most: checkpoints {shown_bytes(self.checkpoints)}, "
            f"{shown_bytes(self.checkpoint)} each; best {shown_bytes(self.best)}, result {shown_bytes(self.result)}, "
            f"pictures {shown_bytes(self.pictures)}"
        )


def disk_use(run: AlignRun, backbone: Backbone) -> DiskUse:
    """Of the run directory; builds the transformer without its weights."""
    module = backbone.empty_transformer()
    whole = bytes_of(module)  # as the pipeline has it
    make_trainable(module, run.learner.lora, targets=backbone.lora_targets, seed=run.seed)
    trained = FP32 * sum(parameter.numel() for parameter in trainable(module).values())
    checkpoint = trained * (COPIES + open_algorithm(run).work().copies_kept)
    return DiskUse(
        checkpoint=checkpoint,
        checkpoints=checkpoint * (run.checkpoint_keep + 1),
        best=trained + (checkpoint if run.watch.action == "roll_back" else 0),
        result=whole if run.learner.lora is None else trained,
        pictures=_pictures(run, image_size(run.pipeline, backbone)),
    )


def _pictures(run: AlignRun, size: tuple[int, int]) -> int:
    """Stored samples of the test prompts, and grids and strips of the dev prompts in TensorBoard."""
    golden = run.golden
    scales = {run.rollout.guidance_scale, *golden.guidances}, {run.rollout.guidance_scale, *golden.aligned_guidances}
    measured = sum(map(len, scales))
    space = spacing(run.iterations, golden.every, PICTURES)
    shown = 2 + run.iterations // space  # the first, and the last where that is none of them
    height, width = size
    small = min(1.0, SIDE / max(size)) ** 2
    grid = SHOWN_IMAGES * RGB * height * width
    strip = COLUMNS * ROWS * RGB * min(THUMBNAIL, height) * min(THUMBNAIL, width)
    return int(measured * grid * (1 + small) + shown * (grid * small + strip))


def check_room(run: AlignRun, backbone: Backbone, run_dir: Path) -> str | None:
    """A line where `run_dir` has less room than the run may take; None: it has enough, or does not say.

    Raises:
        ValueError: not even the first two checkpoints fit.
    """
    room, use = free_bytes(run_dir), disk_use(run, backbone)
    if room is None or Checkpoints(run_dir).done():  # what is there is replaced by what comes
        return None
    if room < 2 * use.checkpoint:
        raise ValueError(
            f"{run_dir}: {shown_bytes(room)} are free there, two checkpoints are {shown_bytes(2 * use.checkpoint)}; "
            "make room, or name another run_dir"
        )
    if room < use.total:
        return f"warning: {shown_bytes(room)} are free in {run_dir}; the run takes {use.words}"
    return None
