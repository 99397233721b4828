"""Says what is loaded while it is: at full size the first number of a run comes after minutes."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from dina_rl.fingerprint import local_directory, weight_files

LARGE = 64 * 2**20
"""Bytes below which nothing is said: what is so small is there at once."""

TRANSFORMER, TEXT, VAE = "transformer", "text encoders", "VAE"
FOLDERS = {TRANSFORMER: "transformer", TEXT: "text_encoder*", VAE: "vae"}
"""Parts of a pipeline, and where in it their weights lie."""

Sizes = Mapping[str, int | None]
"""Bytes on disk by what is loaded; None: it is not here yet."""


@contextmanager
def loading(what: str, path: str | Path, variant: str | None = None) -> Iterator[None]:
    """A line before and after the block, in which this process loads a part of the pipeline at `path`, or the model
    there.
    """
    size = on_disk(what, path, variant)
    if not _takes_time(size):
        yield
        return
    begin = perf_counter()
    say(f"loading {what} of {path}, {_shown(size)}")
    yield
    say(f"loaded {what} in {perf_counter() - begin:.0f} s")


def announce(who: str, sizes: Sizes) -> bool:
    """One line on what others are about to load, each of them; returns whether there was anything to say."""
    large = {what: size for what, size in sizes.items() if _takes_time(size)}
    if large:
        say(f"{who} load {', '.join(f'{what}, {_shown(size)}' for what, size in large.items())}")
    return bool(large)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def sizes(path: str | Path, *parts: str, variant: str | None = None) -> dict[str, int | None]:
    """Of parts of the pipeline at `path`."""
    return {part: on_disk(part, path, variant) for part in parts}


def on_disk(what: str, path: str | Path, variant: str | None = None) -> int | None:
    """Bytes of the weight files of a part of a pipeline, or of the model at `path`; None: a hub id that is not here.

    Args:
        variant: whose files count where a part has them.
    """
    if Path(path).expanduser().is_file():
        return Path(path).expanduser().stat().st_size
    root = _directory(path)
    if root is None:
        return None
    folders = [root / "."] if what not in FOLDERS else sorted(root.glob(FOLDERS[what]))
    return sum(file.stat().st_size for folder in folders for file in weight_files(folder, variant))


def shown_bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _directory(path: str | Path) -> Path | None:
    found = (local_directory(str(path), name) for name in ("model_index.json", "config.json"))
    return next((directory for directory in found if directory is not None), None)


def _takes_time(size: int | None) -> bool:
    return size is None or size >= LARGE


def _shown(size: int | None) -> str:
    return "to be downloaded first" if size is None else f"{shown_bytes(size)} on disk"
