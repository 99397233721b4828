"""Where the files of a pipeline come from, and how its parts are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from dina_rl.textfiles import parse_json, read_text

INDEX = "model_index.json"
LFS_POINTER = b"version https://git-lfs"
SINGLE_FILES = (".safetensors", ".ckpt", ".gguf", ".sft", ".bin", ".pt", ".pth")


STOCK_ERRORS = (OSError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, ImportError,
                AssertionError, SafetensorError, StrictDataclassError)  # fmt: skip
"""What stock classes were seen to raise, or may, of files that are whole and mean nothing."""


class Place(TypedDict):
    """What `load_config` takes."""

    subfolder: str
    revision: str | None


class Weights(Place):
    """What `from_pretrained` takes."""

    variant: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A pipeline directory or hub id, and which of its files are read."""

    path: str
    revision: str | None = None  # of a hub id
    variant: str | None = None  # of weight files, where a part has them: fp16 reads model.fp16.safetensors

    @property
    def is_local(self) -> bool:
        return Path(self.path).is_dir()

    def config(self, part: str) -> Place:
        """Where the configuration of a part lies."""
        return {"subfolder": part, "revision": self.revision}

    def weights(self, part: str) -> Weights:
        """Where a part's weights lie; without the variant if it has none of it, as the stock pipelines load it."""
        folder = Path(self.path) / part
        lacking = folder.is_dir() and self.variant is not None and not has_variant(folder, self.variant)
        return {**self.config(part), "variant": None if lacking else self.variant}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a pipeline is opened."""

    dtype: torch.dtype
    device: str
    max_sequence_length: int | None  # None: the stock pipeline's
    distilled_guidance: float | None = (
        None  # of the generator; None: the stock pipeline's, where there is such an input
    )
    decode_batch: int | None = None  # latents decoded at once; None: all
    vae_tiling: bool = False


class StockReading:
    """A block in which stock classes read a pipeline's files.

    Raises:
        ValueError: what they raise of broken ones, in one line.
    """

    def __init__(self, source: Source) -> None:
        self._path = source.path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        of_files = isinstance(error, STOCK_ERRORS) or type(error) is Exception  # tokenizers raises no class of its own
        if of_files and not isinstance(error, torch.OutOfMemoryError):
            said = " ".join(str(error).split())
            raise ValueError(f"pipeline {self._path} cannot be read: {said or type(error).__name__}") from error


def refuse_distilled_guidance(source: Source, options: Options) -> None:
    """Raises ValueError if a model without that input is given one."""
    if options.distilled_guidance is not None:
        raise ValueError(
            f"pipeline {source.path} has no distilled guidance (FLUX.1-dev has): leave pipeline.distilled_guidance out"
        )


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a part has weight files of a variant, by the rule of the stock pipelines."""
    return any(len(names := file.name.split(".")) > 1 and names[1].startswith(variant) for file in folder.iterdir())


def index_file(source: Source) -> Path:
    """`model_index.json` of a local directory or of a hub id, which is downloaded if need be.

    Raises:
        ValueError: neither, and what it is instead; a revision of a directory.
    """
    local = Path(source.path)
    if local.is_dir():
        if source.revision is not None:
            raise ValueError(f"pipeline.revision {source.revision} is a hub id's; {local} is a directory: leave it out")
        if not (local / INDEX).is_file():
            raise ValueError(f"pipeline directory {local} has no {INDEX}; is it a diffusers pipeline?")
        return local / INDEX
    if local.is_file() or local.suffix in SINGLE_FILES:
        raise ValueError(
            f"pipeline {local} is a single file; a diffusers directory is needed, which its class in diffusers makes "
            f"of most such files: StableDiffusion3Pipeline.from_single_file({str(local)!r}).save_pretrained(DIRECTORY)"
        )
    if local.is_absolute() or source.path.startswith("."):
        raise ValueError(f"pipeline directory {local} does not exist")
    return _from_hub(source)


def _from_hub(source: Source) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source.path, INDEX, revision=source.revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"pipeline {source.path} is neither a local directory nor a hub id that can be read here: "
            f"{' '.join(str(error).split())}"
        ) from error


def read_json(file: Path) -> Mapping[str, Any]:
    """The object in a JSON file of a pipeline.

    Raises:
        ValueError: no such file, a git-lfs pointer in its place, or something else than an object.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing; download the pipeline again")
    check_no_pointer(file)
    try:
        found = parse_json(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object; download it again")
    return found


def check_config(source: Source, part: str) -> None:
    """Raises ValueError if a pipeline directory has no readable configuration of a part."""
    if source.is_local:
        read_json(Path(source.path) / part / "config.json")


def check_no_pointer(file: Path) -> None:
    """Raises ValueError if git left a pointer where a large file should be."""
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a git-lfs pointer and not the file itself; run git lfs pull in the pipeline")
