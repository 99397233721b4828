"""What files hold, by digest: cheap for tens of gigabytes, and the same wherever they lie.

A path is where a thing lies, not what it is. Small files are read in full; of large ones the size and blocks at even
distances stand for all, of weights a block of every tensor. Any training changes those, also an adapter fused into some
layers; an edit by hand of a few numbers may go unnoticed.
"""

import json
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dina_rl.textfiles import parse_json, regular

BLOCK = 2**16  # bytes of a large file read at one place
BLOCKS = 64  # such places
WHOLE_BYTES = 64 * 2**20  # files up to this size are read in full
TENSOR_BYTES = 2**14  # of a tensor that are read, its middle ones
STORE_FILES = 64  # of a store of encoded pairs that are looked into
MAX_HEADER = 10**8  # bytes, safetensors' own limit
_PLAIN_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors")
_SHARD = re.compile(r".*-\d{5}-of-(\d{5})\.\w+")
_SCALES = ("scaling_factor", "shift_factor")
"""What a VAE's configuration says of its latents beside what its tensors do."""


class Fingerprint(BaseModel):
    """What a pipeline's parts hold, whatever their files are called and cut into; None: not all of it is here.

    Tensors are compared as stored: the same weights in another precision are others. Tokenizers and the scheduler have
    no part in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    transformer: str | None = None
    vae: str | None = None
    text: str | None = None

    def other_parts(self, other: "Fingerprint") -> list[str]:
        """Names of the parts that are known of both and differ."""
        pairs = ((name, ours, dict(other)[name]) for name, ours in self)
        return [PARTS[name] for name, ours, theirs in pairs if None not in (ours, theirs) and ours != theirs]


Parts = dict[str, str | None]
"""Digests of what an input is made of, by name; None: unknown."""

PARTS = {"transformer": "transformer", "vae": "VAE", "text": "text encoders"}


def pipeline_fingerprint(location: str, revision: str | None = None, variant: str | None = None) -> Fingerprint:
    """Of a pipeline directory, or of what is cached of a hub id. Downloads nothing, and reads some megabytes.

    Args:
        revision: of a hub id.
        variant: of the weight files, where a part has them. Weights in another precision are other weights.
    """
    directory = local_directory(location, "model_index.json", revision)
    if directory is None:
        return Fingerprint()
    encoders = sorted(part for part in directory.glob("text_encoder*") if part.is_dir())
    text = [_weights_digest(encoder, variant) for encoder in encoders]
    return Fingerprint(
        transformer=_weights_digest(directory / "transformer", variant),
        vae=_vae_digest(directory / "vae", variant),
        text=None if None in text or not text else _digest_of(*text),
    )


def same_part(ours: str | None, theirs: str | None, *, called_alike: bool) -> bool:
    """Whether two parts hold the same; where one of them is unknown, their pipeline's name stands for them."""
    return called_alike if None in (ours, theirs) else ours == theirs


def pipeline_parts(location: str, revision: str | None = None, variant: str | None = None) -> Parts:
    """Everything in a pipeline that decides a number: its fingerprint, and the small files of the other parts."""
    found = {PARTS[name]: value for name, value in pipeline_fingerprint(location, revision, variant)}
    directory = local_directory(location, "model_index.json", revision)
    for name, pattern in (("scheduler", "scheduler"), ("tokenizers", "tokenizer*")):
        parts = [] if directory is None else sorted(part for part in directory.glob(pattern) if part.is_dir())
        found[name] = _digest_of(*map(files_digest, parts)) if parts else None
    return found


def repository_parts(path: str, known_file: str) -> Parts:
    """The files of a directory, a file, or the commit of a hub id."""
    directory = Path(path).expanduser()
    if directory.is_file():
        return file_parts(directory)
    return {"content": files_digest(directory) if directory.is_dir() else cached_commit(path, known_file)}


def file_parts(file: Path) -> Parts:
    return {"content": file_digest(file)}


