"""Processes that a test looks for among its own children."""

import psutil


def title_of(process: psutil.Process) -> str:
    """Its command line, which Ray sets to what the process is doing; nothing if it has ended meanwhile."""
    try:
        return " ".join(process.cmdline()).strip()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
