"""A run directory for the time of a run: held against other processes, and given up if the start comes to nothing."""

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

from dina_rl.checkpoint import (
    CONFIG_FILE,
    INPUTS_FILE,
    LOCK_FILE,
    REPORTS,
    VERSIONS_FILE,
    Growth,
    Input,
    check_place,
    open_run_dir,
    resumed_values,
)
from dina_rl.storage import refuse_link, writing
from dina_rl.textfiles import parse_json

BEFORE_ANY_WORK = (CONFIG_FILE, VERSIONS_FILE, INPUTS_FILE, LOCK_FILE, *REPORTS, "tensorboard")
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


def _never(run_dir: Path) -> bool:
    return False


@contextmanager
def run_directory(
    config: BaseModel,
    run_dir: Path,
    *,
    resume: bool,
    may_change: Sequence[str] = (),
    may_grow: Growth | None = None,
    unread: Sequence[str] = (),
    inputs: Sequence[Input] = (),
    finished: Callable[[Path], bool] = _never,
) -> Iterator[Path]:
    """`open_run_dir` for the time of a block, in which no other process can open the directory.

    If the block fails before it has made anything, the directory is as if nobody had started in it; reports that say
    why stay. The directory of a finished run that is to be shown is not held, and nothing is written in it.

    Args:
        finished: whether the run in a directory is finished.

    Raises:
        ValueError: as `open_run_dir`, or another process has the directory.
        StorageFailed: it cannot be made.
    """
    run_dir = run_dir.expanduser().resolve()
    if resume and finished(run_dir):
        resumed_values(config, run_dir, may_change=may_change, may_grow=may_grow, unread=unread, inputs=inputs)
        yield run_dir
        return
    check_place(run_dir, resume=resume)
    was_there = run_dir.is_dir()
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with _held(run_dir):
        fresh = not (run_dir / CONFIG_FILE).is_file()
        try:
            yield open_run_dir(
                config, run_dir, resume=resume, may_change=may_change, may_grow=may_grow, unread=unread, inputs=inputs
            )
        except BaseException:
            if fresh:
                with suppress(OSError):  # likewise
                    _withdraw(run_dir)
            raise
        finally:
            with suppress(OSError):  # of storage that is away: there is nothing to tidy up
                (run_dir / LOCK_FILE).unlink(missing_ok=True)
                if not was_there and not any(run_dir.iterdir()):
                    run_dir.rmdir()


@contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """An operating system's lock on a file of the directory: it is gone when the process is, however that ends."""
    file = run_dir / LOCK_FILE
    refuse_link(file)
    with writing(file):
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_current(handle, file)
    except BlockingIOError as error:
        os.close(handle)
        raise ValueError(
            f"run directory {run_dir} is in use by {_holder(file)}; wait until that ends, or name another run_dir"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            os.close(handle)
            raise
        print(f"{run_dir} lies on storage without file locks: nothing keeps a second process out", flush=True)
    try:
        since = datetime.now(UTC).isoformat(" ", "seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        with suppress(OSError):  # it is for people: a disk without room for it is told of when there is more to write
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(holder).encode())
        yield
    finally:
        os.close(handle)


def _check_current(handle: int, file: Path) -> None:
    """Raises BlockingIOError where the locked file was removed meanwhile, as its holder does at the end of a run."""
    if not file.is_file() or file.stat().st_ino != os.fstat(handle).st_ino:
        raise BlockingIOError(errno.EWOULDBLOCK, "taken meanwhile")


def _holder(file: Path) -> str:
    try:
        holder = parse_json(file.read_bytes())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just come or gone
        return "another process"


def _withdraw(run_dir: Path) -> None:
    """Remove what a start writes, unless something was made."""
    if any(file.is_file() for entry in run_dir.iterdir() if entry.name not in BEFORE_ANY_WORK for file in _all(entry)):
        return
    # The configuration goes last: while it is there the directory is a run's, whenever this is killed.
    for entry in sorted(run_dir.iterdir(), key=lambda entry: entry.name == CONFIG_FILE):
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in (*REPORTS, LOCK_FILE):
            entry.unlink()


def _all(entry: Path) -> Iterator[Path]:
    yield entry
    yield from entry.rglob("*")
