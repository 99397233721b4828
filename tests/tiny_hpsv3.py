"""A randomly initialised HPSv3 in the released layout: one file of weights, and the base's directory without any."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dina_rl.config import HPSv3Config
from dina_rl.scorers.hpsv3_input import INSTRUCTION

WIDTH = 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for content in message.content %}"
    "{% if content.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_hpsv3(directory: Path) -> HPSv3Config:
    """Write base and weights; both are read through the section that is returned."""
    base, weights = directory / "base", directory / "weights"
    weights.mkdir(parents=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(base)
    Qwen2VLImageProcessorPil().save_pretrained(base)
    model = _model(len(tokenizer) + 1, tokenizer.convert_tokens_to_ids("<|image_pad|>"))  # the reward's token
    model.config.save_pretrained(base)
    save_released(model, tiny_head(), weights)
    return HPSv3Config(path=str(weights), processor=str(base))


def tiny_head() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        head = nn.Sequential(*layers)
        for layer in (layers[0], layers[3], layers[5]):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return head.eval()


def save_released(model: Qwen2VLForConditionalGeneration, head: nn.Sequential, directory: Path) -> None:
    """As transformers 4.45 named an 8 B Qwen2-VL: `model.` the text, `visual.` the pictures, `lm_head.` the words."""
    released = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["model", "visual"]:
            parts = parts[1:]
        elif parts[:2] == ["model", "language_model"]:
            parts = ["model", *parts[2:]]
        released[".".join(parts)] = tensor.clone()
    released |= {f"rm_head.{name}": tensor.clone() for name, tensor in head.state_dict().items()}
    save_file(released, directory / "HPSv3.safetensors")


def _model(tokens: int, image_token: int) -> Qwen2VLForConditionalGeneration:
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": tokens,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image_token)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.8 if parameter.ndim > 1 else 0.5)
    return model.eval()


def _tokenizer() -> Qwen2Tokenizer:
    """Beginnings of the instruction's own words are tokens, so that it is hardly longer than the real one makes it."""
    words = [word for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(INSTRUCTION)]
    merges = {(word[:end], word[end]): None for word in words for end in range(1, len(word))}  # in order, each once
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=list(merges),
        pad_token=SPECIAL[0],
        extra_special_tokens=SPECIAL[1:],
    )
    tokenizer.chat_template = CHAT
    return tokenizer
