"""Inputs that were made to do harm: bombs, endless nesting, and what runs where a reader is careless."""

import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow
from pyarrow import parquet

CODE = "__import__('os').system('touch executed')"
DEEP = 200_000


def hostile_text(rng: random.Random, suffix: str) -> bytes:
    """Of a JSON, JSON lines or YAML file."""
    return rng.choice(YAMLS if suffix == ".yaml" else JSONS)


JSONS: tuple[bytes, ...] = (
    b"[" * DEEP,
    b"[" * DEEP + b"]" * DEEP,
    b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    b"9" * 100_000,
    b'{"iteration": ' + b"9" * 5000 + b"}",
    b'[{"prompt": "' + b"\\u0000" * 1000 + b'"}]',
    b"\xef\xbb\xbf" * 3 + b"[]",
    b"\0" * 1000,
    b'"' + b"\xff" * 100 + b'"',
    b"NaN",
    b"[1e999999999]",
    b"-",
)
YAMLS: tuple[bytes, ...] = (
    b"!!python/object/apply:os.system ['touch executed']\n",
    b"seed: !!python/object/apply:subprocess.check_output [['touch', 'executed']]\n",
    b"seed: !!python/name:os.system\nrun_dir: !!python/object/new:type ['z', !!python/tuple [], {}]\n",
    b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b", ".join([b"*%c" % (97 + n)] * 9)) for n in range(12)),
    b"run_dir: &a [*a]\n",
    b"&a pipeline: *a\n",
    b"pipeline: &a\n  path: *a\n",
    b"[" * 3000,
    b"{a: " * 3000 + b"1" + b"}" * 3000,
    b"- " * 3000 + b"x",
    b"? [a, b]\n: 1\n",
    b"? {a: b}\n: 1\n",
    b"seed: !!int abc\n",
    b"seed: !!float x\n",
    b"seed: 2024-99-99\n",
    b"seed: !!binary '%%%'\n",
    b"seed: !!timestamp x\n",
    b"seed: !!bool x\n",
    b"seed: !!set [a]\n",
    b"seed: !!omap [a]\n",
    b"seed: 0x" + b"f" * 100_000 + b"\n",
    b"seed: " + b"9" * 100_000 + b"\n",
    b"seed: 1:2:3:4\nrun_dir: 1_000\n",
    b"<<: *x\n",
    b"<<: [1, 2]\n",
    b"<<: 1\n",
    b"%YAML 9.9\n---\na: 1\n",
    b"--- 1\n--- 2\n",
    b"a: 1\n...\nb: 2\n",
    b"\0\0\0\0",
    b"seed: \x07\n",
    b'seed: "\\ud800"\n',
    b"=: 1\n",
    b"seed: =\n",
    b"1: 2\n",
    b"null: 1\n",
    b"2024-01-01: 1\n",
    b".nan: 1\n",
)


def hostile_weights(rng: random.Random) -> bytes:
    """Of a safetensors file: headers that promise what is not there, and pickles under its name."""
    heads: list[object] = [
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64 - 1]}},
        {"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {"__metadata__": {"format": "pt", "lora_adapter_metadata": "[" * 100_000}},
        {"__metadata__": {"lora_adapter_metadata": "{}"}},
        {"__metadata__": 1},
        {},
        [],
        1,
    ]
    packed = json.dumps(rng.choice(heads)).encode()
    whole = len(packed).to_bytes(8, "little") + packed + b"\0" * 4
    deep = b'{"a":' * DEEP
    return rng.choice(
        (
            whole,
            whole,
            whole,
            struct.pack("<Q", 2**63) + b"{}",
            struct.pack("<Q", 99_999_999) + b"{}",
            len(deep).to_bytes(8, "little") + deep,
            pickled_code(),
            archived_code(),
        )
    )


class _Runs:
    """Pickled, it calls a function when it is unpickled."""

    def __init__(self, function: Callable[[str], object], word: str) -> None:
        self._call = function, (word,)

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return self._call


def pickled_code() -> bytes:
    """A pickle that leaves a file where it is run."""
    from os import system

    return pickle.dumps({"state_dict": _Runs(system, "touch executed")})


def archived_code(extra: Mapping[str, bytes] | None = None) -> bytes:
    """The same as torch.save packs it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickled_code())
        archive.writestr("archive/version", b"3\n")
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return content.getvalue()


def bomb_archive() -> bytes:
    """A torch archive whose one storage is 1 GiB of zeros in 5 MiB."""
    head = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
        b"X\x03\x00\x00\x00cpuJ\x00\x00\x00\x10tQK\x00J\x00\x00\x00\x10\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR."
    )
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", head)
        with archive.open("archive/data/0", "w", force_zip64=True) as stream:
            for _ in range(64):
                stream.write(b"\0" * 2**24)
    return content.getvalue()


def png(width: int, height: int, rows: bytes | None = None, chunks: bytes = b"") -> bytes:
    """A grey PNG whose header says a size, whatever its pixels are."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (height * (width + 1)) if rows is None else rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def hostile_pictures() -> dict[str, bytes]:
    """By what they try."""
    zeros = zlib.compress(b"\0" * 2**26)
    return {
        "promises 60000 x 60000": png(60_000, 60_000, b""),
        "promises 2**31 x 2**31": png(2**31 - 1, 2**31 - 1, b""),
        "pixels": png(9000, 9000),
        "64 MiB of text": png(4, 4, chunks=chunk(b"zTXt", b"a\0\0" + zeros)),
        "64 MiB of iTXt": png(4, 4, chunks=chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros)),
        "64 MiB of profile": png(4, 4, chunks=chunk(b"iCCP", b"a\0\0" + zeros)),
        "no width": png(0, 4, b""),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file closefile\n",
        "gif": b"GIF89a\xff\xff\xff\xff\xf7\0\0" + b"\0\0\0" * 256 + b",\0\0\0\0\xff\xff\xff\xff\0\x08",
        "ppm": b"P6 99999 99999 255\n",
        "ppm of words": b"P3 4 4 99999999999999999999\n" + b"9" * 100_000,
        "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 2**30, -(2**30), 1, 24, 0, 0, 0, 0, 0, 0),
        "tiff": b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 256, 4, 2**31, 8) * 100,
        "tiff that leads to itself": b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 256, 4, 1, 4) + struct.pack("<I", 8),
        "jpeg 2000": b"\xff\x4f\xff\x51\0\x2f\0\0" + struct.pack(">IIIIIIII", 2**31, 2**31, 0, 0, 1, 1, 0, 0) + b"\0\3",
        "webp": b"RIFF\xff\xff\xff\xffWEBPVP8X\n\0\0\0\x10\0\0\0\xff\xff\xff\xff\xff\xff",
        "pickle": pickled_code(),
    }


def write_bomb(file: Path, name: str, mib: int, others: Mapping[str, list[object]]) -> None:
    """A parquet file of one row: a cell of zeros, which are nothing when they are compressed, and other columns."""
    size = mib * 2**20
    ends = pyarrow.py_buffer(struct.pack("<qq", 0, size))
    cells = pyarrow.Array.from_buffers(pyarrow.large_binary(), 1, [None, ends, pyarrow.py_buffer(bytes(size))])
    parquet.write_table(
        pyarrow.table({name: cells, **others}), file, compression="zstd", use_dictionary=False, write_statistics=False
    )
