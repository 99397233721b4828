import json
from importlib.metadata import version

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from dina_rl.seeding import generator
from dina_rl.shapes.card import NUM_STEPS, SAMPLES_PER_PROMPT
from dina_rl.shapes.golden import golden_score
from dina_rl.shapes.grammar import WORDS, all_prompts, prompts
from dina_rl.shapes.pipeline import MAX_SEQUENCE_LENGTH, SHIPPED_PIPELINE, build_pipeline
from dina_rl.shapes.render import IMAGE_SIZE
from dina_rl.shapes.sampling import draw, open_studio
from tests.tensors import assert_same_tensors

TEST_SAMPLES = SAMPLES_PER_PROMPT * len(prompts("test"))  # behind every row of the card
SMALL = 128  # samples of the check of the shipped pipeline


@pytest.fixture(scope="module")
def fresh() -> StableDiffusion3Pipeline:
    return build_pipeline(0)


@pytest.fixture(scope="module")
def shipped() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(SHIPPED_PIPELINE, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def card() -> dict:
    return json.loads((SHIPPED_PIPELINE / "card.json").read_text())


def test_it_is_made_of_the_real_classes(fresh):
    assert type(fresh.transformer) is SD3Transformer2DModel
    assert type(fresh.vae) is AutoencoderKL
    assert type(fresh.text_encoder) is type(fresh.text_encoder_2) is CLIPTextModelWithProjection
    assert type(fresh.text_encoder_3) is T5EncoderModel
    assert isinstance(fresh.tokenizer, CLIPTokenizer)
    assert type(fresh.scheduler) is FlowMatchEulerDiscreteScheduler
    assert fresh.scheduler.config.shift == 3.0
    assert fresh.transformer.config.qk_norm == "rms_norm"
    assert tuple(fresh.transformer.config.dual_attention_layers) == (0, 1)
    assert fresh.vae.config.latent_channels == 16


def test_every_word_is_one_token(fresh):
    for tokenizer in (fresh.tokenizer, fresh.tokenizer_2, fresh.tokenizer_3):
        ids = [tokenizer(word, add_special_tokens=False).input_ids for word in WORDS]
        assert all(len(tokens) == 1 for tokens in ids)
        assert len({tokens[0] for tokens in ids}) == len(WORDS)
        longest = max(len(tokenizer(prompt).input_ids) for prompt in all_prompts())
        assert longest <= MAX_SEQUENCE_LENGTH


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(fresh):
    state = torch.get_rng_state()
    again, other = build_pipeline(0), build_pipeline(1)
    assert torch.get_rng_state().equal(state)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        first, second, third = (dict(getattr(p, name).named_parameters()) for p in (fresh, again, other))
        assert_same_tensors(second, first)
        assert any(not third[key].equal(value) for key, value in first.items())


def test_text_features_tell_all_prompts_apart(fresh):
    embeds, _, pooled, _ = fresh.encode_prompt(
        prompt=list(all_prompts()),
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    )
    assert torch.pdist(embeds.flatten(1)).min() > 1
    assert torch.pdist(pooled).min() > 0.1


def test_the_shipped_pipeline_is_small_and_in_fp16(shipped):
    files = [path for path in SHIPPED_PIPELINE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert not [path for path in files if path.suffix not in {".json", ".safetensors", ".md"}]
    assert json.loads((SHIPPED_PIPELINE / "text_encoder" / "config.json").read_text())["dtype"] == "float16"
    assert shipped.vae.config.scaling_factor != 1.0


def test_the_shipped_text_encoders_are_those_of_the_cards_seed(shipped, card):
    built = build_pipeline(card["recipe"]["seed"])
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert_same_tensors(getattr(shipped, name).state_dict(), getattr(built, name).state_dict())


def test_the_stock_pipeline_draws_what_our_sampler_draws(shipped):
    captions = prompts("test")[:8]
    ours = draw(open_studio(SHIPPED_PIPELINE), captions, num_steps=4, guidance=2.0, generator=generator(3))
    noise = torch.randn(len(captions), 16, 8, 8, generator=generator(3))
    stock = shipped(
        list(captions),
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=4,
        guidance_scale=2.0,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        latents=noise,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)


def test_the_card_holds_on_a_smaller_fresh_sample(card):
    captions = prompts("test") * (SMALL // len(prompts("test")))
    images = draw(
        open_studio(SHIPPED_PIPELINE), captions, num_steps=NUM_STEPS, guidance=2.0, generator=generator("fresh")
    )
    parts = golden_score(images, captions)
    row = card["metrics"]["guidance_2"]
    tolerance = 3 * row["golden_standard_error"] * (1 + TEST_SAMPLES / SMALL) ** 0.5
    assert parts.score.mean().item() == pytest.approx(row["golden"], abs=tolerance)
    assert parts.shape_right.mean().item() == pytest.approx(row["shape_accuracy"], abs=0.1)


def test_the_card_reports_a_usable_generator(card):
    metrics = card["metrics"]
    assert metrics["clean_renders"]["golden_after_vae"] >= 0.97
    assert metrics["guidance_2"]["shape_accuracy"] >= 0.9
    assert max(row["golden"] for name, row in metrics.items() if name.startswith("guidance")) <= 0.7  # headroom
    assert card["recipe"]["transformer_steps"] >= 3600
    assert card["versions"]["torch"].split("+")[0] == version("torch").split("+")[0]
