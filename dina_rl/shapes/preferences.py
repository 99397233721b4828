"""Write the miniature world's preference set as HPDv3 is stored: `python -m dina_rl.shapes.preferences --out DIR`.

Groups of four images of one prompt, drawn by the generator at several settings or rendered with the crawl's
defects, are compared in pairs. A label is one simulated annotator: each side's golden score plus independent
normal noise of standard deviation tau, the higher one is preferred (Thurstone's model, the paper's Eq. 5). So
the best possible accuracy on the labels is known: the share of pairs in which the golden scores themselves
agree with the label (`ceiling`).

`--domain out` draws the same prompts with defects that the crawl does not have, and with other settings of the
generator: a set to evaluate on, whose defects a reward model has not met.

Beside HPDv3's files lie `golden.json` (golden score of every image, for the ceiling only) and `stats.json`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dina_rl.checkpoint import replaced_directory
from dina_rl.seeding import generator
from dina_rl.shapes.foreign import foreign_crawl
from dina_rl.shapes.golden import golden_score
from dina_rl.shapes.grammar import PromptSplit, prompts, spec_tensor
from dina_rl.shapes.pipeline import SHIPPED_PIPELINE
from dina_rl.shapes.render import crawl
from dina_rl.shapes.sampling import Studio, draw, open_studio
from dina_rl.storage import remove_leftovers

GROUP = 4  # images of one prompt
Domain = Literal["in", "out"]
SETTINGS: dict[Domain, tuple[tuple[int, float], ...]] = {  # (steps, guidance) of the generator's images
    "in": ((10, 1.0), (10, 2.0), (6, 2.0), (8, 1.0)),
    "out": ((4, 1.0), (20, 3.0)),
}
CAPTION_ERROR_RATE = 0.45  # of the renders: more than the crawl's, so that the reward model sees wrong pictures
CHUNK = 1000  # images drawn at once: the progress bar moves
TRAIN_PAIRS = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))  # all pairs of a group
TEST_PAIRS = ((0, 1), (2, 3))  # disjoint, so that test pairs are independent
RENDER_NAMES: dict[Domain, str] = {"in": "render", "out": "foreign-render"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitStats:
    """What one split of a preference set holds."""

    images: int
    generated: int  # images drawn by the generator; the others are renders
    pairs: int
    golden_generated: float  # mean over images
    golden_rendered: float
    median_gap: float  # median |difference of golden scores| over pairs
    ceiling: float  # share of pairs in which the golden order agrees with the label


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceStats:
    """What `write_preferences` wrote."""

    train: SplitStats
    test: SplitStats
    domain: Domain
    seed: int
    thurstone_tau: float
    seconds: float


def write_preferences(
    pipeline_dir: Path,
    out_dir: Path,
    *,
    train_groups: int,
    test_groups: int,
    seed: int,
    thurstone_tau: float = 0.05,
    generator_fraction: float = 0.35,
    domain: Domain = "in",
    progress: bool = True,
) -> PreferenceStats:
    """Write a preference set of the training prompts (all 6 pairs of a group) and the test prompts (2 disjoint pairs).

    `train.json` and `test.json` are arrays of {prompt, path1 (preferred), path2, choice_dist, confidence, model1,
    model2}; paths are relative to `out_dir`. choice_dist is [1, 0]: one annotator, who decided. confidence is the
    probability of the likelier order, Phi(|golden difference| / (sqrt(2) tau)), in [0.5, 1]: how sure an
    annotator may be of this pair, not whether this one was right.

    Args:
        seed: same seed, same files.
        thurstone_tau: standard deviation of an annotator's noise on one golden score.
        generator_fraction: share of the images that the generator draws.
        domain: the crawl's defects and the usual settings, or others.

    Raises:
        StorageFailed: storage refuses; nothing is left of it.
        ValueError: `out_dir` is in use, a number is out of range, or there is no pipeline at `pipeline_dir`.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"preference directory {out_dir} is in use: choose a new one")
    if train_groups < 1 or test_groups < 1:
        raise ValueError(f"a preference set needs groups, got {train_groups} to train and {test_groups} to test")
    if not 0 <= generator_fraction <= 1 or thurstone_tau <= 0:
        raise ValueError(
            f"generator_fraction must be in [0, 1] and thurstone_tau above 0, "
            f"got {generator_fraction} and {thurstone_tau}"
        )
    started = time.monotonic()
    studio = open_studio(pipeline_dir)
    remove_leftovers(out_dir.parent, out_dir.name)
    plan: tuple[tuple[PromptSplit, int, tuple[tuple[int, int], ...]], ...] = (
        ("train", train_groups, TRAIN_PAIRS),
        ("test", test_groups, TEST_PAIRS),
    )
    stats: dict[str, SplitStats] = {}
    golden: dict[str, float] = {}
    with replaced_directory(out_dir) as unfinished:
        with tqdm(total=GROUP * (train_groups + test_groups), desc="preferences", disable=not progress) as bar:
            for split, groups, pairs in plan:
                pictures = _picture_groups(studio, split, groups, seed, generator_fraction, domain, bar)
                paths = _write_images(unfinished, split, pictures.pixels)
                scores = golden_score(pictures.pixels.float() / 255, pictures.captions).score
                records, stats[split] = _label(pictures, paths, scores, pairs, thurstone_tau, seed, split)
                _write_json(unfinished / f"{split}.json", records)
                golden |= dict(zip(paths, scores.tolist(), strict=True))
        result = PreferenceStats(
            **stats, domain=domain, seed=seed, thurstone_tau=thurstone_tau, seconds=round(time.monotonic() - started, 1)
        )
        _write_json(unfinished / "golden.json", golden)
        _write_json(unfinished / "stats.json", asdict(result))
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pictures:
    captions: list[str]  # GROUP in a row share a caption
    pixels: Tensor  # [B, 3, 32, 32] uint8, as stored
    models: list[str]
    rendered: Tensor  # [B] bool; the others are the generator's


