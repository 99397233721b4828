"""Embeddings of a store's prompts: as the text encoder gave them, to the last bit, whatever happened on the way."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pyarrow import parquet

from dina_rl.backbones.registry import open_backbone
from dina_rl.config import FitRun, PipelineConfig
from dina_rl.data.encode import LATENTS, EncodingHere, check_inputs, encode_dataset
from dina_rl.data.stores import prompts as prompt_store
from dina_rl.data.stores.latents import ROW_GROUP_BYTES
from dina_rl.data.stores.prompts import PROMPTS, SHARD_BYTES, PromptsInfo, PromptStore, StoredPrompts, find_prompts
from dina_rl.types import PromptEmbeds
from tests.tiny_reward import PROMPTS as CAPTIONS
from tests.tiny_reward import TINY_REWARD, write_preferences

TEXTS = [*CAPTIONS, "", "ein Hund 🐕 auf Grün, 犬", "word " * 50]
INFO = PromptsInfo(pipeline="p", max_sequence_length=8, dtype="float32", shape=(2, 3, 1), prompts_per_shard=2)


def counted(prompts: Sequence[str]) -> PromptEmbeds:
    """Embeddings of `INFO`'s shape that tell prompts apart by their length."""
    sizes = torch.tensor([float(len(prompt)) for prompt in prompts])
    return PromptEmbeds(embeds=sizes.view(-1, 1, 1) + torch.arange(6.0).view(2, 3), pooled=-sizes[:, None])


def filled(directory: Path, info: PromptsInfo = INFO, prompts: Sequence[str] = ("a", "bb", "ccc")) -> PromptStore:
    store = PromptStore.create(directory, info, prompts)
    for shard in store.missing_shards():
        store.write_shard(shard, counted)
    return store


def assert_equal(ours: PromptEmbeds, expected: PromptEmbeds) -> None:
    assert ours.embeds.dtype == expected.embeds.dtype
    assert torch.equal(ours.embeds, expected.embeds)
    assert torch.equal(ours.pooled, expected.pooled)
    assert (ours.lengths is None) == (expected.lengths is None)
    assert ours.lengths is None or torch.equal(ours.lengths, expected.lengths)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["tiny_pipeline", "tiny_flux", "tiny_z_image"])
def test_stored_is_encoded_bit_for_bit(request, family: str, dtype: str, tmp_path: Path) -> None:
    pipeline = PipelineConfig(path=str(request.getfixturevalue(family)), dtype=dtype, max_sequence_length=60)
    backbone = open_backbone(pipeline.location, dtype=getattr(torch, dtype), max_sequence_length=60)
    encoder = backbone.load_text_encoder()
    info = replace(PromptsInfo.of(pipeline, backbone), prompts_per_shard=4)
    store = PromptStore.create(tmp_path, info, iter(TEXTS))
    assert [store.write_shard(shard, encoder) for shard in store.missing_shards()] == [4, 2]
    expected = encoder(TEXTS)
    assert expected.embeds.abs().sum() > 0
    stored = StoredPrompts([PromptStore(tmp_path)])
    assert_equal(stored(TEXTS), expected)
    assert_equal(stored([TEXTS[5], TEXTS[0], TEXTS[5]]), expected.select(torch.tensor([5, 0, 5])))
    assert find_prompts(tmp_path, pipeline) is not None


def test_a_large_prompt_is_a_row_group_of_its_own(tmp_path: Path) -> None:
    """At SD3.5's size, which also bounds the files."""
    shape = 333, 4096, 2048
    info = PromptsInfo.of(
        PipelineConfig(dtype="bfloat16"), SimpleNamespace(prompt_shape=shape, max_sequence_length=256)
    )
    assert info.prompts_per_shard * info.values * 2 <= SHARD_BYTES < (info.prompts_per_shard + 1) * info.values * 2

    def encoder(prompts: Sequence[str]) -> PromptEmbeds:
        assert len(prompts) == 1  # no more than that is in memory
        embeds = torch.full((1, 333, 4096), float(len(prompts[0])), dtype=torch.bfloat16)
        return PromptEmbeds(embeds=embeds, pooled=-embeds[:, 0, :2048])

    store = PromptStore.create(tmp_path, info, ["a", "bb"])
    store.write_shard(0, encoder)
    with parquet.ParquetFile(tmp_path / PROMPTS / "shard-00000.parquet") as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        assert [group.num_rows for group in groups] == [1, 1]
        assert groups[0].column(0).compression == "ZSTD"
        assert groups[0].total_byte_size > ROW_GROUP_BYTES
    assert_equal(store.read(1), encoder(["bb"]))


