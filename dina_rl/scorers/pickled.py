"""The tensors of a module that was pickled whole, by the names of its state dict. Nothing in the file is run.

A pickle says which classes and functions to import and call. Here none is imported: tensors are rebuilt by functions
of this file, ordered dicts and sets are themselves, and whatever else is named becomes an inert object that keeps what
it is given.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
RECORD = "data.pkl"
BROKEN = (pickle.UnpicklingError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, LookupError, TypeError,
          ValueError, AttributeError, RecursionError)  # fmt: skip
"""What reading a file was seen to raise, or may, that is damaged or made to do harm."""


class Inert:
    """Stands for an object of any class: it takes whatever that would be built of, and does nothing."""

    def __new__(cls, *values: object, **named: object) -> "Inert":
        made = super().__new__(cls)
        made.state = {}
        return made

    state: dict[Any, Any]

    def __init__(self, *values: object, **named: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.state = state

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...


@dataclass(slots=True, kw_only=True)
class _Unpickled:
    """An archive as torch.save writes it: a pickle, and the bytes of its storages beside it."""

    archive: zipfile.ZipFile
    prefix: str
    storages: dict[str, torch.Tensor] = field(default_factory=dict)  # flat, by key

    def load(self) -> object:
        return _Unpickler(self).load()

    def storage(self, reference: Any) -> torch.Tensor:
        """What `("storage", type, key, location, length)` stands for."""
        _, dtype, key, *_ = reference
        if key not in self.storages:
            content = self.stored(f"{self.prefix}data/{key}")
            self.storages[key] = torch.frombuffer(bytearray(content), dtype=dtype)
        return self.storages[key]

    def stored(self, name: str) -> bytes:
        """A member of the archive. torch.save compresses none: what is compressed may be a thousand times its size."""
        if self.archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, which torch.save never does")
        return self.archive.read(name)


class _Unpickler(pickle.Unpickler):
    def __init__(self, source: _Unpickled) -> None:
        super().__init__(BytesIO(source.stored(f"{source.prefix}{RECORD}")))
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        return KNOWN.get((module, name), Inert)

    def persistent_load(self, reference: Any) -> torch.Tensor:
        return self._source.storage(reference)


def _tensor(storage: torch.Tensor, offset: int, size: Any, stride: Any, *_: object) -> torch.Tensor:
    return storage.as_strided(size, stride, offset).clone()


def _parameter(tensor: torch.Tensor, *_: object) -> torch.Tensor:
    return tensor


KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # as protocol 2 calls it
}


def module_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of the `nn.Module` in a file of torch.save.

    Raises:
        ValueError: unreadable, or something else.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = [name for name in archive.namelist() if name.rpartition("/")[2] == RECORD]
            if len(records) != 1:
                raise ValueError(f"it has {len(records)} times {RECORD}")
            module = _Unpickled(archive=archive, prefix=records[0].removesuffix(RECORD)).load()
            tensors = dict(_named(module, ""))
    except BROKEN as error:
        raise ValueError(f"{file} cannot be read as a pickled module: {' '.join(str(error).split())}") from error
    if not tensors:
        raise ValueError(f"{file} holds no module with tensors")
    return tensors


def _named(module: object, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """As `nn.Module.state_dict` names them."""
    if not isinstance(module, Inert):
        return
    passing = module.state.get("_non_persistent_buffers_set", set())
    for kind, left_out in (("_parameters", set()), ("_buffers", passing)):
        for name, tensor in module.state.get(kind, {}).items():
            if isinstance(tensor, torch.Tensor) and name not in left_out:
                yield prefix + name, tensor
    for name, part in module.state.get("_modules", {}).items():
        yield from _named(part, f"{prefix}{name}.")
