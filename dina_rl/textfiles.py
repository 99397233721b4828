"""The one reader of text files, whoever wrote them, and of the YAML in them."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

BOM = "\ufeff"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors begin it with.

    Raises:
        ValueError: another encoding.
    """
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        found = "it looks like UTF-16" if content.startswith(_UTF16) else f"byte {error.start}: {error.reason}"
        raise ValueError(f"{file} is not UTF-8 text ({found}); save it as UTF-8") from error


def parse_yaml(text: str) -> Any:
    """What the YAML in `text` means. Raises yaml.YAMLError if it is none, or a key is written twice in one mapping."""
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """The stock loader keeps the last of two equal keys, and with it drops a whole section."""

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
