"""The shared way to score pictures: the reward model's own numbers, keyed noise, files, latents, pixel scorers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dina_rl.config import PictureScorerConfig, PipelineConfig
from dina_rl.reward.checkpoint import save_reward
from dina_rl.runtime import open_pipeline
from dina_rl.scoring import NORMALISATIONS, NoiseKey, open_scorer
from dina_rl.seeding import generator, normal
from tests.tiny_clip import EDGE, save_tiny_clip
from tests.tiny_reward import PROMPTS, latents, stirred_model

KEYS = [NoiseKey(group=("set", index // 2), member=index) for index in range(4)]
FOUR = [*PROMPTS, PROMPTS[0]]


@pytest.fixture(scope="module")
def scorer(tiny_reward):
    return open_scorer(tiny_reward)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Two pictures at the fit's size."""
    paths = []
    for name in ("a.png", "b.png"):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator("picture", name), dtype=torch.uint8)
        paths.append(tmp_path / name)
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return paths


def by_hand(scorer, samples, prompts, noise, levels):
    """The reward model called directly."""
    with torch.no_grad():
        model, embeds = scorer._scorer.model, scorer._parts.text_encoder(prompts)
        return model.score_clean(samples, embeds, levels, noise)


def test_three_lines_score_a_file_as_the_model_does(scorer, files):
    scores = scorer.score(files, PROMPTS[:2])
    images = torch.stack([torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1) / 255 for file in files])
    encoded = scorer.encode(images)
    noise = torch.cat([normal((1, *encoded.shape[1:]), 0, "picture-score", prompt) for prompt in PROMPTS[:2]])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, by_hand(scorer, encoded, PROMPTS[:2], noise, (0.4,)), rtol=1e-5, atol=1e-6)


def test_ensembles_and_draws(scorer):
    levels = (0.2, 0.5, 0.7)
    noise = torch.stack([normal((2, 16, 8, 8), 0, "picture-score", *key.group) for key in KEYS])
    each = [by_hand(scorer, latents(4), FOUR, noise[:, draw], levels) for draw in range(2)]
    scores = scorer.at(levels, draws=2).score_latents(latents(4), FOUR, KEYS)
    torch.testing.assert_close(scores, torch.stack(each).mean(0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(*each)


def test_scores_do_not_depend_on_the_batch(scorer):
    together = scorer.score_latents(latents(4), FOUR, KEYS)
    backwards = [3, 1, 0, 2]
    apart = torch.cat([scorer.score_latents(latents(4)[i : i + 1], [FOUR[i]], [KEYS[i]]) for i in backwards])
    torch.testing.assert_close(apart, together[backwards], rtol=1e-5, atol=1e-6)


def test_shared_noise_cancels_and_independent_noise_does_not(tiny_reward, scorer):
    twins = latents(1).repeat(2, 1, 1, 1)
    first, second = scorer.score_latents(twins, [PROMPTS[0]] * 2, KEYS[:2])
    assert first == second
    independent = open_scorer(PictureScorerConfig(path=str(tiny_reward), noise="independent"))
    first, second = independent.score_latents(twins, [PROMPTS[0]] * 2, KEYS[:2])
    assert first != second
    again, _ = independent.score_latents(twins, [PROMPTS[0]] * 2, KEYS[:2])
    assert again == first


@pytest.mark.parametrize(("name", "expected"), [("raw", -3.0), ("readme", 0.7), ("grpo_reward", 0.9)])
def test_normalisations_by_name(tiny_reward, scorer, name, expected):
    offset, scale = NORMALISATIONS[name]
    assert (-3.0 + offset) / scale == pytest.approx(expected)
    named = open_scorer(PictureScorerConfig(path=str(tiny_reward), normalisation=name))
    raw = scorer.score_latents(latents(2), FOUR[:2], KEYS[:2])
    torch.testing.assert_close(named.score_latents(latents(2), FOUR[:2], KEYS[:2]), (raw + offset) / scale)


def test_latent_files_and_pictures_of_several_sizes_in_one_call(scorer, files, tmp_path):
    save_file({"latents": latents(1)}, tmp_path / "c.safetensors")
    save_file({"anything": latents(1)[0].bfloat16()}, tmp_path / "d.safetensors")
    paths = [files[0], tmp_path / "c.safetensors", files[1], tmp_path / "d.safetensors"]
    together = scorer.score(paths, [PROMPTS[0]] * 4)
    apart = scorer.score(paths, [PROMPTS[0]] * 4, batch_size=1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[1], together[3], rtol=0.01, atol=0.01)  # one of them rounded to bfloat16
    assert abs(together[0] - together[2]) > 1e-3
    assert abs(together[0] - together[1]) > 1e-3


def test_pictures_meet_the_size_that_the_fit_gave_their_aspect(tiny_pipeline, tmp_path):
    pipeline = PipelineConfig(path=str(tiny_pipeline))
    model = stirred_model(open_pipeline(pipeline))
    save_reward(model, tmp_path / "reward", pipeline=pipeline, buckets=((32, 32), (48, 32), (64, 64)))
    scorer = open_scorer(tmp_path / "reward")
    for name, size in (("tall", (91, 60)), ("square", (40, 40)), ("large", (90, 90)), ("flat", (30, 60))):
        Image.new("RGB", size[::-1]).save(tmp_path / f"{name}.png")
    shapes = [scorer.read(tmp_path / f"{name}.png").tensor.shape[1:] for name in ("tall", "square", "large")]
    assert shapes == [(48, 32), (32, 32), (64, 64)]
    with pytest.raises(ValueError, match=r"flat\.png: none of the fit's 3 sizes has the aspect of 30x60; give height"):
        scorer.read(tmp_path / "flat.png")
    scores = scorer.score([tmp_path / "tall.png", tmp_path / "square.png"], PROMPTS[:2])
    assert scores.isfinite().all()
    stretched = open_scorer(PictureScorerConfig(path=str(tmp_path / "reward"), height=32, width=64))
    assert stretched.read(tmp_path / "flat.png").tensor.shape == (3, 32, 64)


def test_pixel_scorers_see_the_picture_cropped_by_their_own_rule_and_decode_latents(tiny_pipeline, tmp_path, files):
    clip = str(save_tiny_clip(tmp_path / "clip"))
    Image.new("RGB", (40, 56), (200, 30, 30)).save(tmp_path / "wide.png")
    config = PictureScorerConfig(kind="pickscore", path=clip, processor=clip)
    scorer = open_scorer(config)
    assert scorer.space == "images"
    assert scorer.read(tmp_path / "wide.png").tensor.shape == (3, EDGE, EDGE), "no batch is kept at native size"
    assert scorer.score([files[0], tmp_path / "wide.png"], PROMPTS[:2]).isfinite().all()
    with pytest.raises(ValueError, match="takes a pipeline"):
        scorer.score_latents(latents(1), PROMPTS[:1], KEYS[:1])
    decoding = open_scorer(config, pipeline=tiny_pipeline)
    decoded = decoding._parts.codec.decode(latents(2))
    expected = decoding.score_images(decoded, PROMPTS[:2], KEYS[:2])
    assert torch.equal(decoding.score_latents(latents(2), PROMPTS[:2], KEYS[:2]), expected)
    with pytest.raises(ValueError, match="no noise levels"):
        scorer.at((0.2,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "pickscore", "levels": [0.2]}, "levels: only a dina scorer has that"),
        ({"kind": "clip_score", "draws": 3, "normalisation": "readme"}, "draws, normalisation: only a dina scorer"),
        ({"processor": "clip"}, "processor belongs to a scorer of images"),
        ({"height": 32}, "height and width go together"),
    ],
)
def test_settings_that_do_not_apply_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PictureScorerConfig(**settings)


