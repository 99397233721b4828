"""What the GPU's benchmark is asked for, and the runs that it makes of it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from benchmarks.options import one_or_several
from dina_rl.cli import read_yaml
from dina_rl.config import AlignRun, FitConfig, LoRAConfig, PipelineConfig, RewardModelConfig
from dina_rl.config.base import Positive, Section

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL_REWARD = RewardModelConfig(taps=(1, 2, 3), num_heads=4, lora=LoRAConfig(rank=4, alpha=8))
PIXELS, TEXT_TOKENS = 512, 256
TINY_PIXELS, TINY_TEXT_TOKENS = 32, 8


Setting = Literal["fast", "full"]


class BenchmarkRun(Section):
    """Parity with the CPU, then speed and memory of SD3.5-medium at 512 pixels."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cpu, with tiny, tries this command out"""
    tiny: bool = False
    """the miniature world's sizes in place of SD3.5-medium's"""
    pipeline: str | None = None
    """an SD3.5-medium to measure with its weights and text encoders: a directory or hub id; None: random weights of its
    sizes, made on the device, and random embeddings in place of text encoders, which are neither loaded nor timed"""
    settings: Annotated[tuple[Setting, ...], BeforeValidator(one_or_several)] = ("fast", "full")
    """which of the two are measured"""
    fast: Path = CONFIGS / "sd35m_flow_grpo_fast.yaml"
    """preset of the first setting; on a card of 24 GB take configs/sd35m_flow_grpo_fast_1gpu.yaml"""
    full: Path = CONFIGS / "sd35m_flow_grpo.yaml"
    """preset of the second one: guidance, all steps trained"""
    reward: Path = CONFIGS / "reward_sd35m.yaml"
    """preset of the reward model and its fit"""
    groups: Positive = 2
    """groups of an iteration: times are in proportion to them"""
    group_size: Positive = 18
    """samples of a group, and of a forward of the rollout"""
    micro_batch_size: Positive = 9
    """samples of a forward with a gradient"""
    pairs: Positive = 4
    """pairs of a step of the fit"""
    repeats: Positive = 2
    """iterations of each setting, and steps of the fit, after one that does not count"""
    out: Path = Path("runs/gpu.json")
    """where the figures go"""


def align_run(benchmark: BenchmarkRun, preset: Path, pipeline: Path | str, reward: Path) -> AlignRun:
    """An alignment by a preset, on one GPU and with the benchmark's batches.

    Raises:
        ValueError: a preset that cannot be read, or batches that do not divide.
    """
    values = read_yaml(preset)
    sections = {name: dict(_mapping(values.get(name))) for name in ("pipeline", "rollout", "learner", "grpo")}
    sections["pipeline"] |= _pipeline(benchmark, pipeline)
    sections["rollout"] |= {
        "prompts_per_iteration": benchmark.groups,
        "group_size": benchmark.group_size,
        "groups_per_call": 1,
    }
    sections["learner"] |= {"micro_batch_size": benchmark.micro_batch_size, "engine": "torch"}
    dina = {"path": str(reward), "levels": [0.4]}
    return AlignRun.model_validate({**sections, "rewards": {"dina": dina}, "workers": {"gpus": 1}})


def fit_config(benchmark: BenchmarkRun) -> FitConfig:
    """The preset's fit, a step in one forward."""
    values = {**_mapping(read_yaml(benchmark.reward).get("fit")), "batch_size": benchmark.pairs}
    return FitConfig.model_validate({**values, "micro_batch_size": None, "num_workers": 1})


def reward_config(benchmark: BenchmarkRun) -> RewardModelConfig:
    if benchmark.tiny:
        return SMALL_REWARD
    return RewardModelConfig.model_validate(read_yaml(benchmark.reward).get("reward"))


def pipeline_config(benchmark: BenchmarkRun, pipeline: Path | str) -> PipelineConfig:
    """The generator as all phases open it."""
    return PipelineConfig.model_validate({"dtype": "bfloat16", **_pipeline(benchmark, pipeline)})


def _pipeline(benchmark: BenchmarkRun, pipeline: Path | str) -> dict[str, object]:
    pixels = TINY_PIXELS if benchmark.tiny else PIXELS
    tokens = TINY_TEXT_TOKENS if benchmark.tiny else TEXT_TOKENS
    return {"path": str(pipeline), "height": pixels, "width": pixels, "max_sequence_length": tokens}


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
