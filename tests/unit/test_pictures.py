"""Lists of pictures: files, directories, manifests, and what is wrong with each."""

import json
from pathlib import Path

import pytest

from dina_rl.pictures import Picture, Skipped, list_pictures


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "set" / "inner").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "notes.txt", "latent.safetensors", "inner/c.png"):
        (tmp_path / "set" / name).touch()
    return tmp_path / "set"


def test_files_and_directories_in_order(folder):
    pictures = list_pictures([str(folder / "b.PNG"), str(folder)], prompt="p", root=None)
    assert [picture.path.name for picture in pictures] == ["b.PNG", "a.jpg", "b.PNG", "latent.safetensors"]
    assert {picture.prompt for picture in pictures} == {"p"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_manifest_gives_every_picture_its_prompt(folder, suffix):
    rows = [{"image": "inner/c.png", "prompt": 'a "red", round: thing'}, {"image": "a.jpg", "prompt": ""}]
    manifest = folder / f"list{suffix}"
    if suffix == ".csv":
        manifest.write_text('image,model,prompt\ninner/c.png,sd,"a ""red"", round: thing"\na.jpg,sd,\n')
    else:
        manifest.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    first, second = list_pictures([str(manifest)], prompt=None, root=None)
    assert first == Picture(
        image="inner/c.png", path=(folder / "inner" / "c.png").resolve(), prompt='a "red", round: thing'
    )
    assert second == Skipped(image=f"{manifest}:{3 if suffix == '.csv' else 2}", reason="a.jpg has no prompt")
    assert list_pictures([str(manifest)], prompt="other", root=None)[1].prompt == "other"


def test_a_manifest_may_not_lead_out_of_its_root(folder):
    outside = folder.parent / "outside.png"
    outside.touch()
    manifest = folder / "list.jsonl"
    manifest.write_text(
        "".join(json.dumps({"image": name}) + "\n" for name in ("../outside.png", str(outside), "a.jpg"))
    )
    one, two, three = list_pictures([str(manifest)], prompt="p", root=None)
    assert one.reason == two.reason == f"lies outside {folder.resolve()}"
    assert three.path.name == "a.jpg"
    one, two, _ = list_pictures([str(manifest)], prompt="p", root=folder.parent)
    assert one.path == two.path == outside.resolve()


def test_bad_lines_of_a_manifest_are_skipped_with_their_place(folder):
    manifest = folder / "list.jsonl"
    (folder / "loop").symlink_to(folder / "loop")
    lines = ('{"image": "a.jpg"}', '{"image"', "[1]", '{"image": 3}', '{"prompt": "x"}')
    names = ("nul\0.png", "loop/a.jpg")
    manifest.write_text("\n".join([*lines, *(json.dumps({"image": name}) for name in names)]))
    good, *bad = list_pictures([str(manifest)], prompt="p", root=None)
    assert good.image == "a.jpg"
    assert [each.image for each in bad] == [*(f"{manifest}:{line}" for line in (2, 3, 4, 5)), *names]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "name at least one picture"),
        (["a.png"], "a.png has no prompt; give --prompt"),
        (["nowhere.csv"], "manifest nowhere.csv does not exist"),
        (["{}/empty.jsonl"], "empty.jsonl is empty"),
        (["{}/bad.csv"], "has no column `image`"),
        (["{}/latin.csv"], "is not UTF-8"),
        (["{}/huge.csv"], "is not valid CSV: field larger"),
        (["{}/void"], "holds no pictures"),
    ],
)
def test_mistakes_are_one_line(folder, names, message):
    (folder / "empty.jsonl").touch()
    (folder / "bad.csv").write_text("file,prompt\na,b\n")
    (folder / "latin.csv").write_bytes("image\ncafé\n".encode("latin-1"))
    (folder / "huge.csv").write_text(f"image\n{'x' * 200_000}\n")
    (folder / "void").mkdir()
    with pytest.raises(ValueError, match=message) as mistake:
        list_pictures([name.format(folder) for name in names], prompt=None, root=None)
    assert "\n" not in str(mistake.value)