def _picture_groups(
    studio: Studio,
    split: PromptSplit,
    groups: int,
    seed: int,
    generator_fraction: float,
    domain: Domain,
    bar: "tqdm[NoReturn]",
) -> _Pictures:
    key = (seed, "shapes preferences", split) if domain == "in" else (seed, "shapes preferences", domain, split)
    draws = generator(*key)
    pool = prompts(split)
    rows = torch.randint(0, len(pool), (groups,), generator=draws).repeat_interleave(GROUP)
    captions = [pool[row] for row in rows.tolist()]
    generated = torch.rand(len(captions), generator=draws) < generator_fraction
    order = torch.randperm(len(captions), generator=draws)
    by_setting = order[generated[order]].tensor_split(len(SETTINGS[domain]))

    pixels = torch.zeros(len(captions), 3, 32, 32, dtype=torch.uint8)
    models = [RENDER_NAMES[domain]] * len(captions)
    make = crawl if domain == "in" else foreign_crawl
    specs = spec_tensor(captions)
    for chosen in _chunks((~generated).nonzero()[:, 0]):
        pixels[chosen] = _quantised(make(specs[chosen], draws, caption_error_rate=CAPTION_ERROR_RATE))
        bar.update(len(chosen))
    for (num_steps, guidance), members in zip(SETTINGS[domain], by_setting, strict=True):
        for chosen in _chunks(members):
            wanted = [captions[index] for index in chosen.tolist()]
            drawn = draw(studio, wanted, num_steps=num_steps, guidance=guidance, generator=draws)
            pixels[chosen] = _quantised(drawn)
            for index in chosen.tolist():
                models[index] = f"shapes-sd3-{num_steps}steps-cfg{guidance:g}"
            bar.update(len(chosen))
    return _Pictures(captions=captions, pixels=pixels, models=models, rendered=~generated)


def _label(
    pictures: _Pictures,
    paths: Sequence[str],
    golden: Tensor,
    pairs: Sequence[tuple[int, int]],
    tau: float,
    seed: int,
    split: PromptSplit,
) -> tuple[list[dict[str, str | float | list[int]]], SplitStats]:
    """Records in HPDv3's form, and their statistics. Each pair and side has its own noise."""
    draws = generator(seed, "shapes preference labels", split)
    starts = torch.arange(0, len(paths), GROUP)[:, None]
    left = (starts + torch.tensor([first for first, _ in pairs])).flatten()
    right = (starts + torch.tensor([second for _, second in pairs])).flatten()
    noise = tau * torch.randn(2, len(left), generator=draws)
    left_wins = golden[left] + noise[0] > golden[right] + noise[1]
    winner = torch.where(left_wins, left, right)
    loser = torch.where(left_wins, right, left)
    gap = (golden[left] - golden[right]).abs()
    sure = torch.special.ndtr(gap / (math.sqrt(2) * tau))
    records = [
        {
            "prompt": pictures.captions[first],
            "path1": paths[first],
            "path2": paths[second],
            "choice_dist": [1, 0],
            "confidence": round(confidence, 4),
            "model1": pictures.models[first],
            "model2": pictures.models[second],
        }
        for first, second, confidence in zip(winner.tolist(), loser.tolist(), sure.tolist(), strict=True)
    ]
    rendered = pictures.rendered
    stats = SplitStats(
        images=len(paths),
        generated=int((~rendered).sum()),
        pairs=len(records),
        golden_generated=_mean(golden[~rendered]),
        golden_rendered=_mean(golden[rendered]),
        median_gap=round(gap.median().item(), 4),
        ceiling=_mean((golden[winner] > golden[loser]).float()),
    )
    return records, stats


def _write_images(directory: Path, split: PromptSplit, pixels: Tensor) -> list[str]:
    """Store images as PNG; returns their paths relative to the directory."""
    folder = directory / "images" / split
    folder.mkdir(parents=True)
    arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    paths = []
    for index, array in enumerate(arrays):
        path = f"images/{split}/{index:05d}.png"
        Image.fromarray(array).save(directory / path, compress_level=1)  # small pictures: speed over size
        paths.append(path)
    return paths


def _chunks(indices: Tensor) -> list[Tensor]:
    return [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]


def _quantised(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def _mean(values: Tensor) -> float:
    return round(values.mean().item(), 4) if len(values) else 0.0


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new directory for the preference set")
    parser.add_argument("--pipeline", type=Path, default=SHIPPED_PIPELINE, help="generator (default: shipped)")
    parser.add_argument("--train-groups", type=int, default=2000, help="groups of 4 images (default 2000)")
    parser.add_argument("--test-groups", type=int, default=400, help="groups of 4 images (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="seed of images and labels (default 0)")
    parser.add_argument("--thurstone-tau", type=float, default=0.05, help="annotator noise (default 0.05)")
    parser.add_argument("--generator-fraction", type=float, default=0.35, help="generated share (default 0.35)")
    parser.add_argument("--domain", choices=("in", "out"), default="in", help="usual or foreign defects (default in)")
    options = parser.parse_args()
    try:
        stats = write_preferences(
            options.pipeline,
            options.out,
            train_groups=options.train_groups,
            test_groups=options.test_groups,
            seed=options.seed,
            thurstone_tau=options.thurstone_tau,
            generator_fraction=options.generator_fraction,
            domain=options.domain,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(stats), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
