"""Stores of encoded pairs by what lies in a directory."""

from pathlib import Path

from dina_rl.data.stores.latents import STORE_FILE, LatentStore, PairStore
from dina_rl.data.stores.preprocessed import NAME, PreprocessedStore


def open_store(directory: Path) -> PairStore:
    """Encoded pairs in a directory: a latent store of `jobs.encode`, or the authors' preprocessed files.

    Raises:
        ValueError: it is neither.
    """
    if (directory / STORE_FILE).is_file() or not any(directory.rglob(NAME)):
        return LatentStore(directory)
    return PreprocessedStore(directory)
