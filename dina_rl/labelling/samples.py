"""Pictures of prompts from the generator, as files: each by its own noise, so that it is the same in every run.

A chunk of `batch_size` pictures is one forward and is made whole or not at all: an interruption loses one, and a
resumed run's pictures are those of the uninterrupted one.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dina_rl.backbones.guidance import guided_velocity
from dina_rl.checkpoint import write_bytes
from dina_rl.config import PipelineConfig
from dina_rl.config.labelling import SamplesConfig
from dina_rl.data.sets.records import PreferenceRecord
from dina_rl.errors import RunStopped
from dina_rl.flow.sampler import denoise
from dina_rl.runtime import image_size, open_pipeline
from dina_rl.seeding import normal

IMAGES = "images"


def sample_records(prompts: Sequence[str], config: SamplesConfig, pipeline: PipelineConfig) -> list[PreferenceRecord]:
    """A record of every prompt: the names of its pictures, which need not be there yet."""
    count, model = config.per_prompt, Path(pipeline.path).name
    return [
        PreferenceRecord(
            index=index,
            prompt=prompt,
            images=tuple(f"{IMAGES}/{index:06d}-{sample}.png" for sample in range(count)),
            ranks=tuple(range(count)),
            models=(f"{model}-{config.num_steps}steps-cfg{config.guidance_scale:g}",) * count,
        )
        for index, prompt in enumerate(prompts)
    ]


@torch.no_grad()
def draw_samples(
    records: Sequence[PreferenceRecord], config: SamplesConfig, pipeline: PipelineConfig, run_dir: Path, *, seed: int
) -> int:
    """Make the pictures of `records` that are missing in `run_dir`; returns how many were made.

    A picture's noise depends on (seed, prompt, sample) alone.

    Raises:
        RunStopped: a latent is not finite.
    """
    wanted = [(record, sample) for record in records for sample in range(len(record.images))]
    chunks = [wanted[first : first + config.batch_size] for first in range(0, len(wanted), config.batch_size)]
    missing = [each for each in chunks if not all((run_dir / r.images[sample]).is_file() for r, sample in each)]
    if not missing:
        return 0
    backbone = open_pipeline(pipeline)
    size = image_size(pipeline, backbone)
    shape, sigmas = backbone.latent_shape(*size), backbone.sigmas(config.num_steps, *size).to(backbone.device)
    texts, codec, transformer = backbone.load_text_encoder(), backbone.load_codec(), backbone.load_transformer()
    negative = None if config.guidance_scale == 1 else texts([config.negative_prompt]).to(backbone.device)
    with tqdm(total=sum(map(len, missing)), desc="draw", unit="img") as bar:
        for chunk in missing:
            noise = torch.stack([normal(shape, seed, "label-samples", r.prompt, sample) for r, sample in chunk])
            prompt = texts([record.prompt for record, _ in chunk]).to(backbone.device)
            velocity = guided_velocity(backbone, transformer, prompt, negative, config.guidance_scale)
            latents = denoise(noise.to(backbone.device), sigmas, velocity).latents
            if not latents.isfinite().all():
                raise RunStopped(f"a sample of {chunk[0][0].prompt!r} or of the prompts beside it is not finite")
            pixels = (codec.decode(latents).float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
            for (record, sample), picture in zip(chunk, pixels, strict=True):
                content = io.BytesIO()
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(content, "PNG")
                write_bytes(run_dir / record.images[sample], content.getvalue())
            bar.update(len(chunk))
    return sum(map(len, missing))
