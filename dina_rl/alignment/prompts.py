"""Where prompts come from: a file of prompts, or the records of a preference set."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from dina_rl.backbones.base import Backbone
from dina_rl.config import GoldenConfig, PromptsConfig
from dina_rl.config.fitting import SetKind
from dina_rl.data.sets.prompt_files import without_bom
from dina_rl.data.sets.registry import KINDS, open_set, prompts_of
from dina_rl.errors import shown

SHAPES = "shapes"
_SET = re.compile(rf"({'|'.join(KINDS)}):(.+):([^:/]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]


def load_prompts(config: PromptsConfig) -> Prompts:
    """The three splits. A source is `shapes`, a file of prompts, or `kind:/directory/of/a/set:split`.

    A line is printed of every source with malformed records, and of every one that repeats prompts.

    Raises:
        ValueError: a missing or empty source, or a prompt that is in train and in dev or test.
    """
    splits = Prompts(train=_read("train", config.train), dev=_read("dev", config.dev), test=_read("test", config.test))
    pairs = (("dev", splits.dev, "train"), ("test", splits.test, "train"), ("test", splits.test, "dev"))
    for split, held_out, other in pairs:
        leaked = set(held_out) & set(splits.train if other == "train" else splits.dev)
        if leaked:
            raise ValueError(
                f"{len(leaked)} prompts of prompts.{split} are in prompts.{other} too (first: {sorted(leaked)[0]!r}); "
                "held-out numbers would not be held out"
            )
    return splits


def _read(split: str, source: str) -> tuple[str, ...]:
    if source == SHAPES:
        from dina_rl.shapes import grammar

        return grammar.prompts(split)
    of_a_set = _SET.fullmatch(source)
    kind, path, part = of_a_set.groups() if of_a_set else ("prompts", source, split)
    file = Path(path).expanduser()
    if not of_a_set and not file.is_file():
        raise ValueError(f"prompts.{split}: file {file} does not exist")
    try:
        prompts, skipped = prompts_of(open_set(cast(SetKind, kind), file), part)
    except ValueError as error:
        raise ValueError(f"prompts.{split}: {error}") from error
    if skipped:
        first = skipped[0]
        print(
            f"prompts.{split}: {len(skipped)} of {len(prompts) + len(skipped)} records of {source} are malformed and "
            f"left out, the first is record {first.index} of {first.file}: {first.reason}",
            flush=True,
        )
    if not prompts:
        raise ValueError(f"prompts.{split}: {file} holds no prompts")
    distinct = tuple(dict.fromkeys(map(without_bom, prompts)))
    if len(distinct) < len(prompts):
        print(
            f"prompts.{split}: {len(prompts)} prompts of {source} are {len(distinct)} different ones; each counts once",
            flush=True,
        )
    return distinct


def check_captions(config: PromptsConfig, prompts: Prompts, golden: GoldenConfig) -> None:
    """Raises ValueError where the miniature world's captions or its metric meet prompts of another world."""
    sources = {"train": config.train, "dev": config.dev, "test": config.test}
    texts = {"train": prompts.train, "dev": prompts.dev, "test": prompts.test}
    other = {split: first for split in sources if (first := _first_outside(texts[split])) is not None}
    captions = [f"prompts.{split}" for split, source in sources.items() if source == SHAPES]
    if other and captions:
        split = next(iter(other))
        raise ValueError(
            f"prompts.{split} is {sources[split]}, but {' and '.join(captions)} left at the miniature world's captions "
            f"({SHAPES}): give prompts.train, prompts.dev and prompts.test, with a golden.scorer for them"
        )
    for split in ("dev", "test"):
        if split in other and golden.of_images is None:
            raise ValueError(
                f"golden.scorer {golden.scorer} judges the miniature world's captions alone, and prompts.{split} holds "
                f"{shown(other[split])}; set golden.scorer to a scorer of images, e.g. pickscore"
            )


def _first_outside(prompts: Sequence[str]) -> str | None:
    """The first prompt that is no caption of the miniature world."""
    from dina_rl.shapes import grammar

    captions = {text for split in get_args(grammar.PromptSplit) for text in grammar.prompts(split)}
    return next((prompt for prompt in prompts if prompt not in captions), None)


def cut_prompts(backbone: Backbone, prompts: Prompts, negative: str = "") -> list[str]:
    """A line for every split with prompts that a text encoder will not read to their end. Loads no models.

    Args:
        negative: the negative prompt, which is read likewise.
    """
    lines = [
        f"rollout.negative_prompt is longer than {encoder} and is cut there"
        for encoder in backbone.cut_prompts([negative])
    ]
    for split, of_split in (("train", prompts.train), ("dev", prompts.dev), ("test", prompts.test)):
        for encoder, too_long in backbone.cut_prompts(of_split).items():
            lines.append(
                f"prompts.{split}: {len(too_long)} of {len(of_split)} prompts are longer than {encoder} and are cut "
                f"there, the first is {shown(too_long[0])}"
            )
    return lines
