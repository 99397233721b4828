from pathlib import Path

import pytest
import torch

from dina_rl.backbones.registry import open_backbone
from dina_rl.flow.process import add_noise
from dina_rl.reward.model import LatentRewardModel
from tests.tensors import assert_same_tensors
from tests.tiny_reward import PROMPTS, TINY_REWARD, latents, stirred_model


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path):
    return open_backbone(tiny_pipeline, max_sequence_length=8)


def test_lora_and_head_train_in_fp32_and_nothing_else(backbone) -> None:
    model = LatentRewardModel(backbone, TINY_REWARD, seed=0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora = {name for name in trainable if "lora_" in name}
    assert {name for name in trainable if name.startswith("head.")} == trainable - lora
    assert all(name.startswith("truncated.transformer_blocks.") for name in lora)
    # Three blocks with 8 joint projections, two of them with 4 more (dual attention), A and B each.
    assert len(lora) == 2 * (3 * 8 + 2 * 4)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_without_lora_only_the_head_trains(backbone) -> None:
    model = LatentRewardModel(backbone, TINY_REWARD.model_copy(update={"lora": None}), seed=0)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"head"}
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_only_the_needed_blocks_are_kept(backbone) -> None:
    assert len(LatentRewardModel(backbone, TINY_REWARD, seed=0).truncated.transformer_blocks) == TINY_REWARD.taps[-1]


def test_the_seed_decides_the_initial_weights(backbone) -> None:
    first, second, other = (LatentRewardModel(backbone, TINY_REWARD, seed=seed) for seed in (1, 1, 2))
    assert_same_tensors(first.state_dict(), second.state_dict())
    assert not torch.equal(first.head.query_tokens, other.head.query_tokens)


def test_construction_leaves_the_global_generator_alone(backbone) -> None:
    before = torch.get_rng_state()
    LatentRewardModel(backbone, TINY_REWARD, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_score_depends_on_latent_noise_level_and_prompt(backbone) -> None:
    model, prompt = stirred_model(backbone), backbone.load_text_encoder()(PROMPTS[:2])
    x, t = latents(2, 0), torch.tensor([0.2, 0.6])
    with torch.no_grad():
        score = model.score(x, t, prompt)
        assert score.shape == (2,)
        assert (score != model.score(latents(2, 1), t, prompt)).all()
        assert (score != model.score(x, t + 0.1, prompt)).all()
        assert (score != model.score(x, t, prompt.select(torch.tensor([1, 0])))).all()


@pytest.mark.parametrize("levels", [(0.4,), (0.2, 0.5, 0.7)])
def test_scores_are_differentiable_in_the_latents(backbone, levels: tuple[float, ...]) -> None:
    model, prompt = stirred_model(backbone).requires_grad_(False), backbone.load_text_encoder()(PROMPTS[:2])
    x = latents(2, 0).requires_grad_()
    model.score_clean(x, prompt, levels, latents(2, 1))[0].backward()
    assert x.grad[0].abs().sum() > 0
    assert x.grad[1].abs().sum() == 0  # samples do not mix


def test_noise_is_interpolated() -> None:
    x, eps = latents(3, 0), latents(3, 1)
    noisy = add_noise(x, eps, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(noisy, torch.stack([x[0], 0.75 * x[1] + 0.25 * eps[1], eps[2]]))


def test_taps_beyond_the_backbone_are_refused(backbone) -> None:
    config = TINY_REWARD.model_copy(update={"taps": (2, 4)})
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        LatentRewardModel(backbone, config, seed=0)


def test_training_the_reward_model_leaves_the_generator_alone(backbone) -> None:
    transformer = backbone.load_transformer()
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    truncated = backbone.truncated(transformer, 2)
    with torch.no_grad():
        for parameter in truncated.parameters():
            parameter.zero_()
    assert_same_tensors(transformer.state_dict(), before)
