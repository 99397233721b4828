"""The algorithms by the names they have in the configuration."""

from collections.abc import Callable
from typing import cast

from dina_rl.alignment.algorithms.base import Algorithm, SomeRollout
from dina_rl.alignment.algorithms.grpo import FlowGRPO
from dina_rl.alignment.algorithms.nft import DiffusionNFT
from dina_rl.alignment.algorithms.refl import ReFL
from dina_rl.config import AlgorithmName, AlignRun
from dina_rl.types import Rollout

Kind = Callable[[AlignRun], Algorithm[Rollout]]


def _checked(kind: Callable[[AlignRun], Algorithm[SomeRollout]]) -> Kind:
    """An algorithm, checked against the Protocol for its own record.

    Each one's record leaves its sampling and comes back to its objective, never to another's: "some record, the same in
    both places" is a type that Python cannot say.
    """
    return cast(Kind, kind)


ALGORITHMS: dict[AlgorithmName, Kind] = {
    "grpo": _checked(FlowGRPO),
    "refl": _checked(ReFL),
    "nft": _checked(DiffusionNFT),
}


def open_algorithm(run: AlignRun) -> Algorithm[Rollout]:
    """The configured algorithm."""
    return ALGORITHMS[run.algorithm](run)


def merges(run: AlignRun) -> bool:
    """Whether the rollout samples with an adapter merged into the weights, without LoRA layers."""
    return run.learner.lora is not None and open_algorithm(run).rounds_apart