def store_parts(directory: Path) -> Parts:
    """The files of a store of encoded pairs, of which there may be ten thousand: all by size, some by content."""
    files = [file for file in sorted(directory.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    read = {files[number * (len(files) - 1) // (STORE_FILES - 1)] for number in range(STORE_FILES)} if files else set()
    lines = [
        f"{file.relative_to(directory)} {file.stat().st_size} {_ends(file) if file in read else ''}" for file in files
    ]
    return {"content": _digest_of(*lines)}


def records_parts(files: Sequence[Path]) -> Parts:
    """The files of a preference set's records. Its images are trusted not to change under their names."""
    return {"records": _digest_of(*(f"{file.name} {file_digest(file)}" for file in files if file.is_file()))}


def text_parts(texts: Sequence[str]) -> Parts:
    return {"content": _digest_of(json.dumps(list(texts)))}


def _ends(file: Path) -> str:
    """Of the beginning and the end of a file: parquet has its statistics there."""
    with file.open("rb") as stream:
        content = stream.read(BLOCK)
        stream.seek(max(0, file.stat().st_size - BLOCK))
        return blake2b(content + stream.read(BLOCK), digest_size=16).hexdigest()


def local_directory(location: str, known_file: str, revision: str | None = None) -> Path | None:
    """`location` if it is a directory, else the cached snapshot of that hub id; None without one.

    Args:
        known_file: a file that every such repository has, and that is downloaded first.
    """
    directory = Path(location).expanduser()
    if directory.is_dir():
        return directory
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(location, known_file, revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None  # else: not cached, or known not to exist


def cached_commit(hub_id: str, known_file: str, revision: str | None = None) -> str | None:
    """The commit of the cached snapshot of a hub id; None without one."""
    directory = None if Path(hub_id).is_dir() else local_directory(hub_id, known_file, revision)
    return None if directory is None else directory.name


def files_digest(directory: Path) -> str:
    """Of the names and contents of all files of a directory but hidden ones."""
    files = ((file.relative_to(directory), file) for file in sorted(directory.rglob("*")))
    shown = ((name, file) for name, file in files if not any(part.startswith(".") for part in name.parts))
    return _digest_of(*(f"{name} {file_digest(file)}" for name, file in shown if file.is_file()))


def file_digest(file: Path, *, whole: int = WHOLE_BYTES) -> str:
    """Of a file's size and content; above `whole` bytes of the blocks that stand for it."""
    size = file.stat().st_size
    content = blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as stream:
        if size <= max(whole, BLOCK):
            while block := stream.read(2**20):
                content.update(block)
        else:
            for number in range(BLOCKS):
                stream.seek(number * (size - BLOCK) // (BLOCKS - 1))
                content.update(stream.read(BLOCK))
    return content.hexdigest()


def _weights_digest(part: Path, variant: str | None) -> str | None:
    """Of the tensors in a part of a pipeline, however they are cut into files; None: they are not all here."""
    files = weight_files(part, variant)
    if not files:
        return None
    try:
        if files[0].suffix == ".bin":
            return _digest_of(*map(file_digest, files))
        return _digest_of(*sorted(line for file in files for line in _tensors(file)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whoever loads them says what is wrong
        return None


def weight_files(part: Path, variant: str | None) -> list[Path]:
    """What `from_pretrained` would load: files of the variant, else plain ones; safetensors before pickles."""
    found = sorted(part.glob("*.safetensors"))
    named = [file for file in found if variant is not None and file.name.split(".")[1].startswith(variant)]
    plain = [file for file in found if _PLAIN_WEIGHTS.fullmatch(file.name)]
    files = named or plain or found or sorted(part.glob("*.bin"))
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    whole = not shards or len(shards) >= int(shards[0].group(1))
    return files if whole else []


def _tensors(file: Path) -> Iterator[str]:
    """A line for every tensor of a safetensors file: name, type, shape, and a digest of the bytes in its middle."""
    with regular(file).open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{file} is not a safetensors file")
        header = parse_json(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            skipped = max(0, end - begin - TENSOR_BYTES) // 2
            stream.seek(8 + length + begin + skipped)
            wanted = min(TENSOR_BYTES, end - begin)
            content = stream.read(wanted)
            if len(content) < wanted:
                raise ValueError(f"{file} is cut short")
            yield f"{name} {entry['dtype']} {entry['shape']} {blake2b(content, digest_size=16).hexdigest()}"


def _vae_digest(part: Path, variant: str | None) -> str | None:
    weights, config = _weights_digest(part, variant), part / "config.json"
    if weights is None or not config.is_file():
        return None
    values = parse_json(config.read_bytes())
    return _digest_of(weights, *(f"{name} {values.get(name)}" for name in _SCALES))


def _digest_of(*lines: str | None) -> str:
    return blake2b("\n".join(map(str, lines)).encode(), digest_size=16).hexdigest()
