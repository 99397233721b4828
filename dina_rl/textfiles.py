"""The one reader of text files, whoever wrote them, and of the JSON and YAML in them."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from dina_rl.errors import shown

Record = TypeVar("Record")

BOM = "\ufeff"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def regular(file: Path) -> Path:
    """The file that is about to be opened. One that is missing is its reader's to tell.

    Raises:
        ValueError: a directory, a device or a pipe, which would block its reader for ever, stands in its place.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is no file")
    return file


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors begin it with.

    Raises:
        ValueError: another encoding.
    """
    content = regular(file).read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        found = "it looks like UTF-16" if content.startswith(_UTF16) else f"byte {error.start}: {error.reason}"
        raise ValueError(f"{file} is not UTF-8 text ({found}); save it as UTF-8") from error


def parse_json(text: str | bytes) -> Any:
    """What the JSON in `text` means. Raises ValueError if it is none, also where its nesting or a number has no end."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def read_record(kind: type[Record], file: Path) -> Record:
    """A JSON file of what is said to be in it: a dataclass, a typed dict, or a dict of plain values.

    Raises:
        ValueError: it holds something else.
    """
    try:
        return TypeAdapter(kind).validate_python(parse_json(read_text(file)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) if isinstance(part, int) else shown(part)[1:-1] for part in first["loc"])
        raise ValueError(f"{file} does not hold what was written ({place}: {first['msg']}); was it edited?") from error
    except ValueError as error:
        raise ValueError(f"{file} does not hold what was written ({error}); was it edited?") from error


def parse_yaml(text: str) -> Any:
    """What the YAML in `text` means.

    Raises:
        yaml.YAMLError: it is none, a key is written twice in one mapping, it nests without end, or its aliases unfold
            to more than a file of this size can mean.
    """
    try:
        return yaml.load(text, _Loader)
    except _OF_SCALARS as error:
        raise yaml.YAMLError(f"a value that is not what it is said to be ({type(error).__name__}: {error})") from error
    except RecursionError as error:
        raise yaml.YAMLError("it nests too deeply") from error


_OF_SCALARS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What the stock constructors raise on `2024-99-99`, `!!int x`, `!!bool x`, `!!timestamp x` and the like."""
_MOST_NODES = 100_000  # beside the text's own length: nine aliases of nine aliases and so on are few to write


class _Loader(yaml.SafeLoader):
    """The stock loader keeps the last of two equal keys, and with it drops a whole section."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._length = len(stream)
        self.deep_construct = True  # a mapping that holds itself is then refused, not made

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        if root is not None and _unfolded(root, {}) > _MOST_NODES + self._length:
            raise yaml.YAMLError("its aliases unfold without bound")
        return root

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:  # its stubs' type; it is a name
        # Before any value is made: merging (<<) puts keys of other mappings beside a mapping's own.
        mapping = super().compose_mapping_node(anchor)
        lines: dict[Hashable, int] = {}
        for key, _ in mapping.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"the key {key.value} is written twice, in lines {lines[name]} and {line}")
            lines[name] = line
        return mapping


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node if every alias were written out; a node that holds itself counts once, and is refused later."""
    if id(node) not in known:
        known[id(node)] = 1
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for each in inner for part in (each if isinstance(each, tuple) else (each,)))
        known[id(node)] += sum(_unfolded(part, known) for part in parts)
    return known[id(node)]
