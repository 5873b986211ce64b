"""A stand-in for a ComfyUI server: its HTTP routes and a minimal WebSocket on one loopback port.

A test sets what goes wrong; otherwise the server plays one workflow as the real one does.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def png(width: int = 8, height: int = 8) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 60)).save(data, "PNG")
    return data.getvalue()


class FakeComfyUI:
    """State of the server; `play` is what it does with a queued workflow, in a thread."""

    def __init__(self, port: int = 0) -> None:
        self.play: Callable[[FakeComfyUI, str], None] = play_whole
        self.refusal: dict[str, Any] | None = None
        self.overrides: dict[str, Callable[[], tuple[int, bytes]]] = {}
        self.picture = png()
        self.websockets_allowed = 1_000_000
        self.hang = threading.Event()  # set: no request is answered any more
        self.stopped = threading.Event()
        self.running: str | None = None
        self.pending: list[str] = []
        self.history: dict[str, Any] = {}
        self.posted: list[tuple[str, Any]] = []
        self.clients: list[str] = []
        self.sockets: list[socket.socket] = []
        self.connections = 0
        self.connected = threading.Condition()
        self.threads: list[threading.Thread] = []
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.fake = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    # what a script does

    def send(self, kind: str, **data: Any) -> None:
        self.send_frame(1, json.dumps({"type": kind, "data": data}).encode())

    def send_frame(self, opcode: int, payload: bytes) -> None:
        length = len(payload)
        size = struct.pack(">B", length) if length < 126 else struct.pack(">BQ", 127, length)
        with self.connected:
            for client in self.sockets:
                with contextlib.suppress(OSError):  # it went away
                    client.sendall(bytes([0x80 | opcode]) + size + payload)

    def drop_sockets(self) -> None:
        with self.connected:
            for client in self.sockets:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
            self.sockets.clear()

    def wait_for_socket(self) -> bool:
        with self.connected:
            return self.connected.wait_for(lambda: bool(self.sockets), timeout=5)

    def finish(self, prompt_id: str, outputs: dict[str, Any], status: str = "success") -> None:
        messages = [["execution_start", {"prompt_id": prompt_id}]]
        entry = {"outputs": outputs, "status": {"status_str": status, "messages": messages}}
        self.history[prompt_id] = entry
        self.running = None

    def fail(self, prompt_id: str, kind: str, **data: Any) -> None:
        self.finish(prompt_id, {}, "error")
        self.history[prompt_id]["status"]["messages"].append([kind, data])

    # life

    def die(self) -> None:
        """Close everything at once, as a killed process does."""
        self.stopped.set()
        self.hang.set()
        self.server.shutdown()
        self.server.server_close()
        self.drop_sockets()

    def close(self) -> None:
        if not self.stopped.is_set():
            self.die()
        for thread in [*self.threads, self.thread]:
            thread.join(timeout=5)


class _Server(ThreadingHTTPServer):
    fake: FakeComfyUI
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        fake = self.server.fake
        path = urllib.parse.urlsplit(self.path)
        if path.path == "/ws":
            self.serve_websocket()
        elif self.answered_otherwise(path.path):
            pass
        elif path.path == "/queue":
            running = [[0, fake.running, {}]] if fake.running else []
            self.answer_json(
                {"queue_running": running, "queue_pending": [[1, p, {}] for p in fake.pending]}
            )
        elif path.path.startswith("/history/"):
            name = path.path.removeprefix("/history/")
            self.answer_json({name: fake.history[name]} if name in fake.history else {})
        elif path.path == "/view":
            self.answer(200, fake.picture, "image/png")
        elif path.path == "/system_stats":
            self.answer_json({"system": {"comfyui_version": "0.8.0"}})
        else:
            self.answer(404, b"")

    def do_POST(self) -> None:
        fake = self.server.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.posted.append((self.path, body))
        if self.answered_otherwise(self.path):
            return
        if self.path == "/prompt" and fake.refusal is not None:
            self.answer_json(fake.refusal, 200 if "prompt_id" in fake.refusal else 400)
        elif self.path == "/prompt":
            fake.running = body["prompt_id"]
            thread = threading.Thread(target=fake.play, args=(fake, fake.running), daemon=True)
            fake.threads.append(thread)
            self.answer_json({"prompt_id": fake.running, "number": 0, "node_errors": {}})
            thread.start()
        else:
            self.answer(200, b"")

    def answered_otherwise(self, path: str) -> bool:
        fake = self.server.fake
        while fake.hang.is_set() and not fake.stopped.is_set():
            time.sleep(0.01)
        for prefix, answer in fake.overrides.items():
            if path.startswith(prefix):
                self.answer(*answer())
                return True
        return False

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), "application/json")

    def answer(self, status: int, body: bytes, kind: str = "text/html") -> None:
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "http://127.0.0.1:9/")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def serve_websocket(self) -> None:
        fake = self.server.fake
        if fake.websockets_allowed <= 0:
            self.answer(500, b"")
            return
        fake.websockets_allowed -= 1
        fake.clients.append(self.path)
        digest = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + WEBSOCKET_GUID).encode())
        with fake.connected:  # who has read the answer gets whatever is sent from then on
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.send_header("Sec-WebSocket-Accept", base64.b64encode(digest.digest()).decode())
            self.end_headers()
            self.wfile.flush()
            fake.sockets.append(self.connection)
            fake.connections += 1
            fake.connected.notify_all()
        with contextlib.suppress(OSError):
            while self.connection.recv(4096):
                pass
        self.close_connection = True


# scripts


def play_steps(fake: FakeComfyUI, prompt_id: str, node: str, total: int) -> None:
    fake.send("executing", node=node, display_node=node, prompt_id=prompt_id)
    for step in range(1, total + 1):
        fake.send("progress", value=step, max=total, prompt_id=prompt_id, node=node)


def saved(name: str) -> dict[str, Any]:
    return {"images": [{"filename": name, "subfolder": "", "type": "output"}]}


def play_end(fake: FakeComfyUI, prompt_id: str, node: str = "307") -> None:
    fake.send("execution_success", prompt_id=prompt_id)
    fake.finish(prompt_id, {node: saved("stage3_00001_.png")})
    fake.send("executing", node=None, prompt_id=prompt_id)


def play_whole(fake: FakeComfyUI, prompt_id: str) -> None:
    """One workflow, with what else a real server sends in between."""
    fake.send("status", status={"exec_info": {"queue_remaining": 1}})
    fake.send("execution_start", prompt_id=prompt_id)
    fake.send("execution_cached", nodes=[], prompt_id=prompt_id)
    fake.send("progress_state", prompt_id=prompt_id, nodes={"316": {"value": 0.0}})
    play_steps(fake, prompt_id, "316", 3)
    fake.send_frame(2, b"\x00\x00\x00\x01preview")
    fake.send("progress", value=1, max=1, prompt_id="someone else's", node="9")
    fake.send_frame(1, b"{not json")
    fake.send_frame(9, b"ping")
    play_steps(fake, prompt_id, "325", 2)
    fake.send("executed", node="307", output=saved("stage3_00001_.png"), prompt_id=prompt_id)
    play_end(fake, prompt_id)


def play_nothing(fake: FakeComfyUI, prompt_id: str) -> None:
    """The workflow runs on and on."""


@contextlib.contextmanager
def fake_comfyui() -> Iterator[FakeComfyUI]:
    fake = FakeComfyUI()
    try:
        yield fake
    finally:
        fake.close()
