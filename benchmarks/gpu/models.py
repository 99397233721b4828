"""SD3.5-medium with random weights: made on the device in the dtype asked for, so that nothing passes the host."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.models import AutoencoderKL, SD3Transformer2DModel
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from torch import nn

from dina_rl.backbones.codec import KLCodec
from dina_rl.backbones.files import Need
from dina_rl.backbones.known import PIPELINES
from dina_rl.backbones.registry import BACKBONES
from dina_rl.backbones.sd3 import SD3
from dina_rl.backbones.source import INDEX
from dina_rl.backbones.text import CACHED_PROMPTS, CachedTextEncoder
from dina_rl.checkpoint import write_json
from dina_rl.config.base import SHIPPED_PIPELINE
from dina_rl.seeding import derive_seed, normal
from dina_rl.textfiles import read_text
from dina_rl.types import PromptEmbeds

Model = TypeVar("Model", bound=nn.Module)

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
KIND = "RandomSD3Pipeline"  # what the index of such a directory names
SCALES = {"shift_factor": 0.0609, "scaling_factor": 1.5305}  # of SD3.5's VAE
CONFIGURED = ("transformer", "vae", "text_encoder", "scheduler")


class RandomSD3(SD3):
    """`SD3` without files of weights: whoever loads a part gets the same random numbers."""

    def check(self, *needs: Need) -> None: ...

    def load_transformer(self) -> SD3Transformer2DModel:
        config = SD3Transformer2DModel.load_config(self.path, **self._source.config("transformer"))
        with made_on(self.device, self.dtype, "transformer"):
            transformer: SD3Transformer2DModel = SD3Transformer2DModel.from_config(config)
        return frozen(transformer, self.dtype)

    def load_text_encoder(self, *, cached: int = CACHED_PROMPTS) -> CachedTextEncoder:
        """Random embeddings by prompt, of the encoders' shape: a prompt is encoded once, a sample has 10 passes."""
        tokens, width, pooled = self.prompt_shape

        def encode(prompts: Sequence[str]) -> PromptEmbeds:
            embeds = [normal((tokens, width), "random embeddings", prompt) for prompt in prompts]
            pools = [normal((pooled,), "random pooled", prompt) for prompt in prompts]
            return PromptEmbeds(embeds=torch.stack(embeds).to(self.dtype), pooled=torch.stack(pools).to(self.dtype))

        return CachedTextEncoder(encode, self.device, cached=cached)

    def load_codec(self) -> KLCodec:
        config = AutoencoderKL.load_config(self.path, **self._source.config("vae"))
        with made_on(self.device, self.dtype, "vae"):
            vae: AutoencoderKL = AutoencoderKL.from_config(config)
        return KLCodec(frozen(vae, self.dtype), decode_batch=self._options.decode_batch)


def frozen(module: Model, dtype: torch.dtype) -> Model:
    """Buffers too in `dtype`, as `from_pretrained` has them."""
    module.to(dtype).requires_grad_(False).eval()
    return module


@contextmanager
def made_on(place: str, dtype: torch.dtype, part: str) -> Iterator[None]:
    """What is constructed inside lies on `place` in `dtype` from the start, with the numbers that are `part`'s."""
    before = torch.get_default_dtype()
    devices = [torch.cuda.current_device()] if place == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(place):
        torch.manual_seed(derive_seed("random weights", part))
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def write_random(directory: Path, *, tiny: bool) -> Path:
    """A pipeline directory of configurations that `open_pipeline` opens as a `RandomSD3`.

    Args:
        tiny: of the miniature's sizes, not of SD3.5-medium's.
    """
    if tiny:
        for part in CONFIGURED:
            shutil.copytree(SHIPPED_PIPELINE / part, directory / part, ignore=shutil.ignore_patterns("*.safetensors"))
    else:
        PIPELINES[SD35_MEDIUM].write(directory)
        (directory / "scheduler").mkdir()
        scheduler = {"_class_name": FlowMatchEulerDiscreteScheduler.__name__, "num_train_timesteps": 1000, "shift": 3.0}
        write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
    file = directory / "vae" / "config.json"
    write_json(file, {**SCALES, **json.loads(read_text(file))})
    # No text encoders: the plan counts what the index names.
    classes = (SD3Transformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler)
    parts = zip(("transformer", "vae", "scheduler"), classes, strict=True)
    write_json(directory / INDEX, {"_class_name": KIND, **{name: ["diffusers", cls.__name__] for name, cls in parts}})
    BACKBONES[KIND] = lambda: RandomSD3
    return directory
