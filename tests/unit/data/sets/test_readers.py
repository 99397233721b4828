"""Every published set in its own layout, in miniature."""

import io
import json
import re
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from dina_rl.config.fitting import SetKind
from dina_rl.data.sets import parquet_set
from dina_rl.data.sets.fields import text
from dina_rl.data.sets.records import PreferenceRecord, SkippedRecord, UnlabelledRecord, pairs_of
from dina_rl.data.sets.registry import KINDS, open_set, prompts_of

PUBLISHED_ANNOTATIONS = Path(__file__).parents[5] / "shared" / "data" / "imagereward"


def jpeg(shade: int, width: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 4), (shade,) * 3).save(buffer, "JPEG")
    return buffer.getvalue()


def write_json(directory: Path, split: str, records: list[dict]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / f"{split}.json").write_text(json.dumps(records))
    return directory


def write_parquet(file: Path, columns: dict[str, list], **options: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file, **options)


def reasons(records: list) -> list[tuple[int, str]]:
    return [(record.index, record.reason) for record in records if isinstance(record, SkippedRecord)]


def test_hpdv2_pairs(tmp_path: Path) -> None:
    good = {"prompt": "p", "file_path": ["0.jpg", "1.jpg"], "human_preference": [0, 1]}
    changes = [{}, {"human_preference": [1, 1]}, {"human_preference": [1]}, {"file_path": ["0.jpg"]}, {"prompt": 3}]
    directory = write_json(tmp_path, "train", [good | change for change in changes])
    (directory / "train").mkdir()
    (directory / "train" / "1.jpg").write_bytes(jpeg(7))
    source = open_set("hpdv2", directory)
    first, *bad = source.records("train")
    assert (first.images, first.ranks) == (("train/0.jpg", "train/1.jpg"), (1, 0))
    assert source.image("train/1.jpg") == jpeg(7)
    assert source.size("train/1.jpg") == (4, 8)
    assert [index for index, _ in reasons(bad)] == [1, 2, 3, 4]
    assert "mark one image" in bad[0].reason


def test_hpdv2_rankings(tmp_path: Path) -> None:
    annotations = [{"rank": [2, 0, 1], "user_hash": "u"}]
    record = {"prompt": "p", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [2, 0, 1]}
    source = open_set("hpdv2", write_json(tmp_path, "test", [record | {"raw_annotations": annotations}]))
    (found,) = source.records("test")
    assert [(pair.chosen, pair.rejected) for pair in pairs_of(found)] == [
        ("b.jpg", "a.jpg"),
        ("c.jpg", "a.jpg"),
        ("b.jpg", "c.jpg"),
    ]


def test_imagereward(tmp_path: Path) -> None:
    names = [f"part-1/images/{name}.webp" for name in "abc"]
    good = {"id": "1", "prompt": "p", "generations": names, "ranking": [1, 2, 1]}
    changes = [{}, {"ranking": [1, 2]}, {"ranking": [1, 2, 1.5]}, {"generations": [*names[:2], None]}]
    directory = write_json(tmp_path, "test", [good | change for change in changes])
    (directory / "test_images" / "part-1" / "images").mkdir(parents=True)
    (directory / "test_images" / names[0]).write_bytes(jpeg(7))
    source = open_set("imagereward", directory)
    first, *bad = source.records("test")
    assert first.ties == 1
    assert [(pair.chosen[-6], pair.rejected[-6]) for pair in pairs_of(first)] == [("a", "b"), ("c", "b")]
    assert source.image(first.images[0]) == jpeg(7)
    assert [index for index, _ in reasons(bad)] == [1, 2, 3]


