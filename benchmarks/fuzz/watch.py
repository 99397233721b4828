"""One trial in a process of its own: what it may open, how long it may last, and how it ended.

Python's audit hook tells what Python opens, starts or unpickles. Files that libraries open by themselves (safetensors,
Arrow, SQLite) are told by the kernel: inotify watches the decoys that lie beside every trial's root.
"""

import ctypes
import io
import json
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType
from typing import Literal

from dina_rl.cli import EXIT_BAD_INPUT, EXIT_STOPPED
from dina_rl.storage import StorageFailed

Ending = Literal["result", "counted skips", "one line", "traceback", "hang", "outside", "executed", "memory"]
ENDINGS: tuple[Ending, ...] = (
    "result",
    "counted skips",
    "one line",
    "traceback",
    "hang",
    "outside",
    "executed",
    "memory",
)
FINDS: tuple[Ending, ...] = ENDINGS[3:]

PROMISED = (EXIT_STOPPED, EXIT_BAD_INPUT, StorageFailed.exit_code)
SKIPS = re.compile(
    r"\b[1-9][\d,]* (?:of [\d,]+ records of .* are )?(?:malformed|unreadable|failed)|(?:unreadable|undecodable):? [1-9]"
    r"|skipped [1-9]| is broken \("
)
"""Lines that count what was left out, or say which checkpoint was."""
LONGEST_LINE = 4000  # characters of the line that ends a run: what is quoted is cut
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn")
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
OURS = (("git", "-c", "core.fsmonitor=false"), ("nvidia-smi",))
"""Beginnings of the argument lists of the programs that SECURITY.md names."""
SYSTEM = ("/usr", "/lib", "/lib64", "/proc", "/sys", "/dev", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types")
DEVICES = ("/dev/null", "/dev/urandom", "/dev/shm")
IN_EVENTS = 0x00000FFF  # IN_ALL_EVENTS
IN_NONBLOCK = 0o4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Directories of one trial."""

    root: Path  # the damaged input, and all that is written
    beside: Path  # what no input may lead to: decoys
    world: Path  # whole inputs, which are only read
    said: Path  # standard output and error

    @property
    def readable(self) -> tuple[str, ...]:
        code = Path(__file__).resolve().parents[2]
        return (*SYSTEM, *map(str, (self.root, self.world, code)), sys.prefix, sys.base_prefix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a trial ended."""

    ending: Ending
    detail: str = ""  # of a find, the line that ended it, or nothing
    skips: bool = False


@dataclass(slots=True, kw_only=True)
class Guard:
    """Takes note of what is opened outside, started or unpickled while a block lasts."""

    places: Places
    free_reading: bool  # options say where to read: that is their user's business
    outside: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    _on: bool = False
    _busy: bool = False

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._on or self._busy:
            return
        self._busy = True  # what is asked here is no event of the trial's
        try:
            self._look(event, arguments)
        finally:
            self._busy = False

    def _look(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(set(mode) & set("wax+")) if isinstance(mode, str) else bool(int(str(flags or 0)) & 0o3103)
            self._opened(path, writes=writes)
        elif event in WRITES:
            for path in arguments:
                if isinstance(path, str | bytes | os.PathLike):  # of links what is done is done to themselves
                    directory, name = os.path.split(os.path.abspath(os.fsdecode(path)))
                    self._opened(os.path.join(os.path.realpath(directory), name), writes=True, follow=False)
        elif event in STARTS:
            words = arguments[1] if event == "subprocess.Popen" else arguments
            if not (isinstance(words, list | tuple) and any(tuple(words[: len(own)]) == own for own in OURS)):
                self.executed.append(f"{event} {words!r}"[:300])
        elif event == "pickle.find_class":
            self.executed.append(f"{event} {arguments!r}"[:300])
        elif event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
            if "127.0.0.1" not in repr(arguments):
                self.outside.append(f"{event} {arguments[1:]!r}"[:300])
        elif event == "exec":
            (code,) = arguments
            if isinstance(code, CodeType) and code.co_filename.startswith(str(self.places.root.parent)):
                self.executed.append(f"code of {code.co_filename}")

    def _opened(self, path: object, *, writes: bool, follow: bool = True) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        with suppress(OSError, ValueError):  # no name that a file can have
            real = os.path.realpath(os.fsdecode(path)) if follow else os.fsdecode(path)
            allowed = (str(self.places.root), *DEVICES) if writes else self.places.readable
            if not (self.free_reading and not writes) and not any(
                real == each or real.startswith(f"{each}/") for each in allowed
            ):
                self.outside.append(f"{'written' if writes else 'opened'}: {real}"[:300])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Also what libraries do with the decoys."""
        watch = _inotify(self.places.beside)
        self._on = True
        try:
            yield
        finally:
            self._on = False
            if not self.free_reading:
                self.outside += [
                    f"a library touched {name or 'the directory'} beside the root" for name in _told(watch)
                ]
            os.close(watch)


class _Stream(io.TextIOWrapper):
    """Text in memory, by a terminal's rules on what can be written."""

    def __init__(self, *, errors: str) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)

    def getvalue(self) -> str:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode("utf-8", "backslashreplace")


def _inotify(directory: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    watch: int = libc.inotify_init1(IN_NONBLOCK)
    if watch < 0 or libc.inotify_add_watch(watch, bytes(directory), IN_EVENTS) < 0:
        raise OSError(ctypes.get_errno(), f"cannot watch {directory}")
    return watch


def _told(watch: int) -> list[str]:
    """Names of the files of a watched directory that something was done with."""
    try:
        content = os.read(watch, 2**16)
    except BlockingIOError:
        return []
    names, place = [], 0
    while place < len(content):
        _, _, _, length = struct.unpack_from("iIII", content, place)
        names.append(content[place + 16 : place + 16 + length].rstrip(b"\0").decode())
        place += 16 + length
    return sorted(set(names) - {""})


def limit(*, seconds: int, memory_mib: int) -> None:
    """Of this process: a signal ends it beyond the seconds, and beyond the memory nothing more is to be had."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 2))
    for each in (signal.SIGXCPU, signal.SIGALRM):
        signal.signal(each, signal.SIG_DFL)
    signal.alarm(15 * seconds)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = held + memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run(task: Callable[[], object], places: Places, *, free_reading: bool, seconds: int, memory_mib: int) -> Outcome:
    """Do a task in this process, which is the trial's own, and tell how it ended."""
    os.chdir(places.root)
    os.environ |= {"HOME": str(places.root), "TMPDIR": str(places.root), "HF_HUB_OFFLINE": "1"}
    tempfile.tempdir = str(places.root)
    guard = Guard(places=places, free_reading=free_reading)
    sys.addaudithook(guard.hook)
    limit(seconds=seconds, memory_mib=memory_mib)
    out, err = _Stream(errors="strict"), _Stream(errors="backslashreplace")  # as Python has them
    with guard.watching(), redirect_stdout(out), redirect_stderr(err):
        ending, detail = _ended(task, err)
    places.said.write_text(f"{out.getvalue()}\n--\n{err.getvalue()}\n--\n{detail}\n", errors="backslashreplace")
    if guard.executed or guard.outside:
        return Outcome(
            ending="executed" if guard.executed else "outside", detail="; ".join(guard.executed + guard.outside)
        )
    if ending == "result" and SKIPS.search(out.getvalue() + err.getvalue()):
        return Outcome(ending="counted skips")
    return Outcome(ending=ending, detail=detail)


def _ended(task: Callable[[], object], err: _Stream) -> tuple[Ending, str]:
    try:
        task()
    except SystemExit as ended:
        if not ended.code:
            return "result", ""
        line = err.getvalue().rstrip("\n").rpartition("\n")[2]
        if ended.code not in PROMISED or not line.startswith("error: ") or "Traceback" in err.getvalue():
            return "traceback", f"exit {ended.code} without its line, but {line[:200]!r}"
        if len(line) > LONGEST_LINE or not line.isprintable():
            return "traceback", f"a line of {len(line)} characters, or of more than text: {line[:200]!r}"
        return "one line", line
    except MemoryError as error:
        return "memory", _told_shortly(error)
    except BaseException as error:  # whatever a user would see as a traceback
        return "traceback", _told_shortly(error)
    if "Traceback" in err.getvalue():  # of a thread
        return "traceback", err.getvalue().rstrip().rpartition("\n")[2][:300]
    return "result", ""


def _told_shortly(error: BaseException) -> str:
    """Where it was raised, by the innermost line of ours, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [each for each in frames if "/dina_rl/" in each.filename or "/jobs/" in each.filename]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {place} ({frames[-1].name}): {' '.join(str(error).split())[:200]}"


def write_outcome(file: Path, outcome: Outcome) -> None:
    file.write_text(json.dumps(asdict(outcome)))


def read_outcome(file: Path, status: int) -> Outcome:
    """What a process left, or what its end says where it left nothing."""
    if file.is_file() and file.stat().st_size:
        return Outcome(**json.loads(file.read_text()))
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number in (signal.SIGXCPU, signal.SIGALRM):
        return Outcome(ending="hang", detail=signal.Signals(number).name)
    if number == signal.SIGKILL:
        return Outcome(ending="memory", detail="killed")
    return Outcome(ending="traceback", detail=f"the process died: {status}")
