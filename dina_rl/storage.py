"""What storage does to a run: it is full, away for a while, or broken. A line each, and what was written stays.

Whoever writes does so inside `writing`: what the operating system, SQLite, pyarrow or safetensors say of storage
becomes `StorageFailed`, which ends the run with one line and an exit code of its own. Whoever reads what may be left
out or made again where it is broken does so inside `reading`: what only cannot be had now is not broken.
"""

import errno
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from dina_rl.errors import BadInput, RunStopped
from dina_rl.loading import shown_bytes

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No room: on the disk, in the quota, or under the limit of a file's size."""
AWAY = frozenset({errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN})
"""What a shared file system answers while its server is away; it may come back."""
REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR})
UNREAD = AWAY - {errno.ENOENT}
"""Of those what a file that is there answers to who reads it."""
STORAGE_ALONE = FULL | {errno.EIO, errno.ESTALE}
"""Of these what nothing else answers, a socket for one."""
OF_NAMES = REFUSED | {errno.ENOENT}
"""What concerns a file that an error names: another than the one to be written is somebody else's trouble."""
WAITS_S = (5, 15, 40, 120)
"""Seconds between the tries of a write that may work a little later."""
NO_DIRECTORY_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES})
SQLITE = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_IOERR: errno.EIO, sqlite3.SQLITE_READONLY: errno.EROFS}

Value = TypeVar("Value")


class StorageFailed(RunStopped):
    """Something could not be written or read; what was whole before is whole still.

    Args:
        number: the operating system's error.
    """

    exit_code = 3

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)  # both: it travels between processes by its arguments
        self.number = number

    def __str__(self) -> str:
        return str(self.args[0])


class NothingWhole(BadInput):
    """There is something to go on from, but every copy of it is broken."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The block writes `path`, a file or what lies in a directory.

    Raises:
        StorageFailed: storage refuses.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError, SafetensorError) as error:
        number = _number(error)
        if number not in FULL | AWAY | REFUSED or (number in OF_NAMES and _is_elsewhere(error, path)):
            raise
        room = free_bytes(path) if number in FULL else None
        left = "" if room is None else f", {shown_bytes(room)} are free without it"
        raise StorageFailed(f"cannot write {path}: {os.strerror(number)}{left}", number) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """The block reads `path`, a file, or what lies in a directory.

    Raises:
        StorageFailed: storage is away; what it holds may be whole.
    """
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        if number not in UNREAD:
            raise
        raise StorageFailed(f"cannot read {path}: {os.strerror(number)}", number) from error


def is_away(error: BaseException) -> bool:
    """Whether it says that storage cannot be read now, rather than anything of what it holds."""
    return isinstance(error, OSError) and error.errno in UNREAD


def _number(error: Exception) -> int:
    """The operating system's number of an error, 0 where it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if isinstance(error, sqlite3.OperationalError):
        return SQLITE.get(error.sqlite_errorcode & 0xFF, 0)  # the rest of the code says more closely which
    found = re.search(r"os error (\d+)|code: (\d+)", str(error))
    return 0 if found is None else int(found[1] or found[2])


def _is_elsewhere(error: Exception, path: Path) -> bool:
    named = error.filename if isinstance(error, OSError) else None
    return isinstance(named, str) and path.parent not in (Path(named), *Path(named).parents)


def free_bytes(path: Path) -> int | None:
    """Room for a user's files where `path` lies or would lie; None: storage does not say."""
    there = next((place for place in (path, *path.parents) if place.is_dir()), None)
    try:
        usage = None if there is None else shutil.disk_usage(there)
    except OSError:
        return None
    return usage.free if usage is not None and usage.total else None


def patiently(write: Callable[[], Value]) -> Value:
    """What `write` returns, tried again for a few minutes where storage is away; every wait is said.

    Raises:
        StorageFailed: it stays away, or has no room.
    """
    for wait in WAITS_S:
        try:
            return write()
        except StorageFailed as failed:
            if failed.number not in AWAY:
                raise
            print(f"  {failed}; the next try is in {wait} s", flush=True)
            time.sleep(wait)
    return write()


def check_there(directory: Path) -> None:
    """Whether a directory that a run has made is there still: where a file system is not mounted any more, its path
    would be made anew on another disk.

    Raises:
        StorageFailed: it is not, or storage does not say.
    """
    with reading(directory):
        there = directory.is_dir()
    if not there:
        raise StorageFailed(f"{directory} is not there any more", errno.ENOENT)


def refuse_link(file: Path) -> None:
    """Before a file is written in its place, and not anew: a run directory from elsewhere may have a link there.

    Raises:
        ValueError: it is one, or no file at all.
    """
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise ValueError(f"{file} is a link or no file; what is written there would be written elsewhere: remove it")


def settle(path: Path) -> None:
    """Have the content of a file, or the names in a directory, survive a crash of the machine.

    Errors that storage kept for later, as network file systems do, come up here.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(handle)


def remove_leftovers(directory: Path, name: str) -> None:
    """Remove what a killed process left of writing `name` in a directory that nobody else writes."""
    with suppress(OSError):  # it costs room, and nothing else
        for entry in directory.glob(f".{name}-*"):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
