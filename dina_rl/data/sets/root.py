"""A set's directory: the only place its records may name files in."""

import os
from pathlib import Path

from dina_rl.data.buckets import Size
from dina_rl.data.images import file_size
from dina_rl.storage import StorageFailed, check_there, reading


def lies_inside(real: Path, root: Path) -> bool:
    """Whether a resolved path belongs to a resolved directory: it lies there, or is a blob of the same repository.

    In Hugging Face's cache a snapshot is a tree of symlinks to the `blobs` beside `snapshots`.
    """
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    return real.is_relative_to(root) or (snapshots is not None and real.parent == snapshots.parent / "blobs")


class DataRoot:
    """Opens files by their path, relative to a directory or absolute, and none outside it.

    Raises:
        ValueError: no such directory.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ValueError(f"dataset directory {directory} does not exist")
        self.directory = directory
        self._absolute = Path(os.path.abspath(directory))  # as a record may name it, symlinks and all
        self._real = directory.resolve()

    def file(self, key: str) -> Path:
        """The existing regular file at `key`.

        Raises:
            ValueError: it is missing, or `key` leaves the directory: a path elsewhere, `..`, or a symlink to elsewhere.
            StorageFailed: storage is away, or the whole directory.
        """
        path = self._lexically(key)  # before the file system is asked anything
        try:
            with reading(path):
                real = path.resolve()
                if not lies_inside(real, self._real):
                    raise ValueError(f"refused: {key!r} leads out of the data directory by a symlink")
                found = real.is_file()  # not a directory, and not a pipe that would block the reader for ever
        except StorageFailed:
            raise
        except (OSError, RuntimeError) as error:  # a name too long, a symlink that leads to itself
            raise ValueError(f"unreadable image: {key!r}: {error}") from error
        if not found:
            check_there(self._real)
            raise ValueError(f"unreadable image: no file {key!r}")
        return real

    def _lexically(self, key: str) -> Path:
        inside = os.path.normpath(key)
        if os.path.isabs(inside):
            if not any(Path(inside).is_relative_to(root) for root in (self._absolute, self._real)):
                raise ValueError(f"refused: {key!r} lies outside the data directory {self.directory}")
        elif inside.split(os.sep)[0] == os.pardir:
            raise ValueError(f"refused: {key!r} leaves the data directory")
        return self._real / inside

    def read(self, key: str) -> bytes:
        """The content of the file at `key`. Raises ValueError as `file` does, or if it cannot be read."""
        try:
            file = self.file(key)
            with reading(file):
                return file.read_bytes()
        except OSError as error:
            raise ValueError(f"unreadable image: {error}") from error

    def size(self, key: str) -> Size:
        """(height, width) of the image at `key`, of which only the header is read. Raises ValueError as above."""
        return file_size(self.file(key))
