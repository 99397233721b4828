"""`python -m jobs.encode` through real Ray Data: a parquet set with images, in two buckets, held-out pairs only."""

import io
import json
from pathlib import Path

import numpy
import pyarrow
import pytest
import torch
import yaml
from PIL import Image
from pyarrow import parquet

from dina_rl.backbones.registry import open_backbone
from dina_rl.config import FitRun
from dina_rl.data.encode import LATENTS, RETENTION_FILE, SKIPPED_FILE, EncodingHere, check_inputs, encode_dataset
from dina_rl.data.stores.latents import LatentStore
from dina_rl.data.stores.prompts import StoredPrompts, find_prompts
from jobs import encode, encoding
from tests.tiny_reward import write_preferences

SIZES = ((32, 32), (24, 48))


def picture(seed: int, size: tuple[int, int]) -> dict[str, bytes | str | None]:
    buffer = io.BytesIO()
    pixels = numpy.random.default_rng(seed).integers(0, 255, (*size, 3), numpy.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 votes in GenAI-Bench's layout: 10 ties, one truncated image, one empty cell."""
    votes = ["leftvote", "rightvote", "leftvote", "bothbad_vote"]
    left, right = ([picture(2 * row + side, SIZES[row % 2]) for row in range(40)] for side in range(2))
    left[4]["bytes"] = left[4]["bytes"][:1000]
    right[9]["bytes"] = b""
    columns = {
        "prompt": [f"prompt {row}" for row in range(40)],
        "left_model": ["m"] * 40,
        "left_image": left,
        "right_model": ["n"] * 40,
        "right_image": right,
        "vote_type": votes * 10,
    }
    directory = tmp_path_factory.mktemp("genai")
    parquet.write_table(pyarrow.table(columns), directory / "test-00000-of-00001.parquet", row_group_size=8)
    return directory


def test_a_parquet_set_through_ray_is_what_one_process_makes_of_it(
    ray_local, dataset: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The same files; and with --resume, what was lost meanwhile is made again and prompts are added, nothing else."""
    monkeypatch.setattr(encoding, "MEASURED_HERE", 0)  # image headers by Ray too
    values = {
        "pipeline": {"path": str(tiny_pipeline)},
        "dataset": {
            "kind": "genai_bench",
            "path": str(dataset),
            "train": None,
            "buckets": [list(size) for size in SIZES],
            "max_skipped": 0.1,
            "encode_batch_size": 4,
            "batches_per_shard": 2,
        },
    }
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    argv = ["--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "ray")]
    encode.main(argv)
    shown = capsys.readouterr().out
    assert "test: 40 records, 0 malformed; 40 pairs in, 28 kept (70.0%)" in shown
    assert "dropped by tie: 10" in shown
    assert "dropped by unreadable: 2" in shown
    listed = [json.loads(line) for line in (tmp_path / "ray" / SKIPPED_FILE).read_text().splitlines()]
    assert [(line["file"], line["index"]) for line in listed] == [("test-00000-of-00001.parquet", n) for n in (4, 9)]

    run = FitRun.model_validate(values | {"run_dir": tmp_path / "here"})
    backbone = open_backbone(tiny_pipeline, max_sequence_length=8)
    encode_dataset(check_inputs(run, backbone), run.run_dir, backbone, EncodingHere(backbone))
    store, ours = (LatentStore(tmp_path / name / LATENTS) for name in ("ray", "here"))
    files = [*(f"latents/{file.name}" for file in ours.directory.iterdir()), SKIPPED_FILE, RETENTION_FILE]
    assert len(files) > 10
    tables = [store.pairs("test"), ours.pairs("test")]
    assert tables[0].pair_ids.tolist() == tables[1].pair_ids.tolist()
    assert (len(tables[0]), len(store.pairs("train"))) == (28, 0)
    for bucket in range(2):
        chosen = tables[0].chosen[tables[0].bucket == bucket]
        assert numpy.allclose(store.latents(chosen), ours.latents(chosen), rtol=1e-4, atol=1e-5)
    for name in (SKIPPED_FILE, RETENTION_FILE, "latents/pairs-test.parquet", "latents/rows.parquet"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name

    shards = sorted(store.directory.glob("shard-*"))
    before = {shard: (shard.stat().st_mtime_ns, shard.read_bytes()) for shard in shards}
    shards[-1].unlink()
    encode.main([*argv, "--resume", "--dataset.prompt_embeddings"])
    assert {shard: shard.read_bytes() for shard in shards} == {shard: content for shard, (_, content) in before.items()}
    assert [shard.stat().st_mtime_ns for shard in shards[:-1]] == [before[shard][0] for shard in shards[:-1]]
    pipeline = run.pipeline.model_copy(update={"max_sequence_length": 8})
    embeddings, kept = find_prompts(store.directory, pipeline), tables[0].prompts
    assert list(embeddings.iter_prompts()) == list(kept)
    stored, expected = StoredPrompts([embeddings])(kept), backbone.load_text_encoder()(kept)
    assert torch.allclose(stored.embeds, expected.embeds, rtol=1e-4, atol=1e-5)
    assert torch.allclose(stored.pooled, expected.pooled, rtol=1e-4, atol=1e-5)


def test_a_resumed_encode_minds_what_it_reads_alone(tiny_pipeline: Path, tmp_path: Path, capsys) -> None:
    """A fit's settings, a reward model that the pipeline does not fit among them, are the fit's business."""
    write_preferences(tmp_path / "data", train=4, test=2)
    (tmp_path / "empty.yaml").write_text("{}\n")
    run_dir = tmp_path / "run"
    argv = ["--config", str(tmp_path / "empty.yaml"), "--inline", "--pipeline.path", str(tiny_pipeline)]
    argv += ["--dataset.path", str(tmp_path / "data"), "--run_dir", str(run_dir)]
    encode.main([*argv, "--fit.micro_batch_size", "2"])
    config = (run_dir / "config.yaml").read_text()
    fit = ["--fit.micro_batch_size", "3", "--fit.learning_rate", "1", "--fit.evaluate_every", "7"]
    encode.main([*argv, "--resume", *fit, "--reward.taps", "99", "--latents", "elsewhere"])
    ours, before = (yaml.safe_load(text) for text in ((run_dir / "config.yaml").read_text(), config))
    assert ours | {"resume": False} == before  # what the directory's fit will go by is as it was
    encode.main([*argv, "--resume", "--dataset.max_skipped", "0.5"])
    capsys.readouterr()
    refused = {
        "seed": "1",
        "pipeline.dtype": "bfloat16",
        "dataset.encode_batch_size": "3",
        "dataset.filter.min_confidence": "0.5",
    }
    for key, value in refused.items():
        with pytest.raises(SystemExit) as ending:
            encode.main([*argv, "--resume", f"--{key}", value])
        assert ending.value.code == 2
        assert capsys.readouterr().err == f"error: cannot resume {run_dir} with other values of: {key}\n"


def test_what_encoding_does_not_read_need_not_be_there(tiny_pipeline: Path, tmp_path: Path) -> None:
    """`encode.UNREAD` is all of a run but this; a new section is a decision."""
    assert set(FitRun.model_fields) == {"seed", "run_dir", "resume", "inline", "pipeline", "dataset", *encode.UNREAD}
    write_preferences(tmp_path / "data", train=4, test=2)
    dataset = {"path": str(tmp_path / "data"), "prompt_embeddings": True}
    run = FitRun.model_validate({"pipeline": {"path": str(tiny_pipeline)}, "dataset": dataset})
    backbone = open_backbone(tiny_pipeline, max_sequence_length=8)
    bare = check_inputs(run, backbone).model_copy(update=dict.fromkeys(encode.UNREAD))
    assert encode_dataset(bare, tmp_path / "run", backbone, EncodingHere(backbone)).complete()
