"""Who reads configurations, sets, pictures and prompts: commands, or their readers under their handling of errors."""

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet
from pydantic import BaseModel

from benchmarks.fuzz import worlds
from benchmarks.fuzz.hostile import hostile_text
from benchmarks.fuzz.mutations import Damage, copied
from dina_rl.alignment.planning import describe
from dina_rl.alignment.prompts import load_prompts
from dina_rl.cli import fail, interruptible, known_keys, load
from dina_rl.config import (
    AlignRun,
    CompareRuns,
    EvaluateRun,
    ExportRun,
    FitRun,
    LabelRun,
    PromptsConfig,
    ScoreRun,
    ServeRun,
)
from dina_rl.data.images import load_image
from dina_rl.pictures import Picture, list_pictures
from jobs import encode
from jobs.score import report_skipped

Task = Callable[[], object]

MODELS: tuple[type[BaseModel], ...] = (
    AlignRun,
    FitRun,
    EvaluateRun,
    ScoreRun,
    LabelRun,
    ExportRun,
    CompareRuns,
    ServeRun,
)
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VALUES = (
    "0",
    "-1",
    "1e400",
    "nan",
    "None",
    "true",
    "",
    "[",
    "{a: b}",
    "[1, 2]",
    "x",
    "1",
    "0.5",
    "!!int x",
    "&a [*a]",
    "2024-99-99",
    "9" * 5000,
)
SET_KINDS = ("hpdv3", "hpdv2", "imagereward")
SPLITS = ("train", "test")


def as_command(task: Task, place: Path) -> Task:
    """A task whose errors become lines as those of a command's preparations do."""

    def run() -> None:
        with interruptible(place):
            try:
                task()
            except ValueError as error:
                fail(str(error))

    return run


