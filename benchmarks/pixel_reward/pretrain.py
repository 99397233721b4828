"""A tiny CLIP of the miniature world: `python -m benchmarks.pixel_reward.pretrain --out DIR`, ten minutes on one core.

Contrastive (Radford et al., 2021): the crawl's pictures, defects, wrong captions and all, against their captions. It is
to the pixel reward what the pretrained generator is to DiNa-LRM. The directory is one that stock transformers reads.
"""

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from time import process_time
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from dina_rl.checkpoint import replaced_directory, write_json
from dina_rl.cli import fail, load
from dina_rl.config.base import SHIPPED_PIPELINE, Positive, Rate, Section
from dina_rl.runtime import configure_process
from dina_rl.seeding import derive_seed, generator
from dina_rl.shapes.grammar import prompts, spec_tensor
from dina_rl.shapes.render import IMAGE_SIZE, crawl
from dina_rl.shapes.training_loop import Stage, linear_decay, run_stage

CARD = "card.json"
LARGEST_SCALE = math.log(100)  # Radford et al. 2.5
TOKENS = 8
WIDTH, LAYERS, HEADS, PATCH = 64, 4, 2, 4
TEXT_LAYERS = 2


class PretrainRun(Section):
    """Pretrain a tiny CLIP on the miniature world's crawl."""

    out: Path = Path("runs/pixel_clip")
    """new directory for the model, its tokenizer and its image processor"""
    steps: Positive = 800
    """training steps"""
    batch_size: Annotated[int, Field(ge=2, le=464)] = 96
    """pictures a step, each of another training prompt"""
    learning_rate: Rate = 2e-3
    """AdamW's, after the warm-up; falls to 0"""
    seed: int = 0
    """seed of weights, pictures and order"""
    threads: Positive = 1
    """torch threads"""


def main(argv: Sequence[str]) -> None:
    run = load(PretrainRun, argv, program="python -m benchmarks.pixel_reward.pretrain")
    if run.out.exists():
        fail(f"{run.out} exists: choose a new directory")
    configure_process(run.threads)
    pretrain(run)


def pretrain(run: PretrainRun) -> None:
    model, draws = new_model(run.seed), generator(run.seed, "pixel reward pretraining")
    begin = process_time()
    train(
        "pretrain",
        model,
        run.steps,
        run.learning_rate,
        lambda: contrastive_loss(model, run.batch_size, draws),
        draws,
        run.out,
    )
    save(model, SHIPPED_PIPELINE / "tokenizer", run.out)
    seconds = process_time() - begin
    card = {**run.model_dump(mode="json", exclude={"out"}), "processor_seconds": round(seconds, 1)}
    write_json(run.out / CARD, {"pretraining": card})
    print(f"{run.out}: {seconds:.0f} processor seconds")


def new_model(seed: int) -> CLIPModel:
    """At random; 0.3 million parameters."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": HEADS, "hidden_act": "gelu"}
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_PIPELINE / "tokenizer", trust_remote_code=False)
    words = {
        "max_position_embeddings": TOKENS,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**tower, **words, "num_hidden_layers": TEXT_LAYERS},
        vision_config={**tower, "num_hidden_layers": LAYERS, "image_size": IMAGE_SIZE, "patch_size": PATCH},
        projection_dim=WIDTH,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pixel reward weights"))
        return CLIPModel(config)


@cache
def training_tokens() -> torch.Tensor:
    """The training prompts, [464, TOKENS]."""
    return tokenized(SHIPPED_PIPELINE / "tokenizer", prompts("train"))


def tokenized(tokenizer: Path, texts: Sequence[str]) -> torch.Tensor:
    """[B, TOKENS]."""
    read = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    ids: torch.Tensor = read(
        list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    ).input_ids
    return ids


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, 32, 32] in [0, 1] as the saved image processor gives them: they have the model's size."""
    given = processor()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (given.image_mean, given.image_std))
    return (images - mean) / std


@cache
def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


def contrastive_loss(model: CLIPModel, batch_size: int, draws: torch.Generator) -> torch.Tensor:
    """Cross entropy of which caption is a picture's, and which picture a caption's (Radford et al., Figure 3)."""
    rows = torch.randperm(len(prompts("train")), generator=draws)[:batch_size]
    images = crawl(spec_tensor(prompts("train"))[rows], draws)
    logits = model(input_ids=training_tokens()[rows], pixel_values=normalised(images)).logits_per_image
    own = torch.arange(len(rows))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def train(
    name: str,
    model: CLIPModel,
    steps: int,
    rate: float,
    loss: Callable[[], torch.Tensor],
    draws: torch.Generator,
    out: Path,
) -> None:
    """AdamW; a killed run goes on from its last checkpoint, which lies beside `out` until the end."""

    @torch.no_grad()
    def after_step(step: int) -> None:
        model.logit_scale.clamp_(max=LARGEST_SCALE)

    model.train()
    work = out.with_name(f".{out.name}.work")
    stage = Stage(
        name=name,
        steps=steps,
        modules={"model": model},
        optimizers=(torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01),),
        schedule=linear_decay(steps, warmup=max(1, steps // 20), hold=0.3, floor=0.0),
        loss=loss,
        after_step=after_step,
        generator=draws,
    )
    run_stage(stage, work / "checkpoint.pt")
    shutil.rmtree(work)


def save(model: CLIPModel, tokenizer: Path, out: Path) -> None:
    """Model, tokenizer and image processor in one directory."""
    with replaced_directory(out) as directory:
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(directory)
        processor().save_pretrained(directory)


if __name__ == "__main__":
    main(sys.argv[1:])
