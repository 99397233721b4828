import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from dina_rl.data.sets.root import DataRoot


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    """A directory beside a file that must not be read."""
    inside = tmp_path / "set"
    (inside / "images").mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(inside / "images" / "a.png")
    (tmp_path / "secret.png").write_bytes((inside / "images" / "a.png").read_bytes())
    return DataRoot(inside)


@pytest.mark.parametrize("key", ["images/a.png", "./images/a.png", "images/../images//a.png"])
def test_files_inside(root: DataRoot, key: str) -> None:
    assert root.read(key) == (root.directory / "images" / "a.png").read_bytes()
    assert root.size(key) == (4, 6)


@pytest.mark.parametrize("key", ["../secret.png", "images/../../secret.png", "../set/images/a.png", "../../x", ".."])
def test_paths_that_leave_are_refused_before_the_file_system_is_asked(root: DataRoot, key: str, monkeypatch) -> None:
    monkeypatch.setattr(Path, "resolve", None)
    for access in (root.read, root.size):
        with pytest.raises(ValueError, match="refused: .* leaves the data directory"):
            access(key)


def test_absolute_paths_inside_are_legitimate_and_others_refused(root: DataRoot) -> None:
    os.symlink(root.directory, root.directory.parent / "link")
    for directory in (root.directory, root.directory.parent / "link"):
        assert DataRoot(directory).size(str(directory / "images" / "a.png")) == (4, 6)
    for file in (root.directory.parent / "secret.png", root.directory / ".." / "secret.png", root.directory.parent):
        with pytest.raises(ValueError, match="refused: .* lies outside the data directory"):
            root.read(str(file))


def test_a_snapshot_of_the_hub_reads_its_own_blobs_alone(root: DataRoot, tmp_path: Path) -> None:
    for repository in ("mine", "other"):
        (tmp_path / repository / "blobs").mkdir(parents=True)
        (tmp_path / repository / "blobs" / "0123").write_bytes((root.directory / "images" / "a.png").read_bytes())
    snapshot = tmp_path / "mine" / "snapshots" / "abc"
    (snapshot / "set" / "images").mkdir(parents=True)
    os.symlink("../../../../blobs/0123", snapshot / "set" / "images" / "a.png")
    os.symlink(tmp_path / "other" / "blobs" / "0123", snapshot / "set" / "images" / "b.png")
    for directory, key in ((snapshot, "set/images/a.png"), (snapshot / "set", "images/a.png")):
        assert DataRoot(directory).size(key) == (4, 6)
        assert DataRoot(directory).size(str(directory / key)) == (4, 6)
    with pytest.raises(ValueError, match="by a symlink"):
        DataRoot(snapshot).read("set/images/b.png")
    with pytest.raises(ValueError, match="leaves the data directory"):
        DataRoot(snapshot).read("../../blobs/0123")


def test_symlinks_that_leave_are_refused_and_others_followed(root: DataRoot) -> None:
    os.symlink(root.directory.parent / "secret.png", root.directory / "out.png")
    os.symlink(root.directory.parent, root.directory / "up")
    os.symlink("images/a.png", root.directory / "in.png")
    os.symlink("loop.png", root.directory / "loop.png")
    for key in ("out.png", "up/secret.png"):
        with pytest.raises(ValueError, match="by a symlink"):
            root.read(key)
    assert root.size("in.png") == (4, 6)
    with pytest.raises(ValueError, match="unreadable image"):
        root.read("loop.png")


def test_a_linked_directory_is_a_root_itself(root: DataRoot) -> None:
    os.symlink(root.directory, root.directory.parent / "link")
    assert DataRoot(root.directory.parent / "link").size("images/a.png") == (4, 6)


@pytest.mark.parametrize("key", ["images", "missing.png", "images/a.png/b", "a" * 5000, "nul\0.png", ""])
def test_what_is_no_file_is_unreadable(root: DataRoot, key: str) -> None:
    with pytest.raises(ValueError, match=r"unreadable image|null byte"):
        root.read(key)


def test_a_pipe_does_not_block_the_reader(root: DataRoot) -> None:
    os.mkfifo(root.directory / "pipe.png")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(root.directory / "s"))
    for key in ("pipe.png", "s"):
        with pytest.raises(ValueError, match="no file"):
            root.read(key)
    listener.close()


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        DataRoot(tmp_path / "nowhere")
