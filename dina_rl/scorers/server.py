"""A model behind an OpenAI-compatible server, asked in bounded time whatever the server does.

Connections go straight to the server, not by a proxy of the environment.
"""

import logging
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Event, Timer
from time import perf_counter, time
from typing import Literal, TypeVar
from urllib.parse import urlsplit
from zlib import crc32

from dina_rl.seeding import derive_seed
from dina_rl.textfiles import parse_json

API_KEY = "DINA_RL_SERVER_KEY"
"""Environment variable of the key that servers are shown, where they ask for one. It stands in no file of a run."""

LONGEST_PAUSE_S = 60.0
SHOWN = 160  # characters of an answer that a message quotes
BUSY = 429

log = logging.getLogger(__name__)
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back over HTTP."""

    status: int
    retry_after_s: float  # that the server asks for; 0 where it does not
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no answer to a question."""

    kind: Literal["no answer", "busy", "server error", "refused", "malformed", "no score", "no verdict"]
    reason: str
    passes: bool = False  # it may be another time
    wait_s: float = 0.0  # that the server asks for before that


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where it is, and how much patience there is with it."""

    url: str  # http://HOST:PORT/v1
    timeout_s: float  # of one request
    retries: int  # of a request that failed for a reason that may pass
    pause_s: float = 1.0  # before the first of them; twice as long before each further one

    def ask(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """One request. Raises OSError or HTTPException where no whole reply came in time."""
        place = urlsplit(self.url)
        kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
        with closing(kind(place.hostname or "", place.port, timeout=self.timeout_s)) as connection:
            connection.connect()
            begin = perf_counter()
            # A socket's own timeout begins anew with every byte.
            alarm = Timer(self.timeout_s, _hang_up, (connection.sock,))
            alarm.start()
            try:
                connection.request(method, place.path.rstrip("/") + path, body, _headers())
                response = connection.getresponse()
                wait, content = _seconds(response.getheader("Retry-After")), response.read()
            finally:
                alarm.cancel()
        if perf_counter() - begin > self.timeout_s:  # what was cut off may look whole
            raise TimeoutError(f"no whole answer within {self.timeout_s:g} s")
        return Reply(status=response.status, retry_after_s=wait, content=content)

    def pause(self, attempt: int, body: bytes) -> float:
        """Seconds after the failed `attempt` (from 0): they double, less up to half, drawn by the request."""
        spread = derive_seed("retry", crc32(body), attempt) / 2**63
        return min(self.pause_s * 2.0**attempt, LONGEST_PAUSE_S) * (1 - spread / 2)


class Client:
    """Asks a server for completions, so many at a time. What failed is counted, and said once of each kind.

    Attributes:
        failures: questions without an answer, by kind.
    """

    def __init__(self, name: str, server: Server, *, concurrency: int) -> None:
        self.failures: Counter[str] = Counter()
        self._name = name
        self._server = server
        self._concurrency = concurrency

    def ask(
        self, items: Sequence[Item], body: Callable[[Item], bytes], read: Callable[[str], float | Failure]
    ) -> list[float]:
        """What `read` finds in the text that answers each item's `body`, in the items' order; NaN where that failed."""
        batch = _Batch(self._server)

        def answer(item: Item) -> float | Failure:
            text = batch.complete(body(item))
            return read(text) if isinstance(text, str) else text

        with ThreadPoolExecutor(self._concurrency) as pool:
            return [self._number(found) for found in pool.map(answer, items)]

    def _number(self, found: float | Failure) -> float:
        if not isinstance(found, Failure):
            return found
        self.failures[found.kind] += 1
        if self.failures[found.kind] == 1:
            log.warning(
                "%s: %s from %s: %s; what is asked so has failed, and is counted without another word",
                self._name, found.kind, self._server.url, found.reason,
            )  # fmt: skip
        return float("nan")


class _Batch:
    """Questions that are asked at the same time. Together they notice that the server is gone.

    It is where all tries of one of them went unanswered, and nobody was answered meanwhile: the rest are not asked.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._gone = Event()
        self._heard = perf_counter()

    def complete(self, body: bytes) -> str | Failure:
        """The text that answers, after as many tries as it takes and there may be."""
        began, wait = perf_counter(), 0.0
        failure = Failure(kind="no answer", reason="the server is gone")
        for attempt in range(self._server.retries + 1):
            if self._gone.wait(wait):
                return failure
            outcome = self._try(body)
            if isinstance(outcome, str) or not outcome.passes or outcome.wait_s > self._server.timeout_s:
                return outcome
            failure, wait = outcome, max(outcome.wait_s, self._server.pause(attempt, body))
        if failure.kind == "no answer" and self._heard < began:
            self._gone.set()
        return failure

    def _try(self, body: bytes) -> str | Failure:
        try:
            reply = self._server.ask("POST", "/chat/completions", body)
        except (OSError, HTTPException) as error:
            return Failure(kind="no answer", reason=f"{type(error).__name__}: {error}", passes=True)
        self._heard = perf_counter()
        if reply.status == 200:
            return _text(reply.content)
        reason = f"HTTP {reply.status} {_quoted(reply.content)}"
        if reply.status == BUSY:
            return Failure(kind="busy", reason=reason, passes=True, wait_s=reply.retry_after_s)
        if reply.status >= 500:
            return Failure(kind="server error", reason=reason, passes=True, wait_s=reply.retry_after_s)
        return Failure(kind="refused", reason=reason)


def check_server(server: Server, model: str) -> None:
    """Whether it is there and serves the model.

    Raises:
        ValueError: it is not, or does not, or its address is none.
    """
    place = urlsplit(server.url)
    if place.username is not None or place.query:
        raise ValueError(f"the address of server {place.hostname} holds a secret: a key goes into {API_KEY}")
    if place.scheme not in ("http", "https") or not place.hostname:
        raise ValueError(f"{server.url} is no address of a server: http://HOST:PORT/v1")
    try:
        reply = server.ask("GET", "/models")
    except (OSError, HTTPException, ValueError) as error:  # the last of an address that is none
        raise ValueError(f"server {server.url} cannot be asked: {type(error).__name__}: {error}") from error
    try:
        models = [each["id"] for each in parse_json(reply.content)["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"server {server.url} does not say what it serves: HTTP {reply.status} {_quoted(reply.content)}"
        ) from error
    if model not in models:
        raise ValueError(f"server {server.url} serves {', '.join(map(str, models))}, not {model}")


def _headers() -> dict[str, str]:
    key = os.environ.get(API_KEY)
    return {"Content-Type": "application/json", **({} if key is None else {"Authorization": f"Bearer {key}"})}


def _hang_up(connected: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _seconds(retry_after: str | None) -> float:
    """Of a header that gives seconds or a date; 0 without one, or with something else in it."""
    if retry_after is None:
        return 0.0
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time())
    except ValueError:
        return 0.0


def _text(content: bytes) -> str | Failure:
    """The text of a completion."""
    try:
        text = parse_json(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        text = None
    return text if isinstance(text, str) else Failure(kind="malformed", reason=_quoted(content))


def _quoted(content: bytes) -> str:
    """The beginning of a body on one line; a server may repeat the key that it was shown."""
    text = " ".join(content.decode("utf-8", "replace").split())
    key = os.environ.get(API_KEY)
    return (text.replace(key, "***") if key else text)[:SHOWN]
