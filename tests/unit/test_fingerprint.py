"""What files hold, by digest: every weight counts, and neither where files lie nor how weights are cut into them."""

import json
import shutil
from pathlib import Path
from time import perf_counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from dina_rl.fingerprint import BLOCK, BLOCKS, TENSOR_BYTES, file_digest, files_digest, pipeline_fingerprint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline(tiny_pipeline: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_pipeline, tmp_path / "pipeline")


def test_of_large_files_blocks_at_even_distances_and_the_size_count(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    size = 2 * BLOCKS * BLOCK
    file.write_bytes(bytes(size))
    before = file_digest(file, whole=size - 1)
    assert file_digest(file, whole=size) != before
    ninth = 9 * (size - BLOCK) // (BLOCKS - 1)
    for place, seen in ((0, True), (size - 1, True), (ninth, True), (ninth + BLOCK, False)):
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
            stream.flush()
            assert (file_digest(file, whole=size - 1) != before) == seen
            stream.seek(place)
            stream.write(b"\0")
    assert file_digest(file, whole=size - 1) == before
    file.write_bytes(bytes(size + 1))
    assert file_digest(file, whole=size - 1) != before


def test_a_directory_is_its_files_but_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = files_digest(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b").write_text("2")
    assert files_digest(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "c")
    assert files_digest(tmp_path) != before


def test_each_part_of_a_pipeline_has_its_own(pipeline: Path, tiny_pipeline: Path) -> None:
    whole = pipeline_fingerprint(str(pipeline))
    assert whole == pipeline_fingerprint(str(tiny_pipeline))
    assert None not in dict(whole).values()
    for part, named in (("transformer", "transformer"), ("vae", "VAE"), ("text_encoder_3", "text encoders")):
        (file,) = (pipeline / part).glob("*.safetensors")
        tensors = load_file(file)
        next(iter(tensors.values())).add_(1)
        save_file(tensors, file)
        changed = pipeline_fingerprint(str(pipeline))
        assert changed.other_parts(whole) == [named]
        whole = changed


def test_a_vae_is_its_scales_too(pipeline: Path) -> None:
    before = pipeline_fingerprint(str(pipeline))
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    for key, value, differs in (("_diffusers_version", "9", False), ("shift_factor", 0.5, True)):
        (pipeline / "vae" / "config.json").write_text(json.dumps(config | {key: value}))
        assert (pipeline_fingerprint(str(pipeline)).other_parts(before) == ["VAE"]) == differs


def test_shards_and_headers_do_not_count_and_a_missing_shard_leaves_it_open(pipeline: Path) -> None:
    before = pipeline_fingerprint(str(pipeline))
    tensors = load_file(pipeline / "transformer" / WEIGHTS)
    (pipeline / "transformer" / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = [pipeline / "transformer" / f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for shard, chosen in zip(shards, (names[1::2], names[::2]), strict=True):
        save_file({name: tensors[name] for name in chosen}, shard, {"format": "pt"})
    save_file({}, pipeline / "transformer" / "diffusion_pytorch_model.fp16.safetensors")  # a variant beside it
    assert pipeline_fingerprint(str(pipeline)) == before
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    assert pipeline_fingerprint(str(pipeline)).transformer is None
    shards[0].unlink()
    found = pipeline_fingerprint(str(pipeline))
    assert found.transformer is None
    assert found.other_parts(before) == []


def test_the_middle_of_every_tensor_is_read(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    large = torch.zeros(8 * TENSOR_BYTES, dtype=torch.uint8)
    found = []
    for place in (None, 4 * TENSOR_BYTES, 0):
        tensor = large.clone()
        if place is not None:
            tensor[place] = 1
        save_file({"a": tensor}, tmp_path / "transformer" / WEIGHTS)
        found.append(pipeline_fingerprint(str(tmp_path)).transformer)
    assert found[0] != found[1]
    assert found[0] == found[2], "what is not read is not seen: an edit by hand"


def test_gigabytes_take_less_than_a_second(tmp_path: Path) -> None:
    """A sparse file of the size and the number of tensors of SD3.5-large's transformer."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    each, count = 2**24, 1200
    entries = {
        f"block.{n}": {"dtype": "BF16", "shape": [each // 2], "data_offsets": [n * each, (n + 1) * each]}
        for n in range(count)
    }
    header = json.dumps(entries).encode()
    with (tmp_path / "transformer" / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * each)
    begin = perf_counter()
    assert pipeline_fingerprint(str(tmp_path)).transformer is not None
    file_digest(tmp_path / "transformer" / WEIGHTS)
    assert perf_counter() - begin < 2  # 0.1 s on an idle machine


def test_nothing_is_said_of_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for location in ("someone/pipeline", str(tmp_path / "nowhere"), str(tmp_path)):
        assert set(dict(pipeline_fingerprint(location)).values()) == {None}
