"""What a run was made from is known by content: a resumed run finds the same, wherever it lies now."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import pytest
import yaml

from dina_rl.alignment.inputs import align_inputs
from dina_rl.alignment.prompts import load_prompts
from dina_rl.checkpoint import INPUTS_FILE, Input, open_run_dir
from dina_rl.config import AlignRun, EvaluateRun, FitRun
from dina_rl.data.images import READING
from dina_rl.evaluation.inputs import evaluation_inputs
from dina_rl.fingerprint import BLOCK, pipeline_fingerprint, records_parts, store_parts
from dina_rl.reward.inputs import check_fit_inputs, fit_inputs
from dina_rl.runtime import open_pipeline
from jobs import encode
from tests.tiny_clip import save_tiny_clip
from tests.tiny_reward import write_preferences, write_store
from tests.tiny_run import tiny_run


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """An alignment's inputs in a directory of their own."""

    root: Path

    @property
    def run(self) -> AlignRun:
        clip = str(self.root / "clip")
        return tiny_run(
            self.root.parent / "run",
            self.root / "pipeline",
            self.root / "reward",
            algorithm="refl",
            refl={"stop_range": [2, 3], "pretraining_weight": 0.1, "pretraining_latents": str(self.root / "latents")},
            learner={"updates_per_iteration": 1},
            prompts={"train": str(self.root / "train.txt")},
            golden={"scorer": "clip_score", "path": clip, "processor": clip},
        )

    def open(self, *, resume: bool) -> Path:
        return open_run_dir(self.run, self.run.run_dir, resume=resume, inputs=align_inputs(self.run, self.prompts))

    @property
    def prompts(self):
        return load_prompts(self.run.prompts)


@pytest.fixture
def world(tmp_path: Path, tiny_pipeline: Path, tiny_reward: Path) -> World:
    root = tmp_path / "world"
    shutil.copytree(tiny_pipeline, root / "pipeline")
    shutil.copytree(tiny_reward, root / "reward")
    write_store(root / "latents", str(root / "pipeline"), train=(4, 2), test=(1, 1))
    save_tiny_clip(root / "clip")
    (root / "train.txt").write_text("a red circle\na blue ring\na green cross\na red ring\n")
    return World(root=root)


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def test_an_alignment_names_the_input_that_changed(world: World) -> None:
    world.open(resume=False)
    world.open(resume=True)
    weights = "model.safetensors"
    for place, line in {
        "train.txt": r"prompts.train .*train.txt has changed since the run began \(content\); put back",
        "reward/head.safetensors": r"rewards.dina.path .*reward has changed",
        f"pipeline/vae/diffusion_pytorch_{weights}": "pipeline.path .*VAE",
        "pipeline/scheduler/scheduler_config.json": r"pipeline.path .*\(scheduler\)",
        f"clip/{weights}": r"golden.path .*clip has changed",
        "latents/pairs-train.parquet": "refl.pretraining_latents .*latents has changed",
    }.items():
        file = world.root / place
        before, run = file.read_bytes(), world.run
        inputs = align_inputs(run, world.prompts)
        append(file)
        changed = align_inputs(run, world.prompts) if "vae" not in place else [_vae(each) for each in inputs]
        with pytest.raises(ValueError, match=rf"cannot resume .*run: {line}"):
            open_run_dir(run, run.run_dir, resume=True, inputs=changed)
        file.write_bytes(before)
    world.open(resume=True)


def _vae(each: Input) -> Input:
    """The pipeline as another VAE's: such a one is refused by the reward before."""
    return Input(key=each.key, path=each.path, parts=each.parts | {"VAE": "x"} if "VAE" in each.parts else each.parts)


def test_an_alignment_finds_its_inputs_where_they_lie_now(world: World) -> None:
    run_dir = world.open(resume=False)
    moved = World(root=world.root.rename(world.root.parent / "moved"))
    moved.open(resume=True)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["pipeline"]["path"] == str(moved.root / "pipeline")
    (moved.root / "train.txt").write_text("a red circle\r\na blue ring\n\na green cross\na red ring")
    moved.open(resume=True)  # the same prompts
    (run_dir / INPUTS_FILE).unlink()  # as before inputs were kept: by path
    again = World(root=moved.root.rename(world.root))
    with pytest.raises(ValueError, match=r"with other values of: pipeline.path, prompts.train"):
        again.open(resume=True)


def test_a_run_of_before_says_that_it_compares_by_path(world: World, capsys: pytest.CaptureFixture) -> None:
    run_dir = world.open(resume=False)
    (run_dir / INPUTS_FILE).unlink()
    capsys.readouterr()
    world.open(resume=True)
    assert "was begun without digests of its inputs" in capsys.readouterr().out
    assert "prompts.dev" in json.loads((run_dir / INPUTS_FILE).read_text())


