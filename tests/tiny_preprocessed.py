"""The authors' preprocessed files in miniature: latents of two shapes, in their columns."""

import io
from pathlib import Path

import numpy
import pyarrow
from pyarrow import parquet

SHAPES = ((16, 4, 4), (16, 2, 6))
DETAILS = {
    "votes_chosen": 9,
    "votes_rejected": 3,
    "confidence": 0.0,
    "orig_chosen_hw": [40, 40],
    "orig_rejected_hw": [32, 32],
    "final_chosen_hw": [32, 32],
    "final_rejected_hw": [32, 32],
}


def npy(array: numpy.ndarray) -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def latent(pair: int, side: int) -> numpy.ndarray:
    shape = SHAPES[pair % 2]
    return numpy.random.default_rng([pair, side]).normal(size=shape).astype(numpy.float32)


def write_part(file: Path, pairs: range, **changes: list) -> None:
    """Row groups of 3 pairs; every second pair is of the other shape."""
    sides = [[latent(pair, side) for pair in pairs] for side in (1, 2)]
    columns = {
        "prompt": [f"prompt {pair % 3}" for pair in pairs],
        "model1": ["m"] * len(pairs),
        "model2": ["n"] * len(pairs),
        "detailed_results": [str(DETAILS)] * len(pairs),
        "image1_path": ["images/a.jpg"] * len(pairs),
        "image2_path": ["images/b.jpg"] * len(pairs),
        "latent1": [npy(array) for array in sides[0]],
        "latent2": [npy(array) for array in sides[1]],
        "latent1_shape": [list(array.shape) for array in sides[0]],
        "latent2_shape": [list(array.shape) for array in sides[1]],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns | changes), file, compression="zstd", row_group_size=3)
