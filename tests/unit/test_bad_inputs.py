"""What `benchmarks.fuzz` has found, by its mechanism: each is one line now."""

import io
import json
import os
import shutil
import zipfile
from dataclasses import fields
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dina_rl.alignment.history import checked
from dina_rl.backbones.files import check_files
from dina_rl.backbones.source import Source, StockReading
from dina_rl.checkpoint import load_tensors
from dina_rl.config import PipelineConfig, ScoreRun
from dina_rl.data.plan import EncodePlan
from dina_rl.data.sets import pickapic
from dina_rl.data.sets.fields import DEEPEST, json_array
from dina_rl.data.stores.latents import LatentStore
from dina_rl.pictures import Picture, Skipped, list_pictures
from dina_rl.reward.outcome import FitResult, read_result
from dina_rl.run_directory import run_directory
from dina_rl.runtime import open_pipeline
from dina_rl.scorers import weights
from dina_rl.scorers.pickled import module_tensors
from dina_rl.sums import SUMS_FILE, check_all_sums, read_sums
from dina_rl.textfiles import read_record, read_text
from tests.tiny_reward import write_store


@pytest.mark.parametrize("name", ["/etc/passwd", "../beside", "a/../../b", "", ".", "a\x1b"])
def test_sums_name_no_file_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / SUMS_FILE).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(ValueError, match="which is no file below it"):
        read_sums(tmp_path)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    (tmp_path / SUMS_FILE).write_text(f"{'0' * 64}  a\n")
    with pytest.raises(ValueError, match="is broken: a is not there"):
        check_all_sums(tmp_path)


def test_no_reader_waits_for_a_pipe(tmp_path: Path, store: LatentStore) -> None:
    pipe = store.directory / "pairs-train.parquet"
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is no file"):
        store.pairs("train")
    for read in (read_text, load_tensors, weights.load_tensors):
        with pytest.raises(ValueError, match="is no file"):
            read(pipe)


def test_json_sets_nest_no_deeper_than_records_do(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    brackets = {"prompt": '[[{{"\\' * 2 * DEEPEST}
    file.write_text(json.dumps([brackets] * 3))
    assert list(json_array(file)) == [brackets] * 3
    for opening in ("[", '{"a":', '[{"]":'):
        file.write_text("[" + opening * 100_000)
        with pytest.raises(ValueError, match=f"train.json is not valid JSON at record 0.*deeper than {DEEPEST}"):
            list(json_array(file))


def test_a_compressed_archive_is_no_module(tmp_path: Path) -> None:
    file = tmp_path / "bomb.pth"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x")
    file.write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="is compressed, which torch.save never does"):
        module_tensors(file)