def test_encoding_and_a_fit_go_on_with_what_has_moved(
    tmp_path: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture
) -> None:
    write_preferences(tmp_path / "a" / "set", train=4, test=2)
    shutil.copytree(tiny_pipeline, tmp_path / "a" / "pipeline")

    def words(place: str) -> list[str]:
        at = tmp_path / place
        return ["--dataset.path", str(at / "set"), "--pipeline.path", str(at / "pipeline")]

    options = ["--inline", "--run-dir", str(tmp_path / "run"), "--reward.taps", "1", "2", "--reward.num-heads", "4"]
    encode.main([*options, *words("a"), "--dataset.prompt-embeddings"])
    info = json.loads((tmp_path / "run" / "latents" / "store.json").read_text())
    assert info["pictures"] == READING
    assert info["vae"] == pipeline_fingerprint(str(tmp_path / "a" / "pipeline")).vae
    (tmp_path / "a").rename(tmp_path / "b")
    next((tmp_path / "run" / "latents").glob("shard-*")).unlink()
    encode.main([*options, *words("b"), "--resume"])
    stored = {"latents": tmp_path / "run" / "latents", "pipeline": {"path": str(tmp_path / "b" / "pipeline")}}
    fit = FitRun.model_validate({**stored, "reward": {"taps": [1, 2], "num_heads": 4}})
    checked = check_fit_inputs(fit, open_pipeline(fit.pipeline))  # another run's, on these latents
    assert [each.key for each in fit_inputs(checked)] == ["pipeline.path", "latents"]
    records = tmp_path / "b" / "set" / "train.json"
    records.write_text(records.read_text().replace("circle", "square"))
    with pytest.raises(SystemExit) as ended:
        encode.main([*options, *words("b"), "--resume"])
    assert ended.value.code == 2
    assert "dataset.path" in (line := capsys.readouterr().err)
    assert "has changed since the run began (records)" in line
    append(tmp_path / "b" / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="was made with pipeline .*, this run's is"):
        check_fit_inputs(fit, open_pipeline(fit.pipeline))


def test_an_evaluation_knows_its_scorers_and_sets(tmp_path: Path, tiny_pipeline: Path, tiny_reward: Path) -> None:
    write_preferences(tmp_path / "set", train=1, test=2)
    shutil.copytree(tiny_reward, tmp_path / "reward")
    values = {
        "scorers": {"mine": {"path": str(tmp_path / "reward")}},
        "sets": {"ours": {"path": str(tmp_path / "set")}},
        "training": {"path": str(tmp_path / "set"), "split": "train"},
    }
    run = EvaluateRun.model_validate(values)
    open_run_dir(run, tmp_path / "run", resume=False, inputs=evaluation_inputs(run, ()))
    for file, key in (
        (tmp_path / "reward" / "head.safetensors", "scorers.mine.path"),
        (tmp_path / "set" / "test.json", "sets.ours.path"),
        (tmp_path / "set" / "train.json", "training.path"),
    ):
        before = file.read_bytes()
        append(file)
        with pytest.raises(ValueError, match=rf"{key} .* has changed since the run began"):
            open_run_dir(run, tmp_path / "run", resume=True, inputs=evaluation_inputs(run, ()))
        file.write_bytes(before)
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    moved = {
        "scorers": {"mine": {"path": str(tmp_path / "reward"), "pipeline": str(tmp_path / "pipeline")}},
        "sets": {"ours": {"path": str(tmp_path / "elsewhere")}},
        "training": {"path": str(tmp_path / "elsewhere"), "split": "train"},
    }
    run = EvaluateRun.model_validate(moved)
    open_run_dir(run, tmp_path / "run", resume=True, inputs=evaluation_inputs(run, ()))


def test_large_stores_and_sets_take_less_than_a_second(tmp_path: Path) -> None:
    """A store of a thousand sparse shards of 64 MiB, and a set's records of 8 GiB."""
    (tmp_path / "store").mkdir()
    for number in range(1000):
        with (tmp_path / "store" / f"shard-{number:05d}.parquet").open("wb") as file:
            file.truncate(2**26)
    records = tmp_path / "train.json"
    with records.open("wb") as file:
        file.truncate(2**33)
    begin = perf_counter()
    before = store_parts(tmp_path / "store"), records_parts([records])
    assert perf_counter() - begin < 2  # 0.1 s on an idle machine
    append_at(tmp_path / "store" / "shard-00999.parquet", 2**26 - 1)
    append_at(records, 2**33 - BLOCK)
    after = store_parts(tmp_path / "store"), records_parts([records])
    assert [a != b for a, b in zip(before, after, strict=True)] == [True, True]


def append_at(file: Path, place: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"x")
