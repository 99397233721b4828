"""The learner's memory: counted on a real step of the tiny model, and on the published sizes without their weights."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.autograd.graph import saved_tensors_hooks

from dina_rl.alignment.footprint import learner_footprint, saved_bytes
from dina_rl.backbones.trained import make_trainable
from dina_rl.config import AlignRun
from dina_rl.runtime import open_pipeline
from dina_rl.types import PromptEmbeds

SD35_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
TRAINED = 23_887_872  # rank 32 on all attention projections


def sd35_medium(directory):
    """The published sizes as a pipeline directory without weights."""
    with torch.device("meta"):
        config = dict(SD3Transformer2DModel(**{**SD35_MEDIUM, "num_layers": 1, "dual_attention_layers": [0]}).config)
    config |= SD35_MEDIUM
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 16}
    files = {
        "model_index.json": {"_class_name": "StableDiffusion3Pipeline"},
        "transformer/config.json": config,
        "vae/config.json": vae,
        "text_encoder/config.json": {"model_type": "clip_text_model", "max_position_embeddings": 77},
    }
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    return {"path": str(directory), "dtype": "bfloat16", "height": 512, "width": 512, "max_sequence_length": 256}


SMALL = {"height": 32, "width": 32, "max_sequence_length": 8}


def run_of(pipeline, **learner):
    learner = {"micro_batch_size": 9, **learner}
    return AlignRun.model_validate({"pipeline": pipeline, "learner": learner, "workers": {"learner_ranks": 2}})


@pytest.mark.parametrize("pipeline", ["tiny_pipeline", "tiny_flux", "tiny_z_image"])
def test_a_counted_step_keeps_what_the_estimate_says(pipeline, request):
    run = run_of({"path": str(request.getfixturevalue(pipeline)), **SMALL})
    backbone = open_pipeline(run.pipeline)
    module = backbone.load_transformer()
    make_trainable(module, run.learner.lora, targets=backbone.lora_targets, seed=0)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens, width, pooled = backbone.prompt_shape
    prompt = PromptEmbeds(embeds=torch.randn(9, tokens, width), pooled=torch.randn(9, pooled))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone.velocity(module, torch.randn(9, 16, 8, 8), torch.rand(9), prompt)
    counted = sum(storage.nbytes() for storage in kept.values())
    empty = backbone.empty_transformer()
    make_trainable(empty, run.learner.lora, targets=backbone.lora_targets, seed=0)
    assert abs(saved_bytes(empty, backbone, run) / counted - 1) < 0.05


def test_sd35_medium_fits_where_it_should(tmp_path):
    pipeline = sd35_medium(tmp_path)
    backbone = open_pipeline(run_of(pipeline).pipeline)
    plain = learner_footprint(run_of(pipeline), backbone)
    base = 2 * (2_243_171_520 + 226_492_416)
    assert plain.weights == base + 4 * TRAINED
    assert plain.optimizer == 3 * 4 * TRAINED
    checkpointed = learner_footprint(run_of(pipeline, gradient_checkpointing=True), backbone)
    assert 20 < plain.activations / 2**30 < 35
    assert checkpointed.activations < plain.activations / 8
    whole = learner_footprint(run_of(pipeline, lora=None, zero_stage=2), backbone)
    assert whole.optimizer == 3 * 4 * 2_243_171_520 // 2
    assert whole.weights == 4 * (2_243_171_520) + 2 * 226_492_416 + 2 * base  # masters, their cast, the reference


def test_the_reference_of_full_fine_tuning_is_whole_on_every_rank(tiny_pipeline):
    def weights(kl_weight):
        values = {"pipeline": {"path": str(tiny_pipeline)}, "grpo": {"kl_weight": kl_weight}}
        learner = {"lora": None, "zero_stage": 3, "micro_batch_size": 9}
        run = AlignRun.model_validate({**values, "learner": learner, "workers": {"learner_ranks": 4}})
        return learner_footprint(run, open_pipeline(run.pipeline)).weights

    transformer = open_pipeline(run_of({"path": str(tiny_pipeline)}).pipeline).load_transformer()
    numbers = sum(tensor.numel() for tensor in (*transformer.parameters(), *transformer.buffers()))
    assert weights(0.1) - weights(0.0) == 4 * numbers
