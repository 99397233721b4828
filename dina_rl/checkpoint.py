"""Run directories and atomic files. Nothing is ever unpickled: tensors are safetensors, the rest is JSON and YAML."""

import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

CONFIG_FILE = "config.yaml"
PACKAGES = ("torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "numpy", "tensorboard")


def open_run_dir(config: BaseModel, run_dir: Path, *, resume: bool, may_change: Sequence[str] = ()) -> Path:
    """Create `run_dir` (or, with `resume`, continue the run in it) and save the resolved config and versions there.

    Args:
        may_change: dotted keys or section names that a resumed run may set differently.

    Raises:
        ValueError: the directory holds a run already and `resume` is off, or the resumed run has another configuration.
    """
    run_dir = run_dir.expanduser().resolve()
    saved = run_dir / CONFIG_FILE
    if saved.is_file() and not resume:
        raise ValueError(f"run directory {run_dir} holds a run already; add --resume to continue it, or name another")
    if run_dir.is_dir() and not saved.is_file() and any(run_dir.iterdir()):
        raise ValueError(f"run directory {run_dir} is not empty and holds no run; name another")
    values = config.model_dump(mode="json")
    if saved.is_file():
        try:
            before = yaml.safe_load(saved.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{saved} is not valid YAML; was it edited? {' '.join(str(error).split())}") from error
        changed = _differences(before, values)
        forbidden = [key for key in changed if not _covers(("resume", "run_dir", *may_change), key)]
        if forbidden:
            raise ValueError(f"cannot resume {run_dir} with other values of: {', '.join(forbidden)}")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(saved, yaml.safe_dump(values, sort_keys=False))
    write_json(run_dir / "versions.json", versions())
    return run_dir


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends, and vanishes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp's are private; a run directory is there to be shared
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """An empty directory to fill, which then takes the place of `directory`: it appears whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as writing:
        fresh = Path(writing) / "fresh"
        fresh.mkdir()
        yield fresh
        if directory.exists():
            os.replace(directory, Path(writing) / "replaced")
        os.replace(fresh, directory)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Atomic safetensors file."""
    with replaced_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def _differences(old: object, new: object, prefix: str = "") -> list[str]:
    """Dotted keys at which two config dumps differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [prefix.removesuffix(".")]


def _covers(allowed: Sequence[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)