@pytest.mark.skipif(not PUBLISHED_ANNOTATIONS.is_dir(), reason="needs ImageReward's test.json beside the project")
def test_imagerewards_published_annotations() -> None:
    records = list(open_set("imagereward", PUBLISHED_ANNOTATIONS).records("test"))
    assert all(isinstance(record, PreferenceRecord) for record in records)
    pairs = sum(len(record.images) * (len(record.images) - 1) // 2 for record in records)
    untied = [pair for record in records for pair in pairs_of(record)]
    assert (len(records), len({record.prompt for record in records})) == (466, 463)
    assert (pairs, len(untied), sum(record.ties for record in records)) == (7230, 6399, 831)
    assert len({pair.index for pair in untied}) == 6399


def test_genai_bench(tmp_path: Path) -> None:
    votes = ["leftvote", "rightvote", "tievote", "bothbad_vote", "bothbad", None]
    columns = {
        "prompt": [f"p{row}" for row in range(6)],
        "left_model": ["m"] * 6,
        "left_image": [{"bytes": jpeg(10 * row), "path": "x.jpg"} for row in range(6)],
        "right_model": ["n"] * 6,
        "right_image": [{"bytes": jpeg(200 + row, width=16), "path": None} for row in range(5)] + [None],
        "vote_type": votes,
    }
    folder = tmp_path / "image_generation"
    write_parquet(folder / "test-00000-of-00001.parquet", columns, row_group_size=4)
    write_parquet(folder / "test_v1-00000-of-00001.parquet", {name: cells[:1] for name, cells in columns.items()})
    source = open_set("genai_bench", tmp_path)
    records = list(source.records("test"))
    assert [record.ranks for record in records[:4]] == [(0, 1), (1, 0), (0, 0), (0, 0)]
    assert [sum(1 for _ in pairs_of(record)) for record in records[:4]] == [1, 1, 0, 0]
    assert records[0].models == ("m", "n")
    assert [index for index, _ in reasons(records)] == [4, 5]
    assert [source.image(record.images[0]) for record in records[:4]] == [jpeg(10 * row) for row in range(4)]
    assert source.size(records[1].images[1]) == (4, 16)
    assert len(list(source.records("test_v1"))) == 1
    with pytest.raises(ValueError, match="the cell is empty"):
        source.image("image_generation/test-00000-of-00001.parquet#1/1/right_image")
    write_parquet(tmp_path / "image_generation" / "other" / "test.parquet", columns)
    write_parquet(tmp_path.parent / "elsewhere.parquet", columns)
    for place in ("../elsewhere.parquet", "image_generation/other/test.parquet", str(folder / "test.parquet")):
        with pytest.raises(ValueError, match="is no file of dataset"):
            source.image(f"{place}#0/0/right_image")


def test_cells_without_an_image(tmp_path: Path) -> None:
    columns = {"prompt": ["p"], "left_model": ["m"], "right_model": ["n"], "vote_type": ["leftvote"]}
    file = tmp_path / "test-00000-of-00001.parquet"
    write_parquet(file, columns)
    with pytest.raises(ValueError, match="has no column left_image, right_image"):
        next(open_set("genai_bench", tmp_path).records("test"))
    write_parquet(file, columns | {"left_image": ["a.png"], "right_image": [{"path": "a.png"}]})
    source = open_set("genai_bench", tmp_path)
    (record,) = source.records("test")
    for key, reason in zip(record.images, ("holds no bytes, but 'a.png'", "the cell is empty"), strict=True):
        for read in (source.image, source.size):
            with pytest.raises(ValueError, match=f"unreadable image: .*{reason}"):
                read(key)


def test_parquet_in_hugging_faces_cache(tmp_path: Path) -> None:
    """A snapshot's files are symlinks to blobs outside it; images stay inside cells, so no record names a path."""
    cells = [{"bytes": jpeg(7), "path": "a.jpg"}]
    columns = {"prompt": ["p"], "left_model": ["m"], "left_image": cells, "right_model": ["n"], "right_image": cells}
    write_parquet(tmp_path / "blobs" / "0123", columns | {"vote_type": ["leftvote"]})
    snapshot = tmp_path / "snapshots" / "abc"
    (snapshot / "image_generation").mkdir(parents=True)
    (snapshot / "image_generation" / "test-00000-of-00001.parquet").symlink_to("../../../blobs/0123")
    (record,) = open_set("genai_bench", snapshot).records("test")
    source = open_set("genai_bench", snapshot)  # as another process opens it
    assert source.image(record.images[0]) == jpeg(7)
    assert source.size(record.images[1]) == (4, 8)


def test_a_column_of_images_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row group of many images, which as one array may be more than Arrow holds; any order gives the same."""
    monkeypatch.setattr(parquet_set, "CELLS", 4)
    write_parquet(tmp_path / "train.parquet", picks(0, 30, images=True))
    source = open_set("pickapic", tmp_path)
    for row in (0, 1, 5, 29, 28, 3, 4, 17):
        assert source.image(f"train.parquet#0/{row}/jpg_0") == jpeg(row)
        assert source.image(f"train.parquet#0/{row}/jpg_1") == jpeg(99)
    column = parquet_set._Column(tmp_path / "train.parquet", 0, "jpg_0")
    assert column.cell(17) == jpeg(17)
    assert len(column._cells) == 4
    with pytest.raises(ValueError, match="has no row 30 in group 0"):
        source.image("train.parquet#0/30/jpg_0")


def test_a_broken_column_is_read_once_and_what_lies_before_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_set, "CELLS", 4)
    images = [bytes([row]) * 4096 for row in range(32)]
    file = tmp_path / "train.parquet"
    table = pyarrow.table(picks(0, 32, images=True) | {"jpg_0": images})
    parquet.write_table(table, file, use_dictionary=False, compression="none", data_page_size=4096, write_batch_size=4)
    content = file.read_bytes()
    place = content.index(images[20])
    file.write_bytes(content[: place - 4] + b"\xff" * 4 + content[place:])  # the length of that image
    source = open_set("pickapic", tmp_path)
    assert source.image("train.parquet#0/2/jpg_0") == images[2]
    opened = []
    whole = parquet.ParquetFile
    monkeypatch.setattr(parquet, "ParquetFile", lambda *names, **options: opened.append(1) or whole(*names, **options))
    for row in range(20, 32):
        with pytest.raises(ValueError, match="^unreadable image: "):
            source.image(f"train.parquet#0/{row}/jpg_0")
    assert len(opened) == 0, "the column was open, and is not opened again for each image"
    assert source.image("train.parquet#0/3/jpg_0") == images[3]


def picks(first: int, count: int, *, images: bool) -> dict[str, list]:
    rows = range(first, first + count)
    labels = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0)]
    columns = {
        "caption": [f"prompt {row}" for row in rows],
        "label_0": [labels[row % 4][0] for row in rows],
        "label_1": [labels[row % 4][1] for row in rows],
        "model_0": ["a"] * count,
        "model_1": ["b"] * count,
        "image_0_uid": [f"uid{row}" for row in rows],
    }
    return columns | ({"jpg_0": [jpeg(row) for row in rows], "jpg_1": [jpeg(99)] * count} if images else {})


def test_pickapic(tmp_path: Path) -> None:
    for file, first in ((0, 0), (1, 5)):
        write_parquet(tmp_path / "data" / f"test_unique-{file:05d}-of-00002.parquet", picks(first, 5, images=True))
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", picks(0, 1, images=True))
    source = open_set("pickapic", tmp_path)
    records = list(source.records("test_unique"))
    assert [record.index for record in records] == list(range(10))
    wrong = "label_0 and label_1 must be 1 and 0, or 0.5 both, got (0.0, 0.0)"
    assert reasons(records) == [(3, wrong), (7, wrong)]
    assert [records[row].ranks for row in (0, 1, 2)] == [(0, 1), (1, 0), (0, 0)]
    for row in (0, 6, 9):
        assert source.image(records[row].images[0]) == jpeg(row)
    assert records[6].models == ("a", "b")


def test_pickapic_rows_without_a_label_are_unlabelled_not_malformed(tmp_path: Path) -> None:
    """Whatever stands in their labels. As prompts they are as good as others."""
    labelled = {"has_label": [True, False, None, False, True]}
    write_parquet(tmp_path / "train.parquet", picks(0, 5, images=True) | labelled)
    records = list(open_set("pickapic", tmp_path).records("train"))
    assert reasons(records) == []
    assert [record.index for record in records if isinstance(record, UnlabelledRecord)] == [1, 2, 3]
    assert prompts_of(open_set("pickapic", tmp_path), "train") == ([f"prompt {row}" for row in range(5)], [])
    assert [records[row].ranks for row in (0, 4)] == [(0, 1), (0, 1)]
    write_parquet(tmp_path / "train.parquet", picks(0, 5, images=False) | labelled)
    assert len(reasons(open_set("pickapic", tmp_path).records("train"))) == 0


def test_pickapic_without_images_is_prompts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00001.parquet", picks(0, 4, images=False))
    source = open_set("pickapic", tmp_path)
    assert [(record.prompt, record.images) for record in source.records("train")][0] == ("prompt 0", ())
    assert prompts_of(source, "train") == ([f"prompt {row}" for row in range(4)], [])


def test_parquet_that_is_not(tmp_path: Path) -> None:
    source = open_set("pickapic", tmp_path)
    with pytest.raises(ValueError, match=r"has no train-.*\.parquet"):
        next(source.records("train"))
    (tmp_path / "train-00000-of-00001.parquet").write_text("no")
    with pytest.raises(ValueError, match="not a parquet file"):
        next(source.records("train"))
    write_parquet(tmp_path / "train-00000-of-00001.parquet", {"text": ["p"]})
    with pytest.raises(ValueError, match="has no column caption, label_0, label_1"):
        next(source.records("train"))


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a cat\n\n  ein Hund 🐕  \n")
    for path in (tmp_path, tmp_path / "train.txt"):
        source = open_set("prompts", path)
        assert prompts_of(source, "train") == (["a cat", "ein Hund 🐕"], [])
    with pytest.raises(ValueError, match=r"has no dev\.txt"):
        list(open_set("prompts", tmp_path).records("dev"))
    with pytest.raises(ValueError, match="does not exist"):
        open_set("prompts", tmp_path / "nowhere")
    (tmp_path / "train.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        list(open_set("prompts", tmp_path).records("train"))
    (tmp_path / "train.csv").write_text("prompt\n")
    with pytest.raises(ValueError, match=r"has train\.txt and train\.csv; name the file"):
        open_set("prompts", tmp_path).records("train")


PROMPT_FILES = {
    ".txt": "a cat\n\nein Hund, gro\u00df \n",
    ".jsonl": '{"prompt": "a cat", "id": 3}\n\n"ein Hund, gro\u00df"\n',
    ".json": '[{"prompt": "a cat", "id": 3}, "ein Hund, gro\u00df"]',
    ".csv": 'id,prompt\n3,a cat\n4,"ein Hund, gro\u00df"\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", PROMPT_FILES)
def test_prompt_files_are_read_as_what_they_are(tmp_path: Path, suffix: str, encoding: str) -> None:
    for newline in ("\n", "\r\n"):
        file = tmp_path / f"train{suffix}"
        file.write_text(PROMPT_FILES[suffix], encoding=encoding, newline=newline)
        for path in (file, tmp_path):
            assert prompts_of(open_set("prompts", path), "train") == (["a cat", "ein Hund, gro\u00df"], [])


def test_malformed_entries_of_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "p"}\n{"prompt": \n[1]\n{"text": "p"}\n{"prompt": " "}\n')
    prompts, skipped = prompts_of(open_set("prompts", file), "train")
    assert prompts == ["p"]
    assert [(index, reason.split(":")[0]) for index, reason in reasons(skipped)] == [
        (1, "not valid JSON"),
        (2, "neither an object nor a string"),
        (3, "prompt must be a non-empty string, got None"),
        (4, "prompt must be a non-empty string, got ' '"),
    ]
    file = tmp_path / "train.csv"
    file.write_text("text;prompt\na;b\n")
    with pytest.raises(ValueError, match=r"train\.csv has no column `prompt`, but \['text;prompt'\]; is it split by c"):
        list(open_set("prompts", file).records("train"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'[{"prompt": "p"}, {"a": "p", "confidence": NaN}]',
            r"at record 1, .*no NaN and no Infinity; write null",
        ),
        (b'[{"prompt": "p"}, {"confidence":-Infinity}]', r"at record 1, .*no NaN and no Infinity; write null"),
        (b'[{"prompt": "p"}, {"prompt": "caf\xe9"}]', r"at record 1, .*not UTF-8 text; save it as UTF-8"),
        ("[]".encode("utf-16"), r"at record 0, .*not UTF-8 text; save it as UTF-8"),
        (b'[{"prompt": "NaN"}, {"prompt": "q"', r"at record 1, .*was the file cut short or edited\?"),
    ],
)
def test_json_that_cannot_be_read_says_where_and_what_to_do(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train\.json is not valid JSON {message}") as error:
        list(open_set("hpdv3", tmp_path).records("train"))
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_set(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "p", "path1": "a", "path2": "b"}]), "utf-8-sig")
    (record,) = open_set("hpdv3", tmp_path).records("train")
    assert record.images == ("a", "b")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_opens_and_names_the_file_it_lacks(tmp_path: Path, kind: SetKind) -> None:
    lacks = {
        "genai_bench": "train-[0-9]*.parquet",
        "pickapic": "train-[0-9]*.parquet",
        "prompts": "train.txt",
        "preprocessed": "part_rank[0-9]*.parquet",
    }
    with pytest.raises(ValueError, match=re.escape(f"has no {lacks.get(kind, 'train.json')}")):
        list(open_set(kind, tmp_path).records("train"))


def test_a_kind_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        open_set("hpdv4", tmp_path)


def test_half_a_surrogate_pair_is_no_prompt(tmp_path: Path) -> None:
    """Whatever a JSON parser makes of it, what comes through can be written to files."""
    (tmp_path / "train.json").write_text(r'[{"prompt": "\ud800", "path1": "a", "path2": "b"}]')
    (record,) = open_set("hpdv3", tmp_path).records("train")
    shown = record.reason if isinstance(record, SkippedRecord) else record.prompt
    assert shown.encode()
    with pytest.raises(ValueError, match="prompt is not valid Unicode"):
        text({"prompt": "\ud800"}, "prompt")
