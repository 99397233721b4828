"""What is different in a job that `ray job submit` started: it runs in a temporary copy of what was sent along."""

import os
from pathlib import Path

from dina_rl.cli import fail
from dina_rl.textfiles import parse_json

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable by which Ray tells a submitted job's process what it was submitted with; no other process has it."""
MIB = 2**20


def check_results(**places: Path | None) -> None:
    """End the program where a submitted job would leave its results in Ray's copy, which is gone with the job.

    Otherwise, or in a job that was started by hand, nothing happens, but that the size of the copy is told.

    Args:
        places: setting -> the directory or file that it says results go to.
    """
    submitted = os.environ.get(JOB_CONFIG)
    if submitted is None:
        return
    for key, place in places.items():
        if place is not None and not place.expanduser().is_absolute():
            option = key.replace("_", "-")
            fail(
                f"{key} {place} is relative: in a submitted job that lies in Ray's temporary copy of the clone, and is "
                f"gone with it; give an absolute path on storage that all nodes share: --{option} PATH"
            )
    if parse_json(submitted).get("runtime_env", {}).get("working_dir"):
        sizes = [file.stat().st_size for file in Path.cwd().rglob("*") if file.is_file()]
        print(f"submitted with {len(sizes)} files, {sum(sizes) / MIB:.1f} MiB, in {Path.cwd()}", flush=True)
