"""Which weights a pipeline has: recorded beside a reward model, whose scores mean something on these weights only."""

from hashlib import blake2b
from pathlib import Path

from dina_rl.fingerprint import cached_commit

SAMPLED_BYTES = 2**20
WEIGHT_SUFFIXES = (".safetensors", ".bin")


def pipeline_revision(location: str, asked: str | None = None) -> str | None:
    """The revision of a pipeline directory or hub id; None where nothing can be said. Downloads nothing.

    A hub snapshot has its commit hash. Any other directory has `files:` and a hash of its transformer's configuration,
    weight index, and of each weight file's size, first and last MiB: enough to tell two trainings of one architecture
    apart without reading gigabytes.

    Args:
        asked: branch, tag or commit of a hub id; None: its main branch.
    """
    directory = Path(location)
    if not directory.is_dir():
        return cached_commit(location, "model_index.json", asked)
    if directory.resolve().parent.name == "snapshots":
        return directory.resolve().name
    transformer = directory / "transformer"
    if not transformer.is_dir():
        return None
    digest = blake2b(digest_size=16)
    for file in sorted(transformer.iterdir()):
        if file.suffix == ".json":
            digest.update(file.read_bytes())
        elif file.suffix in WEIGHT_SUFFIXES:
            size = file.stat().st_size
            digest.update(str(size).encode())
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLED_BYTES))
                stream.seek(max(0, size - SAMPLED_BYTES))
                digest.update(stream.read())
    return f"files:{digest.hexdigest()}"
