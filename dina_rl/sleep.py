"""What a process gives back of a GPU that it shares while others work there, and how it takes it up again."""

import gc
from collections.abc import Iterable

import torch

STEP = 2**28  # the buffer grows by whole ones, so that a few more tensors do not mean another one


class SharedGPU:
    """This process's turns at its GPU; without one there is nothing to give back.

    Args:
        sleeps: everything that lies on the GPU moves to pinned host memory, not only what the allocator kept unused.
    """

    def __init__(self, *, sleeps: bool) -> None:
        self._luggage = Luggage() if sleeps else None

    def rest(self) -> None:
        """Make room. Until `wake` nothing that lies on the GPU may be used."""
        if self._luggage is not None:
            self._luggage.pack(tensors_on("cuda"))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Bring everything back; nothing to do for a process that is awake."""
        if self._luggage is not None:
            self._luggage.unpack()


class Luggage:
    """Storages whose bytes are moved to the host and back in one go.

    The storages themselves stay, empty: every parameter, view and optimizer state over them is valid again once they
    are filled, and shared ones stay shared.
    """

    def __init__(self) -> None:
        self._host = torch.empty(0, dtype=torch.uint8)
        self._packed: list[tuple[torch.UntypedStorage, slice]] = []

    def pack(self, tensors: Iterable[torch.Tensor]) -> None:
        """Move the storages of `tensors`. Those of mapped files stay: they take no memory of their own."""
        if self._packed:
            return
        storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        size = 0
        for storage in storages.values():
            if storage.resizable() and storage.nbytes():
                self._packed.append((storage, slice(size, size + storage.nbytes())))
                size += storage.nbytes()
        self._make_room(size)
        _wait()  # for other streams' work on them
        for storage, place in self._packed:
            self._host[place].copy_(_bytes(storage), non_blocking=True)
        _wait()
        for storage, _ in self._packed:
            storage.resize_(0)

    def unpack(self) -> None:
        """Fill the storages again."""
        for storage, place in self._packed:
            storage.resize_(place.stop - place.start)
            _bytes(storage).copy_(self._host[place], non_blocking=True)
        _wait()
        self._packed = []

    def _make_room(self, size: int) -> None:
        """A pinned buffer of at least `size` bytes, kept for the next time: pinning takes longer than moving."""
        if size <= len(self._host):
            return
        if torch.cuda.is_available() and len(self._host):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr()))
        self._host = torch.empty(-(-size // STEP) * STEP, dtype=torch.uint8)
        if torch.cuda.is_available():  # torch's own pinned memory comes in powers of two
            pin = torch.cuda.cudart().cudaHostRegister
            torch.cuda.check_error(pin(self._host.data_ptr(), len(self._host), 0))


def tensors_on(device_type: str) -> list[torch.Tensor]:
    """Every tensor of this process on devices of a type, gradients included.

    Found by asking Python for all objects: models, caches and what an engine keeps for itself alike, without each
    having to say what it holds. A tensor that no Python object holds stays where it is.
    """
    # By type(): isinstance would wake lazy modules that stand in for others.
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    found = [tensor for tensor in tensors if tensor.device.type == device_type]
    gradients = (tensor.grad for tensor in found if tensor.is_leaf)
    return [*found, *(gradient for gradient in gradients if gradient is not None)]


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
