"""Storage that is full, broken or away: one line each, and what was whole before is whole still."""

import errno
import pickle
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dina_rl import storage
from dina_rl.alignment.board import Board
from dina_rl.alignment.checkpoints import Checkpoint, Checkpoints
from dina_rl.alignment.disk import check_room, disk_use
from dina_rl.alignment.inline import InlineExperience
from dina_rl.checkpoint import open_run_dir, save_tensors, write_json
from dina_rl.cli import interruptible
from dina_rl.config import AlignRun, FilterConfig, FitRun
from dina_rl.data.images import file_size
from dina_rl.data.plan import EncodePlan
from dina_rl.data.sets.records import UnlabelledRecord
from dina_rl.data.sets.root import DataRoot
from dina_rl.data.stores.files import write_lines, write_table
from dina_rl.errors import BadInput
from dina_rl.evaluation.score_store import _write_part
from dina_rl.kept import Kept
from dina_rl.report import plot_samples
from dina_rl.reward.checkpoint import load_reward, save_reward
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.session import FirstRank, FitLog, OneRank
from dina_rl.run_directory import run_directory
from dina_rl.runtime import open_pipeline
from dina_rl.storage import NothingWhole, StorageFailed, writing
from dina_rl.sums import SUMS_FILE
from dina_rl.types import PolicyWeights
from tests.full_disk import files_below, full, mounted
from tests.tensors import assert_same_tensors
from tests.tiny_reward import TINY_REWARD, write_store
from tests.tiny_run import tiny_run

