"""Does a run survive its cluster? `python -m benchmarks.chaos --trials 100 --seed 0`.

The alignment of the smoke run goes on a Ray cluster of three nodes on this machine (raylets of their own; the head
takes no actors).
Each trial draws a fault, and where and when it strikes: a process or a node, while it starts, in a stage, or between.
What ends the run with its line and exit code is continued with `--resume`. A trial is survived if the run ends, at once
or so, with the history and the weights of the undisturbed one, bit by bit.
"""

import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

from benchmarks.chaos.faults import FAULTS, FULL, LOOP, Fault, draw
from benchmarks.chaos.lab import Lab, Numbers, numbers
from benchmarks.chaos.settings import BenchmarkRun
from dina_rl.cli import EXIT_RAY_LOST, EXIT_STOPPED, EXIT_TERMINATED, fail, load
from dina_rl.markdown import grid

Ending = Literal["alike", "promised", "neither", "missed"]
KILLED = -9
RESUMED = 3  # attempts after a promised end


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What became of one."""

    fault: Fault
    ending: Ending
    late_s: float  # beyond the undisturbed run's seconds, attempts that continued it included


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """The undisturbed run."""

    numbers: Numbers
    seconds: float
    loop_s: float  # from the first rollout on


def undisturbed(lab: Lab) -> Usual:
    """What a run is to end with, and how long it takes."""
    lab.mend()
    begin = time.monotonic()
    with lab.attempt(lab.directory / "undisturbed", resume=False) as attempt:
        attempt.until(f"ray::{LOOP}")
        loop = time.monotonic()
        code = attempt.wait()
        if code != 0:
            fail(f"the undisturbed run ended with {code}: {attempt.said()[-2000:]}")
    end = time.monotonic()
    return Usual(numbers=numbers(lab.directory / "undisturbed"), seconds=end - begin, loop_s=end - loop)


def tried(lab: Lab, run_dir: Path, fault: Fault, usual: Usual) -> Trial:
    """One run under a fault, continued as long as it ends as promised."""
    lab.mend()
    begin, promised = time.monotonic(), False

    def judged(ending: Ending) -> Trial:
        return Trial(fault=fault, ending=ending, late_s=time.monotonic() - begin - usual.seconds)

    with lab.attempt(run_dir, resume=False) as attempt:
        if not fault.strike(attempt, lab):
            return judged("missed")
        code = attempt.wait()
        for _ in range(RESUMED):
            if code == 0:
                break
            said = attempt.said()
            if code not in (EXIT_STOPPED, EXIT_RAY_LOST, EXIT_TERMINATED, KILLED) or "Traceback" in said:
                return judged("neither")
            promised = True
            lab.mend()
            with lab.attempt(run_dir, resume=(run_dir / "config.yaml").is_file()) as again:
                code = again.wait()
    if code != 0 or "Traceback" in attempt.said() or numbers(run_dir) != usual.numbers:
        return judged("neither")
    return judged("promised" if promised else "alike")


def table(trials: Sequence[Trial]) -> str:
    """By fault."""
    by_fault: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_fault[trial.fault.name].append(trial)
    rows = []
    for name, some in [*sorted(by_fault.items()), ("all", list(trials))]:
        struck = [trial for trial in some if trial.ending != "missed"]
        counts = [sum(trial.ending == ending for trial in struck) for ending in ("alike", "promised", "neither")]
        late = f"{median(trial.late_s for trial in struck):.0f}" if struck else ""
        rows.append([name, str(len(struck)), *map(str, counts), late])
    return grid(["fault", "trials", "ended alike", "promised line, then alike", "neither", "later by, s"], rows)


def main(argv: Sequence[str]) -> None:
    run = load(BenchmarkRun, argv, program="python -m benchmarks.chaos")
    names = sorted(name for name in FAULTS if run.only is None or run.only in name)
    if not names:
        fail(f"only {run.only}: no fault is called so; there are {', '.join(FAULTS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng, trials = random.Random(run.seed), list[Trial]()
    with TemporaryDirectory(prefix="chaos-") as scratch:
        lab = Lab(run.keep or Path(scratch), full=FULL)
        try:
            usual = undisturbed(lab)
            print(f"undisturbed: {usual.seconds:.0f} s, {usual.loop_s:.0f} s of it in the loop", flush=True)
            for number in range(run.trials):
                fault = draw(rng, names, usual.loop_s)
                trials.append(tried(lab, lab.directory / f"trial_{number:03d}", fault, usual))
                last = trials[-1]
                print(
                    f"{len(trials):4d}  {fault.name}, {fault.moment}: {last.ending}, {last.late_s:+.0f} s", flush=True
                )
        finally:
            lab.shutdown()
            if trials:
                print(table(trials))


if __name__ == "__main__":
    main(sys.argv[1:])