def configs(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """A YAML file of a command, and the plan where it is an alignment's of a size that is planned at once."""
    preset = rng.choice(sorted(CONFIGS.glob("*.yaml")))
    model = FitRun if "reward" in preset.name else AlignRun if rng.random() < 0.7 else rng.choice(MODELS)
    file = root / "config.yaml"
    text = preset.read_text()
    if rng.random() < 0.15:
        file.write_bytes(hostile_text(rng, ".yaml"))
    elif rng.random() < 0.3:
        file.write_bytes(damage.content(text.encode()))
    else:
        file.write_text(damage.yaml(text), errors="surrogatepass")
    words = ["--config", str(file)]
    return lambda: _configured(model, words, world, plan=rng.random() < 0.3)


def options(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """Words of a command line."""
    model = rng.choice(MODELS)
    keys, words = known_keys(model), list[str]()
    for _ in range(rng.choice((1, 1, 2, 6))):
        key = rng.choice(keys).replace("_", "-").replace("NAME", rng.choice(("a", "b c", "", ".", "🙂", "a.b")))
        if rng.random() < 0.1:
            key = damage.content(key.encode()).decode(errors="replace")
        words.append(rng.choice((f"--{key}", f"--{key}", f"--{key}", f"-{key}", key, f"--{key}.x", f"--no-{key}")))
        for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
            surprise = damage.surprise()
            word = (
                rng.choice(VALUES) if rng.random() < 0.7 else surprise if isinstance(surprise, str) else str(surprise)
            )
            words.append(word.replace("\0", "0"))  # which no command line can hold
    if rng.random() < 0.05:
        words.append("--help")
    return lambda: _configured(model, words, world, plan=False)


def _configured(model: type[BaseModel], words: Sequence[str], world: Path, *, plan: bool) -> None:
    load(model, words, program="python -m fuzz")
    if plan and model is AlignRun:
        places = ["--pipeline.path", str(world / worlds.PIPELINE), "--rewards.dina.path", str(world / worlds.REWARD)]
        small = load(AlignRun, [*words, *places], program="python -m fuzz")
        as_command(lambda: print(describe(small)), small.run_dir)()


def encode_command(world: Path, root: Path, kind: str, data: Path, *words: str) -> Task:
    places = ["--dataset.path", str(data), "--dataset.kind", kind, "--pipeline.path", str(world / worlds.PIPELINE)]
    few = ["--dataset.max-skipped", "1.0"]
    return lambda: encode.main(["--inline", "--run-dir", str(root / "run"), *places, *worlds.TAPS, *few, *words])


def sets(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """Records of a JSON set, and links in its directory that lead out of it."""
    kind = rng.choice(SET_KINDS)
    data = copied(world / worlds.SETS / kind, root / "set")
    _links_out(data, root)
    damage.directory(data, *rng.choice((("*.json",), ("train.json",), ("*.json", "*.png"))), most=2)
    return encode_command(world, root, kind, data)


def _links_out(data: Path, root: Path) -> None:
    """Names that `mutations.leading_out` has records give."""
    beside = root.parent / "beside"
    (data / "linked.png").symlink_to(beside / "decoy.png")
    (data / "linked").symlink_to(beside)
    (data / "loop").symlink_to("loop")
    (data / "pipe").unlink(missing_ok=True)
    os.mkfifo(data / "pipe")


def parquet_sets(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """A parquet file with other bytes, other columns or other types; a cell that is a bomb."""
    kind = rng.choice(("pickapic", "genai_bench"))
    data = copied(world / worlds.PARQUET / kind, root / "set")
    file = data / f"{rng.choice(SPLITS)}-00000-of-00001.parquet"
    draw = rng.random()
    if draw < 0.03 and kind == "pickapic":
        shutil.copy2(world / worlds.BOMB / "jpg_0.parquet", file)
    elif draw < 0.5:
        damage.file(file)
    else:
        table = parquet.read_table(file)
        for _ in range(rng.choice((1, 1, 3))):
            table = changed_column(rng, damage, table)
        parquet.write_table(
            table, file, row_group_size=rng.choice((1, 2, 100)), compression=rng.choice(("snappy", "zstd", "none"))
        )
    return encode_command(world, root, kind, data)


def changed_column(rng: random.Random, damage: Damage, table: pyarrow.Table) -> pyarrow.Table:
    if not table.num_columns:
        return table
    at = rng.randrange(table.num_columns)
    name, rows = table.column_names[at], table.num_rows
    kind = rng.randrange(6)
    if kind == 0:
        return table.drop_columns([name])
    if kind == 1:
        return table.rename_columns(
            [
                damage.rng.choice(("x", "", f"{each}.y", "a/b", each)) if n == at else each
                for n, each in enumerate(table.column_names)
            ]
        )
    if kind == 2:
        return table.append_column(name, table.column(at))
    fresh: tuple[object, ...] = (
        pyarrow.nulls(rows),
        pyarrow.array([[1]] * rows),
        pyarrow.array([rng.choice((b"", b"\xff", worlds.picture(0, "gif"), b"\0" * 10**6)) for _ in range(rows)]),
        pyarrow.array([rng.choice(("", "\0", "a" * 10**6, "leftvote", "../x")) for _ in range(rows)]),
        pyarrow.array([float("nan")] * rows),
        pyarrow.array([2**62] * rows),
        pyarrow.array([{"bytes": b"x", "path": "/etc/passwd"}] * rows),
        pyarrow.array([{"bytes": None, "path": "/etc/passwd"}] * rows),
        pyarrow.array([{"path": "../beside/decoy.png"}] * rows),
        pyarrow.array([b"\xff\xfe"] * rows, pyarrow.binary()).view(pyarrow.string()),  # text that is no UTF-8
    )
    return table.set_column(at, name, rng.choice(fresh))


def images(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """Pictures of a set: other formats, damaged ones, and what was made to do harm."""
    data = copied(world / worlds.SETS / "hpdv3", root / "set")
    for file in rng.sample(sorted((data / "images").iterdir()), 4):
        _other_picture(rng, damage, world, file)
    return encode_command(world, root, "hpdv3", data)


def _other_picture(rng: random.Random, damage: Damage, world: Path, file: Path) -> None:
    draw = rng.random()
    if draw < 0.2:
        file.write_bytes(rng.choice(sorted((world / worlds.PICTURES / "hostile").iterdir())).read_bytes())
    elif draw < 0.8:
        source = rng.choice(sorted(each for each in (world / worlds.PICTURES).iterdir() if each.is_file()))
        file.write_bytes(damage.content(source.read_bytes()))
    elif draw < 0.9:
        file.unlink()
        file.symlink_to(file.parents[2].parent / "beside" / "decoy.png")
    else:
        damage.file(file)


def manifests(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """What `jobs.score` lists: manifests and directories; their pictures are read as it reads them."""
    data = copied(world / worlds.SETS / "hpdv3", root / "set")
    _links_out(data, root)
    rows = [{"image": f"images/{number}.png", "prompt": "a"} for number in range(4)]
    file = data / rng.choice(("list.jsonl", "list.csv"))
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        damage.file(file)
    else:
        text = "image,prompt\n" + "".join(f"{rng.choice((row['image'], str(damage.surprise())))},a\n" for row in rows)
        file.write_bytes(
            damage.content(text.encode("utf-8", "replace")) if rng.random() < 0.5 else text.encode("utf-8", "replace")
        )
    names = [str(file)] if rng.random() < 0.7 else [str(data)]

    def read() -> None:
        found = list_pictures(names, prompt=rng.choice((None, "a")), root=None)
        for each in found:
            if isinstance(each, Picture):
                try:
                    if each.path.is_file():
                        load_image(each.path.read_bytes(), height=8, width=8)
                except (OSError, ValueError) as error:  # as PictureScorer.read does
                    print(f"1 unreadable: {error}")
        report_skipped([each for each in found if not isinstance(each, Picture)], len(found), None)

    return as_command(read, root)


def prompts(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """A prompt file of an alignment."""
    data = copied(world / worlds.PROMPTS, root / "prompts")
    file = rng.choice(sorted(data.iterdir()))
    damage.file(file)
    source = f"prompts:{data}:train" if rng.random() < 0.1 else str(file)
    return as_command(lambda: load_prompts(PromptsConfig(train=source)), root)
