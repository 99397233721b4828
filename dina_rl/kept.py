"""Numbered directories of which the last few stay, each with the sums of what is in it: checkpoints."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from dina_rl.checkpoint import replaced_directory, save_tensors, write_text
from dina_rl.loading import say
from dina_rl.storage import NothingWhole, StorageFailed, patiently, reading, remove_leftovers
from dina_rl.sums import SUMS_FILE, check_sums, read_sums, sha256, write_sums

STATE_FILE = "state.safetensors"

Content = TypeVar("Content")
Seen = tuple[Path, int, int]  # a file, its time of change in ns and its size


class Kept:
    """Directories like `step_00000020` under `root`, one process at a time.

    Args:
        keep: how many stay.
        name: what they are called before their number.
        digits: of the number.
        former: names that earlier versions gave them.
    """

    def __init__(self, root: Path, *, keep: int, name: str, digits: int, former: Sequence[str] = ()) -> None:
        self.root = root
        self._keep = keep
        self._name = name
        self._digits = digits
        self._names = (name, *former)
        self._checked: set[Seen] = set()  # files that were whole

    def all(self) -> list[Path]:
        """Oldest first."""
        found = (each for name in self._names for each in self.root.glob(f"{name}_*") if each.is_dir())
        return sorted((each for each in found if each.name.rpartition("_")[2].isdigit()), key=number_of)

    def save(self, number: int, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
        """Keep a directory of `state.safetensors` and text files; older ones beyond `keep` go then.

        So do newer ones: what was gone on from was older, because they are broken.

        Raises:
            StorageFailed: storage refuses; all that is kept stays.
        """
        place = self.root / f"{self._name}_{number:0{self._digits}d}"
        remove_leftovers(self.root, f"{self._name}_*")
        with replaced_directory(place, lasting=True) as fresh:
            save_tensors(fresh / STATE_FILE, tensors)
            for name, text in texts.items():
                write_text(fresh / name, text)
            write_sums(fresh, {name: sha256(fresh / name) for name in (STATE_FILE, *texts)})
        self._checked.update(_seen(place, (STATE_FILE, *texts)).values())  # a large one is not read to see it whole
        older = [each for each in self.all() if number_of(each) <= number]
        for each in self.all():
            if each not in older[-self._keep :]:
                shutil.rmtree(each, ignore_errors=True)  # what cannot go now goes next time

    def newest(self, read: Callable[[Path], Content], *names: str) -> Content | None:
        """What `read` makes of the newest directory whose files are whole; None without any directory.

        One that is broken is told in a line, and the one before it is taken.

        Args:
            names: of the files that `read` reads.

        Raises:
            NothingWhole: all are broken.
            StorageFailed: none is whole, and the newest cannot be read: storage is away, and stays so for minutes.
        """
        found = self.all()
        away: StorageFailed | None = None
        for place in reversed(found):

            def whole(place: Path = place) -> Content:
                with reading(place):
                    self._check(place, names)
                    return read(place)

            try:
                return patiently(whole) if away is None else whole()
            except (StorageFailed, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                if isinstance(error, StorageFailed):
                    away = away or error
                before = "; the one before it is taken, and what was done since is done again"
                say(f"{place} is broken ({' '.join(str(error).split())}){before if place != found[0] else ''}")
        if not found:
            return None
        if away is not None:
            raise away
        raise NothingWhole(f"none of the {len(found)} checkpoint(s) in {self.root} is whole; begin another run")

    def _check(self, place: Path, names: Sequence[str]) -> None:
        """`check_sums`, which has nothing to read of files that this object has seen whole and nobody has written."""
        sums = read_sums(place)
        unsaid = [name for name in names if name not in sums]
        if unsaid and (place / SUMS_FILE).is_file():
            raise ValueError(f"{SUMS_FILE} has no {unsaid[0]}")
        seen = _seen(place, names)
        check_sums(place, [name for name in names if seen[name] not in self._checked])
        self._checked.update(seen.values())


def _seen(place: Path, names: Sequence[str]) -> dict[str, Seen]:
    stats = {name: (place / name).stat() for name in names}
    return {name: (place / name, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def number_of(directory: Path) -> int:
    return int(directory.name.rpartition("_")[2])
