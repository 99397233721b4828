"""MPS (Zhang et al., 2024), overall: CLIP ViT-H/14 whose image tokens look at those words that preference is about.

Words are masked by how near they are to a list of conditions. The released code masks by the highest value of a whole
batch and scores one picture at a time; here it is each prompt's own, which is the same number and does not depend on
what is scored beside it. The released code also runs in half precision: near the threshold a word may fall on the
other side of it there.

Shapes: B pictures, V image tokens, N text tokens, D embedding.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPModel

from dina_rl.checkpoint import save_tensors
from dina_rl.config import ImageScorerConfig
from dina_rl.loading import loading
from dina_rl.reward.card import check_tensors
from dina_rl.scorers.base import Conditions, EmptyImageScorer, ImageKind, Space
from dina_rl.scorers.clip import (
    COUNTED,
    check_clip,
    clip_config,
    embedding_width,
    empty_clip,
    empty_picture,
    frozen,
    text_length,
)
from dina_rl.scorers.clip_input import CLIPInput, distinct
from dina_rl.scorers.pickled import module_tensors
from dina_rl.scorers.weights import Tensors, load_tensors

# Kwai-Kolors/MPS, eval_overall_mps_on_hpdv2.py; the model's own forward, for training, has 0.01 as threshold
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.3
# The same, trainer/models/clip_model.py and cross_modeling.py
LAYERS, HEADS, HEAD_WIDTH, EXPANSION = 4, 16, 64, 4
CLIP, CROSS = "model.", "cross_model."


class SwiGLU(nn.Module):
    """The first half, gated by the second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, gate = x.chunk(2, dim=-1)
        return values * functional.silu(gate)


class WordAttention(nn.Module):
    """Image tokens attend to words through one head of keys and values; a feed-forward runs beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = EXPANSION * width
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, HEADS * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * hidden, bias=False), SwiGLU(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, x: torch.Tensor, words: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """x [B, V, D], words [B, N, D], visible [B, N] -> what is added to x."""
        x = self.norm(x)
        keys, values = self.to_kv(words).chunk(2, dim=-1)
        added: torch.Tensor = self.to_out(_attended(self.to_q(x), keys, values, visible)) + self.ff(x)
        return added


class SelfAttention(nn.Module):
    """Image tokens attend to each other in the same way, with rotary positions."""

    inv_freq: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = EXPANSION * width
        self._parts = (HEADS * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 2 * hidden)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("inv_freq", 10000 ** -(torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH))
        self.fused_attn_ff_proj = nn.Linear(width, sum(self._parts), bias=False)
        self.attn_out = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(hidden, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, V, D] -> what is added to it."""
        queries, keys, values, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self._parts, dim=-1)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.inv_freq
        turned = _rotated(queries.unflatten(-1, (HEADS, HEAD_WIDTH)), angles[:, None]).flatten(-2)
        added: torch.Tensor = self.attn_out(_attended(turned, _rotated(keys, angles), values)) + self.ff_out(hidden)
        return added


