"""What can be found wrong with a pipeline's files without loading them: absent parts, and files that are not whole.

Downloads break off, clones without git-lfs hold pointers, copies lose folders. Stock classes then fail deep inside, or
go on: a tokenizer without its vocabulary knows two tokens and encodes every prompt alike. Only headers of weights are
read.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

from huggingface_hub import constants

from dina_rl.backbones.source import Source, check_no_pointer, has_variant, index_file, read_json
from dina_rl.errors import shown
from dina_rl.textfiles import parse_json

Need = Literal["transformer", "vae", "scheduler", "text"]
"""What of a pipeline is used; `text` is all text encoders and tokenizers."""
EVERYTHING: tuple[Need, ...] = ("transformer", "vae", "scheduler", "text")

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # of weight files, by library
PICKLED = {"diffusion_pytorch_model": "diffusion_pytorch_model", "model": "pytorch_model"}
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))
LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
LONGEST_HEADER = 100_000_000  # by that format


def check_files(source: Source, *needs: Need, text: Sequence[str] = (), optional: Collection[str] = ()) -> None:
    """Whether the parts that are needed are there and whole.

    Of a hub id only what is cached is looked at: the rest is downloaded when it is loaded. Offline it must be there.

    Args:
        text: the parts that `text` stands for.
        optional: parts that the pipeline may be without.

    Raises:
        ValueError: the first part or file that is not, and what to do about it.
    """
    file = index_file(source)
    index = read_json(file)
    _check_variant(source, file.parent)
    complete = source.is_local or constants.HF_HUB_OFFLINE
    for part in (each for need in needs for each in (text if need == "text" else (need,))):
        if part in index and index[part] is None:
            raise ValueError(
                f"{file} says null of {part}, which diffusers cannot read; a part left out is [null, null]"
            )
        library = library_of(index, part, file)
        folder = file.parent / part
        if library is None:
            if part not in optional:
                raise ValueError(f"pipeline {source.path} has no {part}: {file} names none; use a complete pipeline")
        elif folder.is_dir():
            _check_part(source, folder, library, complete=complete)
        elif complete:
            without = f", or make it [null, null] in {file.name} to do without" if part in optional else ""
            raise ValueError(f"pipeline {source.path}: its {part} is missing (no {folder}); download it again{without}")


def left_out(source: Source, parts: Collection[str]) -> dict[str, None]:
    """Those of `parts` that the pipeline is without, as its stock class wants to be told."""
    file = index_file(source)
    index = read_json(file)
    return {part: None for part in parts if library_of(index, part, file) is None}


def library_of(index: Mapping[str, Any], part: str, file: Path) -> str | None:
    """The library that has a part's class; None: the pipeline is without. Raises ValueError where it is no entry."""
    entry = index.get(part, [None, None])
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(each, str | None) for each in entry):
        raise ValueError(f"{file} says of {part} {shown(entry)}, where a library and a class should stand")
    library: str | None = entry[0]
    return library


def _check_variant(source: Source, directory: Path) -> None:
    """The stock pipelines refuse a variant that no part has."""
    if not source.is_local or source.variant is None:
        return
    if not any(has_variant(folder, source.variant) for folder in directory.iterdir() if folder.is_dir()):
        raise ValueError(f"pipeline {source.path} has no weights of pipeline.variant {source.variant}; leave it out")


def _check_part(source: Source, folder: Path, library: str, *, complete: bool) -> None:
    if folder.name.startswith("tokenizer"):
        _check_tokenizer(folder, complete=complete)
        return
    config = folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")
    if complete or config.exists():
        read_json(config)
    if folder.name != "scheduler":
        variant = source.weights(folder.name)["variant"]
        _check_weights(folder, STEMS.get(library, "model"), variant, complete=complete)


def _check_tokenizer(folder: Path, *, complete: bool) -> None:
    found = [name for names in VOCABULARIES for name in names if (folder / name).is_file()]
    if complete and not any(all(name in found for name in names) for names in VOCABULARIES):
        raise ValueError(
            f"{folder} has no vocabulary ({', or '.join(' and '.join(names) for names in VOCABULARIES)}); without it "
            "every prompt would be encoded alike: download it again"
        )
    if complete or (folder / TOKENIZER_CONFIG).exists():
        read_json(folder / TOKENIZER_CONFIG)
    for name in found:
        if name.endswith(".json"):
            read_json(folder / name)
        else:
            _check_not_empty(folder / name)


def _check_weights(folder: Path, stem: str, variant: str | None, *, complete: bool) -> None:
    files = _weight_files(folder, stem, variant)
    if files is None and complete:
        others = sorted(
            {name.split(".")[1] for name in _names(folder) if name.startswith(f"{stem}.")} - {"safetensors"}
        )
        kinds = [name.split("-")[0] for name in others]
        hint = f"it has {kinds[0]} weights, set pipeline.variant {kinds[0]}" if kinds else "download it again"
        raise ValueError(f"{folder} has no weights ({stem}.safetensors); {hint}")
    for file, expected in (files or {}).items():
        if not file.is_file():
            if complete:
                raise ValueError(f"{file} is missing, which {folder} is listed to hold; download it again")
        elif file.suffix == ".safetensors":
            lacking = expected - _tensors(file)
            if lacking:
                raise ValueError(
                    f"{file} lacks {len(lacking)} tensors that its index names (first: {min(lacking)}); "
                    "download it again"
                )
        else:
            _check_not_empty(file)
            if not is_zipfile(file):
                raise ValueError(f"{file} is not whole, or no file of torch.save; download it again")


def _weight_files(folder: Path, stem: str, variant: str | None) -> Mapping[Path, set[str]] | None:
    """Files that `from_pretrained` reads, and the tensors that an index expects in each; None if there are none."""
    infix = "" if variant is None else f".{variant}"
    for name, suffix in ((stem, "safetensors"), (PICKLED[stem], "bin")):
        index, single = folder / f"{name}.{suffix}.index{infix}.json", folder / f"{name}{infix}.{suffix}"
        if single.is_file() and (stem == "model" or not index.is_file()):  # diffusers looks for an index first
            return {single: set()}
        if index.is_file():
            shards: dict[Path, set[str]] = {}
            for tensor, shard in _weight_map(index):
                shards.setdefault(folder / shard, set()).add(tensor)
            return shards
    return None


def _weight_map(index: Path) -> Iterator[tuple[str, str]]:
    tensors = read_json(index).get("weight_map")
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{index} lists no files; download it again")
    for tensor, shard in tensors.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index} names {shown(shard)}, which is no file beside it")
        yield tensor, shard


def _tensors(file: Path) -> set[str]:
    """Names of the tensors of a safetensors file, after its length has been compared with what its header promises."""
    _check_not_empty(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = LENGTH_BYTES + int.from_bytes(stream.read(LENGTH_BYTES), "little")
        content = stream.read(header - LENGTH_BYTES) if header <= min(size, LONGEST_HEADER) else b""
    try:
        entries: dict[str, Any] = parse_json(content)
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is cut off, or no safetensors file: it has no readable header; download it again"
        ) from error
    expected = header + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{file} is not whole: it has {size:,} bytes and should have {expected:,}; download it again")
    return {name for name in entries if name != "__metadata__"}


def _check_not_empty(file: Path) -> None:
    if not file.stat().st_size:
        raise ValueError(f"{file} is empty; download it again")
    check_no_pointer(file)


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]
