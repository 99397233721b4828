"""What an LRM is made of: the first half of a UNet between a VAE and two projections."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection

TIMESTEP = 1
"""Of the noise. The published models are trained on {1, 51, ..., 951} and measured on pictures at 1: Kwai-Kolors/LPO,
lrm/lrm_15/trainer/datasets/step_sd_hf_dataset.py and lrm/lrm_xl/trainer/datasets/step_sdxl_hf_dataset.py, of every
split but that of training."""
GUIDANCE = 7.5  # Kwai-Kolors/LPO, lrm/lrm_15/trainer/conf/step_sd15.yaml, of the middle alone (multi_scale_cfg: False)
RESIDUAL = 1  # of each down block, the second: numbers 2, 5, 8 and 11 of all, of which the first is the UNet's input
LEFT_OUT = ("up_blocks.", "conv_norm_out.", "conv_out.")  # of a UNet: what comes after its middle

TextModel = CLIPTextModel | CLIPTextModelWithProjection


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A prompt, encoded."""

    hidden: torch.Tensor  # [1, L, D] what the UNet attends to
    pooled: torch.Tensor  # [1, P] of the last text encoder
    feature: torch.Tensor  # [1, E] what pictures are compared with


class Head(nn.Module):
    """What `state_dict.pt` holds. SDXL's text encoder has a projection of its own."""

    def __init__(self, unet: UNet2DConditionModel, texts: Sequence[TextModel]) -> None:
        super().__init__()
        widths, text = unet.config["block_out_channels"], texts[-1].config
        width = text.projection_dim
        assert isinstance(width, int)
        self.visual_projection = nn.Linear(sum(widths) + widths[-1], width, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, width, bias=False) if len(texts) == 1 else None
        self.logit_scale = nn.Parameter(torch.zeros(()))


class LRM(nn.Module):
    """Scores noisy latents; from the VAE on, all that a score needs.

    Args:
        unet: `truncated`.
        texts: CLIP's, one (SD1.5) or two (SDXL).
    """

    def __init__(
        self, *, vae: AutoencoderKL, unet: UNet2DConditionModel, texts: Sequence[TextModel], head: Head
    ) -> None:
        super().__init__()
        self.vae, self.unet, self.texts, self.head = vae, unet, nn.ModuleList(texts), head
        self.text_lengths = [text.config.max_position_embeddings for text in texts]
        self.edge: int = unet.config["sample_size"] * 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.latent_shape = (1, vae.config["latent_channels"], unet.config["sample_size"], unet.config["sample_size"])

    def latents(self, image: torch.Tensor) -> torch.Tensor:
        """Latents [1, C, h, w] of a picture [1, 3, edge, edge] in [0, 1].

        The mean of the posterior, where the published code draws from it: a picture has one score.
        """
        mean: torch.Tensor = self.vae.encode(2 * image - 1).latent_dist.mean
        scaled: torch.Tensor = mean * self.vae.config["scaling_factor"]
        return scaled

    def score(self, noisy: torch.Tensor, words: Words, empty: Words) -> torch.Tensor:
        """Score [1] of noisy latents [1, C, h, w]."""
        stages, middle = self._halfway(noisy, words)
        _, unconditional = self._halfway(noisy, empty)
        guided = unconditional + GUIDANCE * (middle - unconditional)
        seen = self.head.visual_projection(torch.cat([*stages, guided], dim=-1))
        return self.head.logit_scale.exp() * functional.cosine_similarity(seen, words.feature, dim=-1)

    def read(self, tokens: Sequence[torch.Tensor]) -> Words:
        """One prompt's tokens [1, L], for each text encoder."""
        read = [text(each, output_hidden_states=True) for text, each in zip(self.texts, tokens, strict=True)]
        if self.head.text_projection is not None:
            (only,) = read
            pooled = only.pooler_output
            return Words(hidden=only.last_hidden_state, pooled=pooled, feature=self.head.text_projection(pooled))
        pooled = read[-1].text_embeds
        hidden = torch.cat([each.hidden_states[-2] for each in read], dim=-1)
        return Words(hidden=hidden, pooled=pooled, feature=pooled)

    def _halfway(self, noisy: torch.Tensor, words: Words) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Averages over the picture, [1, c] each: of the residual of every down block, and of the middle block."""
        stages: list[torch.Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _block, _given, out: stages.append(out[1][RESIDUAL].mean(dim=(2, 3))))
            for block in self.unet.down_blocks
        ]
        try:
            middle = self.unet(
                noisy, TIMESTEP, encoder_hidden_states=words.hidden, added_cond_kwargs=self._added(words)
            ).sample
        finally:
            for hook in hooks:
                hook.remove()
        return stages, middle.mean(dim=(2, 3))

    def _added(self, words: Words) -> dict[str, torch.Tensor] | None:
        """What SDXL's UNet is told of the picture: its size, nothing cut off, its size again."""
        if self.unet.config["addition_embed_type"] is None:
            return None
        size = [self.edge, self.edge]
        return {
            "text_embeds": words.pooled,
            "time_ids": torch.tensor([[*size, 0, 0, *size]], dtype=words.pooled.dtype, device=words.pooled.device),
        }


def truncated(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet, without what comes after its middle block, whose output becomes its own."""
    for name, nothing in (("up_blocks", nn.ModuleList()), ("conv_norm_out", None), ("conv_out", nn.Identity())):
        unet.register_module(name, nothing)
    return unet
