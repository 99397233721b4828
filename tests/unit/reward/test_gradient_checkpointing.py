"""Recomputed blocks on every family: the same scores and gradients, and blocks that run again in the backward pass."""

import pytest
import torch

from dina_rl.backbones.registry import open_backbone
from dina_rl.config import LoRAConfig, RewardModelConfig
from dina_rl.reward.fit import checkpoint_blocks
from dina_rl.seeding import normal
from tests.tensors import assert_same_tensors
from tests.tiny_reward import PROMPTS, stirred_model

CONFIG = RewardModelConfig(taps=(1, 2), num_heads=4, lora=LoRAConfig(rank=2, alpha=4))


@pytest.mark.parametrize("pipeline", ["tiny_pipeline", "tiny_flux", "tiny_z_image"])
def test_gradients_are_the_same_and_blocks_run_twice(pipeline: str, request: pytest.FixtureRequest) -> None:
    backbone = open_backbone(request.getfixturevalue(pipeline), max_sequence_length=64)
    prompt = backbone.load_text_encoder()(PROMPTS[:2])
    shape = backbone.latent_shape(32, 32)
    gradients, scores, calls = [], [], []
    for recompute in (False, True):
        model = stirred_model(backbone, CONFIG)
        if recompute:
            checkpoint_blocks(model.truncated)
        runs = []
        for name, module in model.truncated.named_modules():
            if name.endswith((".0.attn.to_q.base_layer", ".1.attn.to_q.base_layer", ".0.attention.to_q.base_layer")):
                module.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        score = model.score(normal((2, *shape), "x"), torch.tensor([0.2, 0.7]), prompt)
        assert runs
        forward = len(runs)
        score.sum().backward()
        calls.append((forward, len(runs) - forward))
        scores.append(score.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*scores)
    assert_same_tensors(*gradients)
    (forward, again), (same_forward, recomputed) = calls
    assert (again, same_forward, recomputed) == (0, forward, forward)
