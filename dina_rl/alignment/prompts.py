"""Prompt files: plain text, one prompt a line."""

from pathlib import Path

from dina_rl.alignment.loop import Prompts
from dina_rl.config import PromptsConfig


def load_prompts(config: PromptsConfig) -> Prompts:
    """The three splits.

    Raises:
        ValueError: a missing or empty file, or a prompt that is in train and in dev or test.
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
    if source == "shapes":
        from dina_rl.shapes.grammar import prompts

        return tuple(prompts(split))
    file = Path(source).expanduser()
    if not file.is_file():
        raise ValueError(f"prompts.{split}: file {file} does not exist")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    found = tuple(dict.fromkeys(line for line in lines if line))  # a repeated prompt is one prompt
    if not found:
        raise ValueError(f"prompts.{split}: file {file} holds no prompts")
    return found
