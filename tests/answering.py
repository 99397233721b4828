"""A real HTTP server on this machine that speaks as an OpenAI-compatible one, well or badly."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Event, Lock, Thread

from PIL import Image

MODEL = "UnifiedReward"


class Asked(BaseHTTPRequestHandler):
    """One request, and ways to answer it."""

    server: "AnsweringServer"

    def do_GET(self) -> None:
        self.send(200, json.dumps({"data": [{"id": MODEL}]}))

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.number = len(self.server.asked)
            self.server.asked.append(self)
        with suppress(ConnectionError):  # who asked has hung up
            self.server.answer(self)

    @property
    def pictures(self) -> list[Image.Image]:
        """What is shown, in order; the text comes after it."""
        urls = [part["image_url"]["url"] for part in self.body["messages"][0]["content"][:-1]]
        return [Image.open(BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) for url in urls]

    @property
    def picture(self) -> Image.Image:
        (picture,) = self.pictures
        return picture

    @property
    def text(self) -> str:
        return self.body["messages"][0]["content"][-1]["text"]

    def say(self, text: str) -> None:
        """A completion."""
        self.send(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}))

    def send(self, status: int, content: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: object) -> None:
        pass


class AnsweringServer(ThreadingHTTPServer):
    """Calls `answer` with every question, in a thread of its own.

    Attributes:
        closing: set when the server closes, for answers that would wait forever.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, answer: Callable[[Asked], None]) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.answer = answer
        self.asked: list[Asked] = []
        self.lock = Lock()
        self.closing = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def answering(answer: Callable[[Asked], None]) -> Iterator[AnsweringServer]:
    with AnsweringServer(answer) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
