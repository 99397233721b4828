"""Who reads what runs and models keep: stores, weights, run directories; and who answers requests."""

import json
import random
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from http import HTTPStatus
from pathlib import Path

import torch
from pyarrow import parquet
from safetensors.torch import save

from benchmarks.fuzz import worlds
from benchmarks.fuzz.mutations import Damage, copied
from benchmarks.fuzz.readers import Task, as_command, changed_column, encode_command
from dina_rl.alignment.inline import InlineLearner
from dina_rl.alignment.record import Recorder
from dina_rl.backbones.base import Backbone
from dina_rl.backbones.files import EVERYTHING
from dina_rl.cli import load
from dina_rl.config import (
    AlignRun,
    FitRun,
    PipelineConfig,
    ScoreRun,
    ServeRun,
)
from dina_rl.data.encode import EncodingHere
from dina_rl.data.stores.open import open_store
from dina_rl.data.stores.units import fit_units
from dina_rl.evaluation.runs import essence, notes_on, read_runs
from dina_rl.reward.inputs import open_encoder
from dina_rl.reward.job import FitWork, fit_reward
from dina_rl.reward.outcome import Outcome
from dina_rl.runtime import open_pipeline
from dina_rl.scorers.weights import load_tensors
from dina_rl.scoring import PictureScorer, open_scorer
from dina_rl.serving.server import ScoreServer
from jobs import align, compare, convert_mps, export
from jobs import fit_reward as fit_job

TOKEN = "a-token-of-the-trials"


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
        parquet.write_table(changed_column(rng, damage, table) if file.stat().st_size else table, file)
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
    return encode_command(
        world, root, "hpdv3", world / worlds.SETS / "hpdv3", "--resume", "--dataset.prompt-embeddings"
    )


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
