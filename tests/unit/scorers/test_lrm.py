"""LRMs against a plain computation with whole UNets of the stock class; what is refused of their files."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from dina_rl import seeding
from dina_rl.alignment.golden import open_metric
from dina_rl.config import GoldenConfig
from dina_rl.config.rewards import image_scorer
from dina_rl.scorers.registry import (
    check_image_scorer,
    empty_image_scorer,
    image_scorer_bytes,
    image_scorer_inputs,
    open_image_scorer,
)
from tests.tiny_lrm import EDGE, save_tiny_lrm

NAMES = ("lrm_sd15", "lrm_sdxl")
PROMPTS = ("a small red circle on blue", "a large green square on black", "a small red circle on blue")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("lrm")
    for name in NAMES:
        save_tiny_lrm(root / "models" / name, root / name, sdxl=name == "lrm_sdxl")
    return root


@pytest.fixture(scope="module")
def configs(root):
    return {name: image_scorer(name, str(root / "models" / name), str(root / name)) for name in NAMES}


@pytest.fixture(scope="module")
def scorers(configs):
    return {name: open_image_scorer(config, device="cpu") for name, config in configs.items()}


def pictures(height=EDGE, width=EDGE):
    """Smooth pictures [3, 3, h, w] of 8-bit values."""
    rows, columns = np.meshgrid(np.linspace(0, 3, height), np.linspace(0, 2, width), indexing="ij")
    waves = [np.sin(k + rows[..., None] * (k + 1) + columns[..., None] * np.arange(1, 4)) for k in range(3)]
    pixels = ((np.stack(waves) + 1) * 127).astype(np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@torch.no_grad()
def plain_scores(config, images, prompts):
    """The published steps on one doubled batch: prompts first, then as many empty ones."""
    both = [*prompts, *[""] * len(prompts)]

    def read(kind, number):
        tokenizer = AutoTokenizer.from_pretrained(config.processor, subfolder=f"tokenizer{number}")
        tokens = tokenizer(both, padding="max_length", truncation=True, max_length=8, return_tensors="pt").input_ids
        text = kind.from_pretrained(config.path, subfolder=f"text_encoder{number}")
        return text(tokens, output_hidden_states=True)

    state = torch.load(f"{config.path}/state_dict.pt")
    first = read(CLIPTextModel, "")
    if config.name == "lrm_sdxl":
        second = read(CLIPTextModelWithProjection, "_2")
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        time_ids = torch.tensor([EDGE, EDGE, 0, 0, EDGE, EDGE]).float().repeat(len(both), 1)
        added, texts = {"text_embeds": second.text_embeds, "time_ids": time_ids}, second.text_embeds
    else:
        hidden, added = first.last_hidden_state, None
        texts = first.pooler_output @ state["text_projection"]["weight"].T

    vae = AutoencoderKL.from_pretrained(config.processor, subfolder="vae")
    latents = vae.encode((images - 0.5) / 0.5).latent_dist.mean * vae.config.scaling_factor
    noise = seeding.normal((1, *latents.shape[1:]), 0, "lrm-noise").expand_as(latents)
    scheduler = DDPMScheduler.from_pretrained(config.processor, subfolder="scheduler")
    noisy = scheduler.add_noise(latents, noise, torch.ones(len(latents), dtype=torch.long))

    unet = UNet2DConditionModel.from_pretrained(config.path, subfolder="unet").eval()
    seen = {}
    for place, block in enumerate(unet.down_blocks):
        block.register_forward_hook(lambda _module, _given, out, place=place: seen.update({place: out[1][1]}))
    unet.mid_block.register_forward_hook(lambda _module, _given, out: seen.update(middle=out))
    unet(torch.cat([noisy, noisy]), torch.ones(len(both)), encoder_hidden_states=hidden, added_cond_kwargs=added)
    pooled = {place: functional.adaptive_avg_pool2d(out, 1)[:, :, 0, 0].chunk(2) for place, out in seen.items()}
    with_text, without = pooled.pop("middle")
    features = torch.cat([*(pooled[place][0] for place in sorted(pooled)), without + 7.5 * (with_text - without)], -1)
    image = features @ state["visual_projection"]["weight"].T
    text = texts[: len(prompts)]
    cosine = (image / image.norm(dim=-1, keepdim=True) * text / text.norm(dim=-1, keepdim=True)).sum(-1)
    return np.exp(2.5) * cosine


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_whole_unet(configs, scorers, name):
    expected = plain_scores(configs[name], pictures() / 255, PROMPTS)
    assert expected.std() > 1e-3 * expected.abs().max(), "the pictures must be told apart"
    torch.testing.assert_close(scorers[name].score(pictures() / 255, PROMPTS), expected, rtol=1e-4, atol=1e-4)


def test_pictures_become_square_as_pillow_makes_them(configs, scorers):
    pixels = pictures(50, 80)
    resized = [Image.fromarray(each.permute(1, 2, 0).numpy()).resize((EDGE, EDGE), Image.BILINEAR) for each in pixels]
    images = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    ours = torch.stack([scorers["lrm_sd15"].reduce(each) for each in pixels])
    assert (ours - images).abs().max() <= 1 / 255
    assert torch.equal(scorers["lrm_sd15"].score(ours, PROMPTS), scorers["lrm_sd15"].score(pixels / 255, PROMPTS))


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_its_batch(scorers, name):
    images = pictures() / 255
    alone = [scorers[name].score(image[None], (prompt,)) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert torch.equal(scorers[name].score(images, PROMPTS), torch.cat(alone))


@pytest.mark.parametrize("name", NAMES)
def test_the_score_has_the_gradient_of_its_finite_differences(scorers, name):
    images = (0.25 + pictures(40, 36) / 510).requires_grad_()
    (gradient,) = torch.autograd.grad(scorers[name].score(images, PROMPTS).sum(), images)
    direction = 0.01 * gradient / gradient.norm()
    with torch.no_grad():
        slope = scorers[name].score(images + direction, PROMPTS) - scorers[name].score(images - direction, PROMPTS)
    assert slope.sum().item() / 0.02 == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_fits_its_own_prompt_better_than_a_foreign_one(configs, name):
    """Of a projection fitted to two pictures, in closed form: it fails where picture and prompt are mixed up."""
    scorer = open_image_scorer(configs[name], device="cpu")
    projection, seen = scorer._model.head.visual_projection, []
    hook = projection.register_forward_hook(lambda _module, given, _out: seen.append(given[0]))
    images, prompts = pictures()[:2] / 255, PROMPTS[:2]
    scorer.score(images, prompts)
    hook.remove()
    texts = torch.cat([scorer._read(prompt).feature for prompt in prompts])
    projection.weight.copy_(torch.linalg.lstsq(torch.cat(seen), texts).solution.T)
    own, foreign = scorer.score(images, prompts), scorer.score(images, prompts[::-1])
    assert (own > foreign).all()
    assert own.tolist() == pytest.approx([np.exp(2.5)] * 2, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_second_half_of_the_unet_is_not_there(scorers, name):
    names = {key.split(".")[0] for key in scorers[name]._model.unet.state_dict()}
    assert names >= {"conv_in", "down_blocks", "mid_block"}
    assert not names & {"up_blocks", "conv_norm_out", "conv_out"}


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_has_the_model_without_weights(configs, scorers, name):
    empty = empty_image_scorer(configs[name])
    shapes = {key: tensor.shape for key, tensor in empty.model.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in scorers[name]._model.state_dict().items()}
    look = empty.look()
    assert (look.device.type, look.shape) == ("meta", (1,))


@pytest.mark.parametrize(("name", "parameters"), [("lrm_sd15", 559_703_528), ("lrm_sdxl", 2_149_246_824)])
def test_the_published_one_is_planned_without_a_network(name, parameters):
    """Of the UNets 349 and 1,243 million parameters, of 860 and 2,567."""
    model = empty_image_scorer(image_scorer(name, None, None)).model
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_its_weights_are_counted_and_known_by_their_content(root, tmp_path):
    shutil.copytree(root / "models", tmp_path / "models")
    config = image_scorer("lrm_sd15", str(tmp_path / "models"), str(root / "lrm_sd15"))
    weights = [tmp_path / "models" / "lrm_sd15" / name for name in (UNET, TEXT)]
    assert image_scorer_bytes(config) == sum(file.stat().st_size for file in weights)
    before, _ = image_scorer_inputs(config)
    edit(weights[0], lose("conv_in.bias"))
    after, _ = image_scorer_inputs(config)
    assert None not in (before.parts["content"], after.parts["content"])
    assert before.parts != after.parts
    assert image_scorer_bytes(image_scorer("lrm_sd15", "no/where", None)) is None


def test_a_hub_id_is_read_from_the_cache_and_known_by_its_commit(root, scorers, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--casiatao--LRM"
    shutil.copytree(root / "models", cached / "snapshots" / COMMIT)
    (cached / "snapshots" / COMMIT / ".gitattributes").touch()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    config = image_scorer("lrm_sd15", None, str(root / "lrm_sd15"))
    check_image_scorer(config)
    weights, _ = image_scorer_inputs(config)
    assert weights.parts == {"content": COMMIT}
    local = image_scorer("lrm_sd15", str(root / "models"), None)
    assert image_scorer_bytes(config) == image_scorer_bytes(local)
    ours = open_image_scorer(config, device="cpu").score(pictures() / 255, PROMPTS)
    assert torch.equal(ours, scorers["lrm_sd15"].score(pictures() / 255, PROMPTS))


def test_as_golden_metric_it_is_found_in_the_folder_of_its_name(root, scorers):
    for name in NAMES:
        metric = open_metric(GoldenConfig(scorer=name, path=str(root / "models"), processor=str(root / name)))
        values = metric(pictures() / 255, PROMPTS).values
        assert values == pytest.approx(scorers[name].score(pictures() / 255, PROMPTS).tolist())


def edit(file, change):
    """Change a file of tensors, the way it is written."""
    if file.suffix == ".pt":
        state = torch.load(file)
        change(state)
        torch.save(state, file)
    else:
        state = load_file(file)
        change(state)
        save_file(state, file, metadata={"format": "pt"})


def lose(key):
    return lambda state: state.pop(key)


def gain(key):
    return lambda state: state.update({key: torch.zeros(2)})


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        (UNET, lose("mid_block.resnets.0.conv1.bias"), "1 tensors missing: mid_block.resnets.0.conv1.bias"),
        (UNET, lose("up_blocks.0.resnets.0.conv1.bias"), "1 tensors missing: up_blocks.0.resnets.0.conv1.bias"),
        (UNET, gain("down_blocks.7.bias"), "1 tensors unknown: down_blocks.7.bias"),
        (TEXT, gain("logit_bias"), "text_encoder of .* 1 tensors unexpected: logit_bias"),
        ("state_dict.pt", lose("text_projection"), "1 tensors missing: text_projection.weight"),
        ("state_dict.pt", gain("mid_projection"), "1 tensors unknown: mid_projection"),
        ("state_dict.pt", lambda state: state.update(logit_scale="2.5"), "something else than tensors and numbers"),
        ("state_dict.pt", lambda state: state.update(logit_scale=print), "more than a state dict of tensors"),
    ],
)
def test_tensors_that_are_missing_or_left_over_are_refused(configs, tmp_path, file, change, reason):
    shutil.copytree(configs["lrm_sd15"].path, tmp_path / "model")
    edit(tmp_path / "model" / file, change)
    config = image_scorer("lrm_sd15", str(tmp_path / "model"), configs["lrm_sd15"].processor)
    with pytest.raises(ValueError, match=reason) as refusal:
        open_image_scorer(config, device="cpu")
    assert "\n" not in str(refusal.value)


def test_another_model_is_refused_before_weights_are_read(configs, tmp_path):
    sd15, sdxl = (configs[name] for name in NAMES)
    shutil.copytree(sd15.path, tmp_path / "cut", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(sd15.processor, tmp_path / "sd3")
    config = tmp_path / "sd3" / "vae" / "config.json"
    config.write_text(config.read_text().replace('"latent_channels": 4', '"latent_channels": 16'))
    wrong = [
        (("lrm_sd15", sd15.path, str(tmp_path / "sd3")), "has latents of 16 channels, LRM .* reads 4"),
        (("lrm_sd15", str(tmp_path / "cut"), sd15.processor), "has no whole set of weight files in unet/"),
        (("lrm_sdxl", sd15.path, sd15.processor), "has no text_encoder_2/config.json"),
        (("lrm_sd15", sdxl.path, sdxl.processor), "is a UNet2DConditionModel like SDXL's, not SD1.5's"),
        (("lrm_sd15", str(tmp_path), sd15.processor), "has no unet/config.json; give the directory of lrm_sd15"),
        (("lrm_sd15", sd15.path, str(tmp_path)), "vae of .* cannot be read"),
        (("lrm_sdxl", sdxl.path, sd15.processor), "processor .* cannot be read"),
    ]
    for given, reason in wrong:
        with pytest.raises(ValueError, match=reason) as refusal:
            check_image_scorer(image_scorer(*given))
        assert "\n" not in str(refusal.value)
