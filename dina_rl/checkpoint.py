"""Run directories and atomic files. Nothing is ever unpickled: tensors are safetensors, the rest is JSON and YAML."""

import json
import os
import platform
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import BaseModel, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dina_rl import __version__
from dina_rl.config.keys import Mark, covers, explain, marked, value_at, with_todays_names
from dina_rl.fingerprint import Parts
from dina_rl.storage import remove_leftovers, settle, writing
from dina_rl.textfiles import parse_json, parse_yaml, read_text, regular

CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
INPUTS_FILE = "inputs.json"
LOCK_FILE = "run.lock"
REPORTS = ("skipped.jsonl", "retention.json", "dropped.jsonl")
"""What the message of a start that fails may point to; of such a start nothing else stays."""
PACKAGES = ("torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "numpy", "tensorboard")
CHECKOUT = Path(__file__).parents[1]
GIT_TIMEOUT_S = 5.0


Config = TypeVar("Config", bound=BaseModel)

Growth = Mapping[str, Callable[[int], str | None]]
"""Dotted key of a count that a resumed run may raise -> given what it was, why not this time; None: it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """Something that a run is made from."""

    key: str  # dotted, of the setting that says where it lies
    path: str
    parts: Parts


def open_run_dir(
    config: BaseModel,
    run_dir: Path,
    *,
    resume: bool,
    may_change: Sequence[str] = (),
    may_grow: Growth | None = None,
    unread: Sequence[str] = (),
    inputs: Sequence[Input] = (),
) -> Path:
    """Create `run_dir` (or, with `resume`, continue the run in it) and save the resolved config and versions there.

    A resumed run may set differently what is marked as the business of processes or places.

    Args:
        may_change: dotted keys or section names that it may set differently too.
        may_grow: how long the run is: what is done must be what the longer run would have done.
        unread: sections that this job never reads: they may differ, and stay as they are saved, for another job of the
            same directory goes by them.
        inputs: what the run is made from. They may lie elsewhere than before, but must hold the same.

    Raises:
        ValueError: the directory holds a run already and `resume` is off, or the resumed run has another configuration
            or other inputs.
    """
    run_dir = run_dir.expanduser().resolve()
    check_place(run_dir, resume=resume)
    values = config.model_dump(mode="json")
    if (run_dir / CONFIG_FILE).is_file():
        if inputs and not (run_dir / INPUTS_FILE).is_file():
            print(f"{run_dir} was begun without digests of its inputs: they are compared by path, and kept from now on")
        values = resumed_values(config, run_dir, may_change=may_change, may_grow=may_grow, unread=unread, inputs=inputs)
    else:
        for report in REPORTS:
            (run_dir / report).unlink(missing_ok=True)  # of a start that failed
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, VERSIONS_FILE, INPUTS_FILE):
        remove_leftovers(run_dir, name)  # of a start that was killed
    with replaced_file(run_dir / CONFIG_FILE, lasting=True) as temporary:  # an empty one would be no run's
        temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    write_json(run_dir / VERSIONS_FILE, versions())
    _save_inputs(run_dir, inputs)
    return run_dir


def check_place(run_dir: Path, *, resume: bool) -> None:
    """Raises ValueError where `run_dir` holds something that a run would not go on with.

    A start that was killed in its first write has left a part of a configuration, and no run.
    """
    if (run_dir / CONFIG_FILE).is_file():
        if not resume:
            raise ValueError(
                f"run directory {run_dir} holds a run already; add --resume to continue it, or name another"
            )
        return
    names = [entry.name for entry in run_dir.iterdir()] if run_dir.is_dir() else []
    if any(name not in (LOCK_FILE, *REPORTS) and not name.startswith(f".{CONFIG_FILE}-") for name in names):
        raise ValueError(f"run directory {run_dir} is not empty and holds no run; name another")


def resumed_values(
    config: BaseModel,
    run_dir: Path,
    *,
    may_change: Sequence[str],
    may_grow: Growth | None,
    unread: Sequence[str],
    inputs: Sequence[Input] = (),
) -> dict[str, object]:
    """The configuration with which the run in `run_dir` goes on. Raises ValueError if that is another run's."""
    before = saved_config(type(config), run_dir / CONFIG_FILE).model_dump(mode="json")
    values = config.model_dump(mode="json")
    values |= {name: before[name] for name in unread if name in before}
    same = _unchanged(run_dir, inputs)
    allowed = (*marked(type(config), Mark.PROCESS, Mark.PLACE), *may_change, *(may_grow or {}), *same)
    forbidden = [key for key in _differences(before, values) if not covers(allowed, key)]
    if forbidden:
        raise ValueError(f"cannot resume {run_dir} with other values of: {', '.join(forbidden)}")
    for key, objection in (may_grow or {}).items():
        _check_growth(run_dir, key, value_at(before, key), value_at(values, key), objection)
    return values


def _check_growth(run_dir: Path, key: str, before: int, now: int, objection: Callable[[int], str | None]) -> None:
    """Raises ValueError where the count at `key` falls, or rises although something speaks against it."""
    if now < before:
        raise ValueError(f"cannot resume {run_dir} with {key} {now}: it has {before}, which can only grow")
    reason = objection(before) if now > before else None
    if reason is not None:
        raise ValueError(f"cannot resume {run_dir} with {key} {now} where it had {before}: {reason}")


def _unchanged(run_dir: Path, inputs: Sequence[Input]) -> list[str]:
    """Keys of the inputs that are known to hold what they held when the run began, wherever they lie now.

    Raises:
        ValueError: one holds something else.
    """
    saved, same = _saved_inputs(run_dir), []
    for each in inputs:
        before: Parts = saved[each.key]["parts"] if each.key in saved else {}
        pairs = [(name, before.get(name), now) for name, now in each.parts.items()]
        others = [name for name, old, now in pairs if None not in (old, now) and old != now]
        if others:
            raise ValueError(
                f"cannot resume {run_dir}: {each.key} {each.path} has changed since the run began "
                f"({', '.join(others)}); put back what it held then, or begin another run"
            )
        if all(old is not None and old == now for _, old, now in pairs):
            same.append(each.key)
    return same


def _save_inputs(run_dir: Path, inputs: Sequence[Input]) -> None:
    """Beside those that another job of the same directory has. What is unknown now may have been known before."""
    if not inputs:
        return
    saved = _saved_inputs(run_dir)
    for each in inputs:
        before: Parts = saved[each.key]["parts"] if each.key in saved else {}
        known = {name: value for name, value in each.parts.items() if value is not None}
        saved[each.key] = {"path": each.path, "parts": {**each.parts, **before, **known}}
    write_json(run_dir / INPUTS_FILE, saved)


def _saved_inputs(run_dir: Path) -> dict[str, Any]:
    """Empty where an earlier version, which kept none, began the run."""
    file = run_dir / INPUTS_FILE
    try:
        saved: dict[str, Any] = parse_json(read_text(file)) if file.is_file() else {}
        return {key: {"path": value["path"], "parts": dict(value["parts"])} for key, value in saved.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} holds no inputs; was it edited?") from error


def versions() -> dict[str, str | None]:
    """Versions of this package, of Python and of the packages that decide numbers; None: it is not installed."""
    return {
        "dina_rl": __version__,
        "commit": commit_of(CHECKOUT),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def commit_of(checkout: Path) -> str | None:
    """The commit of a git checkout, with `-dirty` where tracked files differ from it.

    None where `checkout` is none (an installed package may lie inside somebody else's) or git cannot say: no trouble
    with git is a run's.
    """
    if not (checkout / ".git").exists():
        return None
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        asked = subprocess.run(
            ("git", "-c", "core.fsmonitor=false", "-C", str(checkout), *describe),
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part.

    Raises:
        StorageFailed: storage refuses; so do all that follow here.
    """
    with replaced_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def replaced_file(path: Path, *, lasting: bool = False) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends, and vanishes if it fails.

    Its mode is what the umask leaves of a new file's, whoever fills it: safetensors' writer makes its files private.

    Args:
        lasting: it survives a crash of the machine from then on; otherwise that may leave an empty one for a minute.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}-{secrets.token_hex(4)}{path.suffix}"
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        try:
            yield temporary
            temporary.chmod(mode)
            if lasting:
                settle(temporary)
            os.replace(temporary, path)
            if lasting:
                settle(path.parent)
        except BaseException:
            with suppress(OSError):  # of storage that is away; the first error is the one to tell
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def replaced_directory(directory: Path, *, lasting: bool = False) -> Iterator[Path]:
    """An empty directory to fill, which then takes the place of `directory`: it appears whole or not at all.

    The modes of the files in it are what the umask leaves of new files', as in `replaced_file`.

    Args:
        lasting: see `replaced_file`; each file costs a wait for the disk.
    """
    with writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=f".{directory.name}-", ignore_cleanup_errors=True
        )
        with temporary as made:
            fresh = Path(made) / "fresh"
            fresh.mkdir()
            yield fresh
            for each in fresh.rglob("*"):
                if each.is_file():
                    each.chmod(fresh.stat().st_mode & 0o666)
                if lasting:
                    settle(each)
            if lasting:
                settle(fresh)
            if directory.exists():
                os.replace(directory, Path(made) / "replaced")
            os.replace(fresh, directory)
            if lasting:
                settle(directory.parent)


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, *, lasting: bool = False
) -> None:
    """Atomic safetensors file.

    Args:
        lasting: see `replaced_file`.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replaced_file(path, lasting=lasting) as temporary:
        save_file(contiguous, temporary, None if metadata is None else dict(metadata))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(regular(path))


def load_part(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a file whose names begin with `prefix`, which is left off; no other is read."""
    with safe_open(regular(path), framework="pt") as file:
        names: list[str] = file.keys()
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}


def saved_config(model: type[Config], file: Path) -> Config:
    """A saved configuration; settings that it does not know yet have their defaults.

    Raises:
        ValueError: it is not one.
    """
    try:
        saved = parse_yaml(read_text(file))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML; was it edited? {' '.join(str(error).split())}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{file} holds no configuration; was it edited?")
    try:
        return model.model_validate(with_todays_names(saved))
    except ValidationError as error:
        raise ValueError(f"{file}: {explain(error)[0]}; was it edited?") from error


def _differences(old: object, new: object, prefix: str = "") -> list[str]:
    """Dotted keys at which two config dumps differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [prefix.removesuffix(".")]
