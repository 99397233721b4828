"""Score pictures: `python -m jobs.score --scorer.path RUN/reward --images a.png b.png --prompt "a red circle"`.

One process, which is what a list of pictures takes; whole preference sets are what `jobs.evaluate` spreads over actors.
"""

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dina_rl.checkpoint import write_text
from dina_rl.cli import fail, load, stoppable
from dina_rl.config import ScoreRun
from dina_rl.pictures import Picture, Skipped, list_pictures
from dina_rl.scoring import PictureScorer, file_key, open_scorer
from jobs.submitted import check_results

SHOWN_SKIPS = 20  # where a file has them all


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One line of the outcome."""

    image: str
    prompt: str
    score: float


def main(argv: Sequence[str]) -> None:
    run = load(ScoreRun, argv, program="python -m jobs.score")
    check_results(out=run.out)
    try:
        pictures = list_pictures(run.images, prompt=run.prompt, root=run.root)
        scorer = open_scorer(run.scorer, seed=run.seed)
        scored, skipped = score(scorer, pictures, batch_size=run.batch_size, max_pixels=run.max_pixels)
    except ValueError as error:
        fail(str(error))
    with stoppable():
        report_skipped(skipped, len(pictures), run.out)
    if not scored:
        fail(f"none of the {len(pictures)} pictures could be scored")
    if run.out is None:
        print(as_table(scored))
        return
    as_text = as_json(scored, skipped, scorer) if run.out.suffix == ".json" else as_csv(scored)
    with stoppable():
        write_text(run.out.expanduser(), as_text)
    print(f"{len(scored)} scores in {run.out}")


def score(
    scorer: PictureScorer, pictures: Sequence[Picture | Skipped], *, batch_size: int, max_pixels: int
) -> tuple[list[Scored], list[Skipped]]:
    """Scores in the order of `pictures`, and what could not be scored; a score that is not finite is none."""
    scored: list[Scored] = []
    skipped = [picture for picture in pictures if isinstance(picture, Skipped)]
    listed = [picture for picture in pictures if isinstance(picture, Picture)]
    with tqdm(total=len(listed), desc="score", unit="img", disable=len(listed) <= batch_size) as bar:
        for first in range(0, len(listed), batch_size):
            readable, samples = [], []
            for picture in listed[first : first + batch_size]:
                try:
                    samples.append(scorer.read(picture.path, max_pixels=max_pixels))
                    readable.append(picture)
                except ValueError as error:
                    reason = str(error).removeprefix(f"{picture.path}: ")
                    skipped.append(Skipped(image=picture.image, reason=reason))
            prompts = [picture.prompt for picture in readable]
            keys = [file_key(picture.image, picture.prompt) for picture in readable]
            for picture, value in zip(readable, scorer.score_samples(samples, prompts, keys).tolist(), strict=True):
                if math.isfinite(value):
                    scored.append(Scored(image=picture.image, prompt=picture.prompt, score=value))
                else:
                    skipped.append(Skipped(image=picture.image, reason=f"its score is {value}"))
            bar.update(len(samples))
    return scored, skipped


def report_skipped(skipped: Sequence[Skipped], total: int, out: Path | None) -> None:
    """Say what was skipped; beside a file of scores the whole list is a file too."""
    if not skipped:
        return
    for each in skipped if out is None else skipped[:SHOWN_SKIPS]:
        print(f"skipped {each.image}: {each.reason}", file=sys.stderr)
    where = ""
    if out is not None:
        file = out.expanduser().with_suffix(".skipped.jsonl")
        lines = [json.dumps({"image": each.image, "reason": each.reason}) + "\n" for each in skipped]
        write_text(file, "".join(lines))
        where = f", listed in {file}"
    print(f"skipped {len(skipped)} of {total} pictures{where}", file=sys.stderr)


def as_table(scored: Sequence[Scored]) -> str:
    width = max(len(each.image) for each in scored)
    return "\n".join(f"{each.image:<{width}}  {each.score:+10.4f}  {' '.join(each.prompt.split())}" for each in scored)


def as_csv(scored: Sequence[Scored]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "prompt", "score"))
    writer.writerows((each.image, each.prompt, each.score) for each in scored)
    return text.getvalue()


def as_json(scored: Sequence[Scored], skipped: Sequence[Skipped], scorer: PictureScorer) -> str:
    outcome = {
        "scorer": scorer.config.model_dump(mode="json"),
        "scores": [{"image": each.image, "prompt": each.prompt, "score": each.score} for each in scored],
        "skipped": [{"image": each.image, "reason": each.reason} for each in skipped],
    }
    return json.dumps(outcome, indent=2) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
