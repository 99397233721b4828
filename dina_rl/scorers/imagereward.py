"""ImageReward (Xu et al., 2023): BLIP's text encoder reads the prompt with the picture before it, a linear head scores.

The released file has the tensors under BLIP's original names; `med_config.json` beside it has the text encoder's sizes,
and those of the image encoder are the tensors' own.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from dina_rl.backbones.known import BLIP_LARGE, Sizes
from dina_rl.backbones.source import read_json
from dina_rl.config import ImageScorerConfig
from dina_rl.loading import loading
from dina_rl.reward.card import check_tensors
from dina_rl.scorers.base import Conditions, EmptyImageScorer, ImageKind, Space
from dina_rl.scorers.clip_input import SquareCrop
from dina_rl.scorers.weights import Tensors, file_if_here, load_tensors, released_file

FILE, MED_CONFIG = "ImageReward.pt", "med_config.json"  # of THUDM/ImageReward
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # THUDM/ImageReward, ImageReward/ImageReward.py: of raw scores
TOKENS = 35  # the same: of a prompt, padded and cut
HEAD_WIDTHS = (1024, 128, 64, 16, 1)  # the same
HEAD_WIDTH = 64  # of attention in the image encoder, which its tensors do not say: models/BLIP/blip.py
VISION_EPS = 1e-6  # models/BLIP/vit.py
READ_OF_MED = {  # names of BertConfig are BlipTextConfig's
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("vocab_size", "max_position_embeddings", "layer_norm_eps", "hidden_act", "pad_token_id"),
}

# What the released file has of BLIP beside it: projections for its contrastive loss, and a table of numbers
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
NAMES = (  # of salesforce/BLIP, models/vit.py, and of transformers' BlipVisionModel
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\..+)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision\..+)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\..+)\.norm([12])\.", r"\1.layer_norm\2."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """Sizes of both."""

    text: BlipTextConfig
    vision: BlipVisionConfig

    @property
    def edge(self) -> int:
        """Of the pictures, in pixels."""
        assert isinstance(self.vision.image_size, int)
        return self.vision.image_size


class ImageReward(nn.Module):
    """Its three parts."""

    def __init__(self, encoders: Encoders) -> None:
        super().__init__()
        self.vision = BlipVisionModel(encoders.vision)
        self.text = BlipTextModel(encoders.text, add_pooling_layer=False)
        self.head = make_head(encoders.text.hidden_size)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Normalised scores [B], fp32, of pixel values [B, 3, h, w] and tokens [B, tokens]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False)
        raw: torch.Tensor = self.head(read.last_hidden_state[:, 0].float())[:, 0]
        return (raw - MEAN) / STD


def make_head(width: int) -> nn.Sequential:
    """Linear layers without activations; dropouts hold places in the released names."""
    widths = (width, *HEAD_WIDTHS)
    first, second, third, fourth, fifth = (nn.Linear(*pair) for pair in zip(widths, HEAD_WIDTHS, strict=False))
    return nn.Sequential(first, nn.Dropout(0.2), second, nn.Dropout(0.2), third, nn.Dropout(0.1), fourth, fifth)


def check_imagereward(config: ImageScorerConfig) -> None:
    """Whether weights and tokenizer are there and fit.

    Raises:
        ValueError: they are not, or do not.
    """
    _tokenizer(config.processor)
    file = file_if_here(config.path, FILE)
    if file is not None:
        _read(file, config.path)


class ImageRewardScorer:
    """`Scorer` in image space: the released normalisation of the head's score.

    The picture goes through CLIP's preprocessing as tensor operations, so that the score has a gradient.

    Raises:
        ValueError: the model cannot be read, or is another one.
    """

    space: Space = "images"

    def __init__(self, config: ImageScorerConfig, *, device: str) -> None:
        self._device = device
        self._tokenizer = _tokenizer(config.processor)
        file = released_file(config.path, FILE)
        with loading("the model", file):
            tensors, encoders = _read(file, config.path)
            self._model = load_imagereward(tensors, encoders).to(device)
        edge = encoders.edge
        self._pictures = SquareCrop(edge, (edge, edge), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, device=device)

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return self.score(samples, conditions.prompts)

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1] against their prompts."""
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self._device)
        scores: torch.Tensor = self._model(self._pictures.pixels(images), tokens.input_ids, tokens.attention_mask)
        return scores

    def reduce(self, pixels: torch.Tensor) -> torch.Tensor:
        """The cropped picture [3, h, w] in [0, 1] of one [3, H, W] uint8. Its score is that of the whole."""
        return self._pictures.reduce(pixels)


