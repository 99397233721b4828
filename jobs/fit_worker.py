"""One rank of the reward model's fit: what Ray Train runs on each of its workers."""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import ray.train
import torch
from ray.train.torch import get_device, prepare_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dina_rl.checkpoint import load_tensors, save_tensors
from dina_rl.config import FitRun
from dina_rl.data.stores.open import open_store
from dina_rl.reward.fit import RewardFit
from dina_rl.reward.inputs import open_encoder
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.outcome import Outcome
from dina_rl.reward.session import run_fit
from dina_rl.runtime import configure_process, open_pipeline
from jobs.pair_stream import pair_batches

STATE_FILE = "state.safetensors"


class TrainRanks:
    """`Ranks` over the process group of Ray Train's workers."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = values.to(get_device())  # NCCL reduces what lies on the GPU
        distributed.all_reduce(total)
        return (total / self.world_size).cpu()

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        gathered = [torch.empty(0)] * self.world_size
        distributed.all_gather_object(gathered, values)
        return gathered


def fit_on_worker(run: FitRun, *, latents: Path, run_dir: Path) -> Outcome:
    """`run_fit` on this rank; continues from the checkpoint that Ray Train gives, if any.

    Args:
        latents: the store of the training pairs.

    Raises:
        RunStopped: a gradient is not finite; every rank raises it.
    """
    configure_process(run.fit.threads_per_worker)
    ranks = TrainRanks()
    backbone = open_pipeline(run.pipeline)
    progress = RewardFit(LatentRewardModel(backbone, run.reward, seed=run.seed), run.fit)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            progress.load_state(load_tensors(Path(directory) / STATE_FILE))
    # Buffers are frozen position tables: equal everywhere, and large, so they are not broadcast at every forward.
    forward = prepare_model(progress.model, parallel_strategy_kwargs={"broadcast_buffers": False})
    store = open_store(latents)
    return run_fit(
        progress,
        pair_batches(ray.train.get_dataset_shard("train"), store.pairs("train").prompts, first_step=progress.step),
        open_encoder(run, latents, backbone),
        store,
        run,
        run_dir,
        ranks=ranks,
        forward=forward,
        no_sync=forward.no_sync if isinstance(forward, DistributedDataParallel) else nullcontext,
        save_checkpoint=lambda progress: _save_checkpoint(progress, ranks.rank),
    )


def _save_checkpoint(progress: RewardFit, rank: int) -> None:
    """Hand weights, averages, optimizer and step to Ray Train; all ranks meet here."""
    name = f"step_{progress.step:08d}"
    if rank != 0:
        ray.train.report({"step": progress.step}, checkpoint_dir_name=name)
        return
    with tempfile.TemporaryDirectory() as directory:
        save_tensors(Path(directory) / STATE_FILE, progress.state())
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": progress.step}, checkpoint=checkpoint, checkpoint_dir_name=name)
