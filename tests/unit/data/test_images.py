import io
import struct
import zlib

import numpy
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from dina_rl.data.images import image_size, load_image

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow has its own on broken metadata and bombs

NOISE = numpy.random.default_rng(0).integers(0, 255, (32, 48, 3), numpy.uint8)


ORIENTATION = 0x0112
UNDER = (0, 255, 0)  # a colour that nobody sees


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits: int, colour: int, row: bytes, *, key: bytes = b"", late: bytes = b"", width: int = 2) -> bytes:
    """One row of pixels; `key` is the transparent colour, `late` chunks behind the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    transparent = chunk(b"tRNS", key) if key else b""
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + transparent + pixels + late + chunk(b"IEND", b"")


def upright(data: bytes) -> numpy.ndarray:
    height, width = image_size(data)
    return load_image(data, height=height, width=width)


def test_images_are_rgb_of_the_wanted_size() -> None:
    pixels = load_image(encoded(Image.new("L", (10, 30), 200)), height=8, width=16)
    assert (pixels.shape, pixels.dtype) == ((8, 16, 3), numpy.uint8)
    assert (pixels == 200).all()


def test_an_image_of_the_right_size_is_untouched() -> None:
    assert numpy.array_equal(load_image(encoded(Image.fromarray(NOISE)), height=32, width=48), NOISE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_sizes_come_from_the_header(kind: str) -> None:
    data = encoded(Image.fromarray(NOISE), kind)
    assert image_size(data) == (32, 48)
    assert load_image(data, height=32, width=48).shape == (32, 48, 3)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (4, 4), (90, 51)), "PNG", (222, 222, 222)),
        (Image.new("RGB", (4, 4), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", (10, 20, 30)),
        (Image.fromarray(numpy.full((4, 4), 0x8040, numpy.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(numpy.full((4, 4), 0x8040, numpy.uint16)), "PPM", (128, 128, 128)),
        (Image.fromarray(numpy.full((4, 4), 0x8040, numpy.uint16)), "TIFF", (128, 128, 128)),
    ],
)
def test_other_modes_are_converted(image: Image.Image, kind: str, expected: tuple[int, int, int]) -> None:
    pixels = load_image(encoded(image, kind), height=4, width=4).astype(int)
    assert abs(pixels - expected).max() <= 2  # JPEG rounds


def test_modes_without_8_bit_colours_are_refused() -> None:
    with pytest.raises(ValueError, match="mode F has no 8-bit colours"):
        load_image(encoded(Image.fromarray(NOISE[..., 0].astype(numpy.float32)), "TIFF"), height=4, width=4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_truncated_images_are_unreadable(kind: str) -> None:
    data = encoded(Image.fromarray(NOISE), kind)
    for length in (0, 1, 20, len(data) // 2):
        with pytest.raises(ValueError, match="^unreadable image: "):
            load_image(data[:length], height=32, width=48)


def test_text_and_programs_are_unreadable() -> None:
    for data in (b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"):
        with pytest.raises(ValueError, match="not of a known format"):
            image_size(data)


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(NOISE))[:60]  # there are no pixels to decode
    with pytest.raises(ValueError, match="^unreadable image: 32x48 is beyond max_pixels = 1535$"):
        load_image(data, height=32, width=48, max_pixels=1535)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # beyond twice its limit Pillow refuses itself
    with pytest.raises(ValueError, match="^unreadable image: "):
        image_size(data)


def test_broken_bytes_never_raise_anything_else() -> None:
    draws = numpy.random.default_rng(1)
    outcomes: set[tuple[int, ...] | str] = set()
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = numpy.frombuffer(encoded(Image.fromarray(NOISE), kind), numpy.uint8)
        for _ in range(60):
            broken = whole.copy()
            broken[draws.integers(0, min(len(whole), 300), 6)] = draws.integers(0, 256, 6)
            try:
                outcomes.add(load_image(broken.tobytes(), height=32, width=48).shape)
            except ValueError as error:
                outcomes.add(str(error).partition(":")[0])
    assert outcomes == {(32, 48, 3), "unreadable image"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_stands_upright_in_size_and_pixels(kind: str, orientation: int) -> None:
    data = encoded(Image.fromarray(NOISE), kind, exif=turned(orientation))
    with Image.open(io.BytesIO(data)) as image:
        expected = numpy.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert image_size(data) == expected.shape[:2] == ((48, 32) if orientation > 4 else (32, 48))
    assert numpy.array_equal(upright(data), expected)


def test_what_a_png_says_behind_its_pixels_counts() -> None:
    late = chunk(b"eXIf", turned(6).tobytes().removeprefix(b"Exif\0\0"))
    for bits, row in ((8, b"\x0a\xff"), (4, b"\x0f")):
        data = png(bits, 0, row, late=late, key=b"\0\x0a" if bits == 8 else b"\0\0")
        assert image_size(data) == (2, 1)
        assert upright(data)[:, 0, 0].tolist() == [255, 255]


def xmp(value: str) -> bytes:
    return f'<x:xmpmeta><rdf tiff:Orientation="{value}"/></x:xmpmeta>'.encode()


def with_exif(kind: str, block: bytes) -> bytes:
    if kind != "AVIF":
        return encoded(Image.fromarray(NOISE), kind, exif=block)
    software = Image.Exif()
    software[305] = "x" * 64
    whole = encoded(Image.fromarray(NOISE), kind, exif=software)  # Pillow writes no broken block into it
    block = block.removeprefix(b"Exif\0\0")
    place = whole.rindex(software.tobytes()[6:16])
    return whole[:place] + block + whole[place + len(block) :]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_broken_metadata_says_nothing(kind: str) -> None:
    good = turned(6).tobytes()
    draws = numpy.random.default_rng(2)
    blocks = [b"garbage", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", good[:12]]
    for _ in range(20):
        broken = numpy.frombuffer(good + bytes(16), numpy.uint8).copy()
        broken[draws.integers(6, len(broken), 4)] = draws.integers(0, 256, 4)
        blocks.append(broken.tobytes())
    for block in blocks:
        data = with_exif(kind, block)
        assert upright(data).shape in ((32, 48, 3), (48, 32, 3))
    for block in blocks[:3]:
        assert image_size(with_exif(kind, block)) == (32, 48)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_broken_xmp_says_nothing(kind: str) -> None:
    for text in (b"\xff\xfe<x", xmp("x"), xmp("9"), xmp("0")):
        if kind == "PNG":
            info = PngImagePlugin.PngInfo()
            info.add_itxt("XML:com.adobe.xmp", text.decode("latin-1"))
            options = {"pnginfo": info}
        else:
            options = {"tiffinfo": {700: text}} if kind == "TIFF" else {"xmp": text}
        assert upright(encoded(Image.fromarray(NOISE), kind, **options)).shape == (32, 48, 3)


def test_size_and_pixels_of_a_tiff_agree_whatever_its_xmp_says() -> None:
    data = encoded(Image.fromarray(NOISE), "TIFF", tiffinfo={700: xmp("6")})
    assert numpy.array_equal(upright(data), NOISE)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_hidden_colours_decide_nothing(kind: str) -> None:
    """Pictures that look alike are alike: half seen, half under transparency of another colour."""
    seen = []
    for hidden in (UNDER, (255, 0, 0)):
        pixels = numpy.full((16, 16, 4), (*hidden, 0), numpy.uint8)
        pixels[:, :8] = (10, 20, 200, 255)
        options = (
            {}
            if kind in ("PNG", "TIFF")
            else {"lossless": True}
            if kind == "WEBP"
            else {"quality": 100, "subsampling": "4:4:4"}
        )
        seen.append(upright(encoded(Image.fromarray(pixels), kind, **options)).astype(int))
    assert (seen[0][:, 8:] == 255).all()
    assert abs(seen[0] - seen[1]).max() <= (8 if kind == "AVIF" else 0)


def test_transparency_of_palettes_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*UNDER, 10, 20, 30])
    image.putdata([0, 1])
    for options in ({"transparency": 0}, {"transparency": b"\0\xff"}):
        assert upright(encoded(image, "PNG", **options)).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    assert upright(encoded(image, "GIF", transparency=0)).tolist() == [[[255, 255, 255], [10, 20, 30]]]


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key", "expected"),
    [
        (8, 2, bytes((*UNDER, 10, 20, 30)), struct.pack(">3H", *UNDER), [10, 20, 30]),
        (8, 0, b"\x05\x60", b"\0\x05", [96, 96, 96]),
        (4, 0, b"\x53", b"\0\x05", [51, 51, 51]),
        (2, 0, b"\x90", b"\0\x02", [85, 85, 85]),
        (1, 0, b"\x00", b"\0\x01", [0, 0, 0]),
        (16, 0, b"\x12\x34\x12\x35", b"\x12\x34", [18, 18, 18]),
        (16, 2, struct.pack(">6H", 0, 65280, 0, 2560, 5120, 7680), struct.pack(">3H", 0, 65280, 0), [10, 20, 30]),
    ],
)
def test_the_transparent_colour_of_a_png_lies_on_white(
    bits: int, colour: int, row: bytes, key: bytes, expected: list[int]
) -> None:
    first, second = upright(png(bits, colour, row, key=key))[0].tolist()
    assert second == expected
    assert first == ([255] * 3 if bits != 1 else expected)  # of the one bit row nothing is transparent


def test_ordinary_pictures_are_what_they_were() -> None:
    """Bit for bit what Pillow decodes and stretches, opaque alpha and unused transparent colours included."""
    opaque = numpy.dstack([NOISE, numpy.full((32, 48), 255, numpy.uint8)])
    for image, kind in ((NOISE, "PNG"), (NOISE, "JPEG"), (NOISE, "WEBP"), (opaque, "PNG"), (NOISE[..., 0], "PNG")):
        data = encoded(Image.fromarray(image), kind)
        with Image.open(io.BytesIO(data)) as opened:
            plain = opened.convert("RGB")
        assert numpy.array_equal(load_image(data, height=32, width=48), numpy.asarray(plain))
        smaller = numpy.asarray(plain.resize((20, 10), Image.Resampling.LANCZOS))
        assert numpy.array_equal(load_image(data, height=10, width=20), smaller)


def tiff(bits: int, photometric: int, row: bytes) -> bytes:
    """One row of two greys."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(row)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    row += b"\0" * (len(row) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(row)) + row + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_tiff_says_how_many_bits_its_greys_have_and_which_end_is_white() -> None:
    assert upright(tiff(12, 1, b"\xff\xf8\x00"))[0, :, 0].tolist() == [255, 128]
    assert upright(tiff(16, 1, b"\xff\xff\x00\x80"))[0, :, 0].tolist() == [255, 128]
    assert upright(tiff(16, 0, b"\xff\xff\x00\x80"))[0, :, 0].tolist() == [0, 127]


def test_scans_of_a_jpeg_are_bounded_and_thumbnails_are_none() -> None:
    data = encoded(Image.fromarray(NOISE), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), len(data) - 2
    many = data[:start] + data[start:end] * 1500 + data[end:]
    with pytest.raises(ValueError, match=r"^unreadable image: a JPEG of 15\d\d scans, more than 100$"):
        load_image(many, height=32, width=48)
    assert image_size(many) == (32, 48)
    segment = b"\xff\xed" + struct.pack(">H", 2 + 3000) + b"\xff\xda\0" * 1000
    for ordinary in (data, data[:2] + segment + data[2:], data + b"\xff\xda" * 1000):
        assert numpy.array_equal(upright(ordinary), upright(data))
