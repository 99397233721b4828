"""ImageReward in its released layout against its description, on the file's own tensors, and its gradient."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoTokenizer, CLIPImageProcessorPil

from dina_rl.config import ImageRewardConfig
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.imagereward import FILE, ImageRewardScorer, check_imagereward, empty_imagereward
from tests.tiny_imagereward import EDGE, PATCH, save_tiny_imagereward

PROMPTS = ("a small red circle on blue", "the large green square", "a small red circle on blue")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return save_tiny_imagereward(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="module")
def scorer(config):
    return ImageRewardScorer(config, device="cpu")


@pytest.fixture(scope="module")
def pixels():
    """Smooth pictures [3, 40, 32, 3] uint8, higher than wide, so that they are both resized and cropped."""
    rows, columns = np.meshgrid(np.linspace(0, 3, 40), np.linspace(0, 2, 32), indexing="ij")
    waves = [np.sin(k + rows[..., None] * (k + 1) + columns[..., None] * np.arange(1, 4)) for k in range(3)]
    return ((np.stack(waves) + 1) * 127).astype(np.uint8)


def as_images(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def linear(weights: Weights, name: str, values: torch.Tensor) -> torch.Tensor:
    return functional.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])


def normed(weights: Weights, name: str, values: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def attend(query, key, value, mask=None):
    """Two heads, over all that the mask lets through."""
    query, key, value = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def described_vision(weights: Weights, pixels: torch.Tensor) -> torch.Tensor:
    """A vision transformer: norms come first, the last one after all blocks."""
    name = "blip.visual_encoder"
    patches = functional.conv2d(
        pixels, weights[f"{name}.patch_embed.proj.weight"], weights[f"{name}.patch_embed.proj.bias"], stride=PATCH
    )
    first = weights[f"{name}.cls_token"].expand(len(pixels), -1, -1)
    states = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1) + weights[f"{name}.pos_embed"]
    for block in (f"{name}.blocks.0", f"{name}.blocks.1"):
        query, key, value = linear(weights, f"{block}.attn.qkv", normed(weights, f"{block}.norm1", states, 1e-6)).chunk(
            3, -1
        )
        states = states + linear(weights, f"{block}.attn.proj", attend(query, key, value))
        inner = functional.gelu(linear(weights, f"{block}.mlp.fc1", normed(weights, f"{block}.norm2", states, 1e-6)))
        states = states + linear(weights, f"{block}.mlp.fc2", inner)
    return normed(weights, f"{name}.norm", states, 1e-6)


def described_text(weights: Weights, ids: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """BERT, whose layers look at the picture between looking at the text and the two linear layers."""
    name = "blip.text_encoder"
    words = weights[f"{name}.embeddings.word_embeddings.weight"][ids]
    places = weights[f"{name}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    states = normed(weights, f"{name}.embeddings.LayerNorm", words + places, 1e-12)
    for layer in (f"{name}.encoder.layer.0", f"{name}.encoder.layer.1"):
        for part, source, hidden in (("attention", None, mask[:, None, None].bool()), ("crossattention", seen, None)):
            own = f"{layer}.{part}"
            query, key, value = (
                linear(weights, f"{own}.self.{which}", states if which == "query" or source is None else source)
                for which in ("query", "key", "value")
            )
            added = linear(weights, f"{own}.output.dense", attend(query, key, value, hidden))
            states = normed(weights, f"{own}.output.LayerNorm", states + added, 1e-12)
        inner = functional.gelu(linear(weights, f"{layer}.intermediate.dense", states))
        added = linear(weights, f"{layer}.output.dense", inner)
        states = normed(weights, f"{layer}.output.LayerNorm", states + added, 1e-12)
    return states[:, 0]


def described_features(config, pixels, prompts) -> torch.Tensor:
    """Of the head's last layer [B, 16]: the published preprocessing on PIL images, then the file's own tensors."""
    weights = torch.load(Path(config.path) / FILE, weights_only=True)
    crop = {"height": EDGE, "width": EDGE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=crop)
    images = processor([Image.fromarray(each) for each in pixels], return_tensors="pt").pixel_values
    tokens = AutoTokenizer.from_pretrained(config.processor)(
        list(prompts), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    features = described_text(weights, tokens.input_ids, tokens.attention_mask, described_vision(weights, images))
    for layer in (0, 2, 4, 6):
        features = linear(weights, f"mlp.layers.{layer}", features)
    return features


def test_scores_are_those_of_the_description(config, scorer, pixels):
    weights = torch.load(Path(config.path) / FILE, weights_only=True)
    raw = linear(weights, "mlp.layers.7", described_features(config, pixels, PROMPTS))[:, 0]
    expected = (raw - 0.16717362830052426) / 1.0333394966054072
    ours = scorer(as_images(pixels), Conditions.of_images(PROMPTS))
    assert expected.std() > 0.05 * expected.abs().max(), "the pictures must be told apart"
    # The tolerance is PIL's rounding of resized pictures to 8 bits.
    torch.testing.assert_close(ours, expected, rtol=0.01, atol=0.02 * expected.std().item())


def test_a_score_does_not_depend_on_its_batch(scorer, pixels):
    prompts = (PROMPTS[0], " ".join(["red"] * 60), PROMPTS[1])
    together = scorer.score(as_images(pixels), prompts)
    alone = [scorer.score(as_images(pixels)[row : row + 1], prompts[row : row + 1]) for row in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_the_score_has_the_gradient_of_its_finite_differences(scorer, pixels):
    images = (0.25 + as_images(pixels) / 2).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(images, PROMPTS).sum(), images)
    direction = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        slope = scorer.score(images + direction, PROMPTS).sum() - scorer.score(images - direction, PROMPTS).sum()
    assert slope.item() / 0.04 == pytest.approx(gradient.norm().item(), rel=0.05)


def test_a_reduced_picture_scores_as_the_whole(scorer, pixels):
    whole = torch.from_numpy(pixels[0]).permute(2, 0, 1)
    reduced = scorer.reduce(whole)
    assert reduced.shape == (3, EDGE, EDGE)
    assert torch.equal(scorer.score(whole[None] / 255, PROMPTS[:1]), scorer.score(reduced[None], PROMPTS[:1]))


def test_a_matching_prompt_beats_a_foreign_one(config, tmp_path):
    """The head's last layer is fitted on all pictures with all prompts."""
    colours = {"red": (200, 30, 30), "blue": (30, 30, 200)}
    pairs = [(seen, said) for seen in colours for said in colours]
    pictures = np.stack([np.full((EDGE, EDGE, 3), colours[seen], dtype=np.uint8) for seen, _ in pairs])
    prompts = tuple(f"a {said} square" for _, said in pairs)
    features = described_features(config, pictures, prompts).double()
    wanted = torch.tensor([1.0 if seen == said else -1.0 for seen, said in pairs])
    inputs = torch.cat([features, torch.ones(4, 1)], 1)
    solved = torch.linalg.lstsq(inputs, wanted.double()[:, None], driver="gelsd").solution[:, 0].float()
    weights = torch.load(Path(config.path) / FILE, weights_only=True)
    weights["mlp.layers.7.weight"], weights["mlp.layers.7.bias"] = solved[None, :-1].contiguous(), solved[-1:].clone()
    torch.save(weights, tmp_path / FILE)
    (tmp_path / "med_config.json").write_text((Path(config.path) / "med_config.json").read_text())
    fitted = ImageRewardScorer(config.model_copy(update={"path": str(tmp_path)}), device="cpu")
    scores = fitted.score(as_images(pictures), prompts)
    torch.testing.assert_close(scores * 1.0333394966054072 + 0.16717362830052426, wanted, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("mlp.layers.6.bias"), "1 tensors missing: head.6.bias"),
        (lambda weights: weights.update({"blip.other": torch.zeros(1)}), "1 tensors unknown: blip.other"),
        (lambda weights: weights.pop("blip.visual_encoder.pos_embed"), "no ImageReward"),
        (lambda weights: weights.update({"mlp.layers.7.bias": torch.zeros(2)}), r"head.7.bias \[2\] instead of \[1\]"),
    ],
    ids=["head", "left over", "another model", "shape"],
)
def test_other_tensors_are_refused(config, tmp_path, change, message):
    weights = torch.load(Path(config.path) / FILE, weights_only=True)
    change(weights)
    torch.save(weights, tmp_path / FILE)
    (tmp_path / "med_config.json").write_text((Path(config.path) / "med_config.json").read_text())
    other = config.model_copy(update={"path": str(tmp_path)})
    for refused in (lambda: check_imagereward(other), lambda: ImageRewardScorer(other, device="cpu")):
        with pytest.raises(ValueError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)


def test_missing_files_are_named(config, tmp_path):
    check_imagereward(config)
    check_imagereward(config.model_copy(update={"path": str(Path(config.path) / FILE)}))
    for update, message in (
        ({"path": str(tmp_path)}, f"{FILE} does not exist"),
        ({"processor": str(tmp_path / "nowhere")}, "tokenizer .*nowhere cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            check_imagereward(config.model_copy(update=update))
    (tmp_path / FILE).write_bytes((Path(config.path) / FILE).read_bytes())
    with pytest.raises(ValueError, match=r"med_config\.json is missing"):
        check_imagereward(config.model_copy(update={"path": str(tmp_path)}))
    (tmp_path / "med_config.json").write_text(json.dumps({"hidden_size": 64}))
    with pytest.raises(ValueError, match="of another shape"):
        check_imagereward(config.model_copy(update={"path": str(tmp_path)}))


def test_the_published_model_is_planned_without_a_network():
    published = empty_imagereward(ImageRewardConfig().path)
    counted = sum(parameter.numel() for parameter in published.model.parameters())
    assert counted + 256 * (1024 + 768 + 2) == 446_665_953  # the released file's 1.79 GB, with its two projections
    assert published.look().shape == (1,)
