"""Who reads each kind of input: commands, or their readers under the commands' own handling of errors."""

import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from http import HTTPStatus
from pathlib import Path

import pyarrow
import torch
from pyarrow import parquet
from pydantic import BaseModel
from safetensors.torch import save

from benchmarks.fuzz import worlds
from benchmarks.fuzz.hostile import hostile_text
from benchmarks.fuzz.mutations import Damage, copied
from dina_rl.alignment.inline import InlineLearner
from dina_rl.alignment.planning import describe
from dina_rl.alignment.prompts import load_prompts
from dina_rl.alignment.record import Recorder
from dina_rl.backbones.base import Backbone
from dina_rl.backbones.files import EVERYTHING
from dina_rl.cli import fail, interruptible, known_keys, load
from dina_rl.config import (
    AlignRun,
    CompareRuns,
    EvaluateRun,
    ExportRun,
    FitRun,
    LabelRun,
    PipelineConfig,
    PromptsConfig,
    ScoreRun,
    ServeRun,
)
from dina_rl.data.encode import EncodingHere
from dina_rl.data.images import load_image
from dina_rl.data.stores.open import open_store
from dina_rl.data.stores.units import fit_units
from dina_rl.evaluation.runs import essence, notes_on, read_runs
from dina_rl.pictures import Picture, list_pictures
from dina_rl.reward.inputs import open_encoder
from dina_rl.reward.job import FitWork, fit_reward
from dina_rl.reward.outcome import Outcome
from dina_rl.runtime import open_pipeline
from dina_rl.scorers.weights import load_tensors
from dina_rl.scoring import PictureScorer, open_scorer
from dina_rl.serving.server import ScoreServer
from jobs import align, compare, convert_mps, encode, export
from jobs import fit_reward as fit_job
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
TOKEN = "a-token-of-the-trials"


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


def _encode(world: Path, root: Path, kind: str, data: Path, *words: str) -> Task:
    places = ["--dataset.path", str(data), "--dataset.kind", kind, "--pipeline.path", str(world / worlds.PIPELINE)]
    few = ["--dataset.max-skipped", "1.0"]
    return lambda: encode.main(["--inline", "--run-dir", str(root / "run"), *places, *worlds.TAPS, *few, *words])


