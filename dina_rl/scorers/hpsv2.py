"""HPSv2 and HPSv2.1 (Wu et al., 2023): open_clip's ViT-H-14, fine-tuned on comparisons; their score is the cosine.

The released files are state dicts in open_clip's names, and become a CLIPModel here. Sizes, tokenizer and image
processor are those of the CLIP model that was fine-tuned. open_clip also mends broken unicode in prompts (ftfy), and
pads them with another token; nothing that is read comes after the end of a prompt.
"""

import re

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from dina_rl.config import ImageScorerConfig
from dina_rl.loading import loading
from dina_rl.reward.card import check_tensors
from dina_rl.scorers.base import ImageKind
from dina_rl.scorers.clip import CLIPScorer, check_clip, clip_config, empty_clip, frozen
from dina_rl.scorers.clip_input import CLIPInput
from dina_rl.scorers.weights import Tensors, file_if_here, load_tensors, released_file

FILES = ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")  # tgxs002/HPSv2, hpsv2/utils.py, of xswu/HPSv2
STATE = "state_dict"  # tgxs002/HPSv2, hpsv2/img_score.py
ACTIVATION = "gelu"  # mlfoundations/open_clip, src/open_clip/model_configs/ViT-H-14.json: quick_gelu is not set

# Names of mlfoundations/open_clip, src/open_clip/{model,transformer}.py, and of transformers' CLIPModel
PLAIN = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
TOWERS = {"transformer": "text_model", "visual.transformer": "vision_model"}
BLOCK = re.compile(r"((?:visual\.)?transformer)\.resblocks\.(\d+)\.(.+)(weight|bias)")
PARTS = {
    "ln_1.": "layer_norm1",
    "ln_2.": "layer_norm2",
    "attn.out_proj.": "self_attn.out_proj",
    "mlp.c_fc.": "mlp.fc1",
    "mlp.c_proj.": "mlp.fc2",
}
FUSED = "attn.in_proj_"  # queries, keys and values, in this order


def clip_names(state: Tensors) -> Tensors:
    """open_clip's tensors by the names and in the shapes of a CLIPModel; what is none of them keeps its name."""
    renamed: Tensors = {}
    for name, tensor in state.items():
        block = BLOCK.fullmatch(name)
        if name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = tensor.T
        elif block is not None:
            renamed |= _of_block(block, tensor)
        else:
            renamed[PLAIN.get(name, name)] = tensor
    return renamed


def _of_block(found: re.Match[str], tensor: torch.Tensor) -> Tensors:
    tower, layer, part, kind = found.groups()
    prefix = f"{TOWERS[tower]}.encoder.layers.{layer}"
    if part == FUSED:
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{which}_proj.{kind}": third for which, third in thirds}
    return {f"{prefix}.{PARTS[part]}.{kind}" if part in PARTS else found.string: tensor}


def check_hpsv2(config: ImageScorerConfig, name: str) -> None:
    """Raises ValueError where the released file or its CLIP model is not there, or they do not fit together."""
    check_clip(config.processor, config.processor)
    file = file_if_here(config.path, name)
    if file is not None:
        check_tensors(clip_names(load_tensors(file, STATE)), empty_clip(config.processor).model.state_dict(), file)


def open_hpsv2(config: ImageScorerConfig, name: str, device: str) -> CLIPScorer:
    """Raises ValueError as `check_hpsv2`."""
    check_clip(config.processor, config.processor)
    file = released_file(config.path, name)
    sizes = clip_config(config.processor)
    state = clip_names(load_tensors(file, STATE))
    check_tensors(state, empty_clip(config.processor).model.state_dict(), file)
    with loading("the model", file):
        model = frozen(_filled(sizes, state), device)
    return CLIPScorer(model, CLIPInput(config.processor, device=device), learned_scale=False)


def _filled(sizes: CLIPConfig, state: Tensors) -> CLIPModel:
    for tower in (sizes.text_config, sizes.vision_config):
        assert isinstance(tower, CLIPTextConfig | CLIPVisionConfig)
        tower.hidden_act = ACTIVATION
    whole = {name: tensor.float().contiguous() for name, tensor in state.items()}
    model: CLIPModel = CLIPModel.from_pretrained(None, config=sizes, state_dict=whole)
    return model


def _kind(name: str) -> ImageKind:
    return ImageKind(
        open=lambda config, device: open_hpsv2(config, name, device),
        check=lambda config: check_hpsv2(config, name),
        empty=lambda config: empty_clip(config.processor),
        files=(name, "preprocessor_config.json"),
    )


HPSV2, HPSV2_1 = map(_kind, FILES)
