"""What a fit hands back. It imports no model: Ray Train's controller reads it too."""

from dataclasses import dataclass
from pathlib import Path

from dina_rl.textfiles import read_record

METRICS_FILE = "metrics.json"
"""`FitResult` in the run directory, written last."""
LOG_FILE = "fit.jsonl"
"""The fit's curves in the run directory; see session.py."""

Accuracies = dict[str, dict[str, float]]
"""Held-out set -> {accuracy_single, accuracy_ensemble}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What `run_fit` returns, the same on every rank."""

    held_out: Accuracies
    best_step: int | None
    best_accuracy_single: float | None
    pairs_per_second: float
    fit_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What a fit reached. Accuracies are pairwise, on test pairs, of the averaged weights."""

    accuracy_single: float  # at reward.single_level, on the first held-out set: the fit's own test pairs, if any
    accuracy_ensemble: float  # over reward.ensemble_levels
    held_out: Accuracies  # the same on every held-out set
    best_step: int | None  # whose weights `reward_best` holds; None without periodic evaluation
    best_accuracy_single: float | None
    label_ceiling: float | None  # best possible accuracy on the first set, where it comes with golden scores
    train_pairs: int
    test_pairs: int  # of the first set
    skipped: int  # unusable records
    steps: int
    pairs_per_second: float  # training alone, evaluations left out
    encode_seconds: float
    fit_seconds: float  # the loop alone, on the workers
    total_seconds: float
    reward: str  # directory of the saved reward model


def read_result(file: Path) -> FitResult:
    """What a fit reached, as its directory has it. Raises ValueError where the file says something else."""
    result = read_record(FitResult, file)
    told = ("accuracy_single", "accuracy_ensemble")
    if not result.held_out or any(name not in each for each in result.held_out.values() for name in told):
        raise ValueError(f"{file} does not hold what was written (held_out lacks accuracies); was it edited?")
    return result
