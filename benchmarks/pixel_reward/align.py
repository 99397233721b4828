"""An alignment whose seconds are the processor's: `python -m benchmarks.pixel_reward.align --config ... --run-dir RUN`.

What `python -m jobs.align --inline` does, with all its options. On a machine that others use too, `jobs.compare` then
draws the same work at the same place, whoever else was at work.
"""

import sys
from collections.abc import Sequence
from time import process_time

from dina_rl.alignment.inline import InlineExperience, InlineLearner
from dina_rl.alignment.loop import align
from dina_rl.alignment.record import Recorder
from dina_rl.cli import fail, interruptible, load
from dina_rl.config import AlignRun
from dina_rl.runtime import configure_process
from jobs.align import exporter, opened, preflight, with_sizes


def main(argv: Sequence[str]) -> None:
    run = load(AlignRun, argv, program="python -m benchmarks.pixel_reward.align")
    configure_process(run.workers.threads_per_actor)
    try:
        run = with_sizes(run)
        prompts = preflight(run)
        with opened(run, prompts) as run_dir, interruptible(run_dir):
            recorder = Recorder(run, run_dir, exporter(run), clock=process_time)
            align(run, prompts, InlineExperience(run), InlineLearner(run), recorder)
    except ValueError as error:
        fail(str(error))
    for stage, seconds in recorder.seconds.items():
        print(f"{stage:<12}{seconds:>8.1f} processor seconds")


if __name__ == "__main__":
    main(sys.argv[1:])
