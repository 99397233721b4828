"""Serve a scorer over HTTP: `python -m dina_rl.serve --scorer.path FIT/reward`; see docs/serving.md.

Ctrl-C and SIGTERM finish what is under way and end it; a second one ends it at once.
"""

import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch

from dina_rl.cli import EXIT_INTERRUPTED, EXIT_STOPPED, fail, load
from dina_rl.config import ServeRun
from dina_rl.scoring import NoiseKey, PictureScorer, open_scorer
from dina_rl.serving.server import ScoreServer
from dina_rl.textfiles import read_text

TOKEN = "DINA_RL_SERVE_TOKEN"
"""Environment variable of the token. It stands in no file that this program writes."""

SHORTEST_TOKEN = 16
LOOK_S = 0.5  # between looks at the model's thread


def main(argv: Sequence[str]) -> None:
    run = load(ServeRun, argv, program="python -m dina_rl.serve")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    token: str | None = None
    where = "no token is asked for"
    try:
        if run.token:
            token, where = find_token(run.token_file.expanduser())
        server = ScoreServer(run, token=token)
        scorer = open_scorer(run.scorer, seed=run.seed)
        warm_up(scorer)
    except (OSError, ValueError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    with stop_signals() as stopping:
        try:
            server.start(scorer)
        except ValueError as error:
            fail(str(error))
        print(f"{scorer.config.kind} answers at {server.url} ({where})", flush=True)
        while not stopping.wait(LOOK_S) and server.alive:
            pass
    ended = not server.alive
    print("finishing what is under way", file=sys.stderr, flush=True)
    server.stop()
    if ended:
        print("error: the scorer has ended", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED)


def find_token(file: Path) -> tuple[str, str]:
    """The token, and in words where it is from: the environment, or a file that is made where there is none.

    Raises:
        ValueError: it is too short or not ASCII, or others may read the file.
        OSError: the file cannot be read or made.
    """
    given = os.environ.get(TOKEN)
    if given is not None:
        return _checked(given, TOKEN), f"token of {TOKEN}"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        if file.stat().st_mode & 0o077:
            raise ValueError(f"others may read the token in {file}: chmod 600, or delete it") from None
        return _checked(read_text(file).strip(), str(file)), f"token in {file}"
    with os.fdopen(descriptor, "w") as opened:
        opened.write(secrets.token_urlsafe(32) + "\n")
    return read_text(file).strip(), f"new token in {file}"


def _checked(token: str, place: str) -> str:
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"the token in {place} must have {SHORTEST_TOKEN} characters of ASCII or more, and no blanks")
    return token


def warm_up(scorer: PictureScorer) -> None:
    """Load what is loaded at the first score, and see that there is one, before anybody asks."""
    for shape in scorer.latent_shapes if scorer.space == "latents" else ():
        scorer.score_latents(torch.zeros(1, *shape), [""], [NoiseKey(group=("",), member="")])


@contextmanager
def stop_signals() -> Iterator[Event]:
    """An event that SIGINT and SIGTERM set in the block; after it they do again what they did before."""
    stopping = Event()
    before = {each: signal.signal(each, lambda *_: stopping.set()) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


if __name__ == "__main__":
    main(sys.argv[1:])
