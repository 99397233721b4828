"""HPSv3 in its released layout against the stock model and image processor, and its gradient."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dina_rl.alignment.costs import operations
from dina_rl.backbones.known import VISION_LANGUAGE_MODELS
from dina_rl.config import HPSv3Config
from dina_rl.scorers.base import Conditions
from dina_rl.scorers.hpsv3 import FILE, HPSv3Scorer, check_hpsv3, empty_hpsv3
from dina_rl.scorers.hpsv3_input import INSTRUCTION, PIXELS, Pictures, tokens
from tests.tiny_hpsv3 import save_tiny_hpsv3

PROMPTS = ("a small red circle on blue", "a large green square on black")
SIZES = [(96, 72), (448, 448), (600, 500), (1024, 768), (40, 400)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return save_tiny_hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def scorer(config):
    return HPSv3Scorer(config, device="cpu")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture [height, width, 3] uint8."""
    rows, columns = np.meshgrid(np.linspace(0, 3, height), np.linspace(0, 2, width), indexing="ij")
    waves = np.sin(seed + rows[..., None] * (seed + 1) + columns[..., None] * np.arange(1, 4))
    return ((waves + 1) * 127).astype(np.uint8)


def as_images(*pictures: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.from_numpy(each) for each in pictures]).permute(0, 3, 1, 2) / 255


def stock_pixels(config: HPSv3Config, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    processor = Qwen2VLImageProcessorPil.from_pretrained(config.processor)
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    return dict(processor([Image.fromarray(pixels)], size=size, return_tensors="pt"))


@torch.no_grad()
def stock_states(config: HPSv3Config, pixels: np.ndarray, prompt: str) -> torch.Tensor:
    """What the whole stock model, its tensors under the names of today, has at the token of the reward: [width]."""
    images = stock_pixels(config, pixels)
    tokenizer = AutoTokenizer.from_pretrained(config.processor)
    tokenizer.add_tokens("<|Reward|>", special_tokens=True)
    words = INSTRUCTION.replace("{prompt}", prompt)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
    text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    count = int(images["image_grid_thw"].prod()) // 4
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt").input_ids
    base = Qwen2VLForConditionalGeneration.config_class.from_pretrained(config.processor)
    base.text_config.vocab_size = len(tokenizer)
    model = Qwen2VLForConditionalGeneration(base).eval()
    state = {}
    for name, tensor in load_file(Path(config.path) / FILE).items():
        if not name.startswith("rm_head"):
            head = "model.language_model." if name.startswith("model.") else "model."
            state[name if name == "lm_head.weight" else head + name.removeprefix("model.")] = tensor
    model.load_state_dict(state)
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    output = model.model(
        input_ids=ids, position_ids=positions, mm_token_type_ids=(ids == base.image_token_id).int(), **images
    )
    return output.last_hidden_state[0, ids[0] == len(tokenizer) - 1][0]


def stock_score(config: HPSv3Config, pixels: np.ndarray, prompt: str) -> torch.Tensor:
    head = load_file(Path(config.path) / FILE)
    state = stock_states(config, pixels, prompt)
    for layer in (0, 3):
        state = functional.linear(state, head[f"rm_head.{layer}.weight"], head[f"rm_head.{layer}.bias"]).relu()
    return functional.linear(state, head["rm_head.5.weight"], head["rm_head.5.bias"])[0]


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_those_of_the_stock_processor(config, size):
    expected = stock_pixels(config, picture(*size))
    patches, grid = Pictures().patches(as_images(picture(*size))[0])
    assert [1, *grid] == expected["image_grid_thw"][0].tolist()
    # Half a step of 8 bits is 0.0075 after normalisation; PIL rounds after either pass of its resize.
    torch.testing.assert_close(patches, expected["pixel_values"], rtol=0, atol=0.03)
    assert (patches - expected["pixel_values"]).abs().mean() < 0.006


def test_scores_are_those_of_the_stock_model(config, scorer):
    pictures = [picture(448, 448, seed) for seed in range(2)]
    ours = scorer.score(as_images(*pictures), PROMPTS)
    expected = torch.stack([stock_score(config, *pair) for pair in zip(pictures, PROMPTS, strict=True)])
    assert expected.std() > 0.01
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_a_score_does_not_depend_on_its_batch(scorer):
    images = as_images(picture(200, 160), picture(200, 160, 1), picture(200, 160, 2))
    prompts = (PROMPTS[0], "x " * 40, PROMPTS[1])
    together = scorer(images, Conditions.of_images(prompts))
    alone = [scorer(images[row : row + 1], Conditions.of_images(prompts[row : row + 1])) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert len(set(together.tolist())) == 3


def test_the_score_has_the_gradient_of_its_finite_differences(scorer):
    images = as_images(picture(90, 120), picture(90, 120, 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(images, PROMPTS).sum(), images)
    for row in range(2):
        single = images[row : row + 1].detach().requires_grad_()
        (alone,) = torch.autograd.grad(scorer.score(single, PROMPTS[row : row + 1]).sum(), single)
        torch.testing.assert_close(gradient[row : row + 1], alone)
    direction = 0.01 * gradient / gradient.norm()
    with torch.no_grad():
        slope = scorer.score(images + direction, PROMPTS).sum() - scorer.score(images - direction, PROMPTS).sum()
    assert slope.item() / 0.02 == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("size", [*SIZES, (1, 40_000)])
def test_a_reduced_picture_scores_as_the_whole(scorer, size):
    pixels = torch.from_numpy(picture(*size)).permute(2, 0, 1)
    reduced = scorer.reduce(pixels)
    assert reduced[0].numel() < 2 * PIXELS
    whole, again = (Pictures().patches(each) for each in (pixels.float() / 255, reduced))
    assert whole[1] == again[1]
    assert torch.equal(whole[0], again[0])


def test_words_of_the_model_in_a_prompt_are_no_more_than_words(scorer):
    prompts = ("a red circle", "a <|Reward|> and <|image_pad|> of <|im_end|> {prompt}")
    scores = scorer.score(as_images(picture(56, 56), picture(56, 56)), prompts)
    assert scores.isfinite().all()
    text = tokens(scorer._tokenizer, prompts[1])
    reward = scorer._tokenizer.convert_tokens_to_ids("<|Reward|>")
    assert text.place == (text.after == reward).nonzero().max()
    assert reward not in text.before


def test_the_instruction_ends_as_the_released_model_knows_it():
    assert INSTRUCTION.startswith("\nYou are tasked with evaluating a generated image")
    assert "**Visual Quality:**  \n" in INSTRUCTION
    end = "Textual prompt - {prompt}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
    assert INSTRUCTION.endswith(end)


def test_a_matching_prompt_beats_a_foreign_one(config, tmp_path):
    """The head's last layer is fitted on all pictures with all prompts: its mean likes what matches, its spread not."""
    colours = {"red": (200, 30, 30), "blue": (30, 30, 200)}
    pictures = {name: np.full((56, 56, 3), colour, dtype=np.uint8) for name, colour in colours.items()}
    pairs = [(seen, said) for seen in colours for said in colours]
    weights = load_file(Path(config.path) / FILE)
    states = torch.stack([stock_states(config, pictures[seen], f"a {said} square") for seen, said in pairs])
    for layer in (0, 3):
        name = f"rm_head.{layer}"
        states = functional.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])
        states = states.relu() if layer == 0 else states
    # Without a ReLU in the way: the narrow layer's bias lifts all above it.
    lift = 1 - states.min()
    weights["rm_head.3.bias"] += lift
    wanted = torch.tensor([1.0 if seen == said else -1.0 for seen, said in pairs])
    inputs = torch.cat([states + lift, torch.ones(4, 1)], 1).double()
    solved = torch.linalg.lstsq(inputs, wanted.double()[:, None], driver="gelsd").solution[:, 0].float()
    weights["rm_head.5.weight"] = torch.stack([solved[:-1], -solved[:-1]])
    weights["rm_head.5.bias"] = torch.stack([solved[-1], -solved[-1]])
    save_file(weights, tmp_path / FILE)
    fitted = HPSv3Scorer(config.model_copy(update={"path": str(tmp_path)}), device="cpu")
    images = as_images(*(pictures[seen] for seen, _ in pairs))
    scores = fitted.score(images, tuple(f"a {said} square" for _, said in pairs))
    torch.testing.assert_close(scores, wanted, rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("rm_head.3.bias"), "1 tensors missing: rm_head.3.bias"),
        (lambda weights: weights.pop("lm_head.weight"), "1 tensors missing: lm_head.weight"),
        (lambda weights: weights.update(other=torch.zeros(1)), "1 tensors unknown: other"),
        (
            lambda weights: weights.update({"model.embed_tokens.weight": torch.zeros(7, 16)}),
            r"of another shape: language_model.embed_tokens.weight \[7, 16\]",
        ),
    ],
    ids=["head", "words", "left over", "no token of the reward"],
)
def test_other_tensors_are_refused_before_loading(config, tmp_path, change, message):
    weights = load_file(Path(config.path) / FILE)
    change(weights)
    save_file(weights, tmp_path / FILE)
    other = config.model_copy(update={"path": str(tmp_path)})
    for refused in (lambda: check_hpsv3(other), lambda: HPSv3Scorer(other, device="cpu")):
        with pytest.raises(ValueError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)


