"""What becomes of bad inputs? `python -m benchmarks.fuzz --trials 3200 --seed 0`.

Whole inputs of every kind are made first. Each trial damages a copy of one, drawn by seed, kind and number, and has it
read as a command reads it, in a process of its own with bounded time and memory. A trial ends as promised with a
result, with one that counts what was left out, or with one line and an exit code of ours. All else is a find: a
traceback, a hang, memory without bound, a file opened or written outside the trial's root, anything that was run.
`--only KIND --trial NUMBER --keep DIRECTORY` does a find again and keeps its input.
"""

import os
import random
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from benchmarks.fuzz import kept_readers, watch
from benchmarks.fuzz.kinds import KINDS, Kind
from benchmarks.fuzz.mutations import Damage
from benchmarks.fuzz.settings import BenchmarkRun
from benchmarks.fuzz.watch import ENDINGS, FINDS, Outcome, Places
from benchmarks.fuzz.worlds import picture
from dina_rl.cli import EXIT_STOPPED, fail, load
from dina_rl.markdown import grid

PREPARATION_S = 900
POLL_S = 0.02
OUTCOME, SAID = "outcome.json", "said.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is tried."""

    kind: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.kind.replace(' ', '-')}-{self.number:05d}"


@dataclass(slots=True, kw_only=True)
class Tried:
    """A process at work."""

    trial: Trial
    pid: int
    directory: Path


def trials(run: BenchmarkRun, names: Sequence[str]) -> Iterator[Trial]:
    """In turn of every kind."""
    if run.trial is not None:
        yield from (Trial(kind=name, number=run.trial) for name in names)
        return
    for number in range(run.trials):
        yield Trial(kind=names[number % len(names)], number=number // len(names))


def prepare(world: Path, kinds: Sequence[Kind]) -> None:
    """Make the whole inputs, in a process of its own: this one, which is copied for every trial, stays small."""

    def make() -> None:
        sys.stdout = sys.stderr = (world / "said.txt").open("w")
        for whole in dict.fromkeys(part for kind in kinds for part in kind.whole):
            whole(world)

    world.mkdir()
    process = get_context("fork").Process(target=make)
    process.start()
    process.join(PREPARATION_S)
    if process.exitcode != 0:
        process.kill()
        fail(f"the whole inputs could not be made: {(world / 'said.txt').read_text()[-2000:]}")


def begin(trial: Trial, run: BenchmarkRun, world: Path, scratch: Path) -> Tried:
    """Damage a copy and have it read, in a copy of this process."""
    directory = scratch / trial.name
    root, beside = directory / "root", directory / "beside"
    root.mkdir(parents=True)
    beside.mkdir()
    pid = os.fork()
    if pid:
        return Tried(trial=trial, pid=pid, directory=directory)
    try:
        os.dup2(os.open(directory / "native.txt", os.O_CREAT | os.O_WRONLY), 2)  # what libraries say by themselves
        os.dup2(2, 1)
        kind, rng = KINDS[trial.kind], random.Random(f"{run.seed}:{trial.name}")
        _decoys(beside)
        task = kind.damaged(rng, Damage(rng, beside), world, root)
        places = Places(root=root, beside=beside, world=world, said=directory / SAID)
        outcome = watch.run(task, places, free_reading=kind.options, seconds=run.limit_s, memory_mib=run.memory_mib)
        watch.write_outcome(directory / OUTCOME, outcome)
    except BaseException as error:  # the damage itself failed: no trial, and to be seen as such
        failed = Outcome(ending="traceback", detail=f"the damage itself failed: {error!r}")
        watch.write_outcome(directory / OUTCOME, failed)
    finally:
        os._exit(0)  # no handlers of the process that this one is a copy of
    raise AssertionError("unreachable")


def _decoys(beside: Path) -> None:
    (beside / "decoy.png").write_bytes(picture(0, "png"))
    (beside / "decoy.txt").write_text("a red circle\n")
    (beside / "decoy.json").write_text("[]")
    (beside / "decoy.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")


def ended(tried: Sequence[Tried]) -> tuple[Tried, int] | None:
    """One that has ended, and its status."""
    for each in tried:
        pid, status = os.waitpid(each.pid, os.WNOHANG)
        if pid:
            return each, status
    return None


def outcomes(run: BenchmarkRun, names: Sequence[str], world: Path, scratch: Path) -> Iterator[tuple[Trial, Outcome]]:
    """Of every trial, as they end."""
    waiting, working = trials(run, names), list[Tried]()
    total = len(names) if run.trial is not None else run.trials
    with tqdm(total=total, desc="fuzz", unit="trial") as bar:
        while True:
            while len(working) < run.processes and (trial := next(waiting, None)) is not None:
                working.append(begin(trial, run, world, scratch))
            if not working:
                return
            found = ended(working)
            if found is None:
                time.sleep(POLL_S)
                continue
            done, status = found
            working.remove(done)
            outcome = watch.read_outcome(done.directory / OUTCOME, status)
            if outcome.ending in FINDS or run.trial is not None:
                bar.write(f"{done.trial.name}: {outcome.ending}: {outcome.detail}")
                if run.keep is not None:
                    shutil.copytree(
                        done.directory, run.keep / done.trial.name, symlinks=True, ignore=_pipes, dirs_exist_ok=True
                    )
            shutil.rmtree(done.directory)
            bar.update()
            yield done.trial, outcome


def _pipes(directory: str, names: list[str]) -> list[str]:
    """What cannot be copied."""
    return [name for name in names if (Path(directory) / name).is_fifo()]


def table(counts: Mapping[str, Counter[str]]) -> str:
    """By kind."""
    rows = []
    for name, some in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
        rows.append([name, str(some.total()), *(str(some[ending]) for ending in ENDINGS)])
    return grid(["kind of input", "trials", *ENDINGS], rows)


def main(argv: Sequence[str]) -> None:
    run = load(BenchmarkRun, argv, program="python -m benchmarks.fuzz")
    names = [name for name in KINDS if run.only is None or run.only in name]
    if not names:
        fail(f"only {run.only}: no kind is called so; there are {', '.join(KINDS)}")
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread in a process that is copied
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with TemporaryDirectory(prefix="fuzz-") as made:
        scratch = Path(made).resolve()
        begun = time.monotonic()
        prepare(scratch / "world", [KINDS[name] for name in names])
        kept_readers.ready(scratch / "world")
        print(f"whole inputs made in {time.monotonic() - begun:.0f} s", flush=True)
        for trial, outcome in outcomes(run, names, scratch / "world", scratch):
            counts[trial.kind][outcome.ending] += 1
    print(table({name: counts[name] for name in names if name in counts}))
    finds = sum(some[ending] for some in counts.values() for ending in FINDS)
    if finds:
        print(f"error: {finds} finds", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED)


if __name__ == "__main__":
    main(sys.argv[1:])
