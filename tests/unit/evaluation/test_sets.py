"""What of a preference set an evaluation scores, and what it counts."""

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dina_rl.config import SetConfig
from dina_rl.evaluation.sets import check_malformed, read_set


def write(directory: Path, labelled: list[bool]) -> SetConfig:
    rows = len(labelled)
    columns = {"caption": ["p"] * rows, "label_0": [1.0] * rows, "label_1": [0.0] * rows, "has_label": labelled}
    images = {"jpg_0": [b"a"] * rows, "jpg_1": [b"b"] * rows}
    parquet.write_table(pyarrow.table(columns | images), directory / "test.parquet")
    return SetConfig(kind="pickapic", path=str(directory))


def test_unlabelled_records_are_counted_and_not_malformed(tmp_path: Path) -> None:
    data = read_set("picks", write(tmp_path, [True, False, False, True]), seed=0)
    assert ([record.index for record in data.records], data.unlabelled, data.skipped) == ([0, 3], 2, ())
    assert data.sample(1, seed=0).unlabelled == 2
    check_malformed(data, max_broken=0)


def test_a_set_of_unlabelled_records_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(0 records, 0 malformed, 2 unlabelled\)"):
        read_set("picks", write(tmp_path, [False, False]), seed=0)
