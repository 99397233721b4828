"""Text as TensorBoard and reports show it."""

import textwrap
from collections.abc import Iterable, Sequence

import yaml
from pydantic import BaseModel

WIDTH = 110


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def numbered(texts: Sequence[str]) -> str:
    """Texts of any script as they stand, one after the other with their numbers from 1 on; long ones are wrapped."""
    digits = len(str(len(texts)))
    return _verbatim(
        textwrap.fill(
            " ".join(text.split()),
            width=WIDTH,
            initial_indent=f"{number:{digits}}  ",
            subsequent_indent=" " * (digits + 2),
            break_on_hyphens=False,
        )
        for number, text in enumerate(texts, 1)
    )


def settings(config: BaseModel) -> str:
    """A resolved configuration as YAML."""
    return _verbatim([yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip()])


def _verbatim(lines: Iterable[str]) -> str:
    """Lines of which none begins with a fence: before a text stands its number, before a value its key."""
    return "\n".join(["```", *lines, "```"])
