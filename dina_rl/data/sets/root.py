"""A set's directory: the only place its records may name files in."""

import os
from pathlib import Path

from dina_rl.data.buckets import Size
from dina_rl.data.images import file_size


class DataRoot:
    """Opens files by their path relative to a directory, and none outside it.

    Raises:
        ValueError: no such directory.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ValueError(f"dataset directory {directory} does not exist")
        self.directory = directory
        self._real = directory.resolve()

    def file(self, key: str) -> Path:
        """The existing regular file at `key`.

        Raises:
            ValueError: it is missing, or `key` leaves the directory: an absolute path, `..`, or a symlink to elsewhere.
        """
        inside = os.path.normpath(key)
        if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
            raise ValueError(f"refused: {key!r} leaves the data directory")  # before the file system is asked anything
        try:
            real = (self._real / inside).resolve()
            if not real.is_relative_to(self._real):
                raise ValueError(f"refused: {key!r} leads out of the data directory by a symlink")
            found = real.is_file()  # not a directory, and not a pipe that would block the reader for ever
        except (OSError, RuntimeError) as error:  # a name too long, a symlink that leads to itself
            raise ValueError(f"unreadable image: {key!r}: {error}") from error
        if not found:
            raise ValueError(f"unreadable image: no file {key!r}")
        return real

    def read(self, key: str) -> bytes:
        """The content of the file at `key`. Raises ValueError as `file` does, or if it cannot be read."""
        try:
            return self.file(key).read_bytes()
        except OSError as error:
            raise ValueError(f"unreadable image: {error}") from error

    def size(self, key: str) -> Size:
        """(height, width) of the image at `key`, of which only the header is read. Raises ValueError as above."""
        return file_size(self.file(key))