def load_imagereward(tensors: Tensors, encoders: Encoders) -> ImageReward:
    """The model of tensors in our names, frozen, fp32."""
    with torch.device("meta"):
        model = ImageReward(encoders)
    parts: dict[str, Tensors] = {"vision": {}, "text": {}, "head": {}}
    for name, tensor in tensors.items():
        part, own = name.split(".", 1)
        parts[part][own] = tensor.float()
    model.vision = BlipVisionModel.from_pretrained(None, config=encoders.vision, state_dict=parts["vision"])
    model.text = BlipTextModel.from_pretrained(
        None, config=encoders.text, state_dict=parts["text"], add_pooling_layer=False
    )
    model.head.load_state_dict(parts["head"], assign=True)
    return model.requires_grad_(False).eval()


def our_name(name: str) -> str:
    """A tensor's name here, of the one in the released file."""
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name


def _read(file: Path, path: str) -> tuple[Tensors, Encoders]:
    """The tensors in our names, and the sizes that they have.

    Raises:
        ValueError: unreadable files, or other tensors than the model's.
    """
    released = load_tensors(file)
    tensors = {our_name(name): tensor for name, tensor in released.items() if UNUSED.fullmatch(name) is None}
    vision = _vision(tensors, file)
    beside = file.parent / MED_CONFIG if Path(path).expanduser().exists() else released_file(path, MED_CONFIG)
    text = {name: value for name, value in read_json(beside).items() if name in READ_OF_MED}
    encoders = _encoders(text, vision)
    with torch.device("meta"):
        check_tensors(tensors, ImageReward(encoders).state_dict(), file)
    return tensors, encoders


def _vision(tensors: Tensors, file: Path) -> Sizes:
    """What the image encoder's tensors say of its sizes."""
    names = [f"vision.embeddings.{each}" for each in ("position_embedding", "patch_embedding.weight")]
    names.append("vision.encoder.layers.0.mlp.fc1.weight")
    if not all(name in tensors for name in names):
        raise ValueError(f"{file} is no ImageReward: it has no image encoder of BLIP's")
    positions, patches, inner = (tensors[name].shape for name in names)
    patch = patches[-1]
    return {
        "hidden_size": positions[-1],
        "intermediate_size": inner[0],
        "num_attention_heads": positions[-1] // HEAD_WIDTH,
        "num_hidden_layers": len([name for name in tensors if name.endswith(".layer_norm1.weight")]),
        "patch_size": patch,
        "image_size": patch * round((positions[1] - 1) ** 0.5),
    }


def _encoders(text: Sizes, vision: Sizes) -> Encoders:
    cross = {"encoder_hidden_size": vision["hidden_size"], "is_decoder": True}  # which makes cross attention
    return Encoders(
        text=BlipTextConfig.from_dict({**text, **cross}),
        vision=BlipVisionConfig.from_dict({**vision, "layer_norm_eps": VISION_EPS}),
    )


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"ImageReward's tokenizer {path} cannot be read: {str(error).strip().splitlines()[0]}"
        ) from error
    return tokenizer


@cache
def empty_imagereward(path: str) -> EmptyImageScorer:
    """The model without weights, known by its hub id or read from where it is.

    Raises:
        ValueError: it is neither known nor can be read here.
    """
    known = BLIP_LARGE.get(path)
    encoders = _encoders(known.text, known.vision) if known else _read(released_file(path, FILE), path)[1]
    with torch.device("meta"):
        model = ImageReward(encoders).requires_grad_(False)
        picture, ids = torch.empty(1, 3, encoders.edge, encoders.edge), torch.empty(1, TOKENS, dtype=torch.long)
    return EmptyImageScorer(model=model, look=lambda: model(picture, ids, None))


IMAGEREWARD = ImageKind(
    open=lambda config, device: ImageRewardScorer(config, device=device),
    check=check_imagereward,
    empty=lambda config: empty_imagereward(config.path),
    files=(FILE, "tokenizer_config.json"),  # the paper's table has it under CLIP
)
