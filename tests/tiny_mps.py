"""A miniature of the released MPS, by its names and pickled whole as it was: written apart from what reads it."""

import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, CLIPModel

from dina_rl.scorers.hpsv2 import clip_names
from tests.tiny_open_clip import EMBED, LENGTH, PROMPTS, normalised, pictures, taught, tokenize

HEADS, WIDE = 16, 64


class Norm(nn.Module):
    """Without a bias to learn, but with one among the buffers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(EMBED))
        self.register_buffer("bias", torch.zeros(EMBED))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight + self.bias


class Gated(nn.Module):
    def forward(self, x):
        half = x.shape[-1] // 2
        return x[..., :half] * functional.silu(x[..., half:])


def attend(queries, keys, values, shut=None):
    """Head by head: queries [B, V, 16 * 64], keys and values [B, N, 64], shut [B, N] added to the logits."""
    heads = []
    for head in range(HEADS):
        logits = queries[..., head * WIDE : (head + 1) * WIDE] @ keys.mT / WIDE**0.5
        heads.append((logits if shut is None else logits + shut[:, None]).softmax(-1) @ values)
    return torch.cat(heads, -1)


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm()
        self.to_q = nn.Linear(EMBED, HEADS * WIDE, bias=False)
        self.to_kv = nn.Linear(EMBED, 2 * WIDE, bias=False)
        self.to_out = nn.Linear(HEADS * WIDE, EMBED, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(EMBED, 8 * EMBED, bias=False), Gated(), nn.Linear(4 * EMBED, EMBED, bias=False)
        )

    def forward(self, x, words, shut):
        x, pair = self.norm(x), self.to_kv(words)
        return self.to_out(attend(self.to_q(x), pair[..., :WIDE], pair[..., WIDE:], shut)) + self.ff(x)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, WIDE, 2).float() / WIDE))

    def turn(self, x):
        """Complex multiplication of the two halves of [B, V, heads * 64], head by head."""
        angle = torch.outer(torch.arange(x.shape[1]), self.inv_freq)
        heads = x.unflatten(-1, (-1, 2, WIDE // 2))
        turned = torch.complex(heads[..., 0, :], heads[..., 1, :]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.stack([turned.real, turned.imag], -2).flatten(2)


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.rotary_emb = Norm(), Rotary()
        self.register_buffer("pos_emb", torch.zeros(3), persistent=False)
        self.fused_attn_ff_proj = nn.Linear(EMBED, HEADS * WIDE + 2 * WIDE + 8 * EMBED, bias=False)
        self.attn_out = nn.Linear(HEADS * WIDE, EMBED, bias=False)
        self.ff_out = nn.Sequential(Gated(), nn.Linear(4 * EMBED, EMBED, bias=False))

    def forward(self, x):
        fused = self.fused_attn_ff_proj(self.norm(x))
        queries, keys, values, hidden = fused.tensor_split(
            [HEADS * WIDE, HEADS * WIDE + WIDE, HEADS * WIDE + 2 * WIDE], -1
        )
        return self.attn_out(attend(self.rotary_emb.turn(queries), self.rotary_emb.turn(keys), values)) + self.ff_out(
            hidden
        )


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, *others):
        return x + self.fn(x, *others)


class Cross_model(nn.Module):  # noqa: N801 - the released name
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Residual(Cross()), Residual(Parallel())]) for _ in range(4))

    def forward(self, x, words, shut):
        for cross, parallel in self.layers:
            x = parallel(cross(x, words, shut))
        return x


class MPS(nn.Module):
    def __init__(self, clip):
        super().__init__()
        self.model = CLIPModel.from_pretrained(
            None, config=AutoConfig.from_pretrained(clip), state_dict=clip_names(taught().state_dict())
        )
        self.model.text_model.embeddings.register_buffer("position_ids", torch.arange(LENGTH)[None])  # as it once was
        self.cross_model = Cross_model()

    def read(self, tokens):
        read = self.model.text_model(input_ids=tokens)
        return self.model.text_projection(read.last_hidden_state), self.model.text_projection(read.pooler_output)

    def score(self, pixels, tokens, condition):
        """One picture [3, h, w] and one prompt [N], as the released evaluation has it."""
        (words, end), (asked, _) = self.read(tokens[None]), self.read(condition[None])
        seen = self.model.visual_projection(self.model.vision_model(pixel_values=pixels[None]).last_hidden_state)
        near = (asked[0] @ words[0].T).max(0).values
        shut = torch.where(near / near.max() > 0.3, 0.0, -torch.inf)
        looked = self.cross_model(seen, words, shut[None])[0, 0]
        return self.model.logit_scale.exp() * (end[0] / end[0].norm()) @ (looked / looked.norm())


def taught_mps(clip: str, condition: torch.Tensor) -> MPS:
    """Whose cross model has learned which prompt goes with which picture; weights that half precision holds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MPS(clip).requires_grad_(False)
    model.cross_model.requires_grad_(True)
    pixels, tokens = normalised(pictures()), tokenize(PROMPTS)
    seen = model.model.visual_projection(model.model.vision_model(pixel_values=pixels).last_hidden_state)
    words, ends = model.read(tokens)
    near = (words @ model.read(condition[None])[0][0].T).amax(-1)
    shut = torch.where(near / near.amax(1, keepdim=True) > 0.3, 0.0, -torch.inf)
    optimizer = torch.optim.Adam(model.cross_model.parameters(), 3e-3)
    for _ in range(25):
        looked = model.cross_model(seen.repeat(4, 1, 1), words.repeat_interleave(4, 0), shut.repeat_interleave(4, 0))[
            :, 0
        ]
        logits = 10 * functional.cosine_similarity(looked, ends.repeat_interleave(4, 0), dim=-1).view(4, 4)
        loss = sum(functional.cross_entropy(each, torch.arange(4)) for each in (logits, logits.T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False).half()


def save_mps(model: MPS, file: Path) -> Path:
    """Pickled whole, in half precision, its classes called by modules that are not there when it is read."""
    homes = {
        "trainer": (),
        "trainer.models": (),
        "trainer.models.clip_model": (MPS,),
        "trainer.models.cross_modeling": CLASSES,
    }
    try:
        for home, classes in homes.items():
            sys.modules[home] = ModuleType(home)
            for kind in classes:
                kind.__module__ = home
                setattr(sys.modules[home], kind.__name__, kind)
        torch.save(model, file)
    finally:
        for home, classes in homes.items():
            del sys.modules[home]
            for kind in classes:
                kind.__module__ = __name__
    return file


CLASSES = (Norm, Gated, Cross, Rotary, Parallel, Residual, Cross_model)
