import io

import numpy
import pytest
from PIL import Image

from dina_rl.data.images import image_size, load_image

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow has its own on broken metadata and bombs

NOISE = numpy.random.default_rng(0).integers(0, 255, (32, 48, 3), numpy.uint8)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


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
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG", (10, 20, 30)),
        (Image.new("LA", (4, 4), (90, 7)), "PNG", (90, 90, 90)),
        (Image.new("RGB", (4, 4), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE), "PNG", (10, 20, 30)),
        (Image.fromarray(numpy.full((4, 4), 0x8040, numpy.uint16)), "PNG", (128, 128, 128)),
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
    data = encoded(Image.fromarray(NOISE))
    for limit in (100, 1_000):  # beyond twice the limit Pillow refuses itself
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
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
