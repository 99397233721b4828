"""Every option of the stock scheduler is followed as the stock pipelines follow it, or refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.guidance import guided_velocity
from dina_rl.backbones.registry import open_backbone
from dina_rl.flow.sampler import denoise
from dina_rl.seeding import normal
from jobs import align
from tests.families import HEIGHT, WIDTH, Family
from tests.tiny_run import tiny_run

PROMPT = ["a small red circle"]
FOLLOWED = {
    "static": {"use_dynamic_shifting": False, "shift": 2.0},
    "dynamic": {"use_dynamic_shifting": True},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift_terminal": 0.1},
    "karras": {"use_karras_sigmas": True},
    "dynamic exponential": {"use_dynamic_shifting": True, "use_exponential_sigmas": True},
}


def scheduled(pipeline: Path, directory: Path, **options: object) -> Path:
    """The pipeline with another scheduler configuration."""
    shutil.copytree(pipeline, directory, copy_function=os.link)
    file = directory / "scheduler" / "scheduler_config.json"
    config = {**json.loads(file.read_text()), **options}
    file.unlink()
    file.write_text(json.dumps(config))
    return directory


def opened_as(family: Family, directory: Path) -> Backbone:
    return open_backbone(directory, max_sequence_length=family.max_sequence_length)


@pytest.fixture(scope="module")
def loaded(family: Family, backbone: Backbone) -> tuple:
    return family.stock(), backbone.load_transformer(), backbone.load_text_encoder()(PROMPT)


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed_is_followed_as_stock_does(tmp_path: Path, family: Family, loaded: tuple, name: str) -> None:
    stock, transformer, prompt = loaded
    directory = scheduled(family.path, tmp_path / "pipeline", **FOLLOWED[name])
    backbone = opened_as(family, directory)
    stock.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(directory, subfolder="scheduler")
    noise = normal((1, *backbone.latent_shape(HEIGHT, WIDTH)), "schedule")
    theirs = family.sample(stock, noise, guidance=1.0, prompt=list(PROMPT), num_inference_steps=4)
    sigmas = backbone.sigmas(4, HEIGHT, WIDTH)
    assert torch.equal(sigmas, stock.scheduler.sigmas)
    assert not torch.equal(sigmas, opened_as(family, family.path).sigmas(4, HEIGHT, WIDTH)) or (
        name == "dynamic" and family.name == "flux"
    )
    ours = denoise(noise, sigmas, guided_velocity(backbone, transformer, prompt, None, 1.0)).latents
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sd3_shifts_dynamically_by_the_size_of_the_image(tmp_path: Path, tiny_pipeline: Path) -> None:
    backbone = open_backbone(scheduled(tiny_pipeline, tmp_path / "pipeline", use_dynamic_shifting=True))
    assert backbone.sigmas(4, 32, 32).tolist() == pytest.approx([1, 0.7602, 0.4426, 0.0016, 0], abs=1e-4)
    assert not torch.equal(backbone.sigmas(4, 32, 32), backbone.sigmas(4, 32, 40))


REFUSED = [
    ({"_class_name": "DPMSolverMultistepScheduler"}, "is a DPMSolverMultistepScheduler; only FlowMatchEuler"),
    ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "is a FlowMatchHeunDiscreteScheduler; only FlowMatchEuler"),
    ({"stochastic_sampling": True}, "sets stochastic_sampling, which is not followed"),
    ({"invert_sigmas": True}, "sets invert_sigmas, which is not followed"),
    ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "cannot be opened: Only one of"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_not_followed_is_refused(tmp_path: Path, family: Family, options: dict, message: str) -> None:
    backbone = opened_as(family, scheduled(family.path, tmp_path / "pipeline", **options))
    with pytest.raises(ValueError, match=message) as caught:
        backbone.sigmas(4, HEIGHT, WIDTH)
    assert "\n" not in str(caught.value)


def test_the_class_in_the_index_counts_too_and_the_job_says_so(
    tmp_path: Path, tiny_pipeline: Path, tiny_reward: Path
) -> None:
    directory = scheduled(tiny_pipeline, tmp_path / "pipeline")
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").unlink()
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (directory / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is a UniPCMultistepScheduler; only FlowMatchEuler"):
        align.preflight(tiny_run(tmp_path / "run", directory, tiny_reward))
