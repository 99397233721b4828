"""The fit's two Protocols satisfied in this process, without Ray: for debuggers and for machines without it.

Same batches, noise and arithmetic as the Ray Train job on one worker, and the same checkpoints.
"""

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from dina_rl.backbones.base import Backbone
from dina_rl.config import FitRun
from dina_rl.data.encode import EncodingHere
from dina_rl.data.stores.latents import PairStore
from dina_rl.data.stores.open import open_store
from dina_rl.data.stores.order import fit_order
from dina_rl.data.stores.units import TrainingBatch, fit_units, read_units
from dina_rl.reward.checkpoints import FitCheckpoints
from dina_rl.reward.fit import RewardFit, StepReport
from dina_rl.reward.inputs import open_encoder
from dina_rl.reward.job import FitWork, fit_reward
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.outcome import FitResult, Outcome
from dina_rl.reward.session import run_fit


class TrainingHere:
    """`Training` in this process."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def train(self, run: FitRun, latents: Path, run_dir: Path) -> Outcome:
        store = open_store(latents)
        encoder = open_encoder(run, latents, self._backbone)
        checkpoints = FitCheckpoints(run_dir, keep=run.fit.checkpoint_keep)
        step = checkpoints.last_step()
        progress = RewardFit(LatentRewardModel(self._backbone, run.reward, seed=run.seed), run.fit)
        if step:
            progress.load_state(checkpoints.load(step))
        with tqdm(total=run.fit.steps, desc="fit reward", unit="step", initial=step) as bar:

            def show(report: StepReport) -> None:
                bar.set_postfix(accuracy=f"{report.accuracy:.3f}", loss=f"{report.loss:.3f}", refresh=False)
                bar.update()

            return run_fit(
                progress,
                training_batches(run, store, first_step=step),
                encoder,
                store,
                run,
                run_dir,
                save_checkpoint=lambda progress: checkpoints.save(progress.step, progress.state()),
                on_step=show,
            )


def fit_inline(run: FitRun) -> FitResult:
    """`fit_reward` in this process."""
    return fit_reward(run, work_here)


def work_here(backbone: Backbone) -> FitWork:
    return EncodingHere(backbone), TrainingHere(backbone)


def training_batches(run: FitRun, store: PairStore, *, first_step: int = 0) -> Iterator[TrainingBatch]:
    """Every step's whole batch, from `first_step` on."""
    pairs = store.pairs("train")
    units = fit_units(pairs, run.fit.batch_of)
    order = fit_order(units, store.latent_shapes, run.fit, seed=run.seed)
    return (read_units(store, pairs, units, index) for index in order.batches[first_step:])
