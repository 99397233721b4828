"""A small alignment run for tests: real classes, few samples, a learning rate that moves the weights visibly."""

from pathlib import Path

from dina_rl.config import AlignRun

TINY = {
    "iterations": 3,
    "checkpoint_every": 1,
    "rollout": {
        "num_steps": 4,
        "window_steps": 2,
        "guidance_scale": 2.0,
        "prompts_per_iteration": 4,
        "group_size": 3,
        "groups_per_call": 1,
    },
    "grpo": {"kl_weight": 0.01, "clip_range": 1e-3},
    "learner": {
        "lora": {"rank": 2, "alpha": 4},
        "learning_rate": 1e-3,
        "updates_per_iteration": 2,
        "micro_batch_size": 3,
    },
    "golden": {
        "every": 2,
        "dev_samples": 4,
        "test_samples": 4,
        "guidances": [1.0, 2.0],
        "aligned_guidances": [2.0],
        "batch_size": 4,
    },
    "workers": {"rollout_workers": 1, "scorers": 1, "learner_ranks": 1, "call_timeout_s": 120, "start_timeout_s": 120},
}


def tiny_run(run_dir: Path, pipeline: Path, reward: Path, **changes: dict | int | bool) -> AlignRun:
    """The run above with `changes` merged into its sections."""
    values = {
        **TINY,
        "run_dir": run_dir,
        "pipeline": {"path": str(pipeline)},
        "rewards": {"dina": {"path": str(reward)}},
    }
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return AlignRun.model_validate(values)
