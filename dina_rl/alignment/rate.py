"""The policy's learning rate, update by update."""

import math

from dina_rl.config import LearnerConfig


def learning_rate(config: LearnerConfig, update: int, updates: int) -> float:
    """The rate of `update`, counted from 0, of a run of `updates`: a linear warm-up, then the schedule.

    A falling rate would be 0 at the update after the last one. An update that is never made (its groups were dropped)
    does not count.
    """
    if update < config.warmup_updates:
        return config.learning_rate * ((update + 1) / config.warmup_updates)
    share = (update - config.warmup_updates) / (updates - config.warmup_updates)
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - share)
        case "cosine":
            return config.learning_rate * (1 + math.cos(math.pi * share)) / 2
