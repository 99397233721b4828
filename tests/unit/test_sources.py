"""Every value of a preset says its source, in a comment at the end of its line, and the source says that value.

    key: value  # paper 5.1            a section or table of the paper, and what else there is to say
    key: value  # released: why so     the released code that the preset follows
    key: value  # ours: why

A preset that is ours throughout (the miniature world's) says so once at its head.
"""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from dina_rl.cli import load
from dina_rl.config import AlignRun, FitRun, LocalRun
from dina_rl.evaluation.paper import schedule_label, variance_label
from tests.sources import BACKBONES, CONFIGS, PAPER, RELEASED

PRESETS = sorted(CONFIGS.glob("*.yaml"))
WHOLLY_OURS = re.compile(r"^# Every value is ours: \S", re.MULTILINE)
SOURCE = re.compile(r"(?P<kind>paper|released|ours)(?: (?P<place>(?:Table \d|[A-E\d]\.\d)))?(?P<why>[:;] \S.*)?$")

presets = pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)


def model_of(file: Path) -> type[BaseModel]:
    if file.stem.startswith("local"):
        return LocalRun
    return FitRun if "fit" in yaml.safe_load(file.read_text()) or file.stem == "shapes_reward" else AlignRun


@cache
def run_of(file: Path) -> BaseModel:
    return load(model_of(file), ["--config", str(file)], program="test")


def value_of(file: Path, key: str) -> object:
    found: object = run_of(file)
    for name in key.split("."):
        found = dict(found)[name]
    return found


def leaves(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, number of the line on which its value ends) of everything that is no section."""
    if not isinstance(node, yaml.MappingNode):
        yield prefix.removesuffix("."), node.end_mark.line
        return
    for key, value in node.value:
        yield from leaves(value, f"{prefix}{key.value}.")


def sources(file: Path) -> dict[str, re.Match[str] | None]:
    """What stands at the end of every value's line, by the value's key; None: nothing that names a source."""
    text = file.read_text()
    ends = [line.partition("  # ")[2] for line in text.split("\n")]
    return {key: SOURCE.match(ends[line]) for key, line in leaves(yaml.compose(text))}


def says(match: re.Match[str] | None) -> str:
    return "nothing" if match is None else match["kind"]


def is_complete(match: re.Match[str] | None) -> bool:
    """The paper with a place, ours with a reason."""
    if match is None:
        return False
    return bool(match["place"]) == (says(match) == "paper") and (says(match) != "ours" or bool(match["why"]))


@presets
def test_every_value_says_its_source(file: Path) -> None:
    if WHOLLY_OURS.search(file.read_text()):
        assert file.stem.startswith(("shapes_", "local"))
        return
    assert [key for key, found in sources(file).items() if not is_complete(found)] == []


@presets
def test_what_is_the_papers_stands_in_the_paper(file: Path) -> None:
    for key, found in sources(file).items():
        if says(found) == "paper":
            named = found["place"]
            expected = BACKBONES[file.stem] if named == "C.1" else PAPER[named][key]
            assert value_of(file, key) == expected, f"{key}: paper {named}"


@presets
def test_what_is_released_stands_in_released_code(file: Path) -> None:
    table = RELEASED.get(file.stem, {})
    for key, found in sources(file).items():
        if says(found) == "released":
            value, where = table[key]
            assert value_of(file, key) == value, f"{key}: {where}"


@presets
def test_a_value_of_released_code_is_called_that(file: Path) -> None:
    table = RELEASED.get(file.stem, {})
    called = {key: says(found) for key, found in sources(file).items() if key in table}
    assert called == dict.fromkeys(called, "released")


def test_every_table_has_its_preset() -> None:
    assert set(RELEASED) <= {file.stem for file in PRESETS}


OVERRIDE = re.compile(r"^#   +(?P<label>\S.*?)?  +(?P<words>--\S.*)$", re.MULTILINE)


def overrides(file: Path) -> dict[str, list[str]]:
    """What a preset's comment lists as `label  --key value`, continued on lines without a label."""
    found: dict[str, list[str]] = {}
    label = ""
    for match in OVERRIDE.finditer(file.read_text()):
        label = match["label"] or label
        found.setdefault(label, []).extend(shlex.split(match["words"]))
    return found


@presets
def test_overrides_that_a_preset_lists_are_runs(file: Path) -> None:
    for words in overrides(file).values():
        assert load(model_of(file), ["--config", str(file), *words], program="test") != run_of(file)


TABLE_2 = {  # timestep schedule, variance; the fit of "Uniform, NC" is the preset itself
    *(f"t = {level}, Fixed" for level in ("0", "0.2", "0.7")),
    *("Uniform, Fixed", "Uniform, NC"),
    *("LN(0.8, 1), NC", "LN(-0.8, 1), NC"),
}
REWARD = CONFIGS / "reward_sd35m.yaml"


def test_the_rows_of_table_2_are_the_overrides_that_the_preset_lists() -> None:
    rows = {"Table 2, Uniform, NC": []} | overrides(REWARD)
    found = {}
    for label, words in rows.items():
        if label.startswith("Table 2"):
            reward = load(FitRun, ["--config", str(REWARD), *words], program="test").reward
            found[label.removeprefix("Table 2, ")] = (
                f"{schedule_label(reward.timestep)}, {variance_label(reward.thurstone)}"
            )
    assert set(found) == TABLE_2
    assert {label: row for label, row in found.items() if label != row} == {}


def test_the_rows_of_tables_3_and_5_too() -> None:
    rows = {label: words for label, words in overrides(REWARD).items() if not label.startswith("Table 2")}
    runs = {label: load(FitRun, ["--config", str(REWARD), *words], program="test") for label, words in rows.items()}
    assert runs.pop("Table 3, Freeze backbone").reward.lora is None
    assert {label: run.reward.taps[-1] for label, run in runs.items()} == {
        f"Table 5, {depth} layers": depth for depth in (8, 16, 20)
    }