NOISE = torch.randint(0, 256, (2**20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
"""A MiB that no compression makes smaller."""
TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "a": torch.rand(5),
    "none": torch.zeros(0, 3),
    "steps": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "turned": torch.rand(3, 4).T,
    "double": torch.rand(2, dtype=torch.float64),
}


def flip(file: Path, place: float = 0.9) -> None:
    """Turn one bit."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 4
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def test_tensors_of_all_kinds_are_read_as_they_were_written(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", TENSORS, {"format": "pt"})
    assert_same_tensors(load_file(tmp_path / "file"), TENSORS)
    with safe_open(tmp_path / "file", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(
        iteration=number, state={"ema/x": torch.full((9,), float(number))}, history=[], seconds={"start": 1.5}
    )


def kept(run_dir: Path) -> list[int]:
    return sorted(int(each.name[-6:]) for each in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", SUMS_FILE])
def test_of_broken_checkpoints_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, harm: Callable[[Path], object]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2, 3):
        checkpoints.save(checkpoint(number))
    assert kept(tmp_path) == [2, 3]
    newest = tmp_path / "checkpoints" / "iteration_000003"
    assert subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=newest, capture_output=True, check=False).returncode == 0
    harm(newest / name)
    if (name, harm) == (SUMS_FILE, Path.unlink):
        assert Checkpoints(tmp_path).last().iteration == 3, "an earlier version wrote none"
        return
    assert Checkpoints(tmp_path).done() == 2
    capsys.readouterr()
    found = Checkpoints(tmp_path).last()
    assert (found.iteration, found.seconds) == (2, {"start": 1.5})
    assert_same_tensors(found.state, checkpoint(2).state)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{newest} is broken (")
    assert line.endswith("; the one before it is taken, and what was done since is done again")
    Checkpoints(tmp_path, keep=1).save(checkpoint(2))  # done again
    assert kept(tmp_path) == [2], "the broken one, which is newer, is gone"


def test_where_none_is_whole_a_run_ends_with_a_line_and_the_code_of_bad_input(tmp_path: Path, capsys) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last() is None
    for number in (1, 2):
        checkpoints.save(checkpoint(number))
    checkpoints.check()
    for each in (tmp_path / "checkpoints").iterdir():
        flip(each / "state.safetensors")
    with pytest.raises(SystemExit, match="2"), interruptible(tmp_path):
        checkpoints.check()
    assert f"none of the 2 checkpoint(s) in {tmp_path}" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match=r"iteration_000002 is broken .*; there are also 1"):
        checkpoints.weights("last")


def test_broken_best_weights_are_not_taken(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for version in (1, 2):
        checkpoints.keep_best_weights(PolicyWeights(version=version, tensors={"x": torch.ones(3)}))
    checkpoints.keep_best_state({"x": torch.zeros(2)})
    assert checkpoints.best_weights().version == 2
    flip(tmp_path / "best" / "weights.safetensors")
    with pytest.raises(NothingWhole, match="does not hold what was written"):
        checkpoints.best_weights()
    with pytest.raises(ValueError, match="does not hold what was written"):
        checkpoints.weights("best")
    assert_same_tensors(checkpoints.best_state(), {"x": torch.zeros(2)})


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for half in ("checkpoints/.iteration_000001-x1/fresh", "best/.weights.safetensors-1f.safetensors"):
        (tmp_path / half).mkdir(parents=True)
    checkpoints.save(checkpoint(1))
    checkpoints.keep_best_weights(PolicyWeights(version=1, tensors={}))
    assert not list(tmp_path.glob("*/.*"))


def test_a_broken_latent_or_reward_is_told(tmp_path: Path, tiny_pipeline: Path) -> None:
    store = write_store(tmp_path / "store", str(tiny_pipeline), train=(4, 4), test=(1, 1))
    shard = store.directory / "shard-00000.parquet"
    content = shard.read_bytes()
    for harm in (lambda file: flip(file, 0.3), truncate):
        harm(shard)
        with pytest.raises(ValueError, match=r"shard-00000.parquet is broken .*; delete it, and jobs.encode --resume"):
            type(store)(store.directory).latents(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]))
        shard.write_bytes(content)
    run = FitRun(pipeline={"path": str(tiny_pipeline)})
    backbone = open_pipeline(run.pipeline)
    save_reward(LatentRewardModel(backbone, TINY_REWARD, seed=0), tmp_path / "reward", pipeline=run.pipeline)
    load_reward(tmp_path / "reward", backbone)
    flip(tmp_path / "reward" / "backbone_lora" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="reward is broken: .* does not hold what was written"):
        load_reward(tmp_path / "reward", backbone)
    with pytest.raises(BadInput, match="reward is broken: .* does not hold what was written"):
        InlineExperience(tiny_run(tmp_path / "align", tiny_pipeline, tmp_path / "reward"))


# --- a full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(tmp_path_factory.mktemp("disk") / "small") as place:
        yield place


def _board(run_dir: Path) -> None:
    board = Board(AlignRun(), run_dir / "tensorboard", done=0)
    board.images("samples", NOISE[: 2**16 * 3].view(1, 3, 256, 256), ["a"], 1)
    board.close()


def _fit_log(run_dir: Path) -> None:
    writer = FirstRank(OneRank())
    log = FitLog(FitRun(), run_dir, first_step=0, writer=writer)
    log.add_held_out(1, {"test": {"accuracy_single": 0.5}})
    log.close({"test": {"accuracy_single": 0.5}})
    writer.agree()


def _plan(run_dir: Path) -> None:
    plan = EncodePlan(run_dir / "plan.sqlite", {"a": 1})
    try:
        if not plan.is_read:
            records = (UnlabelledRecord(index=n, prompt="a") for n in range(2))
            plan.read({"train": records}, preferences=FilterConfig(), seed=0)
        plan.measured(0, [(n, n) for n in range(9)])
    finally:
        plan.close()


def _table(run_dir: Path) -> None:
    schema = pyarrow.schema([("latent", pyarrow.binary())])
    content = pyarrow.record_batch({"latent": [NOISE.numpy().tobytes()]}, schema=schema)
    write_table(run_dir / "shard.parquet", [content], schema)


def _reward(run_dir: Path) -> None:
    run = FitRun()
    model = LatentRewardModel(open_pipeline(run.pipeline), TINY_REWARD, seed=0)
    save_reward(model, run_dir / "reward", pipeline=run.pipeline)


def _adapter(run_dir: Path) -> None:
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    backbone = open_pipeline(AlignRun().pipeline)
    backbone.save_adapter(
        run_dir / "adapter", {name: NOISE[:4096].float().view(4, -1)}, rank=4, alpha=4, targets=["to_q"]
    )


WRITERS: dict[str, Callable[[Path], object]] = {
    "configuration": lambda run_dir: open_run_dir(AlignRun(), run_dir / "other", resume=False),
    "checkpoint": lambda run_dir: Checkpoints(run_dir).save(checkpoint(3)),
    "best weights": lambda run_dir: Checkpoints(run_dir).keep_best_weights(PolicyWeights(version=1, tensors=TENSORS)),
    "events": _board,
    "log of a fit": _fit_log,
    "picture": lambda run_dir: plot_samples(*2 * [NOISE[:192].view(1, 3, 8, 8)], run_dir / "samples.png"),
    "measurement": lambda run_dir: save_tensors(run_dir / "measurements" / "base.safetensors", {"x": NOISE}),
    "report": lambda run_dir: write_json(run_dir / "report.json", 3 * ["x"]),
    "skips": lambda run_dir: write_lines(run_dir / "skipped.jsonl", 3 * ["x"]),
    "plan": _plan,
    "latents": _table,
    "scores": lambda run_dir: _write_part(run_dir / "part.safetensors", torch.zeros(1, 4), {}),
    "reward": _reward,
    "adapter": _adapter,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(disk: Path, capfd, name: str) -> None:
    run_dir = disk / name.replace(" ", "_")
    run_dir.mkdir()
    for number in (1, 2):
        Checkpoints(run_dir).save(checkpoint(number))
    before = files_below(run_dir)
    with full(disk):
        with pytest.raises(SystemExit, match="3"), interruptible(run_dir):
            WRITERS[name](run_dir)
        left = files_below(run_dir)
    error = capfd.readouterr().err
    line = rf"\nerror: cannot write {run_dir}\S*: No space left on device, 0.0 MiB are free without it"
    assert re.fullmatch(rf"{line}; when that is mended add --resume to continue {run_dir}\n", error), error
    made = {path.name for path, content in left.items() if before.get(path) != content}
    assert {each for each in made if "tfevents" not in each} <= {"plan.sqlite", "fit.jsonl"}, "begun, and gone on with"
    assert left.items() >= before.items()
    WRITERS[name](run_dir)  # there is room again
    assert Checkpoints(run_dir).last().iteration == (3 if name == "checkpoint" else 2)


def test_a_run_that_cannot_even_begin_leaves_nothing(disk: Path) -> None:
    with (
        full(disk),
        pytest.raises(StorageFailed, match=r"cannot write .*: No space left on device"),
        run_directory(AlignRun(), disk / "run", resume=False),
    ):
        pass
    assert not (disk / "run").exists()


def test_a_run_is_refused_where_two_checkpoints_do_not_fit(disk: Path, tmp_path: Path) -> None:
    run = AlignRun(learner={"lora": {"rank": 32}})
    backbone = open_pipeline(run.pipeline)
    use = disk_use(run, backbone)
    assert use.checkpoints == 3 * use.checkpoint
    Checkpoints(disk).save(checkpoint(1))
    with full(disk):
        with pytest.raises(ValueError, match=r"0.0 MiB are free there, two checkpoints are .* MiB; make room"):
            check_room(run, backbone, disk / "new" / "run")
        assert check_room(run, backbone, disk) is None, "what is there makes room for what comes"
    assert check_room(run, backbone, tmp_path) is None


def test_a_file_beyond_the_limit_is_told_without_a_disk_of_its_own(tmp_path: Path) -> None:
    kept = Kept(tmp_path, keep=1, name="step", digits=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))
    try:
        with pytest.raises(StorageFailed, match="cannot write .*: File too large, .* are free without it") as failed:
            kept.save(1, {"x": NOISE}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    told = pickle.loads(pickle.dumps(failed.value))  # as it comes from another process
    assert (str(told), told.number, told.exit_code) == (str(failed.value), errno.EFBIG, 3)


# --- storage that is away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [True, False])
def test_a_checkpoint_waits_for_storage_that_is_away(tmp_path: Path, capsys, monkeypatch, back: bool) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run_dir.mkdir()
    checkpoints = Checkpoints(run_dir)
    checkpoints.save(checkpoint(1))
    run_dir.rename(elsewhere)

    def waits() -> Iterator[float]:
        yield 0.01
        yield 0.02
        if back:
            elsewhere.rename(run_dir)
        yield 0.03

    monkeypatch.setattr(storage, "WAITS_S", waits())
    if back:
        checkpoints.save(checkpoint(2))
        assert kept(run_dir) == [1, 2]
    else:
        with pytest.raises(StorageFailed, match=f"{run_dir} is not there any more"):
            checkpoints.save(checkpoint(2))
        assert not run_dir.exists(), "nothing is made anew where another disk may be"
    told = [f"  {run_dir} is not there any more; the next try is in {wait} s" for wait in (0.01, 0.02, 0.03)]
    assert capsys.readouterr().out.splitlines() == told[: 2 if back else 3]


MEMORY = Path("/proc/self/mem")
"""A file whose beginning no process can read: the system's own I/O error."""


def test_an_image_that_cannot_be_read_now_is_not_broken(tmp_path: Path) -> None:
    """What is broken is left out for good."""
    for read in (lambda: DataRoot(MEMORY.parent).read(MEMORY.name), lambda: file_size(MEMORY)):
        with pytest.raises(StorageFailed, match=r"cannot read /proc/\w+/mem: Input/output error"):
            read()
    (tmp_path / "set").mkdir()
    images = DataRoot(tmp_path / "set")
    with pytest.raises(ValueError, match="unreadable image: no file 'a.png'"):
        images.read("a.png")
    (tmp_path / "set").rmdir()
    with pytest.raises(StorageFailed, match="set is not there any more"):
        images.read("a.png")


def test_a_checkpoint_that_cannot_be_read_is_tried_again_before_the_one_before_it(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(storage, "WAITS_S", (0.01, 0.02))
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        checkpoints.save(checkpoint(number))
    older, newer = (tmp_path / "checkpoints" / f"iteration_00000{number}" / "state.safetensors" for number in (1, 2))
    newer.unlink()
    newer.symlink_to(MEMORY)
    assert Checkpoints(tmp_path).last().iteration == 1
    said = capsys.readouterr()
    line = f"cannot read {newer.parent}: Input/output error"
    assert said.out.splitlines() == [f"  {line}; the next try is in {wait} s" for wait in (0.01, 0.02)]
    assert said.err.startswith(f"{newer.parent} is broken ({line}); the one before it is taken")
    flip(older)
    with pytest.raises(StorageFailed, match=line):
        Checkpoints(tmp_path).last()


def test_an_error_that_only_storage_gives_is_one_line_wherever_it_comes_up(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="3"), interruptible(tmp_path):
        MEMORY.read_bytes()
    assert capsys.readouterr().err.startswith("\nerror: [Errno 5] Input/output error; when that is mended add --resume")
    with pytest.raises(FileNotFoundError), interruptible(tmp_path):
        (tmp_path / "nowhere").read_bytes()


def test_troubles_of_others_are_not_storages(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "a" / "file"):
        (tmp_path / "no set" / "image.png").read_bytes()
    with pytest.raises(ConnectionRefusedError), writing(tmp_path / "file"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    with pytest.raises(StorageFailed, match="Not a directory"):
        write_json(Path(__file__) / "inside" / "x.json", 1)
