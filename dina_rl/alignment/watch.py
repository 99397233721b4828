"""What is read off the curves: does golden fall while proxy rises, does a probe drift while golden does not rise?

It looks at curves, and never touches a loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dina_rl.alignment.history import History
from dina_rl.config import ProbesConfig, WatchConfig
from dina_rl.types import GRID_TAG, Point

ACTS_AGAIN = ("raise_kl", "roll_back")
"""Actions after which the run goes on and may diverge once more."""


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


def drifted(values: Sequence[float], golden: Sequence[float], *, patience: int, margin: float, rising: bool) -> bool:
    """Whether the last `patience` measurements of a probe lie off the base's while golden has nothing to show for it.

    How far it had moved when golden was at its best is not held against it: it must have left that behind too.

    Args:
        values: means of the probe, one per measurement, in order; the first is the base's.
        golden: means of the held-out metric, likewise.
        patience: measurements that must lie there, on the same side; if one of them is golden's best, it rises.
        margin: how far from both, in the probe's units.
        rising: only upwards.
    """
    best = max(range(len(golden)), key=golden.__getitem__)
    if len(golden) - 1 - best < patience:
        return False
    low, high = sorted((values[0], values[best]))
    late = values[-patience:]
    return min(late) > high + margin or (not rising and max(late) < low - margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the watch says of the newest measurement."""

    diverged: bool
    alarm: str | None  # said and acted upon; None: nothing new


class DivergenceWatch:
    """Decides from a run's history alone, so that a resumed run decides alike."""

    def __init__(self, config: WatchConfig, history: History) -> None:
        self._config = config
        self._history = history

    def look(self) -> Verdict:
        """Judge the curves after a new measurement; an alarm goes into the history."""
        points = self._compared()
        golden, proxy = [point["golden"] for point in points], [point["proxy"] for point in points]
        if not diverged(golden, proxy, patience=self._config.patience, margin=self._config.margin):
            return Verdict(diverged=False, alarm=None)
        if self.diverged_at is not None and self._config.action not in ACTS_AGAIN:
            return Verdict(diverged=True, alarm=None)
        self._history.add("diverged", points[-1]["iteration"], {})
        alarm = f"golden falls while proxy rises: {max(golden):.3f} at its best, {golden[-1]:.3f} now"
        return Verdict(diverged=True, alarm=alarm)

    @property
    def diverged_at(self) -> int | None:
        """The iteration at which the watch first called the run diverged."""
        alarms = self._history.alarms()
        return alarms[0] if alarms else None

    @property
    def stopped(self) -> bool:
        """Whether the watch has ended the run."""
        return self._config.action == "stop" and self.diverged_at is not None

    @property
    def kl_scale(self) -> float:
        """What the watch has multiplied the KL weight by."""
        alarms = len(self._history.alarms())
        return self._config.kl_factor**alarms if self._config.action == "raise_kl" else 1.0

    @property
    def best(self) -> Point:
        """The first measurement that was best in golden on the dev prompts."""
        return max(self._history.points(), key=lambda point: point["golden"])

    @property
    def keeps_state(self) -> bool:
        """Whether the learner's whole state must be kept where golden is at its best."""
        return self._config.action == "roll_back"

    @property
    def improved(self) -> bool:
        """Whether the newest measurement is the best one."""
        return self.best["iteration"] == self._history.points()[-1]["iteration"]

    @property
    def rolls_back(self) -> bool:
        """Whether the newest measurement sends the learner back to the best one."""
        newest = self._history.points()[-1]["iteration"]
        return self._config.action == "roll_back" and self._history.alarms()[-1:] == [newest]

    def _compared(self) -> list[Point]:
        """The measurements that are compared: the best one and, where the watch acts again, those since it last did."""
        points, alarms = self._history.points(), self._history.alarms()
        if self._config.action not in ACTS_AGAIN or not alarms:
            return points
        best = self.best["iteration"]
        return [point for point in points if point["iteration"] == best or point["iteration"] > alarms[-1]]


class DriftWatch:
    """Calls a probe drifted, once, from a run's history alone. It marks the run and does nothing else to it."""

    def __init__(self, config: ProbesConfig | None, history: History) -> None:
        self._config = config
        self._history = history

    def look(self) -> list[str]:
        """Judge the probes after a new measurement; what is to be said of those that have drifted since the last one.

        It goes into the history.
        """
        if self._config is None:
            return []
        points = self._history.points()
        golden = [point["golden"] for point in points]
        said = []
        for tag in points[0].get("probes", {}):
            values = [point.get("probes", {})[tag] for point in points]
            if tag not in self.drifts and self._drifted(tag, values, golden):
                self._history.add("drifted", points[-1]["iteration"], {"probe": tag})
                moved = f"{values[0]:.3f} at the base, {values[-1]:.3f} now"
                said.append(f"{tag} drifts while golden does not rise: {moved}")
        return said

    @property
    def drifts(self) -> dict[str, int]:
        """The iteration at which each probe was called drifted, by its tag."""
        return self._history.drifts()

    def _drifted(self, tag: str, values: Sequence[float], golden: Sequence[float]) -> bool:
        assert self._config is not None
        grid = tag == GRID_TAG
        margin = self._config.grid_margin if grid else self._config.margin
        return drifted(values, golden, patience=self._config.patience, margin=margin, rising=grid)