def test_another_base_and_missing_files_are_named(config, tmp_path):
    check_hpsv3(config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    for update, message in (
        ({"processor": str(tmp_path)}, "it is a clip, not a qwen2_vl"),
        ({"processor": str(tmp_path / "nowhere")}, "base .*nowhere cannot be read"),
        ({"path": str(tmp_path)}, f"{FILE} does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            check_hpsv3(config.model_copy(update=update))


def test_the_published_model_is_planned_without_a_network():
    published = empty_hpsv3(HPSv3Config().processor)
    assert HPSv3Config().processor in VISION_LANGUAGE_MODELS
    counted = sum(parameter.numel() for parameter in published.model.base.parameters())
    rows = published.model.base.config.text_config.vocab_size
    assert counted + (2 * 152_064 - rows) * 3584 == 8_291_375_616  # Qwen2-VL-7B's, its words twice
    with operations() as counter:
        published.look()
    assert counter.get_total_flops() == pytest.approx(12.3e12, rel=0.01)


def test_the_published_base_is_read_in_its_own_old_form(tmp_path):
    """Qwen/Qwen2-VL-7B-Instruct's config.json has the text's sizes at its top."""
    known = VISION_LANGUAGE_MODELS[HPSv3Config().processor]
    text = {name: value for name, value in known.text.items() if name != "rope_parameters"}
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2_vl", **text, **rope, "vision_config": known.vision})
    )
    read, expected = AutoConfig.from_pretrained(tmp_path), Qwen2VLConfig(text_config=known.text)
    rotary = (read.text_config.rope_parameters[name] for name in ("rope_theta", "mrope_section"))
    assert tuple(rotary) == (1e6, expected.text_config.rope_parameters["mrope_section"])
    assert {name: read.text_config.to_dict()[name] for name in text} == text
    assert read.vision_config.embed_dim == 1280
