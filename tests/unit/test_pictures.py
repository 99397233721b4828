"""Lists of pictures: files, directories, manifests, and what is wrong with each."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dina_rl.pictures import Picture, Skipped, list_pictures


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "set" / "inner").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "notes.txt", "latent.safetensors", "inner/c.png"):
        (tmp_path / "set" / name).touch()
    return tmp_path / "set"


def test_files_and_directories_in_order(folder):
    listed = list_pictures([str(folder / "b.PNG"), str(folder)], prompt="p", root=None)
    pictures = [each for each in listed if isinstance(each, Picture)]
    assert [picture.path.name for picture in pictures] == ["b.PNG", "a.jpg", "b.PNG", "c.png", "latent.safetensors"]
    assert {picture.prompt for picture in pictures} == {"p"}


def test_what_a_directory_holds_beside_pictures_is_left_out_by_name(folder):
    Image.new("RGB", (2, 2)).save(folder / "inner" / "nameless", "PNG")
    (folder / "readme").write_text("no picture")
    (folder / "link").symlink_to(folder / "inner")
    listed = list_pictures([str(folder)], prompt="p", root=None)
    left_out = {Path(each.image).name: each.reason for each in listed if isinstance(each, Skipped)}
    assert left_out == {
        "notes.txt": ".txt is no ending of a picture; name the file itself if it is one",
        "readme": "no ending, and not a picture by its content",
        "link": "a link to a directory, which is not followed",
    }
    assert str(folder / "inner" / "nameless") in [each.image for each in listed if isinstance(each, Picture)]


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_readable_format_is_found_by_its_endings(tmp_path, kind):
    endings = [ending for ending, known in Image.registered_extensions().items() if known == kind]
    for ending in endings:
        (tmp_path / f"a{ending}").touch()
    found = list_pictures([str(tmp_path)], prompt="p", root=None)
    assert sorted(each.path.suffix for each in found if isinstance(each, Picture)) == sorted(endings)


def test_a_manifest_in_a_snapshot_of_the_hub_names_its_blobs(folder):
    snapshot = folder.parent / "hub" / "snapshots" / "abc"
    blobs = folder.parent / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").touch()
    (snapshot / "a.png").symlink_to("../../blobs/0123")
    (snapshot / "list.jsonl").write_text('{"image": "a.png"}')
    (picture,) = list_pictures([str(snapshot / "list.jsonl")], prompt="p", root=None)
    assert picture == Picture(image="a.png", path=(blobs / "0123").resolve(), prompt="p")


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
