"""Randomly initialised LRMs of the published classes, in the released layout, with the pipeline that lends its VAE."""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dina_rl.config.base import SHIPPED_PIPELINE

EDGE = 32
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 108,  # the tokenizer's, so that a prompt is read where it ends
    "eos_token_id": 109,
    "vocab_size": 110,
    "projection_dim": 12,
}
UNET = {"sample_size": 16, "norm_num_groups": 4, "layers_per_block": 2}


def save_tiny_lrm(model: Path, pipeline: Path, *, sdxl: bool) -> None:
    """Write the released files to `model`, those of the pipeline to `pipeline`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _save_pipeline(pipeline, ("tokenizer", "tokenizer_2") if sdxl else ("tokenizer",))
        unet = _sdxl_unet() if sdxl else _sd15_unet()
        unet.save_pretrained(model / "unet")
        CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(model / "text_encoder")
        if sdxl:
            CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).save_pretrained(model / "text_encoder_2")
        torch.save(_state(unet.config.block_out_channels, sdxl=sdxl), model / "state_dict.pt")


def _save_pipeline(pipeline: Path, tokenizers: tuple[str, ...]) -> None:
    for name in tokenizers:
        shutil.copytree(SHIPPED_PIPELINE / "tokenizer", pipeline / name)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.2,
    ).save_pretrained(pipeline / "vae")
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        pipeline / "scheduler"
    )


def _sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **UNET, block_out_channels=(8, 12, 16, 20), attention_head_dim=4, cross_attention_dim=TEXT["hidden_size"]
    )


def _sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **UNET,
        block_out_channels=(8, 12, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=2 * TEXT["hidden_size"],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + TEXT["projection_dim"],
    )


def _state(widths: tuple[int, ...], *, sdxl: bool) -> dict[str, object]:
    """The released files have the scale as a number; those that its authors' second code writes, as a tensor."""
    visual = {"visual_projection": {"weight": torch.randn(TEXT["projection_dim"], sum(widths) + widths[-1])}}
    if sdxl:
        return {**visual, "logit_scale": torch.tensor(2.5)}
    text = {"weight": torch.randn(TEXT["projection_dim"], TEXT["hidden_size"])}
    return {**visual, "text_projection": text, "logit_scale": 2.5}
