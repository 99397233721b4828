"""Label pairs by a teacher: `python -m jobs.label --scorers.NAME.kind KIND --dataset.path DIR --run-dir LABELS`.

The teacher is a scorer or a weighted sum of several. It labels the pairs of a preference set anew, or pairs of samples
that the generator makes of a prompt file (--prompts.path FILE). Run directory, itself a set in HPDv3's layout:
    config.yaml, versions.json, inputs.json   the resolved configuration, and what it was made from
    train.json, images/                       the labelled pairs, each with a probability, and their pictures
    teacher.json                              who labelled, by which scale, and counts; written last
    dropped.jsonl                             what got no label, and why (absent if there is nothing)
    cache/                                    scores and encoded images, with which --resume goes on
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from dina_rl.cli import fail, interruptible, load
from dina_rl.config import LabelRun
from dina_rl.labelling.job import CARD_FILE, is_finished, label, label_inputs
from dina_rl.run_directory import run_directory
from dina_rl.textfiles import parse_json, read_text
from jobs.evaluate import open_workers
from jobs.submitted import check_results


def main(argv: Sequence[str]) -> None:
    run = load(LabelRun, argv, program="python -m jobs.label")
    if not run.plan:
        check_results(run_dir=run.run_dir)
    try:
        inputs = label_inputs(run)
        if run.plan:
            print("\n".join(inputs.lines()))
            return
        finished = partial(is_finished, run)
        with (
            interruptible(run.run_dir),
            run_directory(run, run.run_dir, resume=run.resume, inputs=inputs.made_from, finished=finished) as run_dir,
        ):
            card: dict[str, Any] = (
                parse_json(read_text(run_dir / CARD_FILE))
                if finished(run_dir)
                else label(inputs, run_dir, open_workers)
            )
    except ValueError as error:
        fail(str(error))
    print(
        f"{card['pairs']} pairs labelled, {card['ties']} ties, {card['failed']} without a score, {card['repeats']} "
        f"repeats left out\nscale {card['scale']:.4g} ({card['scale_from']}), "
        f"mean probability {card['mean_probability']:.3f}"
    )
    if "validation" in card:
        print(
            "validation: accuracy {accuracy:.4f}, ECE {ece:.4f}, Brier {brier:.4f} on {pairs} pairs".format(
                **card["validation"]
            )
        )
    print(f"written to {run_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
