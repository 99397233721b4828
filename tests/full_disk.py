"""A real disk that can be full, or be away for a while: a small tmpfs, for tests that may mount one."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SIZE = 32 * 2**20
FILLER = ".filler"


@contextmanager
def mounted(place: Path) -> Iterator[Path]:
    """A disk of `SIZE` at `place`; skips the test where none may be mounted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},nr_inodes=2000", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")  # as CI is
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """No byte is left on `disk` for the time of the block."""
    with (disk / FILLER).open("wb", buffering=0) as file:
        for portion in (2**16, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(portion))
    assert os.statvfs(disk).f_bavail == 0, errno.ENOSPC
    try:
        yield
    finally:
        (disk / FILLER).unlink()


@contextmanager
def away(disk: Path) -> Iterator[None]:
    """`disk` is not mounted for the time of the block; what it holds is there again after it."""
    elsewhere = disk.with_name("elsewhere")
    elsewhere.mkdir()
    subprocess.run(["mount", "--bind", str(disk), str(elsewhere)], check=True)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "--bind", str(elsewhere), str(disk)], check=True)
        subprocess.run(["umount", "--lazy", str(elsewhere)], check=True)


def files_below(directory: Path) -> dict[Path, bytes]:
    """Content of all files but the filler."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != FILLER}
