"""Who imports whom, read from the source: no circles, and nothing looks up. Imports inside functions count too."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dina_rl

ROOT = Path(__file__).parents[2]
PLACES = ("dina_rl", "actors", "jobs")

Graph = dict[str, set[str]]


@dataclass(frozen=True, slots=True)
class Sources:
    """The syntax trees of all modules below `places`; a package is its __init__.py."""

    trees: dict[str, ast.Module]

    @classmethod
    def read(cls, root: Path, places: tuple[str, ...]) -> "Sources":
        files = [file for place in places for file in (root / place).rglob("*.py")]
        return cls({module_name(file.relative_to(root)): ast.parse(file.read_text()) for file in files})

    def graph(self) -> Graph:
        """Module -> the modules it imports, whose names it may have from a package's __init__.py."""
        return {module: set(self._imported(tree)) - {module} for module, tree in self.trees.items()}

    def _imported(self, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in self.trees)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"a relative import of {node.module}: this test does not read those"
                yield from (self._home(node.module, a.name) for a in node.names if node.module in self.trees)

    def _home(self, module: str, name: str) -> str:
        """The module that defines what `from module import name` brings."""
        if f"{module}.{name}" in self.trees:
            return f"{module}.{name}"
        for node in self.trees[module].body:
            if isinstance(node, ast.ImportFrom) and node.module in self.trees:
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return self._home(node.module, alias.name)
        return module


def module_name(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def cut(module: str, depth: int) -> str:
    return ".".join(module.split(".")[:depth])


def grouped(graph: Graph, depth: int) -> Graph:
    """The graph of what lies `depth` names deep, each with all that is in it."""
    groups: Graph = {}
    for module, imported in graph.items():
        group = groups.setdefault(cut(module, depth), set())
        group |= {cut(other, depth) for other in imported} - {cut(module, depth)}
    return groups


def circle(graph: Graph) -> str:
    """One circle of the graph in words, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


def room(module: str) -> str:
    """A module's place in the table of floors."""
    first, *rest = module.split(".")
    return rest[0] if first == "dina_rl" and rest else first


def floors() -> dict[str, int]:
    """Room -> how far from the top CONTRIBUTING.md has it."""
    _, _, after = (ROOT / "CONTRIBUTING.md").read_text().partition("\nFloors")
    lines = after.splitlines()[1:]
    table = [line.split() for line in lines[1 : lines.index("", 1)]]
    return {name: number for number, names in enumerate(table) for name in names}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Sources.read(ROOT, PLACES).graph()


@pytest.mark.parametrize("depth", [2, 3, 9], ids=["rooms", "rooms in rooms", "modules"])
def test_no_circles(graph: Graph, depth: int) -> None:
    assert len(graph) > 100
    assert circle(grouped(graph, depth)) == ""


def test_every_room_is_on_a_floor(graph: Graph) -> None:
    assert {room(module) for module in graph} - {"dina_rl"} == set(floors()), "see the floors in CONTRIBUTING.md"


def test_nothing_imports_from_a_floor_above(graph: Graph) -> None:
    level = floors()
    up = [
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in imported - {"dina_rl"}
        if level[room(other)] < level[room(module)]
    ]
    assert up == []


def test_circles_are_seen_wherever_they_hide(tmp_path: Path) -> None:
    """In a function, for types alone, and behind a package's __init__.py; a package's own is none."""
    (tmp_path / "house" / "inner").mkdir(parents=True)
    for name, lines in {
        "__init__": "",
        "inner/__init__": "from house.inner.one import ONE\nfrom house.inner.two import TWO as RENAMED",
        "inner/one": "ONE = 1",
        "inner/two": "from house.inner import ONE\nfrom house import other\nTWO = 2",
        "other": "def late():\n    if TYPE_CHECKING:\n        from house.inner import RENAMED",
        "innocent": "import os\nimport house.other\nfrom house.inner import ONE",
    }.items():
        (tmp_path / "house" / f"{name}.py").write_text(lines)
    graph = Sources.read(tmp_path, ("house",)).graph()
    assert graph["house.innocent"] == {"house.other", "house.inner.one"}
    assert graph["house.inner.two"] == {"house.other", "house.inner.one"}
    assert set(circle(graph).split(" imports ")) == {"house.inner.two", "house.other"}
    assert set(circle(grouped(graph, 2)).split(" imports ")) == {"house.inner", "house.other"}
    del graph["house.other"]
    assert circle(graph) == ""


def test_a_directory_of_the_same_name_is_not_taken_for_the_package(tmp_path: Path) -> None:
    """As ~ has one, where presets leave runs."""
    (tmp_path / "dina_rl").mkdir()
    ask = [sys.executable, "-c", "import dina_rl; print(dina_rl.__version__)"]
    asked = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (asked.stdout, asked.returncode) == (f"{dina_rl.__version__}\n", 0), asked.stderr


def test_nothing_that_is_installed_needs_what_is_not() -> None:
    """An editable install has the whole clone on the path, a wheel has these places."""
    everything = Sources.read(ROOT, (*PLACES, "benchmarks", "tests"))
    outside = {
        (module, other)
        for module, imported in everything.graph().items()
        for other in imported
        if cut(module, 1) in PLACES and cut(other, 1) not in PLACES
    }
    assert outside == set()
