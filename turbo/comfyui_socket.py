"""The WebSocket on which a ComfyUI server tells what it is doing.

It may be missing, drop or fall silent at any time: then `EventSocket` gives no event, connects
again a few times, and at last leaves it at that. The caller asks over HTTP meanwhile.
"""

from __future__ import annotations

import json
import logging
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

MESSAGE_LIMIT = 64 * 2**20
"""Largest message taken from the server, in bytes."""
BACK_OFF = 0.5
"""Seconds before the first new connection; each further one waits twice as long.

Not shorter: when a server notices late that the old connection is gone, it forgets the new one of
the same client with it.
"""
BACK_OFF_LIMIT = 10.0
CONNECT_TIMEOUT = 10.0
"""Most seconds that connecting takes, so that a hung server is soon asked over HTTP."""

# The library looks at its list of exceptions only if it is given a proxy that they are from.
_WITHOUT_PROXY = {"http_proxy_host": "unused", "http_proxy_port": 1, "http_no_proxy": ["*"]}

_told_that_library_is_missing = False


class EventSocket:
    """Events of one client of a ComfyUI server, as long as there are any.

    Args:
        url: The server's http or https address.
        client_id: The id under which workflows are queued; only their events come.
        timeout: Seconds that connecting may take.
        attempts: Connections made in a row without an event before no more are tried.
        no_proxy: Never go through a proxy, for servers on this machine.
    """

    def __init__(
        self, url: str, client_id: str, timeout: float, attempts: int, *, no_proxy: bool = False
    ) -> None:
        base = "ws" + url.removeprefix("http")  # http -> ws, https -> wss
        self.url = f"{base}/ws?{urllib.parse.urlencode({'clientId': client_id})}"
        self.timeout = min(timeout, CONNECT_TIMEOUT)
        self.attempts = attempts
        self.no_proxy = no_proxy
        self._library = _import_library()
        self._socket: Any = None
        self._failures = 0
        self._next_try = 0.0
        if self._library is not None:
            self._connect()

    def __enter__(self) -> EventSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; there will be no other."""
        self._library = None
        if self._socket is not None:
            self._socket.shutdown()  # without the closing handshake, which a hung server delays
            self._socket = None

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next event, or None if none comes within `seconds`."""
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            if left <= 0:
                return None
            if self._socket is None and not self._reconnect(left):
                continue
            event = self._receive_message(left)
            if event is not None:
                return event

    def _reconnect(self, left: float) -> bool:
        """Wait until a connection may be tried, then try; False if there is none yet."""
        if self._library is None or self._failures >= self.attempts:
            time.sleep(left)
            return False
        wait = self._next_try - time.monotonic()
        if wait > 0:
            time.sleep(min(wait, left))
            return False
        return self._connect()

    def _connect(self) -> bool:
        try:
            self._socket = self._library.create_connection(
                self.url,
                timeout=self.timeout,
                suppress_origin=True,
                enable_multithread=False,
                redirect_limit=0,
                **(_WITHOUT_PROXY if self.no_proxy else {}),
            )
        except (OSError, ValueError, self._library.WebSocketException) as error:
            self._dropped(error)
            return False
        _bound_messages(self._socket, self._library.WebSocketException)
        return True

    def _receive_message(self, seconds: float) -> dict[str, Any] | None:
        """One message, None if it is no event or none came in time; a lost connection is noted."""
        try:
            self._socket.settimeout(seconds)
            opcode, data = self._socket.recv_data()
            self._socket.frame_buffer.recv.restart()
        except self._library.WebSocketTimeoutException:
            return None
        except (OSError, ValueError, self._library.WebSocketException) as error:
            self._dropped(error)
            return None
        if opcode == self._library.ABNF.OPCODE_CLOSE:
            self._dropped("closed by the server")
            return None
        if opcode != self._library.ABNF.OPCODE_TEXT:
            return None  # a preview picture
        return self._parse(data)

    def _parse(self, data: bytes) -> dict[str, Any] | None:
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(event, dict):
            return None
        self._failures = 0
        return event

    def _dropped(self, why: object) -> None:
        if self._socket is not None:
            self._socket.shutdown()
            self._socket = None
        self._next_try = time.monotonic() + min(BACK_OFF * 2**self._failures, BACK_OFF_LIMIT)
        self._failures += 1
        given_up = self._failures >= self.attempts
        following = "using HTTP only" if given_up else "connecting again"
        logger.info("ComfyUI's WebSocket is gone (%s); %s", why, following)


class _BoundedReceive:
    """A socket's receive function that gives up when one message gets too long."""

    def __init__(self, receive: Callable[[int], bytes], error: type[Exception]) -> None:
        self.receive = receive
        self.error = error
        self.received = 0

    def __call__(self, size: int) -> bytes:
        data = self.receive(size)
        self.received += len(data)
        if self.received > MESSAGE_LIMIT:
            raise self.error(f"a message is longer than {MESSAGE_LIMIT} bytes")
        return data

    def restart(self) -> None:
        """A message is complete; count the next one from 0."""
        self.received = 0


def _bound_messages(socket: Any, error: type[Exception]) -> None:
    """The library has no limit of its own and would collect whatever a server sends."""
    socket.frame_buffer.recv = _BoundedReceive(socket.frame_buffer.recv, error)


def _import_library() -> Any:
    global _told_that_library_is_missing
    try:
        import websocket
    except ImportError:
        if not _told_that_library_is_missing:
            logger.warning(
                "websocket-client is not installed, so ComfyUI is followed without steps; "
                "pip install 'turbo[comfyui]' adds it"
            )
            _told_that_library_is_missing = True
        return None
    return websocket
