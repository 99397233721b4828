"""The HTTP side: who may ask, how much at a time, and how long it may take.

Every connection carries one request. Nothing of a body is read before its token, its length and the room for it are
known. A request that is refused is told why in one line of JSON, {"error": ...}.

    POST /score    safetensors -> scores (`protocol`)
    GET /info      what is scored and within which limits
    GET /health    200 while it answers, 503 when it stops; needs no token
"""

import json
import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BufferedReader, RawIOBase
from secrets import compare_digest
from socketserver import TCPServer, ThreadingMixIn
from threading import BoundedSemaphore, Lock, Thread
from time import monotonic
from typing import Any

import dina_rl
from dina_rl.config import ServeRun
from dina_rl.scoring import PictureScorer
from dina_rl.serving.batcher import Batcher
from dina_rl.serving.protocol import Refused, answer, description, read_question

SPARE = 32
"""Connections beyond `max_requests`: those that are told that there is no room, or ask for /health and /info."""

LINGER_S = 2.0
"""How long a refused request's body is still read, so that the reason arrives: who sends into a closed connection sees
nothing but that."""

RETRY_S = 1
"""What a request is told to wait for which there is no room."""

POLL_S = 0.1
MIB = 2**20

log = logging.getLogger(__name__)


class Room:
    """Requests that are under way, and their bytes; both bounded."""

    def __init__(self, *, requests: int, size: int) -> None:
        self._free_requests = requests
        self._free_bytes = size
        self._lock = Lock()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """For one request of `size` bytes. Raises Refused where there is no room."""
        with self._lock:
            if self._free_requests == 0 or self._free_bytes < size:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too much is asked at the moment; try again")
            self._free_requests -= 1
            self._free_bytes -= size
        try:
            yield
        finally:
            with self._lock:
                self._free_requests += 1
                self._free_bytes += size


