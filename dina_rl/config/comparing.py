"""Settings of a comparison of alignment runs."""

from pathlib import Path

from dina_rl.config.base import Section, Texts


class CompareRuns(Section):
    """Draw the curves of several alignment runs in one picture."""

    runs: Texts = ()
    """directories of alignment runs, finished or not. Those that differ by their seed alone, and by the reward model
    that each fitted, are one band; LABEL=RUN, or LABEL=GLOB, says which are"""
    out: Path = Path("runs/comparison")
    """directory for comparison.png and comparison.csv, which replace those of an earlier comparison"""
