"""A fit on stored embeddings is the fit with the text encoders, to the last bit, and needs none of them."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dina_rl.config import FitRun
from dina_rl.data.encode import LATENTS, EncodingHere, check_inputs, encode_dataset
from dina_rl.data.stores.latents import LatentStore
from dina_rl.data.stores.prompts import PROMPTS, PromptsInfo, PromptStore
from dina_rl.reward.fit import REWARD
from dina_rl.reward.inline import fit_inline
from dina_rl.reward.outcome import LOG_FILE
from dina_rl.runtime import open_pipeline
from tests.tensors import assert_same_tensors
from tests.tiny_reward import TINY_REWARD, write_preferences, write_store


def make_run(run_dir: Path, pipeline: dict[str, object], **values: object) -> FitRun:
    fit = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, **values.pop("fit", {})}
    return FitRun(run_dir=run_dir, pipeline=pipeline, reward=TINY_REWARD, fit=fit, **values)


def outcome(run_dir: Path) -> tuple[list, dict]:
    """(losses, gradient norms and held-out accuracies, saved weights)."""
    lines = [json.loads(line) for line in (run_dir / LOG_FILE).read_text().splitlines()]
    logged = [{key: value for key, value in line.items() if key != "pairs_per_second"} for line in lines]
    return logged, {file.name: load_file(file) for file in (run_dir / REWARD).rglob("*.safetensors")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fit_on_stored_embeddings_is_the_same_fit(tiny_pipeline: Path, tmp_path: Path, dtype: str, capsys) -> None:
    directory = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, directory)
    pipeline = {"path": str(directory), "dtype": dtype}
    write_preferences(tmp_path / "data", train=8, test=3)
    data = {"path": str(tmp_path / "data")}
    fit_inline(make_run(tmp_path / "plain", pipeline, dataset=data))
    encoding = make_run(tmp_path / "encoded", pipeline, dataset=data | {"prompt_embeddings": True})
    backbone = open_pipeline(encoding.pipeline)
    encode_dataset(check_inputs(encoding, backbone), encoding.run_dir, backbone, EncodingHere(backbone))
    for encoder in directory.glob("text_encoder*"):
        shutil.rmtree(encoder)
    fit_inline(make_run(tmp_path / "stored", pipeline, latents=encoding.run_dir / LATENTS))
    assert "text encoders" not in capsys.readouterr().out
    (lines, weights), (our_lines, ours) = outcome(tmp_path / "plain"), outcome(tmp_path / "stored")
    assert our_lines == lines
    assert set(ours) == set(weights) == {"head.safetensors", "adapter_model.safetensors"}
    for file, tensors in weights.items():
        assert_same_tensors(ours[file], tensors)


def with_embeddings(store: LatentStore, run: FitRun) -> Path:
    backbone = open_pipeline(run.pipeline)
    table = store.pairs("test").prompts + store.pairs("train").prompts
    prompts = PromptStore.create(store.directory, PromptsInfo.of(run.pipeline, backbone), dict.fromkeys(table))
    encoder = backbone.load_text_encoder()
    for shard in prompts.missing_shards():
        prompts.write_shard(shard, encoder)
    return store.directory


def test_one_held_out_store_without_embeddings_brings_the_text_encoders_back(
    tiny_pipeline: Path, tmp_path: Path, capsys
) -> None:
    own = write_store(tmp_path / "own", str(tiny_pipeline), train=(4, 4), test=(2, 0))
    other = write_store(tmp_path / "other", str(tiny_pipeline), train=(0, 0), test=(2, 1))
    fit = {"held_out": {"other": str(other.directory)}}
    first = make_run(tmp_path / "first", {"path": str(tiny_pipeline)}, latents=own.directory, fit=fit)
    fit_inline(first)
    assert "text encoders" not in capsys.readouterr().out  # no embeddings anywhere, none asked for

    with_embeddings(own, first)
    fit_inline(first.model_copy(update={"run_dir": tmp_path / "mixed"}))
    assert capsys.readouterr().out == f"{other.directory} has no prompt embeddings: the text encoders are loaded\n"

    with_embeddings(other, first)
    fit_inline(first.model_copy(update={"run_dir": tmp_path / "stored"}))
    assert capsys.readouterr().out == ""
    lines = [outcome(tmp_path / name)[0] for name in ("first", "mixed", "stored")]
    assert lines[0] == lines[1] == lines[2]


def test_a_fit_with_other_settings_is_refused_before_it_starts(tiny_pipeline: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "own", str(tiny_pipeline), train=(4, 4), test=(2, 0))
    pipeline = {"path": str(tiny_pipeline)}
    made = make_run(tmp_path / "made", pipeline, latents=store.directory)
    with_embeddings(store, made)
    longer = make_run(tmp_path / "run", pipeline | {"max_sequence_length": 12}, latents=store.directory)
    with pytest.raises(ValueError, match="were made with pipeline.max_sequence_length 8, this run's is 12; "):
        fit_inline(longer)
    next((store.directory / PROMPTS).glob("shard-*")).unlink()
    with pytest.raises(ValueError, match="are not complete"):
        fit_inline(made)
    assert not (tmp_path / "run").exists()
