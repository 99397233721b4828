"""Whether two runs ended with the same weights."""

from hashlib import sha256
from pathlib import Path

from dina_rl.checkpoint import load_tensors


def digest_of(file: Path) -> str:
    """Of a safetensors file's names and numbers. Its own bytes say less: the writer orders its metadata by chance."""
    digest = sha256()
    for name, tensor in sorted(load_tensors(file).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
