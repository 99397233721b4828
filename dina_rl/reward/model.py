"""LatentRewardModel: truncated diffusion backbone + scoring head, in latent space (paper sections 4.2 and 4.3).

Shapes: B samples, K noise levels, C H W latent.
"""

from collections.abc import Sequence

import torch
from torch import nn

from dina_rl.backbones.base import Backbone
from dina_rl.backbones.lora import add_lora
from dina_rl.config import RewardModelConfig
from dina_rl.flow.process import add_noise
from dina_rl.reward.head import RewardHead
from dina_rl.seeding import derive_seed
from dina_rl.types import PromptEmbeds


class LatentRewardModel(nn.Module):
    """r_theta(x_t, t, c). Trainable: the head (fp32) and, unless `config.lora` is None, LoRA on the backbone (fp32).

    The backbone is a copy: neither its adapters nor their training touch the generator. All scores are differentiable
    with respect to the latents. Noise is always given by the caller, who alone knows what it must be shared with.

    Raises:
        ValueError: taps beyond the backbone, or attention heads that do not divide the scoring head's width.
    """

    def __init__(self, backbone: Backbone, config: RewardModelConfig, *, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.truncated = backbone.truncated(backbone.load_transformer(), config.taps[-1])
        self.truncated.requires_grad_(False)
        if config.lora is not None:
            add_lora(
                self.truncated,
                rank=config.lora.rank,
                alpha=config.lora.alpha,
                targets=backbone.lora_targets,
                seed=seed,
            )
        # Constructors draw from torch's global generator: fork it, so that nobody else notices.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "reward-head"))
            self.head = RewardHead(
                config.head_width or backbone.width,
                token_width=backbone.width,
                time_width=backbone.time_width,
                num_taps=len(config.taps),
                num_queries=config.num_queries,
                num_heads=config.num_heads,
            )
        self.head.to(next(self.truncated.parameters()).device)

    def score(self, noisy_latents: torch.Tensor, t: torch.Tensor, prompt: PromptEmbeds) -> torch.Tensor:
        """r(x_t, t, c) [B] of latents x_t [B, C, H, W] at noise levels t [B], one prompt row per sample (Eq. 11)."""
        return self._score(noisy_latents, t, prompt, num_levels=1)

    def score_clean(
        self, latents: torch.Tensor, prompt: PromptEmbeds, levels: Sequence[float], noise: torch.Tensor
    ) -> torch.Tensor:
        """Scores [B] of clean latents [B, C, H, W] at one level (Eq. 12) or an ensemble of levels (Eq. 13, Alg. 2).

        All levels run in one backbone forward, and share `noise` [B, C, H, W].
        """
        count = len(levels)
        t = torch.tensor(levels, dtype=torch.float32, device=latents.device).repeat(len(latents))
        noisy = add_noise(latents.repeat_interleave(count, 0), noise.repeat_interleave(count, 0), t)
        return self._score(noisy, t, prompt.repeat(count), num_levels=count)

    def unit_scores(
        self, latents: torch.Tensor, unit: torch.Tensor, t: torch.Tensor, prompt: PromptEmbeds, noise: torch.Tensor
    ) -> torch.Tensor:
        """Scores [B] of clean latents [B, C, H, W] in one forward, those of a unit noised alike (Alg. 1: a pair's two).

        Args:
            unit: of every latent [B] int64; U of them.
            t: of every unit [U].
            prompt: of every unit.
            noise: of every unit [U, C, H, W].
        """
        levels = t[unit]
        return self.score(add_noise(latents, noise[unit], levels), levels, prompt.select(unit))

    def forward(
        self, latents: torch.Tensor, unit: torch.Tensor, t: torch.Tensor, prompt: PromptEmbeds, noise: torch.Tensor
    ) -> torch.Tensor:
        """`unit_scores` under the name that wrappers such as DistributedDataParallel call."""
        return self.unit_scores(latents, unit, t, prompt, noise)

    def _score(
        self, noisy_latents: torch.Tensor, t: torch.Tensor, prompt: PromptEmbeds, *, num_levels: int
    ) -> torch.Tensor:
        features = self.backbone.features(self.truncated, noisy_latents, t, prompt, self.config.taps)
        scores: torch.Tensor = self.head(features, num_levels=num_levels)
        return scores
