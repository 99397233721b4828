"""Lists of pictures to score: files, directories with all below them, and manifests that give every picture its prompt.

In a directory a picture is known by the ending of its name, without one by its content; whatever else lies there is
listed as left out.

A manifest is a `.jsonl` file of {"image": ..., "prompt": ...} or a `.csv` file with these columns; others are ignored.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dina_rl.data.images import file_size, suffixes
from dina_rl.data.sets.root import lies_inside
from dina_rl.textfiles import parse_json, read_text

LATENTS_SUFFIX = ".safetensors"
MANIFESTS = (".csv", ".jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture and what it is scored against."""

    image: str  # as it was named
    path: Path
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A picture that is not scored, and why."""

    image: str
    reason: str


def list_pictures(names: Sequence[str], *, prompt: str | None, root: Path | None) -> list[Picture | Skipped]:
    """The pictures behind `names`, in order: files, pictures in directories (by name), entries of manifests.

    Args:
        prompt: of every picture that has none of its own.
        root: directory that a manifest's pictures may not leave; None: the manifest's own.

    Raises:
        ValueError: no names, an empty directory, a broken manifest, or a picture without a prompt.
    """
    if not names:
        raise ValueError("--images: name at least one picture, directory or manifest")
    pictures: list[Picture | Skipped] = []
    for name in names:
        path = Path(name).expanduser()
        if path.suffix in MANIFESTS:
            pictures += _manifest(path, prompt, root)
            continue
        files: list[Path | Skipped] = _files_in(path) if path.is_dir() else [path]
        if prompt is None:
            raise ValueError(f"{name} has no prompt; give --prompt, or a manifest (.jsonl or .csv) with prompts")
        for file in files:
            if isinstance(file, Path):
                pictures.append(Picture(image=str(file), path=file, prompt=prompt))
            else:
                pictures.append(file)
    return pictures


def _files_in(directory: Path) -> list[Path | Skipped]:
    """All that lies in a directory and those below it, by path; no link to a directory or out of it is followed."""
    found, root = list[Path | Skipped](), directory.resolve()
    for path in sorted(directory.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        reason = _no_picture(path, root)
        found.append(path if reason is None else Skipped(image=str(path), reason=reason))
    if not any(isinstance(each, Path) for each in found):
        others = f", but {len(found)} other files" if found else ""
        raise ValueError(f"directory {directory} holds no pictures{others}")
    return found


def _no_picture(path: Path, root: Path) -> str | None:
    """Why a path in a directory is not taken for a picture; None: it is."""
    try:
        if path.is_dir():
            return "a link to a directory, which is not followed"
        if not lies_inside(path.resolve(), root):
            return f"a link that leads out of {root}"
    except (OSError, RuntimeError) as error:  # a loop of links
        return str(error)
    if path.suffix.lower() in suffixes() or path.suffix.lower() == LATENTS_SUFFIX:
        return None
    if path.suffix:
        return f"{path.suffix} is no ending of a picture; name the file itself if it is one"
    if not path.is_file():
        return "not a file"
    try:
        file_size(path)
    except ValueError:
        return "no ending, and not a picture by its content"
    return None


def _manifest(file: Path, prompt: str | None, root: Path | None) -> list[Picture | Skipped]:
    if not file.is_file():
        raise ValueError(f"manifest {file} does not exist")
    text = read_text(file)
    root = (file.parent if root is None else root.expanduser()).resolve()
    rows = _jsonl(text) if file.suffix == ".jsonl" else _csv(text, file)
    pictures = [_entry(f"{file}:{line}", row, file.parent, prompt, root) for line, row in rows]
    if not pictures:
        raise ValueError(f"manifest {file} is empty")
    return pictures


def _jsonl(text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold its others
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError:
                yield number, None


def _csv(text: str, file: Path) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if "image" not in (reader.fieldnames or ()):
        raise ValueError(f"manifest {file} has no column `image`, but {reader.fieldnames}")
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"manifest {file} is not valid CSV: {error}") from error


def _entry(place: str, row: object, directory: Path, prompt: str | None, root: Path) -> Picture | Skipped:
    if not isinstance(row, Mapping) or not isinstance(row.get("image"), str) or not row["image"]:
        return Skipped(image=place, reason="not an entry with an `image`")
    own = row.get("prompt") or prompt
    if not isinstance(own, str):
        return Skipped(image=place, reason=f"{row['image']} has no prompt")
    try:
        path = (directory / row["image"]).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of symlinks, a name no file can have
        return Skipped(image=row["image"], reason=str(error))
    if not lies_inside(path, root):
        return Skipped(image=row["image"], reason=f"lies outside {root}")
    return Picture(image=row["image"], path=path, prompt=own)
