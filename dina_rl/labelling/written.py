"""What labelling leaves: the records in HPDv3's layout, their pictures, and a list of what got no label."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from dina_rl.checkpoint import replaced_file, write_bytes, write_text
from dina_rl.data.images import suffixes
from dina_rl.data.sets.records import PreferenceSet
from dina_rl.labelling.pairs import Pair
from dina_rl.labelling.samples import IMAGES
from dina_rl.labelling.teacher import Scores


def write_dropped(file: Path, malformed: Sequence[str], failed: Sequence[Pair], reasons: Mapping[str, str]) -> None:
    """List what gets no label, and say so."""
    lines = list(malformed)
    for pair in failed:
        why = "; ".join(f"{image}: {reasons[image]}" for image in pair.images if image in reasons)
        lines.append(json.dumps({"prompt": pair.prompt, "images": pair.images, "reason": why or "no score"}))
    if lines:
        write_text(file, "\n".join(lines) + "\n")
        print(f"{len(malformed)} malformed records and {len(failed)} pairs without a score: {file}", flush=True)
    else:
        file.unlink(missing_ok=True)


def copy_pictures(
    source: PreferenceSet, pairs: Sequence[Pair], run_dir: Path, *, among: Sequence[Pair]
) -> dict[str, str]:
    """Copy the pictures of the pairs, as they are, to where the labelled set may name them; returns key -> path.

    Args:
        among: all pairs, with a score or without. A picture has its number among theirs: what got no score may get one
            when the run goes on, and the pictures that are there keep their names.
    """
    wanted = {image for pair in pairs for image in pair.images}
    names: dict[str, str] = {}
    for number, key in enumerate(dict.fromkeys(image for pair in among for image in pair.images)):
        if key in wanted:
            suffix = Path(key).suffix.lower()
            names[key] = f"{IMAGES}/{number // 1000:04d}/{number:07d}{suffix if suffix in suffixes() else ''}"
    for key, name in tqdm(names.items(), desc="copy", unit="img"):
        if not (run_dir / name).is_file():
            write_bytes(run_dir / name, source.image(key))
    return names


def write_records(file: Path, pairs: Sequence[tuple[Pair, float]], scores: Scores, names: Mapping[str, str]) -> None:
    """The labelled pairs as HPDv3 writes them, the teacher's choice first.

    Args:
        pairs: each with the probability that its first image is the better one.
        names: key of an image -> its path in the written set, where that is another.
    """

    def lines() -> Iterator[str]:
        for pair, probability in pairs:
            order = (0, 1) if probability >= 0.5 else (1, 0)
            first, second = (pair.images[side] for side in order)
            record: dict[str, object] = {
                "prompt": pair.prompt,
                "path1": names.get(first, first),
                "path2": names.get(second, second),
                "choice_dist": None,
                "confidence": None,
                "probability": max(probability, 1 - probability),
                "score1": scores[pair.group, first],
                "score2": scores[pair.group, second],
            }
            if pair.models is not None:
                record |= {"model1": pair.models[order[0]], "model2": pair.models[order[1]]}
            yield json.dumps(record)

    with replaced_file(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for number, line in enumerate(lines()):
            stream.write(("[\n" if number == 0 else ",\n") + line)
        stream.write("\n]\n" if pairs else "[]\n")
