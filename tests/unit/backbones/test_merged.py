"""An adapter merged into the weights: the same function, and no trace of what was merged before."""

from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from dina_rl.alignment.algorithms.registry import merges
from dina_rl.alignment.sampler import PolicySampler
from dina_rl.backbones.trained import trained_parameters
from dina_rl.config import AlignRun
from dina_rl.seeding import normal
from dina_rl.sleep import Luggage
from dina_rl.types import PolicyWeights
from tests.tensors import assert_same_tensors, in_parts
from tests.tiny_run import tiny_run


def run_of(pipeline: Path, dtype: str = "float32", **changes) -> AlignRun:
    run = tiny_run(Path("run"), pipeline, pipeline, **changes)
    return run.model_copy(update={"pipeline": run.pipeline.model_copy(update={"dtype": dtype})})


def adapter(sampler: PolicySampler, key: str, size: float = 0.1) -> PolicyWeights:
    """Weights that change the function of the policy; `sampler` holds an adapter."""
    shapes = {name: each.shape for name, each in trained_parameters(sampler.transformer).items()}
    tensors = {name: size * normal(tuple(shape), key, name) for name, shape in shapes.items()}
    return PolicyWeights(version=1, tensors=tensors)


def velocity(sampler: PolicySampler) -> torch.Tensor:
    latents, texts = normal((2, *sampler.latent_shape), "merged"), sampler.backbone.load_text_encoder()
    prompt = texts(["a small red circle"] * 2)
    with torch.no_grad():
        return sampler.velocity(prompt, 1.0, texts).followed(latents, torch.tensor([0.4, 0.9]))


def weights_of(sampler: PolicySampler) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in sampler.transformer.named_parameters()}


@pytest.mark.parametrize("pipeline", ["tiny_pipeline", "tiny_flux", "tiny_z_image"])
def test_a_merged_policy_is_the_same_function_without_lora_layers(
    pipeline: str, request: pytest.FixtureRequest
) -> None:
    sizes = {"height": 32, "width": 32, "max_sequence_length": 8}
    run = tiny_run(Path("run"), request.getfixturevalue(pipeline), Path("reward"))
    run = run.model_copy(update={"pipeline": run.pipeline.model_copy(update=sizes)})
    separate, merged = PolicySampler(run), PolicySampler(run, merged=True)
    base = velocity(merged)
    assert torch.equal(velocity(separate), base)
    weights = adapter(separate, "one")
    separate.load_weights(weights)
    merged.load_weights(weights)
    assert not any(isinstance(each, BaseTunerLayer) for each in merged.transformer.modules())
    assert not torch.allclose(velocity(merged), base, atol=1e-2)
    torch.testing.assert_close(velocity(merged), velocity(separate), rtol=1e-4, atol=1e-4)


def test_every_merge_starts_from_the_weights_as_they_were_loaded(tiny_pipeline: Path) -> None:
    run = run_of(tiny_pipeline, "bfloat16")
    sampler, pattern = PolicySampler(run, merged=True), PolicySampler(run)
    loaded = weights_of(sampler)
    one, two, none = (adapter(pattern, *each) for each in (("one",), ("two",), ("none", 0.0)))
    sampler.load_weights(one)
    first = weights_of(sampler)
    for part in in_parts(two, 5):
        before = weights_of(sampler)
        assert_same_tensors(before, first)  # until the last part has come
        sampler.load_weights(part)
    changed = {name for name, each in weights_of(sampler).items() if not torch.equal(each, first[name])}
    assert changed == {name.replace(".lora_A", "") for name in one.tensors if ".lora_A" in name}
    luggage = Luggage()
    luggage.pack(sampler.transformer.parameters())
    luggage.unpack()
    sampler.load_weights(one)
    assert_same_tensors(weights_of(sampler), first)
    sampler.load_weights(none)
    assert_same_tensors(weights_of(sampler), loaded)


def test_weights_of_another_policy_are_refused(tiny_pipeline: Path) -> None:
    run = run_of(tiny_pipeline)
    sampler, weights = PolicySampler(run, merged=True), adapter(PolicySampler(run), "one")
    for wrong in (dict(list(weights.tensors.items())[1:]), {**weights.tensors, "other": torch.zeros(1)}):
        with pytest.raises(ValueError, match="weights do not fit"):
            sampler.load_weights(PolicyWeights(version=1, tensors=wrong))


def test_where_the_learner_relies_on_the_rollouts_digits_nothing_is_merged(tiny_pipeline: Path) -> None:
    assert not merges(run_of(tiny_pipeline))
    assert merges(run_of(tiny_pipeline, "bfloat16"))
    assert merges(run_of(tiny_pipeline, grpo={"old_log_probs": "recompute"}))
    assert not merges(run_of(tiny_pipeline, "bfloat16", grpo={"old_log_probs": "rollout"}))
    assert not merges(run_of(tiny_pipeline, "bfloat16", learner={"lora": None}))
    refl = {"algorithm": "refl", "refl": {"stop_range": [1, 3]}, "learner": {"updates_per_iteration": 1}}
    assert not merges(run_of(tiny_pipeline, **refl))
    assert merges(run_of(tiny_pipeline, "bfloat16", **refl))
    assert merges(run_of(tiny_pipeline, algorithm="nft", nft={"levels": 3}))
