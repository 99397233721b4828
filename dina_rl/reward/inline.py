"""The reward model's fit in this process, without Ray: for debuggers and for machines without it.

Same batches, noise and arithmetic as the Ray Train job on one worker. It keeps no checkpoints: an interrupted fit
starts over (encoded latents are kept).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from time import perf_counter

import torch
from tqdm import tqdm

from dina_rl.backbones.base import Backbone, TextEncoder
from dina_rl.checkpoint import open_run_dir, write_json
from dina_rl.config import FitRun
from dina_rl.data.encode import SKIPPED_FILE, EncodingHere, check_inputs, encode_dataset
from dina_rl.data.latents import LatentStore, training_order
from dina_rl.evaluation import pairwise_accuracy, score_pairs, store_ceiling
from dina_rl.reward.checkpoint import save_reward
from dina_rl.reward.fit import METRICS_FILE, REWARD, FitResult, RewardFit, StepReport, fit
from dina_rl.reward.model import LatentRewardModel
from dina_rl.runtime import open_pipeline

EVALUATION_BATCH = 64


def fit_inline(run: FitRun) -> FitResult:
    """Encode, fit, save, measure; a finished run returns what it found.

    Raises:
        ValueError: mistakes in the inputs or a used run directory; too many unreadable images.
    """
    begin = perf_counter()
    backbone = open_pipeline(run.pipeline)
    run = check_inputs(run, backbone)
    run_dir = open_run_dir(run, run.run_dir, resume=run.resume, may_change=("fit.num_workers",))
    if (run_dir / METRICS_FILE).is_file():
        return FitResult(**json.loads((run_dir / METRICS_FILE).read_text()))
    store = encode_dataset(run, run_dir, backbone, EncodingHere(backbone))
    encoder = backbone.load_text_encoder()
    encoded = perf_counter()
    progress, steps = training_steps(run, store, backbone, encoder)
    tests = store.pairs("test")
    bar = tqdm(steps, total=run.fit.steps, desc="fit reward", unit="step")
    for report in bar:
        bar.set_postfix(accuracy=f"{report.accuracy:.3f}", loss=f"{report.loss:.3f}", refresh=False)
    fit_seconds = perf_counter() - encoded
    accuracy = {}
    with progress.averaged_weights() as model:
        save_reward(model, run_dir / REWARD, pipeline=run.pipeline)
        for name, levels in (("single", (run.reward.single_level,)), ("ensemble", run.reward.ensemble_levels)):
            shares = (store.batch(tests, index) for index in torch.arange(len(tests)).split(EVALUATION_BATCH))
            accuracy[name] = pairwise_accuracy(*score_pairs(model, shares, encoder, levels=levels, seed=run.seed))
    skipped = run_dir / SKIPPED_FILE
    result = FitResult(
        accuracy_single=accuracy["single"],
        accuracy_ensemble=accuracy["ensemble"],
        label_ceiling=store_ceiling(store),
        train_pairs=len(store.pairs("train")),
        test_pairs=len(tests),
        skipped=len(skipped.read_text().splitlines()) if skipped.is_file() else 0,
        steps=run.fit.steps,
        pairs_per_second=run.fit.steps * run.fit.batch_size / fit_seconds,
        encode_seconds=encoded - begin,
        fit_seconds=fit_seconds,
        total_seconds=perf_counter() - begin,
        reward=str(run_dir / REWARD),
    )
    write_json(run_dir / METRICS_FILE, asdict(result))
    return result


def training_steps(
    run: FitRun, store: LatentStore, backbone: Backbone, encoder: TextEncoder
) -> tuple[RewardFit, Iterator[StepReport]]:
    """A fresh fit and its steps, to be iterated."""
    progress = RewardFit(LatentRewardModel(backbone, run.reward, seed=run.seed), run.fit)
    pairs = store.pairs("train")
    order = training_order(len(pairs), steps=run.fit.steps, batch_size=run.fit.batch_size, seed=run.seed)
    return progress, fit(progress, (store.batch(pairs, index) for index in order), encoder, seed=run.seed)
