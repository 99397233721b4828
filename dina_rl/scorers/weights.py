"""Weights that were published as one file: where it lies, and its tensors. Nothing in it is run."""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dina_rl.reward.published import DAMAGED, HUB_ID
from dina_rl.textfiles import regular

Tensors = dict[str, torch.Tensor]


def released_file(path: str, name: str) -> Path:
    """The file at `path`, or the one called `name` in that directory or hub id, downloaded if need be.

    Raises:
        ValueError: there is none.
    """
    return _on_hub(path, name, look=False) if _is_on_hub(path) else _local(path, name)


def file_if_here(path: str, name: str) -> Path | None:
    """The same without a download; None: it is on the hub.

    Raises:
        ValueError: there is none.
    """
    if not _is_on_hub(path):
        return _local(path, name)
    file = _on_hub(path, name, look=True)
    return file if file.is_file() else None


def load_tensors(file: Path, key: str | None = None) -> Tensors:
    """The tensors of a safetensors file, or of a state dict, mapped into memory where the file allows that.

    Args:
        key: under which the state dict lies in what was saved.

    Raises:
        ValueError: unreadable, no state dict, or a pickle that holds more than tensors: it is refused, not run.
    """
    state = load_saved(file)
    if key is not None:
        state = state.get(key) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{file} is not a state dict of tensors" + (f" under {key!r}" if key else ""))
    return state


def load_saved(file: Path) -> object:
    """What a safetensors file or a pickle of tensors, numbers and dicts of them holds.

    Raises:
        ValueError: as `load_tensors`.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(regular(file))
        return torch.load(regular(file), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} is damaged or holds more than a state dict of tensors; not loaded") from error
    except (*DAMAGED, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _is_on_hub(path: str) -> bool:
    return not Path(path).expanduser().exists() and HUB_ID.fullmatch(path) is not None


def _local(path: str, name: str) -> Path:
    place = Path(path).expanduser()
    file = place / name if place.is_dir() else place
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give {name}, a directory or hub id that has it")
    return file


def _on_hub(path: str, name: str, *, look: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, name, dry_run=True).local_path if look else hf_hub_download(path, name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} of {path} is neither a local file nor can be read from the hub ({reason})") from error
