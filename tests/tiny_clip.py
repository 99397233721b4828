"""A randomly initialised CLIPModel with tokenizer and image processor, in the on-disk format of PickScore's."""

import shutil
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from dina_rl.config.base import SHIPPED_PIPELINE

EDGE = 24
EOS = 109  # of the shipped tokenizer


def save_tiny_clip(directory: Path, activation: str = "quick_gelu") -> Path:
    """Write the model to `directory`; its words are those of the miniature world."""
    shutil.copytree(SHIPPED_PIPELINE / "tokenizer", directory)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": activation,
    }
    config = CLIPConfig(
        text_config={**tower, "max_position_embeddings": 8, "eos_token_id": EOS, "vocab_size": 1000},
        vision_config={**tower, "image_size": EDGE, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}).save_pretrained(
        directory
    )
    return directory
