"""HPSv3 (Ma et al., 2025): Qwen2-VL reads picture and prompt, a small head gives mean and spread of the preference.

The released file has one safetensors with the names of the transformers of its day, the head's `rm_head.*` beside them.
The base's directory has everything else: sizes, tokenizer with chat template, image processor.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen2VLTextConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids

from dina_rl.backbones.known import VISION_LANGUAGE_MODELS
from dina_rl.config import ImageScorerConfig
from dina_rl.loading import loading
from dina_rl.reward.card import check_tensors
from dina_rl.scorers.base import Conditions, EmptyImageScorer, ImageKind, Space
from dina_rl.scorers.hpsv3_input import REWARD_TOKEN, Grid, Pictures, Tokens, middle, tokens
from dina_rl.scorers.weights import Tensors, file_if_here, load_tensors, released_file
from dina_rl.textfiles import regular

FILE = "HPSv3.safetensors"
HEAD_WIDTHS = (1024, 16, 2)  # hpsv3/model/qwen2vl_trainer.py
EDGE, TEXT_TOKENS = 448, 550
"""What a plan counts: a square picture, and the instruction in its chat template with a prompt of 20 tokens."""

OLD_NAMES = ((r"^(model\.)?visual\.", "visual."), (r"^model\.(language_model\.)?", "language_model."))
"""The released names, and those that a later transformers would save, in those of the base here."""

UNUSED = "lm_head.weight"


class HPSv3(nn.Module):
    """The base without its head of words, and the head of preference.

    A token's position is its place in the sequence, for the picture's too: neither training nor inference of the
    released model gives the base the positions in rows and columns that it has by itself.
    """

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.base = Qwen2VLModel(config)
        self.rm_head = make_head(text_sizes(config).hidden_size)

    def forward(self, patches: torch.Tensor, grid: Grid, text: Tokens) -> torch.Tensor:
        """The mean preference, fp32, of one picture's patches [h * w, values] in its text."""
        embed = self.base.get_input_embeddings()
        seen = self.see(patches, grid)
        before, after = (embed(part.to(patches.device)) for part in (text.before, text.after))
        sequence = torch.cat([before, seen.to(before.dtype), after])
        states = self.base.language_model(inputs_embeds=sequence[None], use_cache=False).last_hidden_state[0]
        mean: torch.Tensor = self.rm_head(states[len(before) + len(seen) + text.place].float())[0]
        return mean

    def see(self, patches: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The picture as tokens [h * w / 4, width]."""
        shape = torch.tensor([[1, *grid]])  # on the CPU, where its numbers are needed
        positions = get_vision_position_ids(shape, self.base.visual.spatial_merge_size).to(patches.device)
        seen: torch.Tensor = self.base.visual(patches, grid_thw=shape, position_ids=positions).pooler_output
        return seen


def text_sizes(config: Qwen2VLConfig) -> Qwen2VLTextConfig:
    sizes = config.text_config
    assert isinstance(sizes, Qwen2VLTextConfig)
    return sizes


def make_head(width: int) -> nn.Sequential:
    hidden, narrow, out = HEAD_WIDTHS
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Dropout(0.05),  # holds a place in the released names
        nn.Linear(hidden, narrow),
        nn.ReLU(),
        nn.Linear(narrow, out),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What the base's directory says."""

    config: Qwen2VLConfig
    tokenizer: PreTrainedTokenizerBase
    images: Qwen2VLImageProcessorPil


def read_base(path: str) -> Base:
    """The base at `path`, with the token of the reward, but without weights.

    Raises:
        ValueError: neither a local directory nor a hub id that can be read here, or another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not isinstance(config, Qwen2VLConfig):
            raise ValueError(f"it is a {config.model_type}, not a qwen2_vl")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        images = Qwen2VLImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"HPSv3's base {path} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if tokenizer.chat_template is None:
        raise ValueError(f"HPSv3's base {path} has no chat template")
    tokenizer.add_special_tokens({"extra_special_tokens": [REWARD_TOKEN]}, replace_extra_special_tokens=False)
    return Base(config=_with_vocabulary(config, len(tokenizer)), tokenizer=tokenizer, images=images)


def check_hpsv3(config: ImageScorerConfig) -> None:
    """Whether base and weights are there and fit, without loading weights.

    Raises:
        ValueError: they are not, or do not.
    """
    base = read_base(config.processor)
    file = file_if_here(config.path, FILE)
    if file is not None:
        _check_tensors(_shapes(file), base.config, file)


class HPSv3Scorer:
    """`Scorer` in image space: the mean of the preference.

    Pictures go through the model one at a time: a score does not depend on what is scored beside it, nor does memory.
    With a gradient each is computed again on the way back.

    Raises:
        ValueError: the model cannot be read, or is another one.
    """

    space: Space = "images"

    def __init__(self, config: ImageScorerConfig, *, device: str) -> None:
        base = read_base(config.processor)
        self._tokenizer, self._pictures, self._device = base.tokenizer, Pictures.of(base.images), device
        file = released_file(config.path, FILE)
        with loading("the model", file):
            self._model = load_hpsv3(file, base.config).to(device)

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return self.score(samples, conditions.prompts)

    def score(self, images: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1] against their prompts."""
        one = self._remembered if len(prompts) > 1 and images.requires_grad else self._one
        return torch.stack([one(image, prompt) for image, prompt in zip(images.to(self._device), prompts, strict=True)])

    def _remembered(self, image: torch.Tensor, prompt: str) -> torch.Tensor:
        score: torch.Tensor = checkpoint(self._one, image, prompt, use_reentrant=False)
        return score

    def _one(self, image: torch.Tensor, prompt: str) -> torch.Tensor:
        score: torch.Tensor = self._model(*self._pictures.patches(image), tokens(self._tokenizer, prompt))
        return score

    @torch.no_grad()
    def reduce(self, pixels: torch.Tensor) -> torch.Tensor:
        """The resized picture [3, h, w] in [0, 1] of one [3, H, W] uint8. Its score is that of the whole."""
        return self._pictures.resized(middle(pixels).to(self._device).float() / 255).cpu()


def load_hpsv3(file: Path, config: Qwen2VLConfig) -> HPSv3:
    """The released model, frozen: its base in the precision that the file has, its head in fp32.

    Raises:
        ValueError: an unreadable file, or other tensors than the model's.
    """
    tensors = load_tensors(file)
    _check_tensors(tensors, config, file)
    with torch.device("meta"):
        model = HPSv3(config)
    named = {new_name(name): tensor for name, tensor in tensors.items() if name != UNUSED}
    head = {name: named.pop(f"rm_head.{name}").float() for name in model.rm_head.state_dict()}
    dtype = named["language_model.norm.weight"].dtype
    model.base = Qwen2VLModel.from_pretrained(None, config=config, state_dict=named, dtype=dtype)
    model.rm_head.load_state_dict(head, assign=True)
    return model.requires_grad_(False).eval()


def new_name(name: str) -> str:
    """A tensor's name in the installed base, of the one in the released file."""
    for pattern, ours in OLD_NAMES:
        name, count = re.subn(pattern, ours, name)
        if count:
            break
    return name


def _check_tensors(found: Tensors, config: Qwen2VLConfig, file: Path) -> None:
    with torch.device("meta"):
        model = HPSv3(config)
        expected = {name.removeprefix("base."): tensor for name, tensor in model.state_dict().items()}
        expected[UNUSED] = torch.empty(text_sizes(config).vocab_size, text_sizes(config).hidden_size)
    check_tensors({new_name(name): tensor for name, tensor in found.items()}, expected, file)


def _shapes(file: Path) -> Tensors:
    """The tensors of a safetensors file without data."""
    try:
        with safe_open(regular(file), framework="pt") as opened:
            return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _with_vocabulary(config: Qwen2VLConfig, vocabulary: int) -> Qwen2VLConfig:
    """The base as the released code makes it: as many embeddings as tokens, the reward's among them."""
    text_sizes(config).vocab_size = vocabulary
    return config


@cache
def empty_hpsv3(processor: str) -> EmptyImageScorer:
    """The model without weights on a base that is known by its hub id or read from where it is.

    Raises:
        ValueError: it is neither known nor can be read here, or is no Qwen2-VL.
    """
    known = VISION_LANGUAGE_MODELS.get(processor)
    if known is None:
        config = read_base(processor).config
    else:
        config = Qwen2VLConfig(text_config=known.text, vision_config=known.vision)
    with torch.device("meta"):
        model = HPSv3(config).requires_grad_(False)
        nn.Module.to(model.base, torch.bfloat16)
    square = torch.empty(3, EDGE, EDGE, device="meta")
    return EmptyImageScorer(model=model, look=lambda: look(model, square))


def look(model: HPSv3, image: torch.Tensor) -> torch.Tensor:
    """The score of an image [3, H, W] against as much text as there usually is."""
    before, after = torch.zeros(14, dtype=torch.long), torch.zeros(TEXT_TOKENS - 14, dtype=torch.long)
    score: torch.Tensor = model(*Pictures().patches(image), Tokens(before=before, after=after, place=0))
    return score


HPSV3 = ImageKind(
    open=lambda config, device: HPSv3Scorer(config, device=device),
    check=check_hpsv3,
    empty=lambda config: empty_hpsv3(config.processor),
    files=(FILE, "config.json"),
    backbone="Qwen2VL-7B",
)
