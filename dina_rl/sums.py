"""SHA-256 sums beside files, by which a truncated or altered one is found out.

`SHA256SUMS` has the form of coreutils' sha256sum: `sha256sum -c SHA256SUMS` in a directory says what a run would say.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from dina_rl.checkpoint import write_text
from dina_rl.errors import shown
from dina_rl.loading import LARGE, say, shown_bytes
from dina_rl.textfiles import read_text

SUMS_FILE = "SHA256SUMS"


def write_sums(directory: Path, sums: Mapping[str, str]) -> None:
    """Write file name -> SHA-256 down."""
    write_text(directory / SUMS_FILE, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def read_sums(directory: Path) -> dict[str, str]:
    """File name -> SHA-256; empty where none were written, as by earlier versions.

    Raises:
        ValueError: it is no such list, or names what does not lie below the directory.
    """
    file = directory / SUMS_FILE
    lines = read_text(file).splitlines() if file.is_file() else []
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in sums:
        place = PurePosixPath(name)
        if not name.isprintable() or place.is_absolute() or ".." in place.parts or not place.parts:
            raise ValueError(f"{file} names {shown(name)}, which is no file below it")
    return sums


def sum_files(directory: Path, pattern: str = "*.safetensors") -> None:
    """Write down the sums of the files of a directory that is about to be whole."""
    files = sorted(directory.rglob(pattern))
    write_sums(directory, {file.relative_to(directory).as_posix(): sha256(file) for file in files})


def check_sums(directory: Path, names: Sequence[str]) -> None:
    """Whether files hold what was written; a file without a sum, of an earlier version, is believed.

    Raises:
        ValueError: one does not.
        OSError: one cannot be read.
    """
    sums = read_sums(directory)
    for name in (each for each in names if each in sums):
        file = directory / name
        if not file.is_file():
            raise ValueError(f"{name} is not there")
        size = file.stat().st_size
        if size >= 16 * LARGE:
            say(f"checking {file}, {shown_bytes(size)}")
        if sha256(file) != sums[name]:
            raise ValueError(f"{name} does not hold what was written")


def check_all_sums(directory: Path) -> None:
    """Raises ValueError where a file that has a sum beside it is not there or does not hold what was written."""
    try:
        check_sums(directory, [*read_sums(directory)])
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} is broken: {' '.join(str(error).split())}") from error


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
