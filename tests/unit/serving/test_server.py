"""Who may ask how much, over real HTTP: the documented client, and what others send by mistake or to do harm."""

import os
import re
import signal
import socket
import stat
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep

import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

from dina_rl import serve
from dina_rl.config import PictureScorerConfig
from dina_rl.scoring import PictureScorer, open_scorer
from dina_rl.seeding import generator
from dina_rl.serving.server import _InTime
from tests.serving import TOKEN, asked, packed, serving
from tests.tiny_clip import save_tiny_clip
from tests.tiny_reward import PROMPTS, latents

GUIDE = Path(__file__).parents[3] / "docs" / "serving.md"
CLIENT = re.compile(r"^    import json\n.*?return .*?\n", re.MULTILINE | re.DOTALL)
PATIENCE_S = 60
BODY = packed({"latents": latents(1)}, prompts="x")


class Held(PictureScorer):
    """Scores when it is let go."""

    def __init__(self, scorer: PictureScorer) -> None:
        self.__dict__ |= vars(scorer)
        self.began, self.go = Event(), Event()

    def at(self, *args, **kwargs):
        self.began.set()
        assert self.go.wait(PATIENCE_S)
        return super().at(*args, **kwargs)


@pytest.fixture(scope="module")
def scorer(tiny_reward) -> PictureScorer:
    return open_scorer(tiny_reward)


@pytest.fixture(scope="module")
def server(scorer):
    with serving(scorer, max_body_mib=1, read_timeout_s=PATIENCE_S) as server:
        yield server


@pytest.fixture(scope="module")
def hasty(scorer):
    """A server that waits a second for a request."""
    with serving(scorer, read_timeout_s=1) as server:
        yield server


@pytest.fixture
def held(scorer):
    scorer = Held(scorer)
    yield scorer
    scorer.go.set()


@pytest.fixture(scope="module")
def client():
    """The function that the guide shows."""
    found = CLIENT.search(GUIDE.read_text())
    assert found is not None
    names: dict = {}
    exec(textwrap.dedent(found.group()), names)
    return names["score"]


def test_the_guides_client_gets_the_scores_of_jobs_score(scorer, server, client, tmp_path):
    save_file({"latent": latents(1)[0]}, tmp_path / "a.safetensors")
    (own,) = scorer.score([tmp_path / "a.safetensors"], [PROMPTS[0]]).tolist()
    assert client(latents(1), [PROMPTS[0]], url=server.url, token=TOKEN) == [own]
    (ensemble,) = scorer.at((0.2, 0.5), draws=2).score([tmp_path / "a.safetensors"], [PROMPTS[0]]).tolist()
    assert client(latents(1), PROMPTS[0], url=server.url, token=TOKEN, levels=[0.2, 0.5], draws=2) == [ensemble]
    assert client(latents(1), PROMPTS[0], url=server.url, token=TOKEN, seed=1) != [own]


def test_a_crowd_of_clients_gets_what_one_does(server, client):
    def ask(row: int) -> list[float]:
        return client(latents(8)[row : row + 1], PROMPTS[row % 3], url=server.url, token=TOKEN)

    with ThreadPoolExecutor(8) as pool:
        crowd = [each for (each,) in pool.map(ask, range(8))]
    alone = [each for (each,) in map(ask, range(8))]
    assert crowd == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert len(set(alone)) == 8


def test_pictures_for_a_scorer_of_images(client, tmp_path):
    clip = str(save_tiny_clip(tmp_path / "clip"))
    scorer = open_scorer(PictureScorerConfig(kind="pickscore", path=clip, processor=clip))
    pixels = torch.randint(0, 256, (2, 3, 40, 56), generator=generator("served pictures"), dtype=torch.uint8)
    files = [tmp_path / f"{row}.png" for row in range(2)]
    for file, picture in zip(files, pixels, strict=True):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file)
    with serving(scorer) as server:
        found = client(pixels, PROMPTS[:2], url=server.url, token=TOKEN, tensor="images")
        status, refused, _ = asked(server, packed({"images": pixels}, prompts="x", levels=[0.2]))
        assert (status, refused) == (400, {"error": "levels: a pickscore scorer draws no noise"})
        status, refused, _ = asked(server, packed({"images": pixels.float()}, prompts="x"))
        assert (status, refused) == (400, {"error": "images are of U8, these are F32"})
        assert asked(server, method="GET", path="/info")[1]["tensor"] == "images"
    assert found == pytest.approx(scorer.score(files, PROMPTS[:2]).tolist(), rel=1e-5)


