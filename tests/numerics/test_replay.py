"""Sampling, replay, diffusers' own sampler and the exported adapter agree."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from dina_rl.alignment.engine import TorchEngine
from dina_rl.alignment.learner import PolicyLearner
from dina_rl.backbones.guidance import guided_velocity
from dina_rl.backbones.lora import adapter_disabled, add_lora, load_lora_state, lora_state, trainable
from dina_rl.config import PipelineConfig
from dina_rl.flow.sampler import denoise, replay_step
from dina_rl.flow.sde import step_law
from dina_rl.runtime import open_pipeline
from dina_rl.seeding import generator, normal
from dina_rl.types import PolicyWeights, TrainingGroup, WorkItem
from tests.rollouts import Rollouts
from tests.tiny_run import tiny_run

PROMPT = "a small red circle on blue"


@pytest.fixture(scope="module")
def moved_adapter(tiny_pipeline):
    """An adapter that changes the model's function."""
    backbone = open_pipeline(PipelineConfig(path=str(tiny_pipeline)))
    transformer = backbone.load_transformer()
    add_lora(transformer, rank=2, alpha=4, targets=backbone.lora_targets, seed=0)
    noise = generator("moved adapter")
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
        for name, tensor in lora_state(transformer).items()
    }
    return PolicyWeights(version=0, tensors=state)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_pipeline, tiny_reward):
    return tiny_run(tmp_path_factory.mktemp("run"), tiny_pipeline, tiny_reward)


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance", "cps"])
def test_replayed_log_probs_equal_the_sampled_ones_bit_for_bit(run, moved_adapter, dynamics):
    run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"dynamics": dynamics})})
    worker = Rollouts(run)
    worker.load_weights(moved_adapter)
    item = WorkItem(iteration=0, prompt_id=7, prompt=PROMPT, group_size=3)
    trajectory = worker.rollout([item])[0]

    backbone = open_pipeline(run.pipeline)
    policy = backbone.load_transformer()
    add_lora(policy, rank=2, alpha=4, targets=backbone.lora_targets, seed=0)
    load_lora_state(policy, moved_adapter.tensors)
    prompt = trajectory.prompt.repeat(3)
    for k in range(run.rollout.window_steps):
        law = step_law(dynamics, trajectory.sigmas, trajectory.window_start + k, trajectory.noise_level)
        before, after = trajectory.states[k], trajectory.states[k + 1]
        velocity = backbone.velocity(policy, before, trajectory.sigmas[k].expand(3), prompt)  # with gradient
        again, _ = replay_step(law, before, after, velocity)
        assert torch.equal(again.detach(), trajectory.log_probs[k])


def test_first_update_has_ratio_exactly_one_and_changes_the_policy(run):
    worker = Rollouts(run)
    items = [WorkItem(iteration=0, prompt_id=i, prompt=PROMPT, group_size=3) for i in range(4)]
    learner = PolicyLearner(run, lambda module: TorchEngine(module, run.learner))
    worker.load_weights(learner.policy())
    trajectories = [t for item in items for t in worker.rollout([item])]
    advantages = torch.tensor([1.0, 0.0, -1.0])
    before = learner.policy()
    metrics = learner.update(0, [TrainingGroup(rollout=t, advantages=advantages) for t in trajectories])
    assert metrics["first_ratio_gap"] == 0
    assert metrics["largest_ratio_gap"] > 0, "the second minibatch sees the updated policy"
    assert metrics["kl"] > 0
    after = learner.policy()
    assert after.version == 2
    assert any(not torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)


def test_a_stale_trajectory_is_refused(run):
    worker = Rollouts(run)
    learner = PolicyLearner(run, lambda module: TorchEngine(module, run.learner))
    trajectory = worker.rollout([WorkItem(iteration=0, prompt_id=0, prompt=PROMPT, group_size=3)])[0]
    learner.version = 1
    with pytest.raises(ValueError, match="sampled by policy version 0, the learner is at 1"):
        learner.update(0, [TrainingGroup(rollout=trajectory, advantages=torch.tensor([1.0, 0.0, -1.0]))])


def test_a_group_is_sampled_alike_alone_and_beside_others(run):
    worker = Rollouts(run)
    items = [WorkItem(iteration=1, prompt_id=i, prompt=PROMPT, group_size=3) for i in range(2)]
    together, alone = worker.rollout(items), [worker.rollout([item])[0] for item in items]
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-5)
    assert not torch.allclose(together[0].latents, together[1].latents, atol=0.1), "groups must differ in noise"
    assert not torch.allclose(together[0].latents[0], together[0].latents[1], atol=0.1), "samples must differ too"


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_our_ode_equals_diffusers(tiny_pipeline, guidance_scale):
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = normal((2, 16, 8, 8), "ode")
    theirs = pipeline(
        prompt=[PROMPT] * 2,
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        latents=noise.clone(),
        height=32,
        width=32,
        max_sequence_length=8,
        output_type="latent",
    ).images
    backbone = open_pipeline(PipelineConfig(path=str(tiny_pipeline)))
    transformer, text = backbone.load_transformer(), backbone.load_text_encoder()

    negative = None if guidance_scale == 1 else text([""])
    velocity = guided_velocity(backbone, transformer, text([PROMPT] * 2), negative, guidance_scale)
    ours = denoise(noise, backbone.sigmas(6, 32, 32), velocity).latents
    # diffusers' pipeline returns normalised latents for output_type="latent"
    assert torch.allclose(ours, theirs, atol=1e-6 * theirs.abs().max().item())


def test_exported_adapter_gives_stock_diffusers_the_same_velocity(tmp_path, tiny_pipeline, moved_adapter):
    backbone = open_pipeline(PipelineConfig(path=str(tiny_pipeline)))
    policy = backbone.load_transformer()
    add_lora(policy, rank=2, alpha=4, targets=backbone.lora_targets, seed=0)
    load_lora_state(policy, moved_adapter.tensors)
    backbone.save_adapter(tmp_path, moved_adapter.tensors, rank=2, alpha=4, targets=backbone.lora_targets)
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, dtype=torch.float32)
    stock.load_lora_weights(tmp_path)
    prompt = backbone.load_text_encoder()([PROMPT]).repeat(2)
    latents, sigma = normal((2, 16, 8, 8), "export"), torch.tensor([0.7, 0.3])
    with torch.no_grad():
        ours = backbone.velocity(policy, latents, sigma, prompt)
        theirs = backbone.velocity(stock.transformer, latents, sigma, prompt)
        with adapter_disabled(policy):
            base = backbone.velocity(policy, latents, sigma, prompt)
        plain = backbone.velocity(backbone.load_transformer(), latents, sigma, prompt)
    assert torch.equal(ours, theirs)
    assert torch.equal(base, plain)
    assert not torch.allclose(ours, base, atol=1e-3)
    assert {parameter.requires_grad for parameter in trainable(policy).values()} == {True}
