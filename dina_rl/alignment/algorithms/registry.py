"""The algorithms by the names they have in the configuration."""

from collections.abc import Callable
from typing import cast

from dina_rl.alignment.algorithms.base import Algorithm
from dina_rl.alignment.algorithms.grpo import FlowGRPO
from dina_rl.alignment.algorithms.nft import DiffusionNFT
from dina_rl.alignment.algorithms.refl import ReFL
from dina_rl.config import AlgorithmName, AlignRun
from dina_rl.types import Rollout

ALGORITHMS: dict[AlgorithmName, Callable[[AlignRun], object]] = {
    "grpo": FlowGRPO,
    "refl": ReFL,
    "nft": DiffusionNFT,
}


def open_algorithm(run: AlignRun) -> Algorithm[Rollout]:
    """The configured algorithm."""
    # Each one's own record leaves its sampling and comes back to its objective, never to another's: "some record, the
    # same in both places" is a type that Python cannot say.
    return cast(Algorithm[Rollout], ALGORITHMS[run.algorithm](run))