def sets(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """Records of a JSON set, and links in its directory that lead out of it."""
    kind = rng.choice(SET_KINDS)
    data = copied(world / worlds.SETS / kind, root / "set")
    _links_out(data, root)
    damage.directory(data, *rng.choice((("*.json",), ("train.json",), ("*.json", "*.png"))), most=2)
    return _encode(world, root, kind, data)


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
            table = _changed_column(rng, damage, table)
        parquet.write_table(
            table, file, row_group_size=rng.choice((1, 2, 100)), compression=rng.choice(("snappy", "zstd", "none"))
        )
    return _encode(world, root, kind, data)


def _changed_column(rng: random.Random, damage: Damage, table: pyarrow.Table) -> pyarrow.Table:
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
    return _encode(world, root, "hpdv3", data)


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


class _Reads:
    """A fit's training that reads all that a fit reads, and takes no steps."""

    def train(self, run: FitRun, latents: Path, run_dir: Path) -> Outcome:
        store = open_store(latents)
        encoder = open_encoder(run, latents, open_pipeline(run.pipeline))
        for split in ("train", "test"):
            table = store.pairs(split)
            fit_units(table, "groups")
            for position in range(len(table)):
                batch = store.batch(table, torch.tensor([position]))
                encoder(batch.prompts)
        raise SystemExit(0)


def _reading(backbone: Backbone) -> FitWork:
    return EncodingHere(backbone), _Reads()


def latents(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """A latent store with prompt embeddings, as a fit reads it."""
    store = copied(world / worlds.ENCODED / "latents", root / "latents")
    draw = rng.random()
    if draw < 0.03:
        shutil.copy2(world / worlds.BOMB / "latent.parquet", store / "shard-00000.parquet")
    elif draw < 0.35:
        file = rng.choice(sorted(store.rglob("*.parquet")))
        table = parquet.read_table(file)
        parquet.write_table(_changed_column(rng, damage, table) if file.stat().st_size else table, file)
    else:
        damage.directory(store, most=2)
    words = ["--run-dir", str(root / "run"), *worlds.fit_words(world, store)]
    return as_command(lambda: fit_reward(load(FitRun, words, program="fit"), _reading), root / "run")


def rewards(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """A reward model's directory."""
    place = copied(world / worlds.REWARD, root / "reward")
    damage.directory(place, most=2)
    words = ["--scorer.path", str(place)]
    return as_command(lambda: open_scorer(load(ScoreRun, words, program="score").scorer, seed=0), root)


def adapters(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """An adapter that an alignment starts from."""
    place = copied(world / worlds.ADAPTERS, root / "adapter")
    damage.directory(place, most=1)
    words = [
        "--run-dir",
        str(root / "run"),
        *worlds.align_words(world),
        "--learner.lora.init",
        str(place),
        "--learner.lora.alpha",
        "4",
    ]

    def check() -> None:
        run = load(AlignRun, words, program="align")
        align.check_adapter(run, open_pipeline(run.pipeline))

    return as_command(check, root)


def pipelines(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """A diffusers pipeline: its files are checked, and its parts loaded."""
    place = copied(world / worlds.PIPELINE, root / "pipeline")
    damage.directory(place, *rng.choice((("*.json",), ("*.safetensors",), ("*",))), most=2)

    def check() -> None:
        backbone = open_pipeline(PipelineConfig(path=str(place)))
        backbone.check(*EVERYTHING)
        backbone.latent_shape(32, 32)
        backbone.sigmas(4, 32, 32)
        backbone.load_codec()
        backbone.load_transformer()
        backbone.load_text_encoder()(["a"])

    return as_command(check, root)


def published(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """Files of torch.save and safetensors, as scorers and the conversion read them."""
    source = rng.choice(sorted((world / worlds.PUBLISHED).iterdir()))
    file = root / f"weights{source.suffix if rng.random() < 0.7 else rng.choice(('.pt', '.safetensors', '.bin'))}"
    content = source.read_bytes()
    file.write_bytes(damage.content(content) if rng.random() < 0.6 else content)
    if rng.random() < 0.4:
        return lambda: convert_mps.main([str(file), str(root / "out.safetensors")])
    key = rng.choice((None, "state_dict"))
    return as_command(lambda: load_tensors(file, key), root)


def encoded_runs(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """An encoding that is continued."""
    run = copied(world / worlds.ENCODED, root / "run")
    if rng.random() < 0.5:
        rng.choice(sorted(run.rglob("*.parquet"))).unlink()
    damage.directory(run, most=2)
    return _encode(world, root, "hpdv3", world / worlds.SETS / "hpdv3", "--resume", "--dataset.prompt-embeddings")


def fits(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """A fit's directory: shown, continued, or measured by an evaluation."""
    run = copied(world / worlds.FIT, root / "run")
    damage.directory(run, most=2)
    if rng.random() < 0.5:
        words = ["--resume", "--run-dir", str(run), *worlds.fit_words(world, world / worlds.ENCODED / "latents")]
        return lambda: fit_job.main(words)

    def read() -> None:
        found = read_runs([str(run)])
        notes_on(found)
        for each in found:
            essence(each, pool=False)

    return as_command(read, root)


def alignments(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """An alignment's directory: compared, exported, or continued as far as its checkpoints."""
    run_dir = copied(world / worlds.ALIGNMENT, root / "run")
    damage.directory(
        run_dir, *rng.choice((("*.json", "*.jsonl", "*.yaml"), ("*",), ("checkpoints/*/*", "best/*"))), most=2
    )
    draw = rng.random()
    if draw < 0.35:
        return lambda: compare.main([str(run_dir), "--out", str(root / "out")])
    if draw < 0.7:
        which = rng.choice(("best", "last", "average", "1", "2"))
        return lambda: export.main([str(run_dir), "--which", which, "--out", str(root / "out")])

    def resume() -> None:
        words = [
            "--resume",
            "--run-dir",
            str(run_dir),
            *worlds.align_words(world),
            "--iterations",
            rng.choice(("2", "3")),
        ]
        run = align.with_sizes(load(AlignRun, words, program="align"))
        with align.opened(run, align.preflight(run)) as opened:
            recorder = Recorder(run, opened, align.exporter(run))
            if align.finished(run, opened):
                recorder.recall()
                recorder.history.points()
                return
            recorder.checkpoints.check()
            _, state = recorder.restore()
            learner = InlineLearner(run)
            if state is not None:
                learner.load_state(state)
            recorder.close()

    return as_command(resume, run_dir)


@cache
def _scorer(world: Path) -> PictureScorer:
    """One for all trials: each has a copy of it, as it begins as a copy of the process that asks for it first."""
    return open_scorer(ScoreRun.model_validate({"scorer": {"path": str(world / worlds.REWARD)}}).scorer, seed=0)


def ready(world: Path) -> None:
    """Import and open once what every trial would import and open anew."""
    if (world / worlds.PIPELINE).exists():
        backbone = open_pipeline(PipelineConfig(path=str(world / worlds.PIPELINE)))
        backbone.load_codec()
        backbone.load_transformer()
        backbone.load_text_encoder()(["a"])
    if (world / worlds.REWARD).exists():
        _scorer(world)


def requests(rng: random.Random, damage: Damage, world: Path, root: Path) -> Task:
    """Requests at a served scorer; each is answered by scores or by one line of JSON."""
    metadata = {"prompts": ["a", "b"], "levels": [0.2, 0.5], "draws": 2, "seed": 1}
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    whole = save({"latents": torch.zeros(2, 16, 8, 8)}, metadata=texts)
    asked = []
    for _ in range(4):
        length = int.from_bytes(whole[:8], "little")
        head = json.loads(whole[8 : 8 + length])
        head["__metadata__"] = {name: damage.text_of(damage.values(value)) for name, value in metadata.items()}
        packed = damage.text_of(head).encode("utf-8", "surrogatepass")
        told = len(packed).to_bytes(8, "little") + packed + whole[8 + length :]
        body = rng.choice((told, told, damage.weights(whole), damage.content(whole)))
        said = len(body) if rng.random() < 0.9 else rng.choice((0, 10**12, -1, len(body) + 9, "x", ""))
        start = rng.choice(("POST /score HTTP/1.1", "POST /score HTTP/1.1", "GET /info HTTP/1.1", "PUT /../etc HTTP/9"))
        request = f"{start}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {said}\r\n\r\n".encode() + body
        asked.append(damage.content(request) if rng.random() < 0.15 else request)
    return lambda: _ask(_scorer(world), asked)


def _ask(scorer: PictureScorer, asked: Sequence[bytes]) -> None:
    run = ServeRun.model_validate({"port": 0, "wait_ms": 0, "read_timeout_s": 1.0, "timeout_s": 30.0})
    server = ScoreServer(run, token=TOKEN)
    server.start(scorer)
    try:
        statuses = [_answered(server, request) for request in asked]
    finally:
        server.stop()
    refused = [status for status in statuses if status != HTTPStatus.OK]
    if HTTPStatus.INTERNAL_SERVER_ERROR in refused:
        raise AssertionError(f"the scorer failed at what should have been refused: {statuses}")
    if refused:
        print(f"{len(refused)} malformed requests")


def _answered(server: ScoreServer, request: bytes) -> int:
    """The status of the answer, whose body is one object of JSON; 0: what was asked is no request of HTTP."""
    host, port = str(server.server_address[0]), server.server_address[1]
    with socket.create_connection((host, port), timeout=20) as connection:
        reply = b""
        with suppress(OSError):  # it may answer and hang up before all is said
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while part := connection.recv(2**16):
                reply += part
    head, _, body = reply.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return 0
    json.loads(body)
    return int(head.split()[1])
