"""Every random draw of a run is a function of (run seed, what it is for, where it belongs), never of who draws it.

A draw is keyed by names and numbers, e.g. `generator(seed, "initial-noise", step, prompt_id, sample_id)`. Rank, worker
count, thread and call order do not appear in the key, so one worker and ten workers see the same noise.
"""

from hashlib import blake2b

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from `key`: BLAKE2b of its unambiguous encoding.

    torch's CPU generator uses the low 32 bits, so among 100,000 keys about one pair shares its noise.
    """
    encoded = b"".join(f"{type(part).__name__}:{len(str(part))}:{part};".encode() for part in key)
    return int.from_bytes(blake2b(encoded, digest_size=8).digest(), "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator seeded by `derive_seed(*key)`.

    CPU always: the same key must give the same numbers on every device; the tensors are moved after the draw.
    """
    return torch.Generator().manual_seed(derive_seed(*key))


def normal(shape: tuple[int, ...], *key: int | str) -> torch.Tensor:
    """Standard normal fp32 tensor of `shape` that depends on `key` alone."""
    return torch.randn(shape, generator=generator(*key), dtype=torch.float32)
