"""A chain of presets really run, in this process, on the tiny SD3.5: only places, sizes and counts are a miniature's.

Whether all presets go together at their true sizes is `tests/unit/test_preset_chains.py`'s matter.
"""

from pathlib import Path

import pytest

from jobs import align, encode, evaluate, fit_reward
from tests.sources import CONFIGS
from tests.tiny_clip import save_tiny_clip
from tests.tiny_reward import write_preferences

SIZE = ("--pipeline.height", "32", "--pipeline.width", "32", "--inline")
ONE_WORKER = ("--fit.num_workers", "1", "--fit.threads_per_worker", "1")
FIT = ("--dataset.buckets", "pipeline", "--reward.taps", "1", "2", "3", *ONE_WORKER)
ONE_STEP = ("--fit.steps", "1", "--fit.batch_size", "4", "--fit.micro_batch_size", "2")
ALIGN = {
    "sd35m_flow_grpo_fast": ("--rollout.num_steps", "4", "--rollout.group_size", "2"),
}
ONE_ITERATION = (
    *("--iterations", "1", "--rollout.prompts_per_iteration", "2", "--learner.micro_batch_size", "2"),
    *("--workers.gpus", "1", "--golden.dev_samples", "2", "--golden.test_samples", "2"),
    *("--golden.guidances", "1", "--golden.aligned_guidances", "1"),
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> Path:
    """What `reward_sd35m.yaml` encodes and fits, in a directory with data, prompts and a CLIP model beside it."""
    root = tmp_path_factory.mktemp("presets")
    write_preferences(root / "hpdv3", train=4, test=2)
    save_tiny_clip(root / "clip")
    for split in ("train", "dev", "test"):
        (root / f"{split}.txt").write_text(f"{split} one\n{split} two\n")
    preset = ["--config", str(CONFIGS / "reward_sd35m.yaml"), "--pipeline.path", str(tiny_pipeline), *SIZE, *FIT]
    encode.main([*preset, "--dataset.path", str(root / "hpdv3"), "--run-dir", str(root / "encoded")])
    latents = ["--latents", str(root / "encoded" / "latents")]
    fit_reward.main([*preset, *ONE_STEP, *latents, "--run-dir", str(root / "fit")])
    return root / "fit"


def test_what_the_preset_fits_is_evaluated(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = fitted.parent
    sets = ["--sets.hpdv3.path", str(root / "hpdv3"), "--levels", "0.4", "--uncertainty", "None"]
    evaluate.main(["--runs", str(fitted), *sets, "--inline", "--run-dir", str(root / "audit")])
    assert (root / "audit" / "report.md").is_file()


@pytest.mark.parametrize("preset", ALIGN)
def test_what_the_preset_fits_is_aligned_with(fitted: Path, tiny_pipeline: Path, preset: str) -> None:
    root = fitted.parent
    words = ["--config", str(CONFIGS / f"{preset}.yaml"), "--pipeline.path", str(tiny_pipeline), *SIZE]
    for split in ("train", "dev", "test"):
        words += [f"--prompts.{split}", str(root / f"{split}.txt")]
    words += ["--rewards.dina.path", str(fitted / "reward")]
    words += ["--golden.path", str(root / "clip"), "--golden.processor", str(root / "clip")]
    align.main([*words, *ALIGN[preset], *ONE_ITERATION, "--run-dir", str(root / preset)])
    assert (root / preset / "adapter" / "pytorch_lora_weights.safetensors").is_file()
