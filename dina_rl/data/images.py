"""Encoded images to pixels; whatever is wrong with a file is a ValueError with one line.

Every reader sees a picture as a person does. It stands upright, by the orientation in its metadata, in sizes and pixels
alike; metadata that cannot be read says nothing. What is transparent lies on white, so that colours which nobody sees
decide nothing. Greys of more than 8 bits keep their upper 8.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy
from PIL import Image, ImageFile
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import TiffImageFile

from dina_rl.config.base import MAX_PIXELS
from dina_rl.data.buckets import Size
from dina_rl.storage import is_away, reading

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats of photographs; Pillow knows others that start foreign programs (EPS). JPEG's reader opens MPO too."""

READING = "upright by EXIF, transparency on white, upper 8 bits"
"""How pictures are read here, for the records that say what latents were made of."""

MAX_SCANS = 100
"""Of a progressive JPEG, each of which is a pass over all pixels: encoders write about 10, libtiff stops here too."""

DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error),  # all that decoders raise on broken data
    Image.DecompressionBombError,
)
METADATA_ERRORS = (*DECODER_ERRORS, TypeError, LookupError, ArithmeticError, AttributeError, zlib.error)

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)
_KEY_SCALES = {"1": 255, "L;2": 85, "L;4": 17}
"""Raw mode of a PNG -> how Pillow widens its greys, but not the transparent one among them."""
_PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
_PARAMETERS = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # a JPEG's markers that have a length behind them
_EOI, _SOS = 0xD9, 0xDA
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262


@cache
def suffixes() -> frozenset[str]:
    """Endings of the names of files in these formats, in lower case."""
    readable = {*FORMATS, "MPO"}
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in readable)


def load_image(data: bytes, *, height: int, width: int, max_pixels: int = MAX_PIXELS) -> numpy.ndarray:
    """RGB pixels [height, width, 3] uint8, resized straight to that size (LANCZOS, no crop) if need be.

    Raises:
        ValueError: unknown format, broken or truncated data, more than `max_pixels` pixels, too many scans, or values
            without an 8-bit meaning (floats, 32-bit integers).
    """
    with _opened(io.BytesIO(data)) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.height}x{image.width} is beyond max_pixels = {max_pixels}")
        if image.format in ("JPEG", "MPO"):
            _check_scans(data)
        key = _key_colour(image)
        orientation = _orientation(image)
        pixels = _rgb(image, key)
        if orientation in _TO_UPRIGHT:
            pixels = pixels.transpose(_TO_UPRIGHT[orientation])
        if pixels.size != (width, height):
            pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
        return numpy.asarray(pixels)


def image_size(data: bytes) -> Size:
    """(height, width) of the upright image, as the header says; the pixels are not decoded.

    Raises:
        ValueError: unknown format, a broken header, or twice as many pixels as Pillow opens.
    """
    return _size(io.BytesIO(data))


def file_size(path: Path) -> Size:
    """`image_size` of a file, of which only the header is read."""
    try:
        with reading(path), path.open("rb") as stream:
            return _size(stream)
    except OSError as error:
        raise ValueError(f"unreadable image: {error}") from error


def _size(stream: BinaryIO) -> Size:
    with _opened(stream) as image:
        size = image.height, image.width
        return size[::-1] if _orientation(image) in _ON_ITS_SIDE else size


@contextmanager
def _opened(stream: BinaryIO) -> Iterator[ImageFile.ImageFile]:
    try:
        with _open(stream) as image:
            if image.format == "TIFF":  # turned by Pillow, whose sizes know the tag alone, its pixels the XMP too
                image.info.pop("xmp", None)
            yield image
    except Image.UnidentifiedImageError:
        raise ValueError("unreadable image: not of a known format") from None
    except DECODER_ERRORS as error:
        if is_away(error):  # of the file behind the stream
            raise
        raise ValueError(f"unreadable image: {' '.join(str(error).split())}") from error


def _open(stream: BinaryIO) -> ImageFile.ImageFile:
    try:
        return Image.open(stream, formats=FORMATS)
    except DECODER_ERRORS:
        stream.seek(0)
        data = stream.read()
        without = re.sub(rb"(infe.{8,10})Exif", rb"\1skip", data, flags=re.DOTALL)
        if data[4:8] != b"ftyp" or without == data:
            raise
        return Image.open(io.BytesIO(without), formats=FORMATS)  # Pillow opens no AVIF whose EXIF is broken


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF's number for how the stored pixels lie; 1, upright, if nobody says so."""
    if image.format == "TIFF":  # Pillow has turned it
        return 1
    try:
        if image.format == "PNG" and not _has_late_metadata(image):
            return int(Image.Image.getexif(image).get(Base.Orientation, 1))  # PNG's own decodes the pixels first
        return int(image.getexif().get(Base.Orientation, 1))
    except METADATA_ERRORS:
        return 1


def _has_late_metadata(image: ImageFile.ImageFile) -> bool:
    """Whether a PNG has metadata behind its pixels, where opening does not look."""
    stream = image.fp
    assert stream is not None
    place = stream.tell()
    stream.seek(8)
    found, behind = False, False
    while not found and len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        found = behind and kind in _PNG_METADATA
        behind = behind or kind == b"IDAT"
        stream.seek(length + 4, io.SEEK_CUR)
    stream.seek(place)
    return found


def _check_scans(data: bytes) -> None:
    """Whether a JPEG can be decoded in bounded time; thumbnails inside it and what is behind its end do not count."""
    scans, place = 0, 2
    while (marker := _PARAMETERS.search(data, place)) is not None and marker[0][1] != _EOI:
        scans += marker[0][1] == _SOS
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    if scans > MAX_SCANS:
        raise ValueError(f"a JPEG of {scans} scans, more than {MAX_SCANS}")


def _rgb(image: Image.Image, key: int | tuple[int, ...] | None) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # a PPM's are 16 bits too
        return _grey16(image, key)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no 8-bit colours")
    if key is not None:
        image.info.pop("transparency")
        pixels = numpy.array(image.convert("RGB"))
        pixels[(pixels == key).all(-1)] = 255
        return Image.fromarray(pixels)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _key_colour(image: ImageFile.ImageFile) -> int | tuple[int, ...] | None:
    """The one colour that is transparent in an image without alpha or palette, as its pixels will have it.

    To be asked before the pixels are decoded.
    """
    key = image.info.get("transparency")
    if image.mode not in ("1", "L", "I;16", "RGB") or not isinstance(key, int | tuple):
        return None
    raw = image.tile[0].args if image.tile else None
    if isinstance(key, tuple):
        return tuple(value >> 8 for value in key) if raw == "RGB;16B" else key
    return key * _KEY_SCALES.get(raw, 1) if isinstance(raw, str) else key


def _grey16(image: Image.Image, key: int | tuple[int, ...] | None) -> Image.Image:
    """convert() would clip. A TIFF says how many of the bits it uses, and whether 0 is white."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits = min(tags.get(_TIFF_BITS, (16,)))
    values = numpy.asarray(image)
    greys = (values >> (bits - 8)).astype(numpy.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:
        greys = 255 - greys
    if key is not None:
        greys[values == key] = 255
    return Image.fromarray(greys).convert("RGB")
