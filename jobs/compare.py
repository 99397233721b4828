"""Draw several alignment runs beside each other: `python -m jobs.compare runs/fast_* refl=runs/refl_*`.

Golden and proxy over iterations and over seconds, as a picture and as a table; the runs may be going on.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile

from dina_rl.alignment.comparison import ReadRun, bands, draw, read_runs, write_table
from dina_rl.cli import fail, load, stoppable
from dina_rl.config import CompareRuns
from jobs.submitted import check_results


def main(argv: Sequence[str]) -> None:
    named = list(takewhile(lambda word: not word.startswith("-"), argv))
    words = [*(["--runs", *named] if named else []), *argv[len(named) :]]
    comparison = load(CompareRuns, words, program="python -m jobs.compare RUN RUN ...")
    check_results(out=comparison.out)
    try:
        with stoppable():
            compare(comparison)
    except ValueError as error:
        fail(str(error))


def compare(comparison: CompareRuns) -> None:
    """Read, group, draw and write, and say what was compared.

    Raises:
        ValueError: as `read_runs` and `bands`, or `out` is no directory.
    """
    out = comparison.out.expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is no directory")
    found = bands(read_runs(comparison.runs))
    table, picture = out / "comparison.csv", out / "comparison.png"
    write_table(found, table)
    draw(found, picture)
    print(_told(found))
    print(f"picture     {picture}\ntable       {table}")


def _told(found: Mapping[str, Sequence[ReadRun]]) -> str:
    """A line for each band, and one for each run that did not keep all its seconds."""
    lines = []
    for label, group in found.items():
        seeds = ", ".join(str(each.run.seed) for each in group)
        ends = ", ".join(f"{each.moments[-1].golden:.3f} at {each.moments[-1].iteration}" for each in group)
        lines.append(f"{label}: golden {ends} (seed {seeds})")
    for each in (run for group in found.values() for run in group):
        missing = sum(moment.seconds is None for moment in each.moments)
        if missing:
            of = f"{missing} of its {len(each.moments)} measurements"
            lines.append(f"{each.directory} kept no seconds of {of}: they are drawn over iterations alone")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
