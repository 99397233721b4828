"""Every family in turn, and its miniature pipeline opened as a backbone."""

import pytest

from dina_rl.backbones.base import Backbone
from tests.families import Family


@pytest.fixture(scope="module", params=["sd3", "flux", "z_image"])
def family(request: pytest.FixtureRequest) -> Family:
    if request.param == "sd3":
        return Family(
            name="sd3",
            path=request.getfixturevalue("tiny_pipeline"),
            max_sequence_length=8,
            blocks="transformer_blocks",
            after_blocks=("norm_out", "proj_out"),
            time_embedder="time_text_embed",
        )
    if request.param == "flux":
        return Family(
            name="flux",
            path=request.getfixturevalue("tiny_flux"),
            max_sequence_length=8,
            blocks="transformer_blocks",
            after_blocks=("norm_out", "proj_out", "single_transformer_blocks"),
            time_embedder="time_text_embed",
        )
    return Family(
        name="z_image",
        path=request.getfixturevalue("tiny_z_image"),
        max_sequence_length=100,
        blocks="layers",
        after_blocks=("all_final_layer",),
        time_embedder="t_embedder",
    )


@pytest.fixture(scope="module")
def backbone(family: Family) -> Backbone:
    return family.open()
