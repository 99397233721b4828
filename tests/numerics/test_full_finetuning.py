"""Full fine-tuning: the same loop with all weights trained instead of an adapter."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.loop import align, plan
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.alignment.sampler import PolicySampler
from dina_rl.backbones.trained import check_targets, make_trainable, trained_parameters, trained_state
from dina_rl.config import PolicyLoRAConfig
from dina_rl.runtime import open_pipeline
from dina_rl.types import PolicyWeights
from jobs.align import exporter
from tests.tensors import assert_same_tensors, in_parts
from tests.tiny_run import tiny_run

WHOLE = {"lora": None, "learning_rate": 1e-4, "ema_decay": 0.0}


def perform(run):
    recorder = Recorder(run, run.run_dir, exporter(run))
    align(run, load_prompts(run.prompts), InlineExperience(run), InlineLearner(run), recorder)
    return recorder


def test_a_run_trains_all_weights_and_exports_a_stock_transformer(tmp_path, tiny_pipeline, tiny_reward):
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, learner=WHOLE, iterations=2)
    recorder = perform(run)
    assert [entry["first_ratio_gap"] for entry in recorder.history.iterations()] == [0, 0]
    assert recorder.history.iterations()[1]["kl"] > 0  # against the second transformer, which stays the base
    base = SD3Transformer2DModel.from_pretrained(tiny_pipeline, subfolder="transformer").state_dict()
    ours = SD3Transformer2DModel.from_pretrained(recorder.exported).state_dict()
    moved = [name for name in base if not torch.equal(base[name], ours[name])]
    assert {"proj_out.weight", "transformer_blocks.0.ff.net.2.weight", "context_embedder.bias"} <= set(moved)


def test_the_kl_to_the_base_is_zero_before_the_first_update(tmp_path, tiny_pipeline, tiny_reward):
    learner = {**WHOLE, "updates_per_iteration": 1}
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, learner=learner)
    items = plan(run, load_prompts(run.prompts).train, 0)
    handles = [group.handle for group in InlineExperience(run).collect(items)]
    metrics = InlineLearner(run).update(0, handles, torch.tensor([[-1.0, 0.0, 1.0]] * len(items)), 1.0)
    assert metrics["kl"] == 0
    assert metrics["grad_norm"] > 0


def test_below_float32_masters_stay_float32_and_old_log_probs_are_the_learners_own(
    tmp_path, tiny_pipeline, tiny_reward
):
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, learner=WHOLE)
    run = run.model_copy(update={"pipeline": run.pipeline.model_copy(update={"dtype": "bfloat16"})})
    learner = InlineLearner(run)
    assert {tensor.dtype for tensor in learner.policy().tensors.values()} == {torch.float32}
    items = plan(run, load_prompts(run.prompts).train, 0)
    handles = [group.handle for group in InlineExperience(run).collect(items)]
    metrics = learner.update(0, handles, torch.tensor([[-1.0, 0.0, 1.0]] * len(items)), 1.0)
    assert metrics["first_ratio_gap"] == 0
    assert metrics["first_log_prob_noise"] > 0  # autocast rounds elsewhere than the rollout's bfloat16 weights do


def test_weights_in_parts_are_the_same_weights_and_a_gap_is_refused(tmp_path, tiny_pipeline, tiny_reward):
    run = tiny_run(tmp_path, tiny_pipeline, tiny_reward, learner=WHOLE)
    sampler = PolicySampler(run)
    state = {name: torch.randn_like(tensor) for name, tensor in InlineLearner(run).policy().tensors.items()}
    parts = in_parts(PolicyWeights(version=3, tensors=state), 6)
    for part in parts:
        sampler.load_weights(part)
    assert_same_tensors(trained_state(sampler.transformer), state)
    sampler.load_weights(parts[0])
    with pytest.raises(ValueError, match="part 2 of the policy's weights came where 1 was due"):
        sampler.load_weights(parts[2])


def test_an_adapter_has_pefts_names(tiny_pipeline):
    from peft import get_peft_model_state_dict

    backbone = open_pipeline(tiny_run("run", tiny_pipeline, tiny_pipeline).pipeline)
    module = backbone.load_transformer()
    lora = PolicyLoRAConfig(rank=2, alpha=4, targets=("attn.to_q", "ff.net.2"))
    make_trainable(module, lora, targets=backbone.lora_targets, seed=0)
    assert set(trained_parameters(module)) == set(get_peft_model_state_dict(module))
    adapted = {name.split(".lora_")[0].split(".", 2)[2] for name in trained_parameters(module)}
    assert adapted == {"attn.to_q", "ff.net.2"}
    assert PolicyLoRAConfig.model_validate({"targets": "attn.to_q"}).targets == ("attn.to_q",)
    with pytest.raises(ValueError, match=r"no linear layer of the transformer is called attn.to_x \(some are: "):
        check_targets(backbone.empty_transformer(), PolicyLoRAConfig(targets=("attn.to_x",)))
