"""q(t): which noise levels a preference pair is trained at (paper section 4.1)."""

import torch

from dina_rl.config import TimestepConfig


def draw_timestep(config: TimestepConfig, generator: torch.Generator) -> torch.Tensor:
    """One noise level t in [0, 1], a scalar fp32 tensor."""
    match config.distribution:
        case "fixed":
            return torch.tensor(config.fixed, dtype=torch.float32)
        case "uniform":
            return torch.rand((), generator=generator)
        case "logit_normal":
            return torch.sigmoid(config.mean + config.std * torch.randn((), generator=generator))
