"""Preference sets by name, and stores of encoded pairs by what lies in a directory."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from dina_rl.config.fitting import SetKind
from dina_rl.data.sets.genai_bench import GenAIBench
from dina_rl.data.sets.hpdv2 import HPDv2
from dina_rl.data.sets.hpdv3 import HPDv3
from dina_rl.data.sets.imagereward import ImageReward
from dina_rl.data.sets.pickapic import PickAPic
from dina_rl.data.sets.preprocessed import PreprocessedSet
from dina_rl.data.sets.prompt_files import PromptFiles
from dina_rl.data.sets.records import PreferenceSet, SkippedRecord

KINDS: tuple[SetKind, ...] = get_args(SetKind)
_SETS: dict[SetKind, Callable[[Path], PreferenceSet]] = {
    "hpdv3": HPDv3,
    "hpdv2": HPDv2,
    "imagereward": ImageReward,
    "genai_bench": GenAIBench,
    "pickapic": PickAPic,
    "prompts": PromptFiles,
    "preprocessed": PreprocessedSet,
}


def open_set(kind: SetKind, path: Path) -> PreferenceSet:
    """The preference set of that layout in a directory (`prompts`: also a file).

    Raises:
        ValueError: no such directory, or no such kind.
    """
    if kind not in _SETS:
        raise ValueError(f"unknown kind of preference set {kind!r}; known are {', '.join(KINDS)}")
    return _SETS[kind](path)


def prompts_of(source: PreferenceSet, split: str) -> tuple[list[str], list[SkippedRecord]]:
    """(the prompts of a split's records in order, repeated where they are; the malformed records, which have none).

    Raises:
        ValueError: no such split, or a file that is not what it should be.
    """
    prompts: list[str] = []
    skipped: list[SkippedRecord] = []
    for record in source.records(split):
        if isinstance(record, SkippedRecord):
            skipped.append(record)
        else:
            prompts.append(record.prompt)
    return prompts, skipped
