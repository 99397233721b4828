"""A randomly initialised ImageReward in the released layout, and a tokenizer of BERT's kind."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from dina_rl.config import ImageRewardConfig

EDGE, PATCH = 24, 8
VISION_WIDTH, TEXT_WIDTH = 128, 32
WORDS = [
    "a",
    "the",
    "small",
    "large",
    "red",
    "green",
    "blue",
    "black",
    "circle",
    "square",
    "on",
    "of",
    "in",
    "front",
    "one",
    "two",
]
MED = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "encoder_width": 768,  # as the published file has it; the image encoder's width is put in its place
    "add_cross_attention": True,
}


def save_tiny_imagereward(directory: Path) -> ImageRewardConfig:
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(directory / "tokenizer")
    med = {**MED, "vocab_size": len(vocabulary) + 2}  # [DEC] and [ENC]
    (directory / "med_config.json").write_text(json.dumps(med))
    torch.save(released_state(med), directory / "ImageReward.pt")
    return ImageRewardConfig(path=str(directory), processor=str(directory / "tokenizer"))


def released_state(med: dict) -> dict[str, torch.Tensor]:
    """Random tensors as `ImageReward.state_dict()` of the released code names them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision, text, mlp = _modules(med)
        for module in (vision, text, mlp):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.25 if parameter.ndim > 1 else 0.5)
        state = {f"blip.visual_encoder.{_blip_name(name)}": tensor for name, tensor in vision.state_dict().items()}
        state |= {f"blip.text_encoder.{name}": tensor for name, tensor in text.state_dict().items()}
        state["blip.text_encoder.embeddings.position_ids"] = torch.arange(med["max_position_embeddings"])[None]
        for name, width in (("vision_proj", VISION_WIDTH), ("text_proj", TEXT_WIDTH)):
            state |= {f"blip.{name}.weight": torch.randn(16, width), f"blip.{name}.bias": torch.randn(16)}
        return state | {f"mlp.layers.{name}": tensor for name, tensor in mlp.state_dict().items()}


def _modules(med: dict) -> tuple[nn.Module, ...]:
    vision = BlipVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=EDGE,
        patch_size=PATCH,
    )
    shared = {name: value for name, value in med.items() if name.startswith(("hidden", "num", "max", "inter", "vocab"))}
    text = BlipTextConfig(**shared, encoder_hidden_size=VISION_WIDTH, is_decoder=True)
    mlp = nn.Sequential(
        nn.Linear(TEXT_WIDTH, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(), nn.Linear(128, 64), nn.Dropout(),
        nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    return BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), mlp


def _blip_name(name: str) -> str:
    """salesforce/BLIP's name of a tensor of transformers' image encoder."""
    for theirs, ours in (
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("encoder.layers", "blocks"),
        ("post_layernorm", "norm"),
        ("layer_norm", "norm"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn", "attn"),
    ):
        name = name.replace(theirs, ours)
    return name