def test_it_says_what_it_is(server):
    status, info, _ = asked(server, method="GET", path="/info")
    assert status == 200
    assert info.items() >= {"scorer": "dina", "tensor": "latents", "shapes": [[16, 8, 8]], "levels": [0.4]}.items()
    assert TOKEN not in str(info)


@pytest.mark.parametrize("shown", ["", TOKEN, "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xff"])
def test_without_the_token_nothing_but_health(server, shown):
    for method, path in (("POST", "/score"), ("GET", "/info"), ("GET", "/elsewhere")):
        status, content, headers = asked(server, BODY, method=method, path=path, Authorization=shown)
        assert (status, list(content), headers["WWW-Authenticate"]) == (401, ["error"], "Bearer")
    assert asked(server, method="GET", path="/health", Authorization=shown)[:2] == (200, {"status": "ok"})


LARGE = bytes(2**20 + 1)


@pytest.mark.parametrize(
    ("status", "error", "request_"),
    [
        (404, "there are", {"path": "/scores"}),
        (404, "there are", {"path": "/", "method": "GET"}),
        (501, "Unsupported method ('PUT')", {"method": "PUT"}),
        (400, "no safetensors file", {"body": b"[]"}),
        (413, "a request has at most 1 MiB", {"body": LARGE}),
        (413, "a request has at most 1 MiB", {"Content-Length": "9" * 5000}),
        (400, "Content-Length is no number", {"Content-Length": "-1"}),
        (400, "Content-Length is no number", {"Content-Length": "1_0"}),
        (411, "says its Content-Length", {"Transfer-Encoding": "chunked"}),
    ],
)
def test_what_is_no_request_is_told_in_one_line(server, status, error, request_):
    found, content, _ = asked(server, **{"body": BODY, **request_})
    assert found == status
    assert error in content["error"]


def test_a_body_that_does_not_come_is_not_waited_for(hasty):
    status, content, _ = asked(hasty, BODY, **{"Content-Length": str(len(BODY) + 1)})
    assert (status, content) == (408, {"error": "the request did not arrive within 1 s"})


@pytest.mark.parametrize("head", [b"", b"POST /score HTTP/1.1\r\nAuthorization: "], ids=["silent", "drips"])
def test_a_slow_client_is_left_in_time_whatever_it_drips(hasty, head):
    begin = monotonic()
    with socket.create_connection(hasty.server_address[:2]) as connection:
        connection.sendall(head)
        connection.settimeout(0.1)
        while monotonic() < begin + PATIENCE_S:
            try:
                assert connection.recv(1) == b""
                break
            except TimeoutError:
                if head:
                    connection.sendall(b"x")
            except ConnectionError:
                break
    assert 0.9 < monotonic() - begin < PATIENCE_S


def test_bytes_that_arrive_do_not_prolong_the_time():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = _InTime(ours, 0.2)
        theirs.sendall(b"ab")
        assert reader.read(1) == b"a"
        sleep(0.2)
        with pytest.raises(TimeoutError):
            reader.read(1)


def test_a_body_that_breaks_off_and_a_client_that_is_gone_end_nothing(server):
    with socket.create_connection(server.server_address[:2]) as connection:
        length = len(BODY) + 5
        head = f"POST /score HTTP/1.1\r\nAuthorization: bearer {TOKEN}\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + BODY)
        connection.shutdown(socket.SHUT_WR)
        assert b"the body ends after" in b"".join(iter(lambda: connection.recv(4096), b""))
    with socket.create_connection(server.server_address[:2]) as connection:
        connection.sendall(head.encode())
    assert asked(server, BODY)[0] == 200


