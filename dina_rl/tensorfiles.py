"""safetensors files written and hashed in one pass: a checkpoint of 36 GB is read once, by its own writer.

The format (https://github.com/huggingface/safetensors#format): eight bytes that count the header's, the header as JSON
(`dtype`, `shape`, `data_offsets` of every tensor, `__metadata__`), padded with spaces to a multiple of eight, and the
tensors' bytes one behind the other. Stock safetensors reads them; nothing here does.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import torch

PORTION = 2**24
"""Bytes that are hashed while they are written."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file; returns the SHA-256 of its bytes, in hexadecimal.

    Hashing costs the time by which it is slower than storage: both go on at once. One tensor at a time is copied, where
    it is not contiguous or not on the CPU.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned, as safetensors has them
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hashing:
        for portion in _portions(len(text).to_bytes(8, "little") + text, (tensors[name] for name in order)):
            hashed = hashing.submit(digest.update, portion)
            file.write(portion)
            hashed.result()
    return digest.hexdigest()


def _portions(head: bytes, tensors: Iterator[torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in tensors:
        if math.prod(tensor.shape):
            content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(content), PORTION):
                yield content[start : start + PORTION]
