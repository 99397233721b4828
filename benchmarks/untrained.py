"""A reward model as the fit begins: its speed is that of a fitted one."""

from pathlib import Path

from dina_rl.config import PipelineConfig, RewardModelConfig
from dina_rl.reward.checkpoint import save_reward
from dina_rl.reward.model import LatentRewardModel
from dina_rl.runtime import open_pipeline, sized


def save_untrained(directory: Path, pipeline: PipelineConfig, reward: RewardModelConfig) -> Path:
    """A DiNa-LRM on `pipeline` as `jobs.fit_reward` would save it.

    Raises:
        ValueError: a pipeline that cannot be read, or a reward model that does not fit it.
    """
    backbone = open_pipeline(pipeline)
    save_reward(LatentRewardModel(backbone, reward, seed=0), directory, pipeline=sized(pipeline, backbone))
    return directory
