"""Sizes of published models, so that a plan of a run on them needs no network.

Only numbers that decide shapes are here. Written out as a pipeline directory without weights they are read by the same
code that reads a real one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Sizes = dict[str, object]

AUTOENCODER: Sizes = {  # of SD3, FLUX.1 and Z-Image alike, but for a scale
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_FOUR_CHANNELS: Sizes = {**AUTOENCODER, "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
SD15_AUTOENCODER: Sizes = {**_FOUR_CHANNELS, "scaling_factor": 0.18215}
SDXL_AUTOENCODER: Sizes = {**_FOUR_CHANNELS, "scaling_factor": 0.13025}
SD15_UNET: Sizes = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET: Sizes = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L_TEXT: Sizes = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "max_position_embeddings": 77,
}
CLIP_G_TEXT: Sizes = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "max_position_embeddings": 77,
}
T5_XXL: Sizes = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
QWEN3_4B: Sizes = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPipeline:
    """A published pipeline."""

    kind: str  # its diffusers class
    transformer: tuple[str, Sizes]  # its diffusers class and sizes
    text_encoders: Mapping[str, tuple[str, Sizes]]  # by component: transformers class and sizes
    taps: tuple[int, ...]  # of the reward model that the paper builds on it
    head_width: int | None = None  # of that model's head; None: the transformer's

    def write(self, directory: Path) -> None:
        """The pipeline as a directory of configurations without weights."""
        index = {"_class_name": self.kind, "transformer": ["diffusers", self.transformer[0]]}
        index["vae"] = ["diffusers", "AutoencoderKL"]
        index.update({name: ["transformers", kind] for name, (kind, _) in self.text_encoders.items()})
        _write(directory / "model_index.json", index)
        _write(directory / "transformer" / "config.json", {"_class_name": self.transformer[0], **self.transformer[1]})
        _write(directory / "vae" / "config.json", AUTOENCODER)
        for name, (_, sizes) in self.text_encoders.items():
            _write(directory / name / "config.json", sizes)


def _write(file: Path, values: Mapping[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values), encoding="utf-8")


def _sd3(*, layers: int, positions: int, dual: int = 0, normed: bool = True) -> KnownPipeline:
    """Heads are as many as layers are in all of them; the first `dual` layers have a second attention."""
    sizes: Sizes = {
        "num_layers": layers,
        "num_attention_heads": layers,
        "attention_head_dim": 64,
        "caption_projection_dim": 64 * layers,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": positions,
        "dual_attention_layers": list(range(dual)),
        "qk_norm": "rms_norm" if normed else None,
        "in_channels": 16,
        "patch_size": 2,
        "sample_size": 128,
    }
    texts = {
        "text_encoder": ("CLIPTextModelWithProjection", CLIP_L_TEXT),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G_TEXT),
        "text_encoder_3": ("T5EncoderModel", T5_XXL),
    }
    return KnownPipeline(
        kind="StableDiffusion3Pipeline",
        transformer=("SD3Transformer2DModel", sizes),
        text_encoders=texts,
        taps=(layers // 6, layers // 3, layers // 2),
    )


FLUX: Sizes = {
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "in_channels": 64,
    "patch_size": 1,
    "guidance_embeds": True,
}
Z_IMAGE: Sizes = {
    "n_layers": 30,
    "n_refiner_layers": 2,
    "dim": 3840,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "in_channels": 16,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
_FLUX_DEV = KnownPipeline(
    kind="FluxPipeline",
    transformer=("FluxTransformer2DModel", FLUX),
    text_encoders={"text_encoder": ("CLIPTextModel", CLIP_L_TEXT), "text_encoder_2": ("T5EncoderModel", T5_XXL)},
    taps=(8, 12, 16, 19),
    head_width=1536,
)
_Z_IMAGE = KnownPipeline(
    kind="ZImagePipeline",
    transformer=("ZImageTransformer2DModel", Z_IMAGE),
    text_encoders={"text_encoder": ("Qwen3Model", QWEN3_4B)},
    taps=(4, 8, 12, 16),
    head_width=1536,
)

PIPELINES: Mapping[str, KnownPipeline] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(layers=24, positions=192, normed=False),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(layers=24, positions=384, dual=13),
    "stabilityai/stable-diffusion-3.5-large": _sd3(layers=38, positions=192),
    "black-forest-labs/FLUX.1-dev": _FLUX_DEV,
    "Tongyi-MAI/Z-Image": _Z_IMAGE,
    "Tongyi-MAI/Z-Image-Turbo": _Z_IMAGE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCLIP:
    """A published CLIP model."""

    projection: int
    text: Sizes
    vision: Sizes


CLIP_H = KnownCLIP(
    projection=1024,
    text={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
    },
    vision={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    },
)
CLIP_L = KnownCLIP(
    projection=768,
    text=CLIP_L_TEXT,
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    },
)
CLIP_MODELS: Mapping[str, KnownCLIP] = {
    "yuvalkirstain/PickScore_v1": CLIP_H,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": CLIP_H,  # whose sizes HPSv2 and MPS have
    "openai/clip-vit-large-patch14": CLIP_L,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownVisionLanguageModel:
    """A published model that reads pictures and text."""

    text: Sizes
    vision: Sizes


VISION_LANGUAGE_MODELS: Mapping[str, KnownVisionLanguageModel] = {
    "Qwen/Qwen2-VL-7B-Instruct": KnownVisionLanguageModel(
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 151_658,  # its tokens and HPSv3's own, as HPSv3 cuts the table; the base has 152,064 rows
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision={"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14},
    ),
}

BLIP_LARGE: Mapping[str, KnownVisionLanguageModel] = {
    "THUDM/ImageReward": KnownVisionLanguageModel(
        text={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 30524,
            "max_position_embeddings": 512,
        },
        vision={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 16,
            "image_size": 224,
        },
    ),
}
