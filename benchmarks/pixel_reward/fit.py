"""The pixel reward: `python -m benchmarks.pixel_reward.fit --pretrained CLIP --preferences DIR --out DIR --seed S`.

The pretrained CLIP, fitted on the preference pairs that DiNa-LRM is fitted on, as PickScore is (Kirstain et al., 2023,
section 4): the scale times the cosine is a picture's score, and the loss is -log softmax of a pair's two. The result
loads as `rewards.pickscore.path`, `rewards.pickscore.processor`, `golden.path`, and as a scorer of `jobs.score`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch.nn import functional
from transformers import CLIPModel

from benchmarks.pixel_reward.pretrain import CARD, normalised, save, tokenized, train
from dina_rl.checkpoint import write_json
from dina_rl.cli import fail, load
from dina_rl.config import PickScoreConfig
from dina_rl.config.base import Positive, Rate, Section
from dina_rl.data.images import load_image
from dina_rl.data.sets.hpdv3 import HPDv3
from dina_rl.data.sets.records import PreferenceRecord, pairs_of
from dina_rl.runtime import configure_process
from dina_rl.scorers.clip import check_clip, load_clip, open_clip_scorer
from dina_rl.seeding import generator
from dina_rl.shapes.preferences import TRAIN_PAIRS
from dina_rl.shapes.render import IMAGE_SIZE
from dina_rl.textfiles import read_text

GROUP_PAIRS = len(TRAIN_PAIRS)
"""Pairs of a group of images, which stand beside each other in the file: each image is encoded once for all of its."""
CHUNK = 256  # pictures scored at once


class FitRun(Section):
    """Fit a pretrained CLIP on a preference set of the miniature world."""

    pretrained: Path = Path("runs/pixel_clip")
    """what `python -m benchmarks.pixel_reward.pretrain` writes"""
    preferences: Path = Path("runs/local/preferences")
    """preference set of `python -m dina_rl.local` or of `python -m dina_rl.shapes.preferences`"""
    out: Path = Path("runs/pixel_reward")
    """new directory for the reward"""
    steps: Positive = 1200
    """training steps"""
    groups: Positive = 8
    """groups of six pairs a step: 8 are the 48 pairs of configs/local.yaml"""
    learning_rate: Rate = 1e-3
    """AdamW's, after the warm-up; falls to 0"""
    seed: int = 0
    """seed of the order"""
    threads: Positive = 1
    """torch threads"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """A split of a preference set, in memory: N pictures, P pairs."""

    pixels: torch.Tensor  # [N, 3, 32, 32] uint8
    prompts: tuple[str, ...]  # P of them
    chosen: torch.Tensor  # [P] rows of `pixels`
    rejected: torch.Tensor  # [P]


def main(argv: Sequence[str]) -> None:
    run = load(FitRun, argv, program="python -m benchmarks.pixel_reward.fit")
    configure_process(run.threads)
    try:
        if run.out.exists():
            raise ValueError(f"{run.out} exists: choose a new directory")
        check_clip(str(run.pretrained), str(run.pretrained))
        train_pairs, test_pairs = (read_pairs(run.preferences, split) for split in ("train", "test"))
    except ValueError as error:
        fail(str(error))
    fit_pixel_reward(run, train_pairs, test_pairs)


def fit_pixel_reward(run: FitRun, train_pairs: Pairs, test_pairs: Pairs) -> None:
    """Fits and saves, and leaves what was measured in card.json."""
    model = load_clip(str(run.pretrained), "cpu").requires_grad_(True)
    draws = generator(run.seed, "pixel reward fit")
    tokens = tokenized(run.pretrained, train_pairs.prompts)
    begin, begin_wall = process_time(), perf_counter()
    train(
        "fit",
        model,
        run.steps,
        run.learning_rate,
        lambda: preference_loss(model, train_pairs, tokens, run.groups, draws),
        draws,
        run.out,
    )
    seconds, wall = process_time() - begin, perf_counter() - begin_wall
    save(model, run.pretrained, run.out)
    card = json.loads(read_text(run.pretrained / CARD))
    held_out = round(accuracy(run.out, test_pairs), 4)
    card["fit"] = {
        **run.model_dump(mode="json", exclude={"out", "pretrained", "preferences"}),
        "accuracy": held_out,
        "processor_seconds": round(seconds, 1),
        "seconds": round(wall, 1),
    }
    write_json(run.out / CARD, card)
    print(f"{run.out}: held-out accuracy {held_out:.3f}; {seconds:.0f} processor seconds")


def read_pairs(directory: Path, split: str) -> Pairs:
    """Raises ValueError: no such set or split, or a record or picture of it that cannot be read."""
    source, rows, pixels = HPDv3(directory), dict[str, int](), list[torch.Tensor]()
    prompts, chosen, rejected = [], [], []
    for record in source.records(split):
        if not isinstance(record, PreferenceRecord):
            raise ValueError(f"{directory}: record {record.index} of {split} holds no comparison")
        for key in record.images:
            if key not in rows:
                rows[key] = len(pixels)
                pixels.append(torch.tensor(load_image(source.image(key), height=IMAGE_SIZE, width=IMAGE_SIZE)))
        for pair in pairs_of(record):
            prompts.append(pair.prompt)
            chosen.append(rows[pair.chosen])
            rejected.append(rows[pair.rejected])
    return Pairs(
        pixels=torch.stack(pixels).permute(0, 3, 1, 2),
        prompts=tuple(prompts),
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
    )


def preference_loss(
    model: CLIPModel, pairs: Pairs, tokens: torch.Tensor, groups: int, draws: torch.Generator
) -> torch.Tensor:
    """Mean over the pairs of `groups` random groups of -log softmax at the preferred picture."""
    starts = GROUP_PAIRS * torch.randint(0, len(pairs.prompts) // GROUP_PAIRS, (groups, 1), generator=draws)
    batch = (starts + torch.arange(GROUP_PAIRS)).flatten()
    images, place = torch.cat([pairs.chosen[batch], pairs.rejected[batch]]).unique(return_inverse=True)
    texts, text = tokens[batch].unique(dim=0, return_inverse=True)
    seen = model.get_image_features(pixel_values=normalised(pairs.pixels[images] / 255)).pooler_output
    read = model.get_text_features(input_ids=texts).pooler_output[text].repeat(2, 1)
    scores = model.logit_scale.exp() * functional.cosine_similarity(seen[place], read)
    first, second = scores.chunk(2)
    return -functional.logsigmoid(first - second).mean()


@torch.no_grad()
def accuracy(reward: Path, pairs: Pairs) -> float:
    """Share of pairs whose preferred picture scores higher, by the scorer that a run opens."""
    where = PickScoreConfig(path=str(reward), processor=str(reward))
    scorer = open_clip_scorer(where, learned_scale=True, device="cpu")

    def scored(rows: torch.Tensor) -> torch.Tensor:
        parts = zip(rows.split(CHUNK), range(0, len(rows), CHUNK), strict=True)
        return torch.cat([scorer.score(pairs.pixels[own] / 255, pairs.prompts[at : at + CHUNK]) for own, at in parts])

    return (scored(pairs.chosen) > scored(pairs.rejected)).float().mean().item()


if __name__ == "__main__":
    main(sys.argv[1:])
