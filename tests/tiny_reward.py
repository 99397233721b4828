"""A small DiNa-LRM and small preference data for tests: the real classes on the miniature SD3.5 with random weights."""

import json
from pathlib import Path

import torch
from PIL import Image

from dina_rl.backbones.base import Backbone
from dina_rl.config import LoRAConfig, RewardModelConfig
from dina_rl.data.images import READING
from dina_rl.data.stores.latents import SPLITS, LatentStore, PairBatch, StoredPair, StoreInfo
from dina_rl.data.stores.units import TrainingBatch, Unit, training_batch
from dina_rl.reward.model import LatentRewardModel
from dina_rl.seeding import generator, normal

LATENT_SHAPE = (16, 8, 8)
PROMPTS = ("a small red circle on blue", "a large green cross on white", "a small black ring on cyan")
TINY_REWARD = RewardModelConfig(taps=(1, 3), num_heads=4, lora=LoRAConfig(rank=4, alpha=8))


def stirred_model(backbone: Backbone, config: RewardModelConfig = TINY_REWARD) -> LatentRewardModel:
    """A reward model whose zero-initialised parts (LoRA's B, FiLM, gates) are random too, so that all of it matters."""
    model = LatentRewardModel(backbone, config, seed=0)
    source = generator("stirred")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=source)
    return model


def latents(count: int, *key: int | str) -> torch.Tensor:
    """Standard normal latents [count, 16, 8, 8]."""
    return normal((count, *LATENT_SHAPE), "latents", *key)


def pair_batch(count: int, step: int) -> PairBatch:
    """Pairs that can be learned: the chosen latent is the brighter one in its first channel."""
    chosen, rejected = latents(count, "chosen", step), latents(count, "rejected", step)
    chosen[:, 0] += 0.5
    return PairBatch(
        pair_ids=torch.arange(count) + 100 * step,
        chosen=chosen,
        rejected=rejected,
        prompts=tuple(PROMPTS[index % len(PROMPTS)] for index in range(count)),
    )


def fit_batch(count: int, step: int) -> TrainingBatch:
    """`pair_batch` as a fit takes it, the whole step."""
    return as_step(pair_batch(count, step))


def as_step(pairs: PairBatch, *, step_pairs: int | None = None) -> TrainingBatch:
    """Pairs as a fit takes them."""
    units = [
        Unit(key=key, prompt=prompt, latents=torch.stack([chosen, rejected]), chosen=(0,), rejected=(1,))
        for key, prompt, chosen, rejected in zip(
            pairs.pair_ids.tolist(), pairs.prompts, pairs.chosen, pairs.rejected, strict=True
        )
    ]
    return training_batch(units, step_pairs=len(pairs) if step_pairs is None else step_pairs)


def write_store(directory: Path, pipeline: str, *, train: tuple[int, int], test: tuple[int, int]) -> LatentStore:
    """A latent store of 32x32 and 32x16 images: pairs per bucket and split, the chosen latent brighter in channel 0."""
    shapes = ((16, 8, 8), (16, 8, 4))
    info = StoreInfo(
        dataset=str(directory),
        pipeline=pipeline,
        buckets=((32, 32), (32, 16)),
        latent_shapes=shapes,
        rows=tuple(2 * (a + b) for a, b in zip(train, test, strict=True)),
        rows_per_shard=8,
        pictures=READING,
    )
    store = LatentStore.create(directory, info, (f"{row}.png" for row in range(info.num_rows)))
    for shard in store.missing_shards():
        bucket, rows = info.shard(shard)
        latents = normal((len(rows), *shapes[bucket]), "store", directory.name, shard)
        latents[:, 0] += torch.tensor([0.5 if row % 2 == 0 else 0.0 for row in rows]).view(-1, 1, 1)
        store.write_shard(shard, latents, {})
    firsts = {"train": (0, info.rows[0]), "test": (2 * train[0], info.rows[0] + 2 * train[1])}
    for split, counts in zip(SPLITS, (train, test), strict=True):
        rows = [first + 2 * n for first, count in zip(firsts[split], counts, strict=True) for n in range(count)]
        store.write_pairs(
            split,
            (
                StoredPair(pair_id=number, chosen=row, rejected=row + 1, prompt=PROMPTS[number % len(PROMPTS)])
                for number, row in enumerate(rows)
            ),
        )
    return store


def write_preferences(directory: Path, *, train: int, test: int) -> None:
    """A preference set as HPDv3 writes it, `train` and `test` pairs of 32x32 noise; the preferred image is brighter."""
    (directory / "images").mkdir(parents=True)
    golden = {}
    for split, count in (("train", train), ("test", test)):
        records = []
        for index in range(count):
            paths = [f"images/{split}-{index}-{side}.png" for side in ("bright", "dark")]
            for path, low in zip(paths, (96, 0), strict=True):
                draws = generator("image", path)
                pixels = torch.randint(low, low + 160, (32, 32, 3), generator=draws, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(directory / path)
                golden[path] = low / 255
            records.append(
                {
                    "prompt": PROMPTS[index % len(PROMPTS)],
                    "path1": paths[0],
                    "path2": paths[1],
                    "choice_dist": [9, 1] if index % 2 else None,
                    "confidence": 0.9 if index % 2 else None,
                    "model1": "bright",
                    "model2": "dark",
                }
            )
        (directory / f"{split}.json").write_text(json.dumps(records))
    (directory / "golden.json").write_text(json.dumps(golden))