def test_nothing_half_written_is_left_and_the_rest_is_written_once(tmp_path: Path) -> None:
    store, seen = PromptStore.create(tmp_path / "a", INFO, ["a", "bb", "ccc"]), []

    def killed(prompts: Sequence[str]) -> PromptEmbeds:
        seen.extend(prompts)
        if "ccc" in prompts:
            raise KeyboardInterrupt
        return counted(prompts)

    store.write_shard(0, killed)
    with pytest.raises(KeyboardInterrupt):
        store.write_shard(1, killed)
    names = sorted(file.name for file in store.directory.iterdir())
    assert names == ["prompts.json", "prompts.parquet", "shard-00000.parquet"]
    with pytest.raises(
        ValueError, match=r"are not complete \(1 files missing\); finish them with jobs.encode --resume"
    ):
        find_prompts(tmp_path / "a", PipelineConfig(path="p", max_sequence_length=8))
    again = PromptStore.create(tmp_path / "a", INFO, iter(["a", "bb", "ccc"]))
    assert again.missing_shards() == [1]
    again.write_shard(1, counted)
    whole = filled(tmp_path / "b")
    ours, theirs = ({file.name: file.read_bytes() for file in store.directory.iterdir()} for store in (again, whole))
    assert ours == theirs


@pytest.mark.parametrize("prompts", [["a", "bb"], ["a", "bb", "cc"], ["a", "bb", "ccc", "dddd"]])
def test_embeddings_of_other_prompts_are_refused(tmp_path: Path, prompts: list[str]) -> None:
    filled(tmp_path)
    with pytest.raises(ValueError, match="holds embeddings of other prompts or of another text encoder"):
        PromptStore.create(tmp_path, INFO, prompts)
    with pytest.raises(ValueError, match="max_sequence_length 8"):
        PromptStore.create(tmp_path, replace(INFO, max_sequence_length=9), ["a", "bb", "ccc"])


@pytest.mark.parametrize("other", [{"path": "q"}, {"dtype": "bfloat16"}, {"max_sequence_length": 16}])
def test_other_settings_are_refused(tmp_path: Path, other: dict) -> None:
    filled(tmp_path)
    assert find_prompts(tmp_path, PipelineConfig(path="p", max_sequence_length=8)).num_prompts == 3
    key, value = next(iter(other.items()))
    with pytest.raises(ValueError, match=rf"were made with pipeline.{key} \w+, this run's is {value}; "):
        find_prompts(tmp_path, PipelineConfig(**{"path": "p", "max_sequence_length": 8, **other}))


def test_a_prompt_of_no_store_is_named(tmp_path: Path) -> None:
    stored = StoredPrompts([filled(tmp_path / "a"), filled(tmp_path / "b", prompts=["bb", "eeeee"])])
    assert_equal(stored(["eeeee", "a"]), counted(["eeeee", "a"]))
    with pytest.raises(
        ValueError, match=r"no embeddings are stored of the prompt 'another' in .*a/prompts, .*b/prompts"
    ):
        stored(["a", "another"])


def test_a_killed_encode_of_prompts_goes_on(tiny_pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    """Of the pairs that are left, train and test; nothing that was written before is written again."""
    monkeypatch.setattr(prompt_store, "SHARD_PROMPTS", 1)
    write_preferences(tmp_path / "data", train=2, test=3)
    (tmp_path / "data" / "images" / "train-1-dark.png").write_bytes(b"")
    (tmp_path / "data" / "images" / "test-1-dark.png").write_bytes(b"")
    run = FitRun(
        run_dir=tmp_path / "run",
        pipeline={"path": str(tiny_pipeline)},
        dataset={"path": str(tmp_path / "data"), "max_skipped": 0.5},
        reward=TINY_REWARD,
    )
    backbone = open_backbone(tiny_pipeline, max_sequence_length=8)
    run = check_inputs(run, backbone)
    plain = encode_dataset(run, run.run_dir, backbone, EncodingHere(backbone))
    assert not (plain.directory / PROMPTS).exists()
    asked = run.model_copy(update={"dataset": run.dataset.model_copy(update={"prompt_embeddings": True})})

    class Killed(EncodingHere):
        def encode_prompts(self, run, prompts, shards) -> None:
            super().encode_prompts(run, prompts, shards[:1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_dataset(asked, run.run_dir, backbone, Killed(backbone))
    before = {file: file.stat().st_mtime_ns for file in (run.run_dir / LATENTS).rglob("*.parquet")}
    encode_dataset(asked, run.run_dir, backbone, EncodingHere(backbone))
    after = {file: file.stat().st_mtime_ns for file in (run.run_dir / LATENTS).rglob("*.parquet")}
    assert before.items() < after.items()
    kept = [CAPTIONS[0], CAPTIONS[2]]  # the other one's pairs are unreadable
    store = find_prompts(run.run_dir / LATENTS, run.pipeline)
    assert list(store.iter_prompts()) == kept
    assert_equal(StoredPrompts([store])(kept), backbone.load_text_encoder()(kept))
