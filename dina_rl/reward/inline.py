"""The reward model's fit in this process, without Ray: for debuggers and for machines without it.

Same batches, noise and arithmetic as the Ray Train job on one worker. It keeps no checkpoints: an interrupted fit
starts over (encoded latents are kept).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from time import perf_counter

from tqdm import tqdm

from dina_rl.checkpoint import open_run_dir, write_json
from dina_rl.config import FitRun
from dina_rl.data.encode import EncodingHere
from dina_rl.data.stores.latents import PairBatch, PairStore
from dina_rl.data.stores.open import open_store
from dina_rl.data.stores.order import fit_order
from dina_rl.reward.fit import METRICS_FILE, FitResult, RewardFit, StepReport
from dina_rl.reward.inputs import (
    MAY_CHANGE,
    check_fit_inputs,
    encode_missing,
    open_encoder,
    training_latents,
    unseen_pairs,
    without_embeddings,
)
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.session import result_of, run_fit
from dina_rl.runtime import open_pipeline


def fit_inline(run: FitRun) -> FitResult:
    """Encode, fit, save, measure; a finished run returns what it found.

    Raises:
        ValueError: mistakes in the inputs or a used run directory; too many unreadable images.
        RunStopped: a gradient is not finite.
    """
    begin = perf_counter()
    backbone = open_pipeline(run.pipeline)
    run = check_fit_inputs(run, backbone)
    run_dir = open_run_dir(run, run.run_dir, resume=run.resume, may_change=MAY_CHANGE)
    if (run_dir / METRICS_FILE).is_file():
        return FitResult(**json.loads((run_dir / METRICS_FILE).read_text()))
    encode_missing(run, run_dir, backbone, EncodingHere(backbone))
    latents = training_latents(run, run_dir)
    store = open_store(latents)
    notes = unseen_pairs(run, store) + without_embeddings(run, latents)
    print("".join(f"{line}\n" for line in notes), end="", flush=True)
    encoder = open_encoder(run, latents, backbone)
    encoded = perf_counter()
    with tqdm(total=run.fit.steps, desc="fit reward", unit="step") as bar:

        def show(report: StepReport) -> None:
            bar.set_postfix(accuracy=f"{report.accuracy:.3f}", loss=f"{report.loss:.3f}", refresh=False)
            bar.update()

        outcome = run_fit(
            RewardFit(LatentRewardModel(backbone, run.reward, seed=run.seed), run.fit),
            training_batches(run, store),
            encoder,
            store,
            run,
            run_dir,
            on_step=show,
        )
    result = result_of(
        outcome,
        run,
        run_dir,
        store,
        encode_seconds=encoded - begin,
        total_seconds=perf_counter() - begin,
    )
    write_json(run_dir / METRICS_FILE, asdict(result))
    return result


def training_batches(run: FitRun, store: PairStore) -> Iterator[PairBatch]:
    """Every step's whole batch."""
    pairs = store.pairs("train")
    return (store.batch(pairs, index) for index in fit_order(store, run.fit, seed=run.seed).batches)
