"""Sampler, codec, text encoder and adapter files against the stock pipelines."""

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.flux import pack, unpack
from dina_rl.backbones.guidance import guided_velocity
from dina_rl.backbones.lora import add_lora, lora_state, trainable
from dina_rl.backbones.registry import open_backbone
from dina_rl.flow.sampler import denoise
from dina_rl.seeding import generator, normal
from dina_rl.sums import SUMS_FILE
from dina_rl.types import PromptEmbeds
from tests.families import HEIGHT, WIDTH, Family, watch

PROMPTS = ["a small red circle on blue", "a large green cross on red or on black"]
STEPS = 5


def initial_noise(backbone: Backbone, count: int = 2) -> torch.Tensor:
    return normal((count, *backbone.latent_shape(HEIGHT, WIDTH)), "noise")


def test_pack_is_inverted_by_unpack() -> None:
    latents = normal((2, 16, 8, 10), "packing")
    assert pack(latents).shape == (2, 20, 64)
    assert torch.equal(unpack(pack(latents), 8, 10), latents)


@pytest.mark.parametrize(
    ("guidance", "without"), [(1.0, ""), (3.0, ""), (3.0, "a blurred ring")], ids=["unguided", "guided", "led away"]
)
def test_the_sampler_is_the_stock_pipeline_s(family: Family, backbone: Backbone, guidance: float, without: str) -> None:
    noise, pipeline = initial_noise(backbone), family.stock()
    theirs = family.sample(
        pipeline, noise, guidance=guidance, negative=without, prompt=list(PROMPTS), num_inference_steps=STEPS
    )
    transformer, text = backbone.load_transformer(), backbone.load_text_encoder()
    sigmas = backbone.sigmas(STEPS, HEIGHT, WIDTH)
    torch.testing.assert_close(sigmas, pipeline.scheduler.sigmas, rtol=0, atol=1e-7)

    negative = None if guidance == 1 else text([without])
    ours = denoise(noise, sigmas, guided_velocity(backbone, transformer, text(PROMPTS), negative, guidance)).latents
    assert (theirs - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_time_reaches_a_bfloat16_network_as_in_the_stock_pipeline(family: Family) -> None:
    """FLUX rounds it before it is embedded, the others do not: bit for bit the embeddings that the stock loop makes."""
    steps = 16  # with fewer, times that are rounded elsewhere may all come out alike
    backbone, pipeline = family.open(torch.bfloat16), family.stock(torch.bfloat16)
    noise = initial_noise(backbone, 1)
    theirs = watch(pipeline.transformer.get_submodule(family.time_embedder))
    family.sample(pipeline, noise.bfloat16(), guidance=1.0, prompt=PROMPTS[:1], num_inference_steps=steps)
    transformer, prompt = backbone.load_transformer(), backbone.load_text_encoder()(PROMPTS[:1])
    truncated = backbone.truncated(transformer, 1)
    ours = watch(transformer.get_submodule(family.time_embedder))
    for step, sigma in enumerate(backbone.sigmas(steps, HEIGHT, WIDTH)[:-1]):
        with torch.no_grad():
            assert backbone.velocity(transformer, noise, sigma[None], prompt).dtype == torch.float32
            features = backbone.features(truncated, noise, sigma[None], prompt, (1,))
        assert torch.equal(ours[step], theirs[step])
        assert torch.equal(features.time_embedding, theirs[step])
    assert len(theirs) == steps


def test_the_codec_is_the_stock_vae_with_shift_and_scale(family: Family, backbone: Backbone) -> None:
    codec, pipeline = backbone.load_codec(), family.stock()
    images = torch.rand(2, 3, HEIGHT, WIDTH, generator=generator("images"))
    vae = pipeline.vae
    with torch.no_grad():
        raw = vae.encode(pipeline.image_processor.preprocess(images)).latent_dist.mode()
        latents = (raw - vae.config.shift_factor) * vae.config.scaling_factor
        decoded = pipeline.image_processor.postprocess(vae.decode(raw).sample, output_type="pt")
    assert latents.shape[1:] == backbone.latent_shape(HEIGHT, WIDTH)
    torch.testing.assert_close(codec.encode(images), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.decode(latents), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distilled", [1.0, 6.0])
def test_flux_samples_at_the_distilled_guidance_that_is_given(
    family: Family, backbone: Backbone, distilled: float
) -> None:
    """And its features, a reward model's, see the one they were fitted with."""
    if family.name != "flux":
        return
    ours = open_backbone(family.path, max_sequence_length=family.max_sequence_length, distilled_guidance=distilled)
    noise, sigmas, transformer = initial_noise(backbone), backbone.sigmas(STEPS, HEIGHT, WIDTH), ours.load_transformer()
    prompt = ours.load_text_encoder()(PROMPTS)
    options = {"guidance": 1.0, "prompt": list(PROMPTS), "num_inference_steps": STEPS}
    theirs = family.sample(family.stock(), noise, distilled=distilled, **options)
    found = denoise(noise, sigmas, guided_velocity(ours, transformer, prompt, None, 1.0)).latents
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - family.sample(family.stock(), noise, **options)).abs().max() > 1e-4
    features = [
        each.features(each.truncated(transformer, 1), noise, sigmas[:2], prompt, (1,)) for each in (ours, backbone)
    ]
    assert torch.equal(features[0].visual[0], features[1].visual[0])


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_decoding_in_batches_changes_no_pixel_and_no_gradient(family: Family, backbone: Backbone, batch: int) -> None:
    whole = backbone.load_codec()
    split = open_backbone(family.path, max_sequence_length=family.max_sequence_length, decode_batch=batch).load_codec()
    latents = [initial_noise(backbone, 8).requires_grad_() for _ in range(2)]
    images = [codec.decode(each) for codec, each in zip((whole, split), latents, strict=True)]
    assert torch.equal(images[0], images[1])
    gradients = [torch.autograd.grad((image**2).sum(), each)[0] for image, each in zip(images, latents, strict=True)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(split.decode(latents[0]), images[0])


def test_only_a_batch_is_decoded_at_once(tiny_pipeline: Path) -> None:
    codec = open_backbone(tiny_pipeline, decode_batch=4).load_codec()
    sizes = watch(codec._vae.decoder)
    latents = normal((9, 16, 8, 8), "batch").requires_grad_()
    codec.decode(latents).sum().backward()
    assert [len(each) for each in sizes] == [3, 3, 3] * 2, "in the backward pass once more"


def test_tiles_are_the_stock_vae_s(family: Family) -> None:
    tiled = open_backbone(family.path, max_sequence_length=family.max_sequence_length, vae_tiling=True).load_codec()
    plain = open_backbone(family.path, max_sequence_length=family.max_sequence_length).load_codec()
    vae = family.stock().vae
    vae.enable_tiling()
    size = 2 * vae.config.sample_size
    images = torch.rand(1, 3, size, size, generator=generator("tiles"))
    with torch.no_grad():
        raw = vae.encode(images * 2 - 1).latent_dist.mode()
        decoded = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    latents = (raw - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(tiled.encode(images), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiled.decode(latents), decoded, rtol=1e-5, atol=1e-5)
    assert not torch.equal(plain.decode(latents), tiled.decode(latents))


def test_an_embedding_does_not_depend_on_its_batch(backbone: Backbone) -> None:
    together = backbone.load_text_encoder()([*PROMPTS, "", PROMPTS[0]])
    alone = backbone.load_text_encoder()(PROMPTS[1:])
    assert torch.equal(together.embeds[1:2], alone.embeds)
    assert torch.equal(together.pooled[1:2], alone.pooled)
    assert torch.equal(together.embeds[0], together.embeds[3])
    assert not torch.equal(together.embeds[0], together.embeds[1])
    if alone.lengths is not None:
        assert together.lengths[1] == alone.lengths[0] == (alone.embeds[0].abs().sum(-1) > 0).sum()


def test_padding_and_batch_mates_change_no_velocity(family: Family, backbone: Backbone) -> None:
    transformer, noise, sigma = backbone.load_transformer(), initial_noise(backbone), torch.tensor([0.3, 0.8])
    prompt = backbone.load_text_encoder()([PROMPTS[0], ""])
    with torch.no_grad():
        together = backbone.velocity(transformer, noise, sigma, prompt)
        for row in range(2):
            one = slice(row, row + 1)
            alone = backbone.velocity(transformer, noise[one], sigma[one], prompt.select(one))
            torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)
        if prompt.lengths is not None:
            rubbish = prompt.embeds.clone()
            for row, length in zip(rubbish, prompt.lengths, strict=True):
                row[length:] = 9
            padded = PromptEmbeds(embeds=rubbish, pooled=prompt.pooled, lengths=prompt.lengths)
            assert torch.equal(backbone.velocity(transformer, noise, sigma, padded), together)


def suffixed(modules: tuple[str, ...], names: tuple[str, ...]) -> set[str]:
    return {f"{module}.{name}" for module in modules for name in names}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FIRST_TWO_BLOCKS = {
    "sd3": suffixed(("transformer_blocks.0.attn", "transformer_blocks.1.attn"), JOINT)
    | suffixed(("transformer_blocks.0.attn2", "transformer_blocks.1.attn2"), ATTENTION),
    "flux": suffixed(("transformer_blocks.0.attn", "transformer_blocks.1.attn"), JOINT),
    "z_image": suffixed(("layers.0.attention", "layers.1.attention"), ATTENTION)
    | suffixed(("noise_refiner.0.attention", "noise_refiner.1.attention"), ATTENTION)
    | suffixed(("context_refiner.0.attention", "context_refiner.1.attention"), ATTENTION),
}
OTHERS = {
    "sd3": suffixed(("transformer_blocks.2.attn",), JOINT)
    | suffixed(("transformer_blocks.3.attn",), JOINT[:-1]),  # its text stream ends here
    "flux": suffixed(("single_transformer_blocks.0.attn",), ATTENTION[:-1]),
    "z_image": suffixed(("layers.2.attention",), ATTENTION),
}


@pytest.mark.parametrize("part", ["policy", "features"])
def test_lora_sits_on_the_attention_projections(family: Family, backbone: Backbone, part: str) -> None:
    module, expected = backbone.load_transformer(), FIRST_TWO_BLOCKS[family.name]
    if part == "policy":
        expected = expected | OTHERS[family.name]
    else:
        module = backbone.truncated(module, 2)
    add_lora(module, rank=2, alpha=4, targets=backbone.lora_targets, seed=0)
    assert {name for name, layer in module.named_modules() if isinstance(layer, LoraLayer)} == expected


def test_the_stock_pipeline_reads_the_adapter(tmp_path, family: Family, backbone: Backbone) -> None:
    transformer, noise, sigma = backbone.load_transformer(), initial_noise(backbone), torch.tensor([0.3, 0.8])
    prompt = backbone.load_text_encoder()(PROMPTS)
    add_lora(transformer, rank=2, alpha=8, targets=backbone.lora_targets, seed=0)
    with torch.no_grad():
        base = backbone.velocity(transformer, noise, sigma, prompt)
        for parameter in trainable(transformer).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator("adapter", *parameter.shape))
        ours = backbone.velocity(transformer, noise, sigma, prompt)
    file = backbone.save_adapter(
        tmp_path / "adapter", lora_state(transformer), rank=2, alpha=8, targets=backbone.lora_targets
    )
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {file.name, SUMS_FILE}
    pipeline = family.stock()
    pipeline.load_lora_weights(tmp_path / "adapter")
    with torch.no_grad():
        theirs = backbone.velocity(pipeline.transformer, noise, sigma, prompt)
    assert (ours - base).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_image_sizes_that_do_not_fit_are_refused(family: Family, backbone: Backbone) -> None:
    assert backbone.latent_shape(HEIGHT, WIDTH) == (16, HEIGHT // 4, WIDTH // 4)
    with pytest.raises(ValueError, match="32x36 must be a multiple of 8"):
        backbone.latent_shape(32, 36)
    if family.name == "flux":
        assert backbone.latent_shape(32, 4096) == (16, 8, 1024), "rotary positions have no end"
    else:
        with pytest.raises(ValueError, match="32x1024 is beyond the"):
            backbone.latent_shape(32, 1024)


def test_z_image_refuses_captions_beyond_its_positions(tiny_z_image) -> None:
    assert open_backbone(tiny_z_image, max_sequence_length=224)
    with pytest.raises(ValueError, match="max_sequence_length 225 is beyond the 256 positions"):
        open_backbone(tiny_z_image, max_sequence_length=225)


def test_prompts_that_are_cut_are_those_whose_end_is_not_read(family: Family, backbone: Backbone) -> None:
    """Beyond its limit a word changes no embedding; one that is not reported is read whole."""
    encoder, words = backbone.load_text_encoder(), ["a " * count for count in range(1, 120)]
    cut = backbone.cut_prompts(words)
    assert backbone.cut_prompts(["a"]) == {}
    assert all(found == words[-len(found) :] for found in cut.values()), "the longer ones, in order"
    longest = words[-1]
    whole = [word for word in words if not any(word in found for found in cut.values())]
    assert torch.equal(encoder([longest + "red"]).embeds, encoder([longest + "blue"]).embeds)
    assert not torch.equal(encoder([whole[-1]]).embeds, encoder([whole[-2]]).embeds)
    assert {name.split("'s ")[0] for name in cut} == ({"the chat"} if family.name == "z_image" else {"CLIP", "T5"})
