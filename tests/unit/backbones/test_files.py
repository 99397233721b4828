"""Pipelines as people have them: sharded, in fp16, without T5; and those that are broken, each told in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.files import EVERYTHING
from dina_rl.backbones.guidance import guided_velocity
from dina_rl.backbones.registry import open_backbone
from dina_rl.config import PipelineConfig
from dina_rl.flow.sampler import denoise
from dina_rl.scoring import open_scorer
from dina_rl.seeding import normal
from jobs import align
from tests.families import HEIGHT, WIDTH, Family
from tests.tiny_run import tiny_run

PROMPTS = ["a small red circle", "a large green cross on red"]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def copy_of(pipeline: Path, directory: Path) -> Path:
    """The same files under other names: an edit must `put` a new file."""
    return shutil.copytree(pipeline, directory, copy_function=os.link)


def put(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def opened_as(family: Family, directory: Path, *, variant: str | None = None) -> Backbone:
    return open_backbone(directory, variant=variant, max_sequence_length=family.max_sequence_length)


def assert_same_outputs(ours: Backbone, other: Backbone) -> None:
    """Text encoders, transformer and VAE of two directories."""
    x, sigma = normal((2, *ours.latent_shape(HEIGHT, WIDTH)), "files"), torch.tensor([0.3, 0.8])
    prompts = [backbone.load_text_encoder()(PROMPTS) for backbone in (ours, other)]
    assert torch.equal(prompts[0].embeds, prompts[1].embeds)
    with torch.no_grad():
        a, b = (each.velocity(each.load_transformer(), x, sigma, prompts[0]) for each in (ours, other))
        assert torch.equal(a, b)
        assert torch.equal(ours.load_codec().decode(x), other.load_codec().decode(x))


@pytest.mark.parametrize("kind", ["sharded", "fp16", "sharded fp16", "some fp16"])
def test_sharded_files_and_variants_are_read(tmp_path: Path, family: Family, backbone: Backbone, kind: str) -> None:
    variant = "fp16" if "fp16" in kind else None
    size = "40KB" if "sharded" in kind else "10GB"
    family.stock().save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    assert (len(list(tmp_path.glob("transformer/*.safetensors"))) > 1) == ("sharded" in kind)
    if kind == "some fp16":  # the others are read without it, as the stock pipelines do it
        for part in ("vae", "text_encoder"):
            shutil.rmtree(tmp_path / part)
            copy_of(family.path / part, tmp_path / part)
    opened = opened_as(family, tmp_path, variant=variant)
    opened.check(*EVERYTHING)
    assert_same_outputs(opened, backbone)
    if variant:
        with pytest.raises(ValueError, match="has no weights .*it has fp16 weights, set pipeline.variant fp16"):
            opened_as(family, tmp_path).check(*EVERYTHING)


def test_without_t5_sd3_is_the_stock_pipeline(tmp_path: Path, tiny_pipeline: Path) -> None:
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, text_encoder_3=None, tokenizer_3=None)
    stock.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    stock.set_progress_bar_config(disable=True)
    backbone = open_backbone(tmp_path, max_sequence_length=8)
    backbone.check(*EVERYTHING)
    text = backbone.load_text_encoder()
    prompt, negative = text(PROMPTS), text([""])
    embeds, _, pooled, _ = stock.encode_prompt(PROMPTS, None, None, max_sequence_length=8)
    assert torch.allclose(prompt.embeds, embeds, atol=1e-6)
    assert torch.allclose(prompt.pooled, pooled, atol=1e-6)
    assert prompt.embeds.shape[1:] == backbone.prompt_shape[:2]
    assert "T5" not in " ".join(backbone.cut_prompts(["a " * 100]))

    noise = normal((2, *backbone.latent_shape(32, 32)), "without T5")
    theirs = stock(
        PROMPTS, height=32, width=32, latents=noise, num_inference_steps=3, max_sequence_length=8, guidance_scale=3.0,
        output_type="latent",
    ).images  # fmt: skip
    velocity = guided_velocity(backbone, backbone.load_transformer(), prompt, negative, 3.0)
    ours = denoise(noise, backbone.sigmas(3, 32, 32), velocity).latents
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def weights(directory: Path, part: str) -> Path:
    return next((directory / part).glob("*.safetensors"))


def cut(directory: Path, part: str) -> None:
    file = weights(directory, part)
    put(file, file.read_bytes()[:-100])


def without_vocabulary(directory: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model"):
        (directory / "tokenizer" / name).unlink(missing_ok=True)


def unnamed(directory: Path, part: str) -> None:
    index = json.loads((directory / "model_index.json").read_text())
    put(directory / "model_index.json", json.dumps({**index, part: [None, None]}).encode())


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated transformer": (
        lambda d: cut(d, "transformer"),
        r"model.safetensors is not whole: it has .* should have",
    ),
    "truncated text encoder": (lambda d: cut(d, "text_encoder"), r"text_encoder/model.safetensors is not whole"),
    "truncated header": (lambda d: put(weights(d, "vae"), b"\x00\x10" + bytes(20)), "vae/.* is cut off"),
    "empty file": (lambda d: put(weights(d, "vae"), b""), "vae/.*safetensors is empty"),
    "pointer": (lambda d: put(weights(d, "transformer"), POINTER), "is a git-lfs pointer.*run git lfs pull"),
    "pointer vocabulary": (lambda d: put(d / "tokenizer" / "tokenizer.json", POINTER), "tokenizer.json is a git-lfs"),
    "pointer configuration": (
        lambda d: put(d / "text_encoder" / "config.json", POINTER),
        "text_encoder/config.json is",
    ),
    "no weights": (lambda d: weights(d, "text_encoder").unlink(), r"has no weights \(model.safetensors\); download"),
    "no part": (lambda d: shutil.rmtree(d / "text_encoder"), "text_encoder"),
    "no tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "its tokenizer is missing"),
    "no vocabulary": (without_vocabulary, "tokenizer has no vocabulary"),
    "unnamed part": (lambda d: unnamed(d, "vae"), "has no vae: .*model_index.json names none"),
    "no scheduler": (
        lambda d: (d / "scheduler" / "scheduler_config.json").unlink(),
        "scheduler_config.json is missing",
    ),
    "no configuration": (lambda d: (d / "transformer" / "config.json").unlink(), "transformer/config.json is missing"),
    "broken index": (lambda d: put(d / "model_index.json", b"{"), "model_index.json is not valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pipeline_is_told_before_anything_loads(tmp_path: Path, family: Family, name: str) -> None:
    breaks, message = BROKEN[name]
    directory = copy_of(family.path, tmp_path / "pipeline")
    breaks(directory)
    with pytest.raises(ValueError, match=message) as caught:
        opened_as(family, directory).check(*EVERYTHING)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_missing_or_of_another_training_is_told(tmp_path: Path, family: Family) -> None:
    family.stock().save_pretrained(tmp_path, max_shard_size="40KB")
    first, second = sorted(tmp_path.glob("transformer/*.safetensors"))[:2]
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=f"{first.name} lacks .* tensors that its index names"):
        opened_as(family, tmp_path).check("transformer")
    first.write_bytes(whole)
    second.unlink()
    with pytest.raises(ValueError, match=f"{second.name} is missing"):
        opened_as(family, tmp_path).check("transformer")


def test_only_what_is_needed_is_looked_at(tmp_path: Path, family: Family) -> None:
    directory = copy_of(family.path, tmp_path / "pipeline")
    shutil.rmtree(directory / "scheduler")
    shutil.rmtree(directory / "text_encoder" if family.name != "sd3" else directory / "text_encoder_2")
    opened_as(family, directory).check("transformer", "vae")


def test_a_pipeline_whose_t5_is_gone_may_do_without(tmp_path: Path, tiny_pipeline: Path) -> None:
    directory = copy_of(tiny_pipeline, tmp_path / "pipeline")
    shutil.rmtree(directory / "text_encoder_3")
    with pytest.raises(ValueError, match=r"text_encoder_3 is missing .* or make it \[null, null\] in model_index.json"):
        open_backbone(directory).check(*EVERYTHING)
    index = json.loads((directory / "model_index.json").read_text())
    put(directory / "model_index.json", json.dumps({**index, "text_encoder_3": None}).encode())
    with pytest.raises(ValueError, match=r"says null of text_encoder_3, which diffusers cannot read"):
        open_backbone(directory).check(*EVERYTHING)


@pytest.mark.parametrize("name", ["sd3.5_medium.safetensors", "flux1-dev.gguf"])
def test_a_single_file_is_told_apart_from_a_pipeline(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(ValueError, match="is a single file; a diffusers directory is needed.*from_single_file"):
        open_backbone(tmp_path / name)


def test_settings_that_do_not_apply_are_refused(family: Family) -> None:
    with pytest.raises(ValueError, match="pipeline.revision main is a hub id's"):
        open_backbone(family.path, revision="main")
    with pytest.raises(ValueError, match="has no weights of pipeline.variant bf16"):
        opened_as(family, family.path, variant="bf16").check(*EVERYTHING)
    if family.name != "flux":
        with pytest.raises(ValueError, match="has no distilled guidance"):
            open_backbone(family.path, distilled_guidance=2.0)


def test_jobs_tell_it_before_they_start(tmp_path: Path, tiny_pipeline: Path, tiny_reward: Path) -> None:
    directory = copy_of(tiny_pipeline, tmp_path / "pipeline")
    without_vocabulary(directory)
    with pytest.raises(ValueError, match="has no vocabulary"):
        align.preflight(tiny_run(tmp_path / "run", directory, tiny_reward))
    with pytest.raises(ValueError, match="has no vocabulary"):
        open_scorer(tiny_reward, pipeline=directory)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_remembers_which_files_it_was_fitted_on(tmp_path: Path, tiny_pipeline: Path) -> None:
    from dina_rl.reward.checkpoint import read_card, save_reward
    from dina_rl.runtime import open_pipeline
    from tests.tiny_reward import stirred_model

    StableDiffusion3Pipeline.from_pretrained(tiny_pipeline).save_pretrained(tmp_path / "fp16", variant="fp16")
    pipeline = PipelineConfig(path=str(tmp_path / "fp16"), variant="fp16")
    save_reward(stirred_model(open_pipeline(pipeline)), tmp_path / "reward", pipeline=pipeline)
    assert read_card(tmp_path / "reward").variant == "fp16"
    assert open_scorer(tmp_path / "reward").config.variant == "fp16"
