"""One rank of the reward model's fit: what Ray Train runs on each of its workers."""

from contextlib import nullcontext
from pathlib import Path

import ray.train
import torch
from ray.train.torch import get_device, prepare_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dina_rl.config import FitRun
from dina_rl.data.stores.open import open_store
from dina_rl.reward.checkpoints import FitCheckpoints
from dina_rl.reward.fit import RewardFit
from dina_rl.reward.inputs import open_encoder
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.outcome import Outcome
from dina_rl.reward.session import run_fit
from dina_rl.runtime import configure_process, open_pipeline
from jobs.pair_stream import pair_batches


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
    """`run_fit` on this rank; continues from the last checkpoint, if any.

    Args:
        latents: the store of the training pairs.

    Raises:
        RunStopped: a gradient is not finite, or storage refuses what the first rank writes; every rank raises it. Or
            what this rank alone reads is broken, with the others in a collective.
        ValueError: the latter too.
    """
    configure_process(run.fit.threads_per_worker)
    ranks = TrainRanks()
    backbone = open_pipeline(run.pipeline)
    progress = RewardFit(LatentRewardModel(backbone, run.reward, seed=run.seed), run.fit)
    checkpoints = FitCheckpoints(run_dir, keep=run.fit.checkpoint_keep)
    # One rank looks for all: storage that nodes share may show a new directory to one later than to another.
    found = checkpoints.last_step() if ranks.rank == 0 else 0
    step = round(ranks.world_size * ranks.mean(torch.tensor(float(found), dtype=torch.float64)).item())
    if step:
        progress.load_state(checkpoints.load(step))
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
        save_checkpoint=lambda progress: checkpoints.save(progress.step, progress.state()),
    )
