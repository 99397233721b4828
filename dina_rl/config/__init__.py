"""Every setting of a run: frozen pydantic models, one tree per job. `cli.py` reads them from YAML and overrides.

Defaults are the paper's values where the paper gives one (Tables 7 and 8, sections 5 and C.2); the miniature world's
values live in `configs/`. Each rule that spans several fields has its own message.
"""

from dina_rl.config.algorithms import AlgorithmConfig, AlgorithmName, GRPOConfig, NFTConfig, ReFLConfig
from dina_rl.config.alignment import (
    LearnerConfig,
    PromptsConfig,
    RolloutConfig,
    WatchConfig,
    WorkersConfig,
)
from dina_rl.config.base import LoRAConfig, PipelineConfig, PolicyLoRAConfig
from dina_rl.config.comparing import CompareRuns
from dina_rl.config.evaluation import EvaluateRun, EvaluationWorkersConfig, SetConfig
from dina_rl.config.exporting import ExportRun
from dina_rl.config.fitting import (
    DatasetConfig,
    FilterConfig,
    FitConfig,
    RewardModelConfig,
    ThurstoneConfig,
    TimestepConfig,
)
from dina_rl.config.labelling import LabelRun
from dina_rl.config.measuring import GoldenConfig, ProbePairConfig, ProbesConfig
from dina_rl.config.rewards import (
    IMAGE_SCORERS,
    LRM_RELEASE,
    CLIPScoreConfig,
    DiNaScorerConfig,
    GridConfig,
    HPSv3Config,
    ImageRewardConfig,
    ImageScorerConfig,
    ImageScorerName,
    LRMSD15Config,
    LRMSDXLConfig,
    PickScoreConfig,
    RewardsConfig,
    ScorerConfig,
    ServedScorerConfig,
    ServerConfig,
    UnifiedRewardConfig,
    UnifiedRewardThinkConfig,
)
from dina_rl.config.runs import AlignRun, FitRun, LocalRun
from dina_rl.config.scoring import PictureScorerConfig, ScoreRun
from dina_rl.config.serving import ServeRun

__all__ = [
    "AlgorithmConfig",
    "AlgorithmName",
    "AlignRun",
    "IMAGE_SCORERS",
    "CLIPScoreConfig",
    "CompareRuns",
    "DatasetConfig",
    "DiNaScorerConfig",
    "EvaluateRun",
    "ExportRun",
    "FilterConfig",
    "FitConfig",
    "FitRun",
    "GRPOConfig",
    "GoldenConfig",
    "GridConfig",
    "HPSv3Config",
    "LearnerConfig",
    "NFTConfig",
    "LRMSD15Config",
    "LabelRun",
    "LRMSDXLConfig",
    "LRM_RELEASE",
    "LoRAConfig",
    "LocalRun",
    "ImageRewardConfig",
    "ImageScorerConfig",
    "ImageScorerName",
    "PickScoreConfig",
    "PictureScorerConfig",
    "PipelineConfig",
    "PolicyLoRAConfig",
    "ProbePairConfig",
    "ProbesConfig",
    "PromptsConfig",
    "ReFLConfig",
    "RewardModelConfig",
    "RewardsConfig",
    "RolloutConfig",
    "ScoreRun",
    "ScorerConfig",
    "ServeRun",
    "EvaluationWorkersConfig",
    "ServedScorerConfig",
    "ServerConfig",
    "SetConfig",
    "ThurstoneConfig",
    "UnifiedRewardConfig",
    "UnifiedRewardThinkConfig",
    "TimestepConfig",
    "WatchConfig",
    "WorkersConfig",
]