def test_unreadable_files_are_named(scorer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    save_file({"a": latents(1), "b": latents(1)}, tmp_path / "two.safetensors")
    save_file({"flat": torch.zeros(3)}, tmp_path / "flat.safetensors")
    for name, reason in (
        ("nowhere.png", "does not exist"),
        ("broken.png", "unreadable image"),
        ("broken.safetensors", "not a safetensors file"),
        ("two.safetensors", "holds 2 tensors"),
        ("flat.safetensors", r"a latent is \[C, h, w\]"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
            scorer.score([tmp_path / name], PROMPTS[:1])


def test_a_missing_pipeline_is_named_with_the_way_out(tiny_pipeline, tmp_path):
    gone = shutil.copytree(tiny_pipeline, tmp_path / "gone")
    pipeline = PipelineConfig(path=str(gone))
    save_reward(stirred_model(open_pipeline(pipeline)), tmp_path / "reward", pipeline=pipeline)
    shutil.rmtree(gone)
    with pytest.raises(ValueError, match=r"gone does not exist \(reward model .*reward was fitted on it; a copy may"):
        open_scorer(tmp_path / "reward")
    assert open_scorer(tmp_path / "reward", pipeline=tiny_pipeline).space == "latents"


def test_prompts_must_match_and_nothing_is_a_list_too(scorer):
    with pytest.raises(ValueError, match="1 pictures and 0 prompts do not match"):
        scorer.score(["a.png"], [])
    assert scorer.score([], []).shape == (0,)


def test_another_backbone_is_noticed(tiny_reward, tmp_path, caplog):
    from dina_rl.shapes.pipeline import build_pipeline

    build_pipeline(1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was fitted on another transformer and VAE and text encoders than .*other"):
        open_scorer(tiny_reward, pipeline=tmp_path / "other")
    old = shutil.copytree(tiny_reward, tmp_path / "old")
    card = json.loads((old / "config.json").read_text()) | {"version": 2}
    del card["fingerprint"]
    (old / "config.json").write_text(json.dumps(card))
    open_scorer(old)
    assert not caplog.records
    open_scorer(old, pipeline=tmp_path / "other")
    assert "was fitted on revision files:" in caplog.text
