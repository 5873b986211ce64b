"""A stand-in for a server with OpenAI's images API, on a loopback port."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Answer = tuple[int, bytes] | None
"""Status and body; None hangs up without an answer."""


def png(seed: int, width: int, height: int) -> bytes:
    """A picture that depends on the seed alone."""
    colour = (seed % 256, seed // 256 % 256, seed // 65536 % 256)
    data = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(data, "PNG")
    return data.getvalue()


def painted(body: dict[str, Any], **extra: Any) -> Answer:
    """The answer of a server that works."""
    width, height = map(int, body["size"].split("x"))
    picture = base64.b64encode(png(body["seed"], width, height)).decode()
    return 200, json.dumps({"created": 1, "data": [{"b64_json": picture}], **extra}).encode()


class FakeImagesServer:
    """Answers with `answer`, called with a request's body and its number, counted from 0."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any], int], Answer] = lambda body, number: painted(body)
        self.bodies: list[dict[str, Any]] = []
        self.released = threading.Event()
        """Set at the end, so that an answer that waits for it comes to its end."""
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def reply(self, path: str, body: dict[str, Any]) -> Answer:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
        return self.answer(body, number) if path == "/v1/images/generations" else (404, b"")

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # waits for the handlers' threads

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                answer = fake.reply(self.path, json.loads(self.rfile.read(length)))
                if answer is None:
                    return
                with contextlib.suppress(OSError):  # the client may have given up
                    self.send_response(answer[0])
                    self.send_header("Content-Length", str(len(answer[1])))
                    self.end_headers()
                    self.wfile.write(answer[1])

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        return Handler


@contextlib.contextmanager
def running() -> Iterator[FakeImagesServer]:
    server = FakeImagesServer()
    try:
        yield server
    finally:
        server.close()
