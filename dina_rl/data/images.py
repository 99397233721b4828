"""Encoded images to pixels; whatever is wrong with a file is a ValueError with one line."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
from PIL import Image

from dina_rl.data.buckets import Size

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats of photographs; Pillow knows others that start foreign programs (EPS)."""

DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error),  # all that decoders raise on broken data
    Image.DecompressionBombError,
)


def load_image(data: bytes, *, height: int, width: int) -> numpy.ndarray:
    """RGB pixels [height, width, 3] uint8, resized straight to that size (LANCZOS, no crop) if need be.

    Transparency is dropped, 16-bit greys are scaled to 8 bits, other modes are converted.

    Raises:
        ValueError: unknown format, broken or truncated data, more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or values
            without an 8-bit meaning (floats, 32-bit integers).
    """
    with _opened(io.BytesIO(data)) as image:
        pixels = _rgb(image)
        if pixels.size != (width, height):
            pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
        return numpy.asarray(pixels)


def image_size(data: bytes) -> Size:
    """(height, width) as the header says; the pixels are not decoded.

    Raises:
        ValueError: unknown format, a broken header, or too many pixels.
    """
    with _opened(io.BytesIO(data)) as image:
        return image.height, image.width


def file_size(path: Path) -> Size:
    """`image_size` of a file, of which only the header is read."""
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(source: Path | io.BytesIO) -> Iterator[Image.Image]:
    try:
        with Image.open(source, formats=FORMATS) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise ValueError(f"{image.height}x{image.width} is beyond {most} pixels")
            yield image
    except Image.UnidentifiedImageError:
        raise ValueError("unreadable image: not of a known format") from None
    except DECODER_ERRORS as error:
        raise ValueError(f"unreadable image: {' '.join(str(error).split())}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8)).convert("RGB")  # convert() would clip
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no 8-bit colours")
    return image.convert("RGB")
