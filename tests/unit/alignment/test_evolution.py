"""The strip of a run's iterations: which columns stay, and that no interruption can be seen in it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dina_rl.alignment.evolution import COLUMNS, ROWS, THUMBNAIL, Evolution, spacing, thumbnails
from dina_rl.config import AlignRun

PROMPTS = ("a red circle", "two blue squares " + 20 * "and another one ", "a red circle", "\u4e00\u53ea\u732b")


def evolution(run_dir: Path, iterations: int, every: int = 1) -> Evolution:
    return Evolution(AlignRun.model_validate({"iterations": iterations, "golden": {"every": every}}), run_dir)


def images(done: int) -> torch.Tensor:
    return torch.full((len(PROMPTS), 3, 32, 48), 5 * done, dtype=torch.uint8)


def measure(strip: Evolution, iterations: range) -> None:
    for done in iterations:
        strip.add(done, images(done), PROMPTS)


def columns(run_dir: Path) -> list[int]:
    return sorted(int(file.stem.rpartition("_")[2]) for file in (run_dir / "evolution").iterdir())


def test_columns_are_even_few_and_end_with_the_newest(tmp_path):
    strip = evolution(tmp_path, 25)
    for done in range(26):
        strip.add(done, images(done), PROMPTS)
        assert columns(tmp_path) == sorted({*range(0, done + 1, 4), done})
    assert columns(tmp_path) == [0, 4, 8, 12, 16, 20, 24, 25]


@pytest.mark.parametrize(("iterations", "every"), [(1, 1), (9, 1), (10, 1), (150, 7), (10_000, 3), (3, 10)])
def test_all_that_stay_fit(iterations, every):
    space = spacing(iterations, every, COLUMNS)
    stay = {*range(0, iterations + 1, space), iterations}
    assert len(stay) <= COLUMNS
    assert space == every or len({*range(0, iterations + 1, space // 2), iterations}) > COLUMNS
    assert spacing(2 * iterations, every, COLUMNS) % space == 0, "a longer run's are some of the same"


def test_a_resumed_and_a_longer_run_have_the_strip_of_the_whole_one(tmp_path):
    measure(evolution(tmp_path / "whole", 25), range(26))
    measure(evolution(tmp_path / "run", 9), range(10))
    resumed = evolution(tmp_path / "run", 25)
    resumed.restore(9)
    measure(resumed, range(10, 19))
    again = evolution(tmp_path / "run", 25)
    again.restore(13)
    assert columns(tmp_path / "run") == [0, 4, 8, 12]
    measure(again, range(14, 26))
    whole, run = ((tmp_path / name / "evolution.png").read_bytes() for name in ("whole", "run"))
    assert whole == run


def test_a_row_is_a_prompt_and_a_column_an_iteration(tmp_path):
    measure(evolution(tmp_path, 2), range(2))
    strip = evolution(tmp_path, 2).add(2, images(20), PROMPTS)
    picture = np.asarray(Image.open(tmp_path / "evolution.png"))
    assert (picture == strip.permute(1, 2, 0).numpy()).all(), "as TensorBoard gets it"
    height, width = 2 * 32, 2 * 48
    head, margin = 3 * 11, 3 * width // 2
    assert picture.shape[:2] == (head + 3 * (height + 4), margin + 3 * (width + 4)), "a prompt once"
    for row in range(3):
        for column, value in enumerate((0, 5, 100)):
            top, left = head + row * (height + 4), margin + column * (width + 4)
            assert (picture[top : top + height, left : left + width] == value).all()
    ink = picture.min(2) < 100
    assert all(row.any() for row in np.split(ink[head:, :margin], 3)), "every prompt beside its row"
    assert all(title.any() for title in np.split(ink[:head, margin:], 3, axis=1)), "every iteration over its column"
    assert not ink[:, margin - 4 : margin].any(), "and none in another's picture"


def test_what_is_kept_is_small(tmp_path):
    large = torch.randint(256, (ROWS + 2, 3, 256, 512), dtype=torch.uint8)
    assert thumbnails(large, THUMBNAIL).shape == (ROWS + 2, 3, THUMBNAIL // 2, THUMBNAIL)
    assert torch.equal(thumbnails(images(3), THUMBNAIL), images(3))
    strip = evolution(tmp_path, 1)
    strip.add(0, large, [f"prompt {number}" for number in range(ROWS + 2)])
    (file,) = (tmp_path / "evolution").iterdir()
    assert file.stat().st_size < ROWS * 3 * THUMBNAIL**2
