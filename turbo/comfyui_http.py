"""HTTP with a ComfyUI server: bounded answers, JSON checked, every failure one clear line."""

from __future__ import annotations

import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, NoReturn

from turbo.errors import BackendError, BadInputError
from turbo.messages import one_line

DEFAULT_URL = "http://127.0.0.1:8188"

JSON_LIMIT = 64 * 2**20
"""Largest answer read as JSON, in bytes; the queue's holds every waiting workflow."""

GATEWAY_ERRORS = frozenset({502, 503, 504})
"""What a proxy in front of the server says while the server is away."""


class Unreachable(Exception):
    """No answer came; asking again may help."""


class ServerHttp:
    """The HTTP routes of one server.

    Args:
        url: Address, http or https; a path in it stands before every route.
        timeout: Seconds one exchange may take.

    Raises:
        BadInputError: The address cannot be used.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = _check_url(url)
        self.timeout = timeout
        handlers: list[Any] = [_NoRedirects()]
        if is_loopback(self.url):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def exchange(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        limit: int = JSON_LIMIT,
        timeout: float | None = None,
    ) -> tuple[int, bytes]:
        """One request: GET, or POST of a JSON body. Returns status and answer, whatever it is.

        Raises:
            Unreachable: No whole answer came in time, or it is longer than `limit` bytes.
        """
        timeout = timeout or self.timeout
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            status, answer = self._send(request, limit, timeout)
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(_reason(error, timeout)) from error
        if status in GATEWAY_ERRORS:
            raise Unreachable(f"status {status}")
        return status, answer

    def _send(
        self, request: urllib.request.Request, limit: int, timeout: float
    ) -> tuple[int, bytes]:
        deadline = time.monotonic() + timeout
        try:
            response = self._opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _read(error, limit, deadline)
        with response:
            return response.status, _read(response, limit, deadline)

    def ask(self, path: str) -> dict[str, Any]:
        """GET a JSON object.

        Raises:
            Unreachable: No answer came.
            BackendError: The answer is something else.
        """
        return self.parse(*self.exchange(path), path)

    def parse(
        self, status: int, data: bytes, path: str, accept: tuple[int, ...] = (200,)
    ) -> dict[str, Any]:
        """The JSON object in an answer."""
        if status not in accept:
            self.nonsense(path, f"status {status}")
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            self.nonsense(path, "it is not JSON")
        if not isinstance(answer, dict):
            self.nonsense(path, "it is no JSON object")
        return answer

    def away(self, error: Unreachable, when: str = "") -> NoReturn:
        """Raise the error for a server that gives no answer."""
        raise BackendError(
            f"no answer from ComfyUI at {self.url}{' ' + when if when else ''} ({error}); "
            "start it, or check the address and port"
        ) from error

    def nonsense(self, path: str, why: str) -> NoReturn:
        """Raise the error for an answer that ComfyUI would not give."""
        raise BackendError(
            f"unexpected answer from {self.url} to {path}: {why}; "
            "check that this is the address of a ComfyUI server"
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead anywhere, and ComfyUI sends none."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def is_loopback(url: str) -> bool:
    """Whether a server is on this machine, so that no proxy can lead to it."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a broken IPv6 address, or a port that is no number
        usable = False
    printable = url.isascii() and url.isprintable() and " " not in url
    if not usable or not printable or parts.username or parts.query or parts.fragment:
        raise BadInputError(
            f"{url!r} is no server address; give one such as {DEFAULT_URL} (http or https, "
            "without user name and query)"
        )
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def _read(response: Any, limit: int, deadline: float) -> bytes:
    """The body, but no more than `limit` bytes and not beyond the deadline."""
    body = bytearray()
    while chunk := response.read1(1 << 16):
        body += chunk
        if len(body) > limit:
            raise OSError(f"the answer is longer than {limit} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:  # read1 does not tell that the connection ended too soon
        raise OSError("the answer was cut off")
    return bytes(body)


def _reason(error: Exception, timeout: float) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"nothing within {timeout:g} s"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror.lower()
    return one_line(cause) or type(cause).__name__
