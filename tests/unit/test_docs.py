"""What README, guides and results say exists: links, pictures, anchors, options, keys, files and Python names."""

import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

import dina_rl
from benchmarks import along, forward, layouts, loop, ray_overhead, reward_step, serve, state_way, two_hosts
from benchmarks.chaos import settings as chaos
from benchmarks.fuzz import settings as fuzz
from benchmarks.gpu import settings as gpu
from benchmarks.pixel_reward import cost, pretrain
from benchmarks.pixel_reward import fit as pixel_fit
from dina_rl.cli import NAME, known_keys
from dina_rl.config import AlignRun, CompareRuns, EvaluateRun, ExportRun, FitRun, LabelRun, LocalRun, ScoreRun, ServeRun

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
DOCS = [ROOT / "README.md", ROOT / "SECURITY.md", *GUIDES, *RESULTS]
LINKED = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
README_LINES = 125

PROGRAMS: dict[str, type[BaseModel]] = {
    "dina_rl.local": LocalRun,
    "jobs.encode": FitRun,
    "jobs.fit_reward": FitRun,
    "jobs.align": AlignRun,
    "jobs.evaluate": EvaluateRun,
    "jobs.export": ExportRun,
    "jobs.compare": CompareRuns,
    "jobs.score": ScoreRun,
    "dina_rl.serve": ServeRun,
    "jobs.label": LabelRun,
    "benchmarks.along": along.BenchmarkRun,
    "benchmarks.forward": forward.BenchmarkRun,
    "benchmarks.layouts": layouts.BenchmarkRun,
    "benchmarks.loop": loop.BenchmarkRun,
    "benchmarks.ray_overhead": ray_overhead.BenchmarkRun,
    "benchmarks.reward_step": reward_step.BenchmarkRun,
    "benchmarks.serve": serve.BenchmarkRun,
    "benchmarks.state_way": state_way.BenchmarkRun,
    "benchmarks.two_hosts": two_hosts.BenchmarkRun,
    "benchmarks.gpu": gpu.BenchmarkRun,
    "benchmarks.chaos": chaos.BenchmarkRun,
    "benchmarks.fuzz": fuzz.BenchmarkRun,
    "benchmarks.pixel_reward.align": AlignRun,
    "benchmarks.pixel_reward.cost": cost.CostRun,
    "benchmarks.pixel_reward.fit": pixel_fit.FitRun,
    "benchmarks.pixel_reward.pretrain": pretrain.PretrainRun,
}
RUNS = set(PROGRAMS.values())
OTHER_OPTIONS = {
    *("address", "head", "generate", "working-dir", "disable-usage-stats", "runtime-env-json"),  # ray
    *("served-model-name", "port", "limit-mm-per-prompt.image"),  # vllm
    *("index-url", "logdir", "bind_all"),  # pip, tensorboard
    *("no-deps", "disable-pip"),  # pip-audit
    *("build-arg", "from-file", "tail"),  # docker, kubectl
    *("out", "domain", "train-groups", "test-groups"),  # dina_rl.shapes.preferences
}
FILE_ENDINGS = ("csv", "json", "jsonl", "md", "png", "py", "pt", "safetensors", "sqlite", "txt", "yaml")

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
BACKTICKS = re.compile(r"`([^`]+)`")
PROGRAM = re.compile(rf"python -m ({'|'.join(map(re.escape, PROGRAMS))})\b((?:\\\n|[^\n`#])*)")
OPTION = re.compile(r"(?<![\w-])--([A-Za-z][\w.-]*)")
CONFIG_FILE = re.compile(r"configs/[\w*]+\.(?:yaml|md)")
PATH_IN_BACKTICKS = re.compile(r"(?:dina_rl|actors|jobs|tests|benchmarks|docs)(?:/[\w.]+)+/?")
PYTHON_NAME = re.compile(r"\bdina_rl(?:\.[a-z_]\w*)+")

pages = pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its indented blocks, in which brackets are no links."""
    return "\n".join(line for line in page.read_text().split("\n") if not line.startswith("    "))


def spans(page: Path) -> list[str]:
    """What stands in backticks, each on one line."""
    return [" ".join(span.split()) for span in BACKTICKS.findall(prose(page))]


def anchor_of(title: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor_of(title) for title in HEADING.findall(prose(page))}


@cache
def keys_of(run: type[BaseModel]) -> re.Pattern[str]:
    """Matches the dotted keys of a run, with whatever name stands for NAME."""
    keys = [*known_keys(run), "config", "help"]
    return re.compile("|".join(re.escape(key).replace(NAME, r"[A-Za-z0-9_-]+") for key in keys))


def exists(key: str, runs: set[type[BaseModel]]) -> bool:
    """Whether one of the runs knows a key, written as on the command line or as in a file."""
    key = key.replace("-", "_").replace("NAME", "name")
    parent, dot, leaf = key.rpartition(".")
    return any(keys_of(run).fullmatch(each) for run in runs for each in (key, parent + dot + leaf.removeprefix("no_")))


def options(page: Path) -> Iterator[tuple[str, set[type[BaseModel]]]]:
    """Every option that a page names, with the runs that may know it: that of its command line, else all."""
    text = page.read_text()
    for program, words in PROGRAM.findall(text):
        yield from ((option, {PROGRAMS[program]}) for option in OPTION.findall(words))
    yield from ((option.rstrip("."), RUNS) for option in OPTION.findall(PROGRAM.sub("", text)))


def sections() -> set[str]:
    """Names under which runs have keys."""
    return {key.partition(".")[0] for run in RUNS for key in known_keys(run) if "." in key}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


@pages
def test_options_exist(page):
    unknown = {option for option, runs in options(page) if option not in OTHER_OPTIONS and not exists(option, runs)}
    assert unknown == set()


@pages
def test_keys_exist(page):
    """A span like `section.key` or `section.key value`, where a run has such a section."""
    words = {span.split()[0].rstrip(":") for span in spans(page)}
    dotted = {word for word in words if re.fullmatch(r"[a-z_]+(\.\w+)+", word)}
    keys = {word for word in dotted if word.partition(".")[0] in sections() and not word.endswith(FILE_ENDINGS)}
    assert {key for key in keys if not exists(key, RUNS)} == set()


@pages
def test_files_exist(page):
    named = set(CONFIG_FILE.findall(page.read_text()))
    named |= {span for span in spans(page) if PATH_IN_BACKTICKS.fullmatch(span)}
    assert {name for name in named if not list(ROOT.glob(name))} == set()


@pages
def test_python_names_exist(page):
    names = set(PYTHON_NAME.findall(page.read_text())) - {"dina_rl.local"}  # a program, which imports ray's jobs
    for name in sorted(names):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", [*GUIDES, *RESULTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_guides_and_results_have_contents(page):
    """Every heading below the title is linked before the first one, in order."""
    contents, _, _ = prose(page).partition("\n## ")
    linked = [target.removeprefix("#") for target in LINK.findall(contents) if target.startswith("#")]
    assert linked == [anchor_of(title) for title in re.findall(r"^##+ +(.+)$", prose(page), re.MULTILINE)]


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_changelog_knows_this_version():
    versions = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == dina_rl.__version__
