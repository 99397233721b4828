"""Miniature FLUX.1-dev and Z-Image-Turbo of the real classes, as `from_pretrained` loads them; random weights.

Only sizes differ from the published pipelines: FLUX embeds its distilled guidance and shifts dynamically, Z-Image has
both refiners, a chat template and a static shift of 3. Their VAE has the published shift and scale.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextModel, Qwen2Tokenizer, Qwen3Config, Qwen3Model

from dina_rl.shapes.pipeline import build_pipeline

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CAPTION_WIDTH = 24


def save_tiny_flux(directory: Path) -> None:
    """Two double blocks of width 32 and one single block; CLIP, T5 and tokenizers of the miniature SD3.5."""
    sd3 = build_pipeline(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=sd3.text_encoder_3.config.d_model,
            pooled_projection_dim=sd3.text_encoder.config.hidden_size,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
            ),
            vae=_vae(sd3.vae),
            text_encoder=CLIPTextModel(sd3.text_encoder.config),
            tokenizer=sd3.tokenizer,
            text_encoder_2=sd3.text_encoder_3,
            tokenizer_2=sd3.tokenizer_3,
            transformer=_stirred(transformer),
        ).save_pretrained(directory)


def save_tiny_z_image(directory: Path) -> None:
    """Three layers and two refiners of width 32; a byte-level Qwen tokenizer: as many tokens as bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        transformer = ZImageTransformer2DModel(
            dim=32,
            n_layers=3,
            n_refiner_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=CAPTION_WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
        nn.init.normal_(transformer.x_pad_token)
        nn.init.normal_(transformer.cap_pad_token)
        tokenizer = _qwen_tokenizer()
        text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=CAPTION_WIDTH,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
            )
        )
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(build_pipeline(0).vae),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=_stirred(transformer),
        ).save_pretrained(directory)


def _stirred(transformer: nn.Module) -> nn.Module:
    """Biases and gates away from their zeros, so that no part of the network is silent."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return transformer


def _vae(small: AutoencoderKL) -> AutoencoderKL:
    return AutoencoderKL.from_config({**small.config, "scaling_factor": 0.3611, "shift_factor": 0.1159})


def _qwen_tokenizer() -> Qwen2Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", extra_special_tokens=special[1:])
    tokenizer.chat_template = CHAT
    return tokenizer