class ScoreServer(ThreadingMixIn, TCPServer):
    """Holds its address from the start, and answers from `start` to `stop`.

    Args:
        token: that who asks must show; None: nobody must.

    Raises:
        ValueError: the address is none of this machine's, or taken.
    """

    daemon_threads = True
    block_on_close = False  # `stop` waits for them, not for ever
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, run: ServeRun, *, token: str | None) -> None:
        self.run = run
        self.address_family = socket.AF_INET6 if ":" in run.host else socket.AF_INET
        super().__init__((run.host, run.port), _Handler, bind_and_activate=False)
        self.token = None if token is None else token.encode()
        self.room = Room(requests=run.max_requests, size=run.max_held_mib * MIB)
        self.reading = Lock()  # one request at a time is there twice, packed and unpacked
        self.stopping = False
        self._connections = BoundedSemaphore(run.max_requests + SPARE)
        try:
            self.server_bind()
        except OSError as error:
            raise self._closed(error) from error

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        shown = str(host)
        return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"

    @property
    def alive(self) -> bool:
        """Whether it can score: the model's thread may have ended."""
        return self.batcher.alive

    def start(self, scorer: PictureScorer) -> None:
        """Answer from now on, by threads of its own.

        Raises:
            ValueError: another program has begun to listen at the address meanwhile.
        """
        run = self.run
        self.scorer = scorer
        self.description = {"version": dina_rl.__version__, **description(scorer, run)}
        try:
            self.server_activate()
        except OSError as error:
            raise self._closed(error) from error
        self.batcher = Batcher(scorer, rows=run.max_batch, wait_s=run.wait_ms / 1000, same_bits=run.same_bits)
        Thread(target=self.serve_forever, args=(POLL_S,), name="accept", daemon=True).start()

    def stop(self) -> None:
        """Refuse what comes, finish what is under way within `timeout_s`, and close; once."""
        if self.stopping:
            return
        self.stopping = True
        until = monotonic() + self.run.timeout_s
        self.shutdown()
        self.server_close()
        for _ in range(self.run.max_requests + SPARE):
            if not self._connections.acquire(timeout=max(0.0, until - monotonic())):
                break
        self.batcher.close(max(0.0, until - monotonic()))

    def scores(self, body: bytes) -> Mapping[str, object]:
        """The answer to a request's body. Raises Refused."""
        with self.reading:
            question = read_question(body, self.scorer, self.run)
        del body
        outcome = self.batcher.ask(question)
        try:
            scores, deviations = outcome.result(self.run.timeout_s)
        except TimeoutError as error:
            outcome.cancel()
            reason = f"no scores within {self.run.timeout_s:g} s"
            raise Refused(HTTPStatus.GATEWAY_TIMEOUT, reason) from error
        except (RuntimeError, ValueError) as error:
            reason = f"the scorer failed: {type(error).__name__}: {error}"
            raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, reason[:200]) from error
        return answer(question, scores, deviations)

    def _closed(self, error: OSError) -> ValueError:
        """What is said of an address that cannot be had."""
        self.server_close()
        return ValueError(f"cannot listen at {self.run.host}, port {self.run.port}: {error.strerror}")

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, once fewer than so many have one; meanwhile others wait to be accepted."""
        while not self._connections.acquire(timeout=POLL_S):
            if self.stopping:
                self.shutdown_request(request)
                return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    server: ScoreServer
    protocol_version = "HTTP/1.1"
    server_version = "dina_rl"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = BufferedReader(_InTime(self.connection, self.server.run.read_timeout_s))

    def handle(self) -> None:
        with suppress(ConnectionError):  # who asked has hung up
            super().handle()

    def do_GET(self) -> None:
        try:
            if self.path == "/health":
                self._send(*self._health())
                return
            self._check_token()
            if self.path != "/info":
                raise Refused(HTTPStatus.NOT_FOUND, "there are POST /score, GET /info and GET /health")
            self._send(HTTPStatus.OK, self.server.description)
        except Refused as refused:
            self._refuse(refused)

    def do_POST(self) -> None:
        try:
            self._check_token()
            if self.path != "/score":
                raise Refused(HTTPStatus.NOT_FOUND, "there are POST /score, GET /info and GET /health")
            if self.server.stopping:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping")
            length = self._length()
            with self.server.room.taken(length):
                content = self.server.scores(self._body(length))
            self._send(HTTPStatus.OK, content)
        except Refused as refused:
            self._refuse(refused)

    def _health(self) -> tuple[HTTPStatus, Mapping[str, object]]:
        if self.server.stopping or not self.server.alive:
            return HTTPStatus.SERVICE_UNAVAILABLE, {"status": "stopping" if self.server.stopping else "scorer ended"}
        return HTTPStatus.OK, {"status": "ok"}

    def _check_token(self) -> None:
        """Raises Refused unless the request shows the token, which takes as long whatever it shows."""
        if self.server.token is None:
            return
        kind, _, shown = self.headers.get("Authorization", "").partition(" ")
        if not compare_digest(shown.strip().encode("utf-8", "replace"), self.server.token) or kind.lower() != "bearer":
            raise Refused(HTTPStatus.UNAUTHORIZED, "show the token: Authorization: Bearer TOKEN")

    def _length(self) -> int:
        """Bytes of the body. Raises Refused where there is no such header, or more than may be."""
        given = self.headers.get("Content-Length", "").strip()
        if "Transfer-Encoding" in self.headers or not given:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a request says its Content-Length, and is not chunked")
        if not (given.isascii() and given.isdigit()):
            raise Refused(HTTPStatus.BAD_REQUEST, "Content-Length is no number")
        most = self.server.run.max_body_mib * MIB
        if len(given) > len(str(most)) or int(given) > most:
            reason = f"a request has at most {self.server.run.max_body_mib} MiB; ask in several"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
        return int(given)

    def _body(self, length: int) -> bytes:
        try:
            body = self.rfile.read(length)
        except TimeoutError as error:
            reason = f"the request did not arrive within {self.server.run.read_timeout_s:g} s"
            raise Refused(HTTPStatus.REQUEST_TIMEOUT, reason) from error
        except ConnectionError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "the connection broke off") from error
        if len(body) < length:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the body ends after {len(body)} of {length} bytes")
        return body

    def _refuse(self, refused: Refused) -> None:
        log.info("%s: %d %s", self.address_string(), refused.status, refused)
        headers = {}
        if refused.status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(RETRY_S)
        if refused.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        self._send(refused.status, {"error": str(refused)}, headers)
        self._linger()

    def _send(self, status: int, content: Mapping[str, object], headers: Mapping[str, str] | None = None) -> None:
        """One JSON object, after which the connection ends; who has hung up is not told."""
        self.close_connection = True
        body = json.dumps(content, allow_nan=False).encode()
        with suppress(OSError):
            self.connection.settimeout(self.server.run.read_timeout_s)
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Type": "application/json", "Connection": "close"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _linger(self) -> None:
        """Read on for a while and forget it."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            rest = _InTime(self.connection, LINGER_S)
            scrap = bytearray(64 * 1024)
            while rest.readinto(scrap):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses (no HTTP, another method, endless headers), in our form."""
        self._send(code, {"error": message or HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: object) -> None:  # its name in the standard library
        log.debug("%s: %s", self.address_string(), format % args)


class _InTime(RawIOBase):
    """What arrives at a socket until a moment; then reading raises TimeoutError.

    A socket's own timeout begins anew with every byte.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._until = monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - monotonic()
        if left <= 0:
            raise TimeoutError("it did not arrive in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)