def test_overload_is_refused_for_the_moment_and_what_was_taken_is_answered(held):
    with serving(held, max_requests=2) as server, ThreadPoolExecutor(8) as pool:
        taken = [pool.submit(asked, server, BODY) for _ in range(2)]
        until = monotonic() + PATIENCE_S
        while server.room._free_requests and monotonic() < until:
            sleep(0.01)
        refused = [each.result() for each in [pool.submit(asked, server, BODY) for _ in range(6)]]
        assert {status for status, _, _ in refused} == {503}
        assert {headers["Retry-After"] for _, _, headers in refused} == {"1"}
        assert asked(server, method="GET", path="/health")[0] == 200
        held.go.set()
        assert [each.result()[0] for each in taken] == [200, 200]
        assert asked(server, BODY)[0] == 200, "there is room again"


def test_bytes_are_bounded_over_all_requests(held):
    with serving(held, max_body_mib=1, max_held_mib=1) as server, ThreadPoolExecutor(1) as pool:
        half = save({"latents": latents(1)}, metadata={"prompts": '"x"', "format": 600 * 1024 * "-"})
        first = pool.submit(asked, server, half)
        assert held.began.wait(PATIENCE_S)
        assert asked(server, half)[0] == 503
        held.go.set()
        assert first.result()[0] == 200


def test_scores_that_take_too_long_are_given_up(held):
    with serving(held, timeout_s=0.2) as server:
        status, content, _ = asked(server, BODY)
        assert (status, content) == (504, {"error": "no scores within 0.2 s"})
        held.go.set()


def test_it_stops_after_what_is_under_way(held):
    with serving(held) as server, ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(asked, server, BODY)
        assert held.began.wait(PATIENCE_S)
        stopping = Thread(target=server.stop)
        stopping.start()
        until = monotonic() + PATIENCE_S
        while not server.stopping and monotonic() < until:
            sleep(0.01)
        held.go.set()
        assert under_way.result()[0] == 200
        stopping.join(PATIENCE_S)
        assert not stopping.is_alive()
        assert not server.alive
        with pytest.raises(ConnectionError):
            asked(server, BODY)


def test_the_program_serves_until_it_is_told_to_stop(tiny_reward, client, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv(serve.TOKEN, raising=False)
    file, found = tmp_path / "new" / "token", []

    def ask() -> None:
        said, until = "", monotonic() + PATIENCE_S
        while "answers at" not in said and monotonic() < until:
            sleep(0.02)
            said += capfd.readouterr().out
        url = re.search(r"dina answers at (\S+) \(new token in ", said)
        try:
            found.extend(client(latents(1), "x", url=url.group(1), token=file.read_text().strip()))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    asking = Thread(target=ask)
    asking.start()
    before = signal.getsignal(signal.SIGTERM)
    serve.main(["--scorer.path", str(tiny_reward), "--port", "0", "--token-file", str(file)])
    asking.join(PATIENCE_S)
    assert len(found) == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_token_is_the_environments_or_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv(serve.TOKEN, "of-the-environment")
    assert serve.find_token(tmp_path / "token") == ("of-the-environment", f"token of {serve.TOKEN}")
    assert not (tmp_path / "token").exists()
    monkeypatch.setenv(serve.TOKEN, "short")
    with pytest.raises(ValueError, match="16 characters"):
        serve.find_token(tmp_path / "token")
    monkeypatch.delenv(serve.TOKEN)
    token, _ = serve.find_token(tmp_path / "token")
    assert len(token) > 40
    assert serve.find_token(tmp_path / "token")[0] == token
    (tmp_path / "token").chmod(0o640)
    with pytest.raises(ValueError, match="others may read the token"):
        serve.find_token(tmp_path / "token")


def test_mistakes_are_one_line(tmp_path, capsys, server, monkeypatch):
    monkeypatch.setenv(serve.TOKEN, TOKEN)
    port = str(server.server_address[1])
    for words, message in (
        (["--port", port], f"cannot listen at 127.0.0.1, port {port}: Address already in use"),
        (["--port", "0", "--scorer.path", str(tmp_path)], str(tmp_path)),
        (["--host", "0.0.0.0", "--no-token"], "others reach 0.0.0.0"),
    ):
        with pytest.raises(SystemExit) as ending:
            serve.main(words)
        assert ending.value.code == 2
        assert message in capsys.readouterr().err
