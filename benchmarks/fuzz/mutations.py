"""How inputs are damaged: bytes, the values of JSON and YAML, tensors' headers, and the files of a directory.

Everything is drawn from the generator that is given, so that a trial's number says what it was.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fuzz.hostile import CODE, hostile_text, hostile_weights
from dina_rl.storage import StorageFailed
from dina_rl.sums import SUMS_FILE, read_sums, sha256, write_sums

SURPRISES: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e308, 2**31, 2**63, -(2**63), 10**30, 2**70),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "\n", "0", "nan", "1e999", "None", "null", "true", "a b"),
    *(
        [],
        {},
        [[]],
        [None],
        [1, 2, 3, 4, 5],
        {"a": 1},
        {"": None},
        [0] * 5000,
        "x" * 100_000,
        "\u202ecba",
        "\U0001f600",
    ),
    *(
        "\ud800",
        "\0",
        "a\0b",
        "\r\n\x1b[2J",
        "a\u2028b",
        "é" * 300,
        "line\nline",
        "%s{0}{x}",
        "$HOME",
        "~",
        "~root/x",
        CODE,
    ),
)
STEPS = ("-1", "0", "1", "65535", "2147483648", "18446744073709551615", "1e999", "NaN", "-Infinity")


def leading_out(beside: Path) -> tuple[str, ...]:
    """Names of files that no record may have opened."""
    decoys = [str(beside / name) for name in ("decoy.png", "decoy.json", "decoy.safetensors", "decoy.txt")]
    up = f"../{beside.name}/decoy.png"
    return (
        *decoys,
        *(up, f"images/../{up}", f"./{up}", f"images/../../{beside.name}/decoy.safetensors", f"file://{decoys[0]}"),
        *(
            "/etc/passwd",
            "../../../../../../../../etc/passwd",
            "/dev/zero",
            "/proc/self/environ",
            "/",
            ".",
            "..",
            "images",
        ),
        *("http://127.0.0.1:9/x.png", "a" * 300, "a/" * 3000, "\0", "images/\0.png", "linked.png", "linked/decoy.png"),
        *("pipe", "loop", "C:\\x.png", "images//..//images/./", "%2e%2e/decoy.png"),
    )


class Damage:
    """What is done to inputs of one trial.

    Args:
        beside: where the decoys lie.
    """

    def __init__(self, rng: random.Random, beside: Path) -> None:
        self.rng = rng
        self._beside = beside
        self._paths = leading_out(beside)

    def surprise(self) -> object:
        """A value that nobody expects, or a path to where none may lead."""
        return self.rng.choice(self._paths if self.rng.random() < 0.4 else SURPRISES)

    def content(self, content: bytes) -> bytes:
        """Bytes flipped, cut, doubled, put in or taken out."""
        rng, data = self.rng, bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            size = len(data)
            at = rng.randrange(size + 1)
            kind = rng.randrange(6)
            if kind == 0 and size:
                for _ in range(rng.choice((1, 1, 4, 32))):
                    data[rng.randrange(size)] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[at:]
            elif kind == 2:
                data[at:at] = rng.randbytes(rng.choice((1, 2, 16, 1000)))
            elif kind == 3:
                del data[at : at + rng.choice((1, 4, 64))]
            elif kind == 4:
                data[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, rng.randrange(2**32))))
            else:
                data += data[at : at + 4096]
        return bytes(data)

    def values(self, values: Any) -> Any:
        """A copy of a tree of values with one or a few of them changed, gone, renamed, wrapped or exchanged."""
        tree = json.loads(json.dumps(values))
        for _ in range(self.rng.choice((1, 1, 1, 2, 5))):
            places = list(_places(tree))
            if not places or self.rng.random() < 0.03:
                return self.surprise()
            holder, key = self.rng.choice(places)
            self._change(holder, key, places)
        return tree

    def _change(self, holder: Any, key: Any, places: Sequence[tuple[Any, Any]]) -> None:
        rng = self.rng
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice((f"{key}_", str(key).upper(), "", "\0", "__class__", "🙂"))] = holder.pop(key)
        elif kind == 2:
            holder[key] = [holder[key]]
        elif kind == 3:
            other, place = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[place] if _has(other, place) else None))
        elif kind == 4 and isinstance(holder, list):
            holder.extend(holder[key : key + 1] * rng.choice((1, 3, 300)))
        elif kind == 5 and isinstance(holder[key], int | float):
            holder[key] = rng.choice(
                (-holder[key], holder[key] * 10**6, holder[key] + 1, float(holder[key]), str(holder[key]))
            )
        else:
            holder[key] = self.surprise()

    def text_of(self, values: Any) -> str:
        """JSON of `values`, sometimes with a number or a key as no writer writes it."""
        text = json.dumps(values, ensure_ascii=self.rng.random() < 0.5)
        if self.rng.random() < 0.1 and '": ' in text:
            key = self.rng.choice(text.split('": ')[:-1]).rpartition('"')[2]
            text = text.replace(f'"{key}": ', f'"{key}": {self.rng.choice(STEPS)}, "{key}": ', 1)
        return text

    def weights(self, content: bytes) -> bytes:
        """A safetensors file with another header or other numbers."""
        rng = self.rng
        if rng.random() < 0.3 or len(content) < 8:
            return self.content(content) if rng.random() < 0.7 else hostile_weights(rng)
        length = int.from_bytes(content[:8], "little")
        head, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
        if rng.random() < 0.3:
            at = rng.randrange(max(1, len(body)))
            body[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 1e38)))
        else:
            name = rng.choice(list(head))
            head = rng.choice((self.values, _reshaped, _retyped))(head) if name != "__metadata__" else self.values(head)
        packed = self.text_of(head).encode("utf-8", "surrogatepass")
        return len(packed).to_bytes(8, "little") + packed + bytes(body)

    def file(self, file: Path) -> None:
        """Change a file by what its name says it is; another thing may take its place."""
        rng = self.rng
        if rng.random() < 0.12:
            self._replace(file)
            return
        content, kind = file.read_bytes(), file.suffix
        if kind in (".json", ".jsonl", ".yaml") and rng.random() < 0.12:
            fresh = hostile_text(rng, kind)
        elif kind == ".json" and rng.random() < 0.8:
            fresh = self.text_of(self.values(json.loads(content))).encode("utf-8", "surrogatepass")
        elif kind == ".jsonl" and rng.random() < 0.8:
            fresh = self._lines(content)
        elif kind == ".yaml" and rng.random() < 0.8:
            fresh = self.yaml(content.decode()).encode("utf-8", "surrogatepass")
        elif kind == ".safetensors":
            fresh = self.weights(content)
        elif file.name == SUMS_FILE and rng.random() < 0.5:
            name = rng.choice(self._paths)
            fresh = content + f"{'0' * 64}  {name}\n".encode("utf-8", "surrogatepass")
        else:
            fresh = self.content(content)
        file.write_bytes(fresh)

    def yaml(self, text: str) -> str:
        """A YAML mapping with changed values."""
        try:
            return yaml.safe_dump(
                self.values(yaml.safe_load(text)), sort_keys=False, allow_unicode=self.rng.random() < 0.5
            )
        except (yaml.YAMLError, TypeError, ValueError):  # no YAML any more, or a value that it does not know
            return text[: self.rng.randrange(len(text) + 1)]

    def directory(self, root: Path, *patterns: str, most: int = 2, sums: float = 0.7) -> None:
        """Change some of the files below a directory that match.

        Args:
            sums: share of the trials in which the sums are those of the changed files, as of who means harm.
        """
        files = sorted({each for pattern in patterns or ("*",) for each in root.rglob(pattern) if each.is_file()})
        for file in self.rng.sample(files, min(len(files), self.rng.randint(1, most))):
            if file.is_file() and not file.is_symlink():
                self.file(file)
        if self.rng.random() < sums:
            for listed in root.rglob(SUMS_FILE):
                _sum_anew(listed)

    def _lines(self, content: bytes) -> bytes:
        lines = content.decode().splitlines()
        at = self.rng.randrange(max(1, len(lines)))
        kind = self.rng.randrange(4)
        if kind == 0 or not lines:
            lines.insert(at, self.rng.choice(("", "{", "null", "[]", '"x"', "\ufeff{}", "{}", "NaN")))
        elif kind == 1:
            lines[at : at + 1] = []
        elif kind == 2:
            lines += lines[at:]
        else:
            lines[at] = self.text_of(self.values(json.loads(lines[at])))
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")

    def _replace(self, file: Path) -> None:
        rng, content = self.rng, file.read_bytes()
        file.unlink()
        kind = rng.randrange(8)
        if kind == 0:
            file.write_bytes(b"")
        elif kind == 1:
            file.mkdir()
        elif kind == 2:
            os.mkfifo(file)
        elif kind == 3:
            file.symlink_to("/dev/zero")
        elif kind == 4:
            file.symlink_to(file.name)
        elif kind == 5:
            file.symlink_to("/nowhere")
        elif kind == 6:
            file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        else:
            file.write_bytes(b"\xff\xfe" + content[: len(content) // 2])


def _places(tree: Any) -> Any:
    """(holder, key) of every value in a tree."""
    found: Sequence[Any] = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in found:
        yield tree, key
        yield from _places(tree[key])


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else isinstance(key, int) and key < len(holder)


def _tensors(head: dict[str, Any]) -> list[dict[str, Any]]:
    return [value for name, value in head.items() if name != "__metadata__" and isinstance(value, dict)]


def _reshaped(head: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in another shape: as many values, so that the reader of the format has nothing to say."""
    for each in _tensors(head):
        each["shape"] = each["shape"][::-1] if len(each["shape"]) > 1 else [1, *each["shape"]]
    return head


def _retyped(head: dict[str, Any]) -> dict[str, Any]:
    swaps = {"F32": "I32", "BF16": "F16", "F16": "I16", "I64": "F64", "I32": "U32"}
    for each in _tensors(head):
        each["dtype"] = swaps.get(each["dtype"], each["dtype"])
    return head


def _sum_anew(listed: Path) -> None:
    try:
        names = list(read_sums(listed.parent))
        write_sums(
            listed.parent, {name: sha256(listed.parent / name) for name in names if (listed.parent / name).is_file()}
        )
    except (OSError, ValueError, StorageFailed):  # the list itself is what was changed
        return


def copied(source: Path, target: Path) -> Path:
    """A copy of a file or directory that may be changed."""
    (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    return target


Change = Callable[[Damage, Path], object]
