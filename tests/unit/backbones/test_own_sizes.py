"""Sizes and text lengths that nobody gives are the stock pipeline's own, and are written down."""

import json
from pathlib import Path

import pytest

from dina_rl.alignment.planning import describe
from dina_rl.backbones.registry import open_backbone
from dina_rl.config import AlignRun, PipelineConfig
from dina_rl.runtime import open_pipeline, sized
from jobs.align import with_sizes
from tests.families import Family


def own_sizes(path: Path) -> tuple[int, int, int]:
    config = PipelineConfig(path=str(path))
    found = sized(config, open_pipeline(config))
    return *found.size, found.max_sequence_length or 0


def published(directory: Path, source: Path, sizes: dict[str, dict[str, object]]) -> Path:
    """The configuration files of a miniature, with published numbers in some; no weights."""
    for file in (*source.glob("*.json"), *source.glob("*/*.json")):
        target = directory / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        change = sizes.get(str(file.relative_to(source)), {})
        target.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return directory


VAE = {"vae/config.json": {"block_out_channels": [128, 256, 512, 512]}}


def test_published_pipelines(tmp_path: Path, tiny_pipeline: Path, tiny_flux: Path, tiny_z_image: Path) -> None:
    sd3 = VAE | {
        "transformer/config.json": {"sample_size": 128},
        "tokenizer_3/tokenizer_config.json": {"model_max_length": 512},
    }
    flux = VAE | {"tokenizer_2/tokenizer_config.json": {"model_max_length": 512}}
    z_image = {
        "transformer/config.json": {"axes_lens": [1536, 512, 512]},
        "tokenizer/tokenizer_config.json": {"model_max_length": 131072},
    }
    assert own_sizes(published(tmp_path / "sd3", tiny_pipeline, sd3)) == (1024, 1024, 256)
    assert own_sizes(published(tmp_path / "flux", tiny_flux, flux)) == (1024, 1024, 512)
    assert own_sizes(published(tmp_path / "z", tiny_z_image, z_image)) == (1024, 1024, 512)


def test_the_miniature_has_its_own() -> None:
    run = with_sizes(AlignRun())
    assert (*run.pipeline.size, run.pipeline.max_sequence_length) == (32, 32, 8)
    assert AlignRun.model_validate(run.model_dump(mode="json")) == run, "what is saved is what was used"


def test_the_stock_pipeline_agrees(family: Family) -> None:
    if family.name == "z_image":
        return  # its size stands in the body of the stock call
    stock, backbone = family.stock(), open_backbone(family.path)
    assert backbone.image_size == (stock.default_sample_size * stock.vae_scale_factor,) * 2


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "pipeline  shapes, 32 x 32 pixels, 8 text tokens: its own size and text length"),
        ({"height": 16, "width": 32}, "pipeline  shapes, 16 x 32 pixels, 8 text tokens: its own text length"),
        ({"height": 16, "width": 16, "max_sequence_length": 6}, "pipeline  shapes, 16 x 16 pixels, 6 text tokens"),
    ],
)
def test_the_plan_says_what_is_used(given: dict[str, int], line: str) -> None:
    assert line in describe(AlignRun.model_validate({"pipeline": given})).splitlines()
