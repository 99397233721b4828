"""Settings by their dotted keys, and marks on those that do not decide what comes out.

A mark stands on the field: `num_workers: Annotated[Positive, Mark.PROCESS] = 2`. On a section it holds for all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, auto
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dina_rl.errors import shown

NAME = "NAME"
"""Stands in a dotted key for a name that the user chooses: `sets.NAME.path`."""

RENAMED = {
    "steps": "iterations",
    "rollout.prompts_per_step": "rollout.prompts_per_iteration",
    "learner.updates_per_step": "learner.updates_per_iteration",
}
"""Keys of an alignment run before version 0.2, and what they are called now."""


class Mark(Enum):
    """What a setting is about. One without a mark decides what comes out."""

    PROCESS = auto()
    """who does the work, in what portions, and what is put up with on the way; a resumed run may have another"""
    PLACE = auto()
    """where things lie, and whether they are continued; a resumed run may have another"""
    FILES = auto()
    """how what comes out is cut into files; a resumed run goes on as it began"""
    REPORT = auto()
    """what is looked at and told of what comes out; a resumed run may have another where all of it is told anew"""


def marked(section: type[BaseModel], *marks: Mark, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the settings and sections that carry one of `marks`."""
    for name, field in section.model_fields.items():
        key = prefix + name
        inner = section_of(field.annotation)
        if any(mark in field.metadata for mark in marks):
            yield key
        elif inner is not None:
            yield from marked(inner, *marks, prefix=f"{key}.{NAME}." if is_named(field.annotation) else f"{key}.")


def covers(keys: Sequence[str], key: str) -> bool:
    """Whether a dotted key is one of `keys` or lies in a section that is."""
    parts = key.split(".")
    return any(
        len(pattern) <= len(parts) and all(ours in (NAME, theirs) for ours, theirs in zip(pattern, parts, strict=False))
        for pattern in (each.split(".") for each in keys)
    )


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of a configuration's dump."""
    first, _, rest = key.partition(".")
    return value_at(values[first], rest) if rest else values[first]


def dump_without(section: BaseModel, *marks: Mark) -> dict[str, object]:
    """The section's values as JSON has them, without the settings that carry one of `marks`."""
    return without(section.model_dump(mode="json"), tuple(marked(type(section), *marks)))


def with_todays_names(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A saved configuration with the keys of today."""
    return {
        RENAMED.get(prefix + name, prefix + name).removeprefix(prefix): (
            with_todays_names(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        )
        for name, value in values.items()
    }


def without(values: Mapping[str, object], keys: Sequence[str], prefix: str = "") -> dict[str, object]:
    """A dump without the settings and sections at `keys`."""
    return {
        name: without(value, keys, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in values.items()
        if not covers(keys, prefix + name)
    }


def is_named(annotation: object) -> bool:
    """Whether a field is a mapping of sections by names that the user chooses."""
    return get_origin(annotation) is dict


def section_of(annotation: object) -> type[BaseModel] | None:
    """The model class behind a field annotation `Section`, `Section | None` or `dict[str, Section]`, else None."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def can_be_off(annotation: object) -> bool:
    """Whether a field holds a section that None switches off."""
    return section_of(annotation) is not None and NoneType in get_args(annotation)


def explain(error: ValidationError) -> list[str]:
    """One line per mistake: `section.key: what is wrong (got value)`."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key" + (f"; it is called {RENAMED[path]} now" if path in RENAMED else ""))
        elif isinstance(item["input"], dict | BaseModel):
            lines.append(f"{path}: {message}" if path else message)
        else:
            lines.append(f"{path}: {message} (got {shown(item['input'])})")
    return lines
