"""Whatever is written has the mode that the umask leaves of a new file's: a shared directory stays a shared one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dina_rl.alignment.checkpoints import Checkpoint, Checkpoints
from dina_rl.alignment.history import History
from dina_rl.backbones.lora import add_lora, lora_state
from dina_rl.backbones.trained import save_transformer, trained_state
from dina_rl.checkpoint import open_run_dir, replaced_directory, save_tensors, write_json
from dina_rl.config import FitRun, LoRAConfig, PipelineConfig, RewardModelConfig
from dina_rl.data.encode import EncodingHere, check_inputs, encode_dataset
from dina_rl.report import plot_samples
from dina_rl.reward.checkpoint import save_reward
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.published import save_published
from dina_rl.runtime import open_pipeline
from dina_rl.types import PolicyWeights
from tests.tiny_reward import write_preferences

REWARD = RewardModelConfig(taps=(1, 2), num_heads=4, lora=LoRAConfig(rank=2, alpha=4))


@pytest.fixture(params=[0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def odd_modes(directory: Path, umask: int) -> list[str]:
    """The files and directories below `directory` that have another mode than plainly made ones."""
    plain = {True: 0o777 & ~umask, False: 0o666 & ~umask}
    return [
        f"{path.relative_to(directory)} {path.stat().st_mode & 0o777:o}"
        for path in sorted(directory.rglob("*"))
        if path.stat().st_mode & 0o777 != plain[path.is_dir()]
    ]


def test_what_an_alignment_writes(tmp_path: Path, umask: int, tiny_pipeline: Path) -> None:
    backbone = open_pipeline(PipelineConfig(path=str(tiny_pipeline)))
    open_run_dir(FitRun(), tmp_path / "run", resume=False)
    checkpoints = Checkpoints(tmp_path / "run")
    weights = {"weight": torch.zeros(2)}
    checkpoints.save(Checkpoint(iteration=1, state=weights, history=[], seconds={}))
    checkpoints.keep_best_weights(PolicyWeights(version=1, tensors=weights))
    checkpoints.keep_best_state(weights)
    History().save(tmp_path / "run")
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    plot_samples(images, images, tmp_path / "run" / "samples.png")
    transformer = backbone.load_transformer()
    for _ in range(2):  # the second takes the place of the first
        save_transformer(transformer, tmp_path / "run" / "transformer", trained_state(transformer))
    add_lora(transformer, rank=2, alpha=4, targets=backbone.lora_targets, seed=0)
    backbone.save_adapter(
        tmp_path / "run" / "adapter", lora_state(transformer), rank=2, alpha=4, targets=backbone.lora_targets
    )
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    assert odd_modes(tmp_path, umask) == []


def test_what_a_fit_writes(tmp_path: Path, umask: int, tiny_pipeline: Path) -> None:
    write_preferences(tmp_path / "set", train=2, test=2)
    pipeline = PipelineConfig(path=str(tiny_pipeline))
    backbone = open_pipeline(pipeline)
    values = {
        "run_dir": tmp_path / "run",
        "pipeline": pipeline,
        "dataset": {"path": str(tmp_path / "set"), "prompt_embeddings": True},
    }
    run = check_inputs(FitRun.model_validate(values), backbone)
    run_dir = open_run_dir(run, run.run_dir, resume=False)
    encode_dataset(run, run_dir, backbone, EncodingHere(backbone))
    model = LatentRewardModel(backbone, REWARD, seed=0)
    save_reward(model, run_dir / "reward", pipeline=pipeline)
    save_published(model, run_dir / "published", pipeline=pipeline)
    written = {path.suffix for path in run_dir.rglob("*") if path.is_file()}
    assert written >= {".sqlite", ".parquet", ".safetensors", ".yaml", ".json", ".pt"}
    assert odd_modes(tmp_path, umask) == []


def test_nothing_is_left_of_what_fails(tmp_path: Path, umask: int) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    with pytest.raises(AttributeError):
        save_tensors(tmp_path / "b.safetensors", {"b": None})

    def broken_directory() -> None:
        with replaced_directory(tmp_path / "directory") as fresh:
            save_tensors(fresh / "a.safetensors", {"a": torch.zeros(1)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_directory()
    assert list(tmp_path.iterdir()) == []
