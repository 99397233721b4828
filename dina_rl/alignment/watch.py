"""The divergence watch: does golden fall while proxy rises? It looks at curves, and never touches a loss."""

from collections.abc import Sequence


def diverged(golden: Sequence[float], proxy: Sequence[float], *, patience: int, margin: float) -> bool:
    """Whether the last `patience` measurements are all worse than the best one although the proxy likes them better.

    Args:
        golden: means of the held-out metric, one per measurement, in order; the first is the base's.
        proxy: means of the optimised reward, likewise.
        patience: measurements that must agree.
        margin: how far golden must lie below its best, in its own units.
    """
    best = max(range(len(golden)), key=golden.__getitem__)
    if len(golden) - 1 - best < patience:
        return False
    late = range(len(golden) - patience, len(golden))
    return all(golden[i] < golden[best] - margin and proxy[i] > proxy[best] for i in late)
