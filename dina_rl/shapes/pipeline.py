"""A tiny SD3.5 made of the real classes: what `StableDiffusion3Pipeline.from_pretrained` loads, in 6 MB.

Only sizes differ from `stabilityai/stable-diffusion-3.5-medium`: the transformer has its qk_norm rms_norm and
dual attention layers, the VAE its 16 latent channels, the text side two CLIP models and a T5 with real
tokenizers. The text encoders stay as initialised: random features tell the 17 words of the grammar apart.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers.models import AutoencoderKL, SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dina_rl.shapes.grammar import WORDS
from dina_rl.shapes.render import IMAGE_SIZE

SHIPPED_PIPELINE = Path(__file__).parent / "pipeline"
MAX_SEQUENCE_LENGTH = 8  # six words, begin and end
LATENT_SIZE = IMAGE_SIZE // 4

CLIP_WIDTH = 32  # two of them side by side make the 64 that the transformer is conditioned on
T5_WIDTH = 64
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def build_pipeline(seed: int) -> StableDiffusion3Pipeline:
    """A randomly initialised pipeline, fp32 on the CPU; the same seed gives the same weights.

    The text encoders' weights are rounded to fp16 values, so that saving them in fp16 changes nothing.
    """
    # Model constructors draw from torch's global generator: fork it, so that nobody else notices.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_vocabulary, merges = _clip_vocabulary()
        text_encoder = _clip(clip_vocabulary, activation="quick_gelu")
        text_encoder_2 = _clip(clip_vocabulary, activation="gelu")
        tokenizer_3 = _t5_tokenizer()
        text_encoder_3 = _t5(len(tokenizer_3))
        vae = _vae()
        transformer = _transformer()
    for encoder in (text_encoder, text_encoder_2, text_encoder_3):
        _freeze_rounded(encoder)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_clip_tokenizer(clip_vocabulary, merges),
        text_encoder_2=text_encoder_2,
        tokenizer_2=_clip_tokenizer(clip_vocabulary, merges),
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def _transformer() -> SD3Transformer2DModel:
    transformer: SD3Transformer2DModel = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,
        caption_projection_dim=128,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return transformer


def _vae() -> AutoencoderKL:
    vae: AutoencoderKL = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    return vae


def _clip(vocabulary: dict[str, int], *, activation: str) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        hidden_act=activation,
        bos_token_id=vocabulary[BEGIN],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    return CLIPTextModelWithProjection(config)


def _t5(vocabulary_size: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=T5_WIDTH,
        d_kv=T5_WIDTH // 2,
        d_ff=2 * T5_WIDTH,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def _freeze_rounded(encoder: nn.Module) -> None:
    encoder.eval().requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.copy_(parameter.half().float())


def _clip_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=dict(vocabulary),
        merges=list(merges),  # type: ignore[arg-type]  # declared strings, but the tokenizer takes pairs
        model_max_length=MAX_SEQUENCE_LENGTH,
    )


def _clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding trained on the grammar's words until each is one token: vocabulary and merges.

    Trained rather than written down word by word, because merges apply by rank to all words: hand-written
    ones split words that share letters.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: index for index, token in enumerate([*letters, *(f"{c}{WORD_END}" for c in letters)])}
    merges: list[tuple[str, str]] = []
    words = [[*word[:-1], word[-1] + WORD_END] for word in WORDS]
    while any(len(word) > 1 for word in words):
        counts = Counter(pair for word in words for pair in pairwise(word))
        best = max(counts, key=lambda pair: (counts[pair], pair))  # ties by spelling: deterministic
        merges.append(best)
        vocabulary.setdefault(best[0] + best[1], len(vocabulary))
        words = [_merged(word, best) for word in words]
    for special in (BEGIN, END):
        vocabulary[special] = len(vocabulary)
    return vocabulary, merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    position = 0
    while position < len(word):
        if tuple(word[position : position + 2]) == pair:
            result.append(pair[0] + pair[1])
            position += 2
        else:
            result.append(word[position])
            position += 1
    return result


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = ("</s>", vocabulary["</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
    )