def test_a_record_is_read_by_its_type(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content, why in (
        ('{"a": "x"}', "a: Input should be a valid number"),
        ("[]", "valid dictionary"),
        ("{", "JSON"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"a\.json does not hold what was written") as error:
            read_record(dict[str, float], file)
        assert why in str(error.value) or "Expecting" in str(error.value)


@pytest.mark.parametrize(
    "entries",
    [
        {},
        [1],
        [{"kind": "iteration"}],
        [{"kind": 1, "iteration": 1}],
        [{"kind": "measurement", "iteration": 1, "golden": "0.5", "proxy": 1.0, "proxy_std": 1.0}],
        [{"kind": "measurement", "iteration": float("inf"), "golden": 0.5, "proxy": 1.0, "proxy_std": 1.0}],
        [{"kind": "drifted", "iteration": 1}],
    ],
)
def test_a_history_has_entries_of_its_kinds(entries: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        checked(entries)


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return write_store(tmp_path / "latents", "shapes", train=(2, 2), test=(1, 1))


@pytest.mark.parametrize(
    ("column", "values", "why"),
    [
        ("chosen", [0, 99, 0, 0], "names rows 0 to 99 of 12"),
        ("chosen", [0, -1, 0, 0], "names rows -1"),
        ("chosen", [0, 0, 0, 0], "of two sizes"),
        ("chosen", ["a"] * 4, "its columns are"),
        ("prompt", [None] * 4, "its columns are"),
        ("probability", ["x"] * 4, "its probability is string"),
    ],
)
def test_pairs_are_of_rows_of_their_store(store: LatentStore, column: str, values: list, why: str) -> None:
    file = store.directory / "pairs-train.parquet"
    table = parquet.read_table(file)
    parquet.write_table(table.set_column(table.column_names.index(column), column, pyarrow.array(values)), file)
    with pytest.raises(ValueError, match=f"pairs-train.parquet is broken .*{why}"):
        store.pairs("train")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rows": [2**60, 6]}, "rows.parquet has 12"),
        ({"rows_per_shard": 0}, "sizes that no image has"),
        ({"latent_shapes": [[16, 8, 2**40], [16, 8, 4]]}, "sizes that no image has"),
        ({"rows": [12]}, "as many buckets"),
        ({"dtype": "object"}, "dtype"),
    ],
)
def test_a_description_says_what_its_store_has(store: LatentStore, changes: dict, why: str) -> None:
    file = store.directory / "store.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f"does not describe a latent store.*{why}"):
        LatentStore(store.directory)


def test_a_link_out_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    for place in ("in", "out"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.png").write_bytes(b"x")
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "out" / "a.png")
    (tmp_path / "in" / "c.png").symlink_to("a.png")
    (tmp_path / "in" / "d.png").symlink_to("d.png")
    found = list_pictures([str(tmp_path / "in")], prompt="p", root=None)
    assert [type(each) for each in found] == [Picture, Skipped, Picture, Skipped]
    assert [each.reason for each in found if isinstance(each, Skipped)][0].startswith("a link that leads out")


def test_nothing_is_written_through_a_link_in_a_run_directory(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.lock").symlink_to(precious)
    with pytest.raises(ValueError, match=r"run\.lock is a link or no file"):
        held(run_dir)
    (run_dir / "plan.sqlite").symlink_to(precious)
    with pytest.raises(ValueError, match=r"plan\.sqlite is a link or no file"):
        EncodePlan(run_dir / "plan.sqlite", {})
    assert precious.read_text() == "kept"


def held(run_dir: Path) -> None:
    with run_directory(ScoreRun(), run_dir, resume=False):
        pass


def test_what_stock_classes_raise_of_files_is_one_line(tiny_pipeline: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="^pipeline p cannot be read: no class of its own$"),
        StockReading(Source(path="p")),
    ):
        raise Exception("no class\nof its own")  # as tokenizers raises
    with pytest.raises(KeyboardInterrupt), StockReading(Source(path="p")):
        raise KeyboardInterrupt
    place = tmp_path / "pipeline"
    place.mkdir()
    for each in tiny_pipeline.iterdir():
        (place / each.name).symlink_to(each)
    config = json.loads((tiny_pipeline / "transformer" / "config.json").read_text())
    (place / "transformer").unlink()
    (place / "transformer").mkdir()
    (place / "transformer" / "config.json").write_text(json.dumps(config | {"num_attention_heads": "x"}))
    with pytest.raises(ValueError, match="pipeline .* cannot be read"):
        open_pipeline(PipelineConfig(path=str(place))).empty_transformer()


def test_a_tokenizer_knows_no_token_without_an_embedding(tiny_pipeline: Path, tmp_path: Path) -> None:
    place = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, place)
    file = place / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zzz"] = 10**6
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its text_encoder embeds .* knows token 1000000"):
        open_pipeline(PipelineConfig(path=str(place))).load_text_encoder()


def test_shards_of_weights_lie_beside_their_index(tiny_pipeline: Path, tmp_path: Path) -> None:
    place = tmp_path / "pipeline"
    (place / "vae").mkdir(parents=True)
    (place / "model_index.json").write_text((tiny_pipeline / "model_index.json").read_text())
    (place / "vae" / "config.json").write_text((tiny_pipeline / "vae" / "config.json").read_text())
    index = {"weight_map": {"a": "/etc/passwd"}}
    (place / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'/etc/passwd', which is no file beside it"):
        check_files(Source(path=str(place)), "vae")


def test_a_fit_has_accuracies_of_its_held_out_sets(tmp_path: Path) -> None:
    numbers = {field.name: 1 for field in fields(FitResult)} | {"reward": "r", "held_out": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(numbers))
    with pytest.raises(ValueError, match="held_out lacks accuracies"):
        read_result(tmp_path / "metrics.json")


def test_labels_of_another_type_are_malformed() -> None:
    with pytest.raises(ValueError, match="label_0 and label_1 must be"):
        pickapic._compared(0, {"label_0": {"a": 1}, "label_1": [0.0]})
