"""Against a local server with the answers of the OpenAI images API."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bench.sglang_side import SglangSide
from bench.side import MissingRivalError, Request, SideError
from tests.turbo.fake_comfyui import png
from turbo.plan import DEFAULT_PLAN

REQUEST = Request(prompt="a lighthouse", negative_prompt="blurry", seed=42)
MODEL = {"model_path": "/home/someone/Z-Image-Turbo", "num_gpus": 1, "dit_precision": "bf16"}


def answer_with(data: bytes) -> bytes:
    return json.dumps({"data": [{"b64_json": base64.b64encode(data).decode()}]}).encode()


class FakeSglang(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.posted: list[tuple[str, Any]] = []
        self.picture: tuple[int, bytes] = (200, answer_with(png(672, 864)))
        self.hang = threading.Event()
        self.closed = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeSglang

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(200, json.dumps(MODEL).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.posted.append((self.path, body))
        if self.server.hang.is_set():
            self.server.closed.wait()
        self.answer(*self.server.picture)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[FakeSglang]:
    with FakeSglang() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.closed.set()
        server.shutdown()
        thread.join()


def side_of(server: FakeSglang, **options: Any) -> SglangSide:
    side = SglangSide(server.url, DEFAULT_PLAN, **options)
    side.start()
    return side


def error_of(server: FakeSglang, **options: Any) -> str:
    with pytest.raises(SideError) as caught:
        side_of(server, **options).paint(REQUEST)
    message = str(caught.value)
    assert "\n" not in message
    assert server.url in message
    return message


def test_a_picture_comes_with_the_requests_wall_time(server):
    picture = side_of(server).paint(REQUEST)
    assert list(picture.seconds) == ["total"]
    assert picture.seconds["total"] > 0
    assert picture.total_has_png
    assert (picture.image.size, picture.image.mode) == ((672, 864), "RGB")


def test_the_single_stage_is_asked_for(server):
    side_of(server).paint(REQUEST)
    [(path, body)] = server.posted
    assert path == "/v1/images/generations"
    expected = {
        "prompt": "a lighthouse",
        "negative_prompt": "blurry",
        "size": "672x864",
        "seed": 42,
        "num_inference_steps": 9,
        "guidance_scale": 1.0,  # cfg 2 in ComfyUI's sense
        "response_format": "b64_json",
    }
    assert expected.items() <= body.items()


def test_settings_name_the_model_without_its_folder(server):
    settings = side_of(server).settings()
    assert (settings["model"], settings["dit_precision"]) == ("Z-Image-Turbo", "bf16")
    assert settings["total_includes"] == ["coding the PNG", "its transfer"]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b'{"error": {"message": "size is\\nwrong"}}', "status 400: size is wrong"),
        (422, b'{"detail": "no such model"}', "status 422: no such model"),
        (500, b"<html>", "status 500"),
        (200, b"<html>", "the answer is no JSON object"),
        (200, b'{"data": [{"url": "http://elsewhere/1.png"}]}', "no data[0].b64_json"),
        (200, answer_with(b"no picture"), "picture cannot be decoded"),
        (200, answer_with(png(64, 64)), "a picture of 64x64 came, asked for was 672x864"),
    ],
)
def test_an_answer_that_is_no_picture_is_one_line(server, status, body, message):
    server.picture = (status, body)
    assert message in error_of(server)


def test_a_server_that_hangs_is_given_up(server):
    server.hang.set()
    assert "nothing within 0.2 s" in error_of(server, run_seconds=0.2)


def test_a_server_that_has_gone_is_one_line(server):
    side = side_of(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(SideError, match="no answer from SGLang"):
        side.paint(REQUEST)


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9", "not an address"])
def test_a_server_that_is_not_there_is_a_missing_rival(url):
    with pytest.raises(MissingRivalError, match="--sglang-url") as caught:
        SglangSide(url, DEFAULT_PLAN).start()
    assert "\n" not in str(caught.value)
