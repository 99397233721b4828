"""Export any weights that an alignment run keeps: `python -m jobs.export RUN_DIR --which best`.

They are written in the very form in which the run exports its result: an adapter for stock `load_lora_weights`, or
after full fine-tuning a transformer for stock `from_pretrained`. The run may be finished, interrupted, or going on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dina_rl.alignment.checkpoints import Checkpoints
from dina_rl.alignment.result import exported, saved_run
from dina_rl.cli import fail, load, stoppable
from dina_rl.config import ExportRun
from jobs.align import exporter


def main(argv: Sequence[str]) -> None:
    named = argv[:1] if argv and not argv[0].startswith("-") else ()
    words = [*(["--run-dir"] if named else []), *argv]
    export = load(ExportRun, words, program="python -m jobs.export RUN_DIR")
    try:
        with stoppable():
            print(export_weights(export))
    except ValueError as error:
        fail(str(error))


def export_weights(export: ExportRun) -> str:
    """Write the weights; returns a line that says which they are and where they lie.

    Raises:
        ValueError: no alignment run, no such weights in it, broken ones, its pipeline is gone, or a directory that is
            in use.
        StorageFailed: storage refuses.
    """
    run_dir = export.run_dir.expanduser().resolve()
    run = saved_run(run_dir)
    out = _place(export, exported(run, run_dir))
    found = Checkpoints(run_dir).weights(export.which)
    file = exporter(run)(out, found.tensors)
    return f"{found.title}: {file}"


def _place(export: ExportRun, result: Path) -> Path:
    if export.out is None:
        name = f"iteration_{int(export.which):06d}" if export.which.isdigit() else export.which
        return result.with_name(f"{result.name}_{name}")
    out = export.out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} is there already; name a new or empty directory")
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
