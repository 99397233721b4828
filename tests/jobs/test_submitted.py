"""What `ray job submit` sends along, and what a job refuses that was started so; without a cluster."""

import json
import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.runtime_env.packaging import create_package, get_uri_for_directory

from dina_rl import local
from jobs import align, encode, evaluate, fit_reward, score, submitted

ROOT = Path(__file__).parents[2]
NEEDED = ("actors", "configs", "dina_rl", "jobs")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in use: an environment, data and runs of any name, hidden things, one of them of a letter alone."""
    copy = tmp_path / "clone"
    for name in NEEDED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    for place in (
        "v",
        "venv",
        "env",
        "data2",
        "my_runs",
        ".git",
        ".cache",
        "jobs_old",
        "deploy",
        "dina_rl/__pycache__",
    ):
        (copy / place).mkdir(parents=True)
        with (copy / place / "large.bin").open("wb") as file:
            file.truncate(600 * submitted.MIB)
    return copy


def test_what_a_job_needs_is_sent_along_whatever_lies_beside_it(clone: Path, tmp_path: Path) -> None:
    create_package(str(clone), tmp_path / "package.zip", include_gitignore=True, excludes=[])
    with ZipFile(tmp_path / "package.zip") as package:
        sent = {name for name in package.namelist() if not name.endswith("/")}
    wanted = {f.relative_to(clone).as_posix() for n in NEEDED for f in (clone / n).rglob("*") if f.is_file()}
    assert sent == wanted - {"dina_rl/__pycache__/large.bin"}
    assert {"jobs/align.py", "configs/sd35m_nft.yaml", "dina_rl/shapes/pipeline/model_index.json"} <= sent
    assert (tmp_path / "package.zip").stat().st_size < 10 * submitted.MIB


def test_what_lies_beside_it_does_not_change_the_package(clone: Path) -> None:
    before = get_uri_for_directory(str(clone), include_gitignore=True)
    shutil.rmtree(clone / "v")
    (clone / "README.md").write_text("changed")
    assert get_uri_for_directory(str(clone), include_gitignore=True) == before
    (clone / "configs" / "mine.yaml").write_text("seed: 1")
    assert get_uri_for_directory(str(clone), include_gitignore=True) != before


def test_every_tracked_file_of_these_directories_is_sent(clone: Path) -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", *NEEDED], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")  # a source archive; CI and every clone run it
    assert all((clone / name).is_file() for name in listed.stdout.split())


@pytest.mark.parametrize(
    ("job", "options", "line"),
    [
        (align, ["--run-dir", "runs/a"], "run_dir runs/a is relative: in a submitted job"),
        (align, [], "run_dir runs/run is relative"),
        (encode, ["--run-dir", "runs/a"], "run_dir runs/a is relative"),
        (fit_reward, ["--run-dir", "runs/a"], "run_dir runs/a is relative"),
        (evaluate, [], "on storage that all nodes share: --run-dir PATH"),
        (evaluate, ["--run-dir", "/a", "--cache", "here"], "cache here is relative"),
        (score, ["--out", "scores.csv"], "out scores.csv is relative"),
        (local, [], "run_dir runs/local is relative"),
    ],
)
def test_a_submitted_job_leaves_no_results_in_rays_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture, job, options: list[str], line: str
) -> None:
    monkeypatch.setenv(submitted.JOB_CONFIG, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}))
    with pytest.raises(SystemExit) as ended:
        job.main(options)
    assert ended.value.code == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert line in found


def test_the_size_of_what_was_sent_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * submitted.MIB))
    monkeypatch.chdir(tmp_path)
    submitted.check_results(run_dir=Path("relative"))  # by hand
    assert submitted.JOB_CONFIG == RAY_JOB_CONFIG_JSON_ENV_VAR
    monkeypatch.setenv(submitted.JOB_CONFIG, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}))
    submitted.check_results(run_dir=Path("~/run"), cache=None)
    assert capsys.readouterr().out == f"submitted with 1 files, 3.0 MiB, in {tmp_path}\n"
