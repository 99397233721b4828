"""A miniature of open_clip's CLIP in plain torch, by its names: written apart from what reads its files.

It is taught in a second which words go with which pictures, so that a score with swapped arguments is seen.
"""

from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from dina_rl.config.base import SHIPPED_PIPELINE
from dina_rl.scorers.hpsv2 import clip_names
from tests.tiny_clip import EDGE, EOS, save_tiny_clip

WIDTH, HEADS, LAYERS, EMBED, PATCH, WORDS, LENGTH = 16, 2, 2, 8, 8, 1000, 8
PROMPTS = (
    "a small red circle on blue",
    "a large green square on black",
    "a red ring",
    "a large blue ring on white",
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 2 * WIDTH), "c_proj": nn.Linear(2 * WIDTH, WIDTH)})

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH) / 4)
        self.positional_embedding = nn.Parameter(torch.randn((EDGE // PATCH) ** 2 + 1, WIDTH) / 4)
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBED) / 4)
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Transformer()

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).mT
        first = self.class_embedding.expand(len(pixels), 1, WIDTH)
        x = self.transformer(self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.transformer = Visual(), Transformer()
        self.token_embedding = nn.Embedding(WORDS, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, WIDTH) / 4)
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBED) / 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_text(self, tokens):
        later = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, later)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection

    def cosines(self, pixels, tokens):
        """[pictures, prompts]."""
        return functional.normalize(self.visual(pixels), dim=-1) @ functional.normalize(self.encode_text(tokens)).T


def tokenize(prompts):
    """Cut before its last token and padded by 0, as open_clip does."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_PIPELINE / "tokenizer", model_max_length=99)
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    rows = [row if len(row) <= LENGTH else [*row[: LENGTH - 1], EOS] for row in rows]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def pictures():
    """One [4, 3, EDGE, EDGE] in [0, 1] for each prompt: what is on them is a colour and a slope."""
    colours = torch.tensor([[0.8, 0.2, 0.4], [0.1, 0.6, 0.1], [0.9, 0.7, 0.7], [0.5, 0.6, 0.9]])
    slope = torch.linspace(-0.1, 0.1, EDGE)
    return colours[:, :, None, None] + slope[:, None] * torch.tensor([1.0, -1.0, 0.5, 0.0]).view(4, 1, 1, 1) + 0 * slope


def normalised(images):
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@cache
def taught() -> OpenCLIP:
    """Which has learned, in contrast, which prompt goes with which of the four pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OpenCLIP()
        pixels, tokens = normalised(pictures()), tokenize(PROMPTS)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(60):
            logits = model.logit_scale.exp() * model.cosines(pixels, tokens)
            loss = sum(functional.cross_entropy(each, torch.arange(4)) for each in (logits, logits.T))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def save_as_clip(model: OpenCLIP, directory: Path) -> Path:
    """The same as a CLIPModel's directory, with tokenizer and image processor."""
    save_tiny_clip(directory, activation="gelu")
    config = AutoConfig.from_pretrained(directory)
    CLIPModel.from_pretrained(None, config=config, state_dict=clip_names(model.state_dict())).save_pretrained(directory)
    return directory


def save_hps(model: OpenCLIP, file: Path) -> Path:
    torch.save({"state_dict": model.state_dict()}, file)
    return file
