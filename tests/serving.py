"""A scorer behind a real HTTP server on this machine, and plain requests to it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import torch
from safetensors.torch import save

from dina_rl.config import ServeRun
from dina_rl.scoring import PictureScorer
from dina_rl.serving.server import ScoreServer

TOKEN = "a-token-of-the-tests"


@contextmanager
def serving(scorer: PictureScorer, **settings: object) -> Iterator[ScoreServer]:
    server = ScoreServer(ServeRun.model_validate({"port": 0, "wait_ms": 0, **settings}), token=TOKEN)
    server.start(scorer)
    try:
        yield server
    finally:
        server.stop()


def packed(tensors: Mapping[str, torch.Tensor], **metadata: object) -> bytes:
    """A request's body."""
    return save(dict(tensors), metadata={name: json.dumps(value) for name, value in metadata.items()})


def asked(
    server: ScoreServer, body: bytes = b"", *, method: str = "POST", path: str = "/score", **headers: str
) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    """Status, content and headers of a reply."""
    connection = HTTPConnection(*server.server_address[:2], timeout=60)
    try:
        connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}", **headers})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read()), reply.headers
    finally:
        connection.close()
