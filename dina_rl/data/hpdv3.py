"""Reader of HPDv3's on-disk format: `train.json`, `test.json` and the images they name.

A file is a JSON array of {prompt, path1, path2, choice_dist, confidence, model1, model2}; paths are relative to the
directory and path1 is always the preferred image. choice_dist and confidence are null for pairs without annotators.
"""

import json
from pathlib import Path

import numpy
from PIL import Image

from dina_rl.data.latents import Split
from dina_rl.data.pairs import PreferencePair
from dina_rl.data.records import SkippedRecord


def read_split(directory: Path, split: Split) -> tuple[list[PreferencePair], list[SkippedRecord]]:
    """The comparisons of a split, and the malformed ones with the reason. Images are not looked at.

    Raises:
        ValueError: no such directory or file, or the file is not a JSON array.
    """
    if not directory.is_dir():
        raise ValueError(f"dataset directory {directory} does not exist")
    file = directory / f"{split}.json"
    if not file.is_file():
        raise ValueError(f"dataset {directory} has no {file.name}")
    try:
        array = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(array, list):
        raise ValueError(f"{file} must hold an array of records, not {type(array).__name__}")
    records, skipped = [], []
    for index, raw in enumerate(array):
        try:
            records.append(_record(index, raw))
        except ValueError as error:
            skipped.append(SkippedRecord(file=file.name, index=index, reason=str(error)))
    return records, skipped


def check_skipped(skipped: int, total: int, *, max_skipped: float, where: Path) -> None:
    """Stop over a dataset that is broken beyond what the configuration tolerates.

    Raises:
        ValueError: more than a share `max_skipped` of `total` records is unusable, or all of them.
    """
    if skipped > max_skipped * total or skipped == total:
        raise ValueError(
            f"{skipped} of {total} records of {where} are malformed or have unreadable images, more than "
            f"dataset.max_skipped = {max_skipped:g} allows"
        )


def load_image(path: Path, *, height: int, width: int) -> numpy.ndarray:
    """RGB pixels [height, width, 3] uint8, resized straight to that size (LANCZOS, no crop) if need be.

    Raises:
        ValueError: missing file, unknown format or broken data.
    """
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that PIL decoders raise
        raise ValueError(f"unreadable image: {error}") from error
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    return numpy.asarray(pixels)


def _record(index: int, raw: object) -> PreferencePair:
    if not isinstance(raw, dict):
        raise ValueError(f"record is a {type(raw).__name__}, not an object")
    for key in ("prompt", "path1", "path2"):
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise ValueError(f"{key} must be a non-empty string, got {raw.get(key)!r}")
    return PreferencePair(
        index=index,
        prompt=raw["prompt"],
        chosen=raw["path1"],
        rejected=raw["path2"],
        votes=_votes(raw.get("choice_dist")),
        confidence=_confidence(raw.get("confidence")),
    )


def _votes(value: object) -> tuple[int, int] | None:
    # Null, [] and [null, null] all occur for pairs without annotators; the order of path1 and path2 still holds.
    if value is None or (isinstance(value, list) and (len(value) < 2 or value == [None, None])):
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int and v >= 0 for v in value):
        return value[0], value[1]
    raise ValueError(f"choice_dist must be two vote counts or null, got {value!r}")


def _confidence(value: object) -> float | None:
    if value is None or (type(value) in (int, float) and 0 <= value <= 1):
        return value
    raise ValueError(f"confidence must be a number in [0, 1] or null, got {value!r}")
