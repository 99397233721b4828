"""The sizes that we know give the published numbers of parameters."""

import pytest
import torch
import transformers
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import nn

from dina_rl.backbones.known import AUTOENCODER, CLIP_MODELS, PIPELINES, SD15_UNET, SDXL_AUTOENCODER, SDXL_UNET
from dina_rl.backbones.registry import open_backbone
from dina_rl.backbones.source import Source, index_file, read_json
from dina_rl.scorers.clip import empty_clip

TRANSFORMERS = {
    "stabilityai/stable-diffusion-3-medium-diffusers": 2_028_328_000,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "Tongyi-MAI/Z-Image": 6_154_908_736,
    "Tongyi-MAI/Z-Image-Turbo": 6_154_908_736,
}
TEXT_ENCODERS = {  # CLIP-L with its projection, CLIP-G, T5-XXL; CLIP-L, T5-XXL; Qwen3-4B
    "StableDiffusion3Pipeline": [123_650_304, 694_659_840, 4_762_310_656],
    "FluxPipeline": [123_060_480, 4_762_310_656],
    "ZImagePipeline": [4_022_468_096],
}
CLIPS = {
    "yuvalkirstain/PickScore_v1": 986_109_441,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 986_109_441,
    "openai/clip-vit-large-patch14": 427_616_513,
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_known_pipeline_opens_from_its_numbers(name, tmp_path):
    PIPELINES[name].write(tmp_path)
    backbone = open_backbone(tmp_path)
    assert count(backbone.empty_transformer()) == TRANSFORMERS[name]
    assert backbone.latent_shape(512, 512) == (16, 64, 64)


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-3.5-medium", "Tongyi-MAI/Z-Image"])
def test_its_text_encoders_are_as_large_as_they_are(name, tmp_path):
    PIPELINES[name].write(tmp_path)
    sizes = []
    for component, entry in read_json(index_file(Source(path=str(tmp_path)))).items():
        if component.startswith("text_encoder"):
            kind = getattr(transformers, entry[1])
            with torch.device("meta"):
                sizes.append(count(kind(kind.config_class.from_pretrained(tmp_path, subfolder=component))))
    assert sizes == TEXT_ENCODERS[PIPELINES[name].kind]


def test_the_autoencoder_and_clips_are_as_large_as_they_are():
    with torch.device("meta"):
        assert count(AutoencoderKL.from_config(AUTOENCODER)) == 83_819_683
        assert count(AutoencoderKL.from_config(SDXL_AUTOENCODER)) == 83_653_863
    assert {name: count(empty_clip(name).model) for name in CLIP_MODELS} == CLIPS


@pytest.mark.parametrize(("sizes", "parameters"), [(SD15_UNET, 859_520_964), (SDXL_UNET, 2_567_463_684)])
def test_unets_are_as_large_as_they_are(sizes, parameters):
    with torch.device("meta"):
        assert count(UNet2DConditionModel.from_config(sizes)) == parameters