class CrossModel(nn.Module):
    """What makes image tokens [B, V, D] depend on the words [B, N, D] that are visible [B, N]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([WordAttention(width), SelfAttention(width)]) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, words: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            to_words, to_itself = layer
            x = x + to_words(x, words, visible)
            x = x + to_itself(x)
        return x


def _attended(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Queries [B, V, heads * width] of many heads, keys and values [B, N, width] of one."""
    heads = queries.unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)
    keys, values = (each[:, None].expand(-1, HEADS, -1, -1) for each in (keys, values))
    mask = None if visible is None else visible[:, None, None]
    return functional.scaled_dot_product_attention(heads, keys, values, mask).transpose(1, 2).flatten(2)


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """The first half of the last axis is turned against the second."""
    first, second = x.chunk(2, dim=-1)
    sine, cosine = angles.sin(), angles.cos()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class MPSScorer:
    """`Scorer` in image space: learned scale times cosine of the prompt's end and the picture's first token.

    Args:
        clip: frozen, on the device of `cross` and `given`.
    """

    space: Space = "images"

    def __init__(self, clip: CLIPModel, cross: CrossModel, given: CLIPInput) -> None:
        self._clip = clip
        self._cross = cross
        self._given = given
        self._condition, _ = self._read([CONDITION])
        self.reduce = given.reduce

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        words, ends, visible = self._texts(conditions.prompts)
        seen = self._clip.vision_model(pixel_values=self._given.pixels(samples)).last_hidden_state
        looked = self._cross(self._clip.visual_projection(seen), words, visible)[:, 0]
        return self._clip.logit_scale.exp() * functional.cosine_similarity(looked, ends, dim=-1)

    @torch.no_grad()
    def _texts(self, prompts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Words [B, N, D], ends [B, D], and which words are visible [B, N]; a prompt is read once."""
        texts, rows = distinct(prompts)
        words, ends = self._read(texts)
        nearness = (words @ self._condition[0].T).amax(-1)
        visible = nearness / nearness.amax(1, keepdim=True) > THRESHOLD
        return words[rows], ends[rows], visible[rows]

    @torch.no_grad()
    def _read(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Words and ends. What a prompt is padded by counts among the words, as in the released code."""
        tokens = self._given.tokens(texts, text_length(self._clip))
        read = self._clip.get_text_features(input_ids=tokens["input_ids"])
        return self._clip.text_projection(read.last_hidden_state), read.pooler_output


def convert_mps(released: Path, out: Path) -> int:
    """Write the tensors of the released pickled module as safetensors, by their own names; returns how many.

    Raises:
        ValueError: it cannot be read, or is no MPS.
    """
    state = {name: tensor for name, tensor in module_tensors(released).items() if not name.endswith(COUNTED)}
    if not any(name.startswith(CROSS) for name in state):
        raise ValueError(f"{released} holds no MPS: none of its {len(state)} tensors is called {CROSS}...")
    save_tensors(out, state)
    return len(state)


def check_mps(config: ImageScorerConfig) -> None:
    """Raises ValueError where the converted file or its CLIP model is not there, or they do not fit together."""
    _checked(config)


def open_mps(config: ImageScorerConfig, device: str) -> MPSScorer:
    """Raises ValueError as `check_mps`."""
    state = _checked(config)
    with loading("the model", config.path):
        sizes = clip_config(config.processor)
        clip = frozen(CLIPModel.from_pretrained(None, config=sizes, state_dict=_below(CLIP, state)), device)
        cross = CrossModel(embedding_width(clip))
        cross.load_state_dict(_below(CROSS, state))
    return MPSScorer(clip, cross.to(device).requires_grad_(False).eval(), CLIPInput(config.processor, device=device))


def _checked(config: ImageScorerConfig) -> Tensors:
    """The file's tensors, by the names that they have here."""
    check_clip(config.processor, config.processor)
    file = Path(config.path).expanduser()
    if file.suffix != ".safetensors" or not file.is_file():
        problem = "is no safetensors file" if file.exists() else "does not exist"
        raise ValueError(f"{file} {problem}; python -m jobs.convert_mps makes it of MPS_overall_checkpoint.pth")
    state = {_short(name): tensor for name, tensor in load_tensors(file).items() if not name.endswith(COUNTED)}
    check_tensors(state, empty_mps(config.processor).model.state_dict(), file)
    return state


def _below(prefix: str, state: Tensors) -> Tensors:
    """In fp32."""
    return {name.removeprefix(prefix): each.float() for name, each in state.items() if name.startswith(prefix)}


def _short(name: str) -> str:
    """Without what the released classes wrap things in."""
    return name.replace(".fn.", ".").replace(".rotary_emb.", ".") if name.startswith(CROSS) else name


def empty_mps(processor: str) -> EmptyImageScorer:
    """Raises ValueError where the sizes of its CLIP model are neither known nor can be read."""
    clip = empty_clip(processor).model
    assert isinstance(clip, CLIPModel)
    width = embedding_width(clip)
    with torch.device("meta"):
        cross = CrossModel(width)
        words = torch.empty(1, text_length(clip), width)
        visible = torch.empty(1, text_length(clip), dtype=torch.bool)

    def look() -> object:
        seen = clip.vision_model(pixel_values=empty_picture(clip)).last_hidden_state
        return cross(clip.visual_projection(seen), words, visible)

    return EmptyImageScorer(model=nn.ModuleDict({"model": clip, "cross_model": cross}), look=look)


MPS = ImageKind(
    open=open_mps,
    check=check_mps,
    empty=lambda config: empty_mps(config.processor),
    files=("MPS_overall.safetensors", "preprocessor_config.json"),
)
