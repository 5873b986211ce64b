"""Drives a running ComfyUI server over its HTTP and WebSocket API.

HTTP does the work: `POST /prompt` queues a workflow, `GET /history` tells its end and its pictures,
`GET /view` fetches them. The WebSocket only brings progress sooner, so a socket that is missing or
drops never costs a picture: the server is asked over HTTP whenever the socket is silent.
"""

from __future__ import annotations

import logging
import time
import urllib.parse
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from turbo.comfyui_http import DEFAULT_URL, ServerHttp, Unreachable, is_loopback
from turbo.comfyui_socket import EventSocket
from turbo.comfyui_workflow import NODE_PACKS, Workflow, required_nodes
from turbo.errors import BackendError, BadInputError
from turbo.messages import one_line

logger = logging.getLogger(__name__)

IMAGE_LIMIT = 512 * 2**20
"""Largest picture file, in bytes."""
PICTURES_LIMIT = 256
"""Most pictures fetched for one workflow."""
LAST_EVENTS = 0.1
"""Seconds to wait for events that a finished run sent before it was found finished."""
CANCEL_TIMEOUT = 5.0
"""Seconds that each request of a cancellation may take."""

ProgressCallback = Callable[[str, int, int], None]
"""Called with a node id, its step (from 1) and its number of steps."""
EventCallback = Callable[[Mapping[str, Any], float], None]
"""Called with an event of this workflow's run, as the WebSocket brings it, and with the moment at
which it came, in seconds of `time.perf_counter`."""


@dataclass(slots=True)
class _Run:
    """What is known about one queued workflow."""

    prompt_id: str
    deadline: float
    finished: bool = False
    failure: str | None = None
    progress: dict[str, tuple[int, int]] = field(default_factory=dict)
    on_event: EventCallback | None = None

    def left(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.deadline - time.monotonic())


class ComfyUIClient:
    """A connection to one ComfyUI server. Nothing is uploaded to it but workflows.

    Args:
        url: Address of the server, http or https.
        timeout: Seconds one HTTP request may take.
        run_timeout: Seconds a workflow may take, waiting in the queue included; None is no limit.
        poll_interval: Seconds without news after which the server is asked for the state.
        attempts: Requests that fail in a row before the server counts as gone, and connections
            that the WebSocket gets before only HTTP is used.

    Raises:
        BadInputError: The address or a number cannot be used.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout: float = 30.0,
        run_timeout: float | None = 3600.0,
        poll_interval: float = 1.0,
        attempts: int = 4,
    ) -> None:
        _check_positive("timeout", timeout)
        _check_positive("poll_interval", poll_interval)
        if run_timeout is not None:
            _check_positive("run_timeout", run_timeout)
        if attempts < 1:
            raise BadInputError(f"attempts must be at least 1, got {attempts}")
        self._http = ServerHttp(url, timeout)
        self.url = self._http.url
        self.run_timeout = run_timeout
        self.poll_interval = poll_interval
        self.attempts = attempts

    def run(
        self,
        workflow: Workflow,
        on_progress: ProgressCallback | None = None,
        on_event: EventCallback | None = None,
    ) -> dict[str, list[bytes]]:
        """Run a workflow and fetch its pictures.

        If the wait ends early (`run_timeout`, Ctrl-C, an error in a callback), the server is told
        to drop this workflow, running or waiting; other people's are left alone.

        Args:
            workflow: What to run, in API format.
            on_progress: Told of every step of a node.
            on_event: Told of every event of the run; there are none without a WebSocket.

        Returns:
            Node id -> PNG files that the node saved, each checked to be a whole picture.

        Raises:
            BackendError: The server is away, refuses or fails, or answers nonsense.
        """
        client_id = uuid.uuid4().hex
        run = _Run(str(uuid.uuid4()), time.monotonic() + (self.run_timeout or float("inf")))
        run.on_event = on_event
        with self._open_socket(client_id) as socket:
            try:
                self._queue(run, workflow, client_id)
                entry = self._follow(run, socket, on_progress)
            except BackendError:
                raise
            except BaseException:
                self._cancel(run.prompt_id)
                raise
        return self._fetch_pictures(entry)

    def system_stats(self) -> dict[str, Any]:
        """What the server says about itself: version, devices, memory.

        Raises:
            BackendError: The server is away or answers nonsense.
        """
        try:
            return self._http.ask("/system_stats")
        except Unreachable as error:
            self._http.away(error)

    # ------------------------------------------------------------ one run

    def _open_socket(self, client_id: str) -> EventSocket:
        return EventSocket(
            self.url,
            client_id,
            self._http.timeout,
            self.attempts,
            no_proxy=is_loopback(self.url),
        )

    def _queue(self, run: _Run, workflow: Workflow, client_id: str) -> None:
        body = {"prompt": workflow, "client_id": client_id, "prompt_id": run.prompt_id}
        try:
            status, data = self._http.exchange("/prompt", body)
        except Unreachable as error:
            self._http.away(error)
        answer = self._http.parse(status, data, "/prompt", accept=(200, 400))
        if isinstance(answer.get("prompt_id"), str):
            run.prompt_id = answer["prompt_id"]  # a server that ignores ours has its own
        elif status == 200:
            self._http.nonsense("/prompt", "it has no prompt_id")
        if status == 400 or answer.get("node_errors"):
            if status == 200:  # some of its pictures can be made, but not all
                self._cancel(run.prompt_id)
            reason = _refusal(answer, workflow)
            raise BackendError(f"ComfyUI at {self.url} refuses the workflow: {reason}")

    def _follow(
        self, run: _Run, socket: EventSocket, on_progress: ProgressCallback | None
    ) -> dict[str, Any]:
        """Wait for the end; returns the workflow's entry in the server's history."""
        failures = 0
        while True:
            self._check_deadline(run)
            event = socket.receive(min(self.poll_interval, run.left()))
            if event is not None:
                _take_in(run, event, on_progress)
                if not run.finished:
                    continue
            try:
                entry = self._poll(run)
                failures = 0
            except Unreachable as error:
                failures += 1
                if failures >= self.attempts:
                    self._http.away(error, "during the run")
                logger.info("ComfyUI at %s: %s; asking again", self.url, error)
                time.sleep(min(self.poll_interval * failures, run.left()))
                continue
            self._check_outcome(run, entry)
            if entry is not None:
                self._take_in_the_rest(run, socket, on_progress)
                return entry

    def _take_in_the_rest(
        self, run: _Run, socket: EventSocket, on_progress: ProgressCallback | None
    ) -> None:
        """Report the steps whose events came, unread, before the history told the end."""
        end = time.monotonic() + LAST_EVENTS
        while not run.finished and (left := end - time.monotonic()) > 0:
            event = socket.receive(left)
            if event is not None:
                _take_in(run, event, on_progress)

    def _check_deadline(self, run: _Run) -> None:
        if run.left() > 0:
            return
        self._cancel(run.prompt_id)
        raise BackendError(
            f"ComfyUI at {self.url} did not finish within {self.run_timeout:g} s and was told to "
            "drop the workflow; allow more with run_timeout"
        )

    def _poll(self, run: _Run) -> dict[str, Any] | None:
        """The workflow's history entry, or None while it waits or runs."""
        entry = self._history(run)
        if entry is not None or self._in_queue(run):
            return entry
        # It may have finished between the two questions.
        entry = self._history(run)
        if entry is None and run.failure is None:
            raise BackendError(
                f"ComfyUI at {self.url} no longer knows the workflow: it was restarted, or its "
                "queue or history was cleared; repeat the request"
            )
        return entry

    def _history(self, run: _Run) -> dict[str, Any] | None:
        path = f"/history/{urllib.parse.quote(run.prompt_id, safe='')}"
        entry = self._http.ask(path).get(run.prompt_id)
        if entry is not None and not isinstance(entry, dict):
            self._http.nonsense(path, "the entry is no object")
        return entry

    def _in_queue(self, run: _Run) -> bool:
        queue = self._http.ask("/queue")
        return any(
            _holds(queue.get(part), run.prompt_id) for part in ("queue_running", "queue_pending")
        )

    def _check_outcome(self, run: _Run, entry: Mapping[str, Any] | None) -> None:
        failure = run.failure
        status = entry.get("status") if entry is not None else None
        # Servers of old keep no status; then what the socket said counts.
        if (
            failure is None
            and isinstance(status, Mapping)
            and status.get("status_str") != "success"
        ):
            failure = _recorded_failure(status)
        if failure is not None:
            raise BackendError(f"ComfyUI at {self.url} failed: {failure}")

    def _cancel(self, prompt_id: str) -> None:
        """Take the workflow out of the queue, or stop it if it runs; errors change nothing."""
        http = self._http
        try:
            http.exchange("/queue", {"delete": [prompt_id]}, timeout=CANCEL_TIMEOUT)
            queue = http.parse(*http.exchange("/queue", timeout=CANCEL_TIMEOUT), "/queue")
            # Old servers ignore the id and stop whatever runs: ask only if that is ours.
            if _holds(queue.get("queue_running"), prompt_id):
                http.exchange("/interrupt", {"prompt_id": prompt_id}, timeout=CANCEL_TIMEOUT)
        except (Unreachable, BackendError) as error:
            logger.warning("ComfyUI at %s could not be told to stop: %s", self.url, error)

    # ------------------------------------------------------------ pictures

    def _fetch_pictures(self, entry: Mapping[str, Any]) -> dict[str, list[bytes]]:
        outputs = entry.get("outputs")
        if not isinstance(outputs, Mapping):
            self._http.nonsense("/history", "it has no outputs")
        listed: dict[str, list[Any]] = {}
        for node, output in outputs.items():
            images = output.get("images") if isinstance(output, Mapping) else None
            if isinstance(images, list) and images:
                listed[str(node)] = images
        if sum(map(len, listed.values())) > PICTURES_LIMIT:
            self._http.nonsense("/history", f"it lists more than {PICTURES_LIMIT} pictures")
        return {node: [self._fetch(image) for image in images] for node, images in listed.items()}

    def _fetch(self, image: object) -> bytes:
        if not isinstance(image, Mapping) or not isinstance(image.get("filename"), str):
            self._http.nonsense("/history", "a picture has no filename")
        name = image["filename"]
        query = {k: str(image[k]) for k in ("filename", "subfolder", "type") if k in image}
        status, data = self._download("/view?" + urllib.parse.urlencode(query))
        if status != 200:
            raise BackendError(
                f"ComfyUI at {self.url} made {one_line(name)} but has status {status} for it; "
                "was the file removed from its output folder?"
            )
        problem = _picture_problem(data)
        if problem is not None:
            self._http.nonsense(f"/view of {one_line(name)}", problem)
        return data

    def _download(self, path: str) -> tuple[int, bytes]:
        attempt = 1
        while True:
            try:
                return self._http.exchange(path, limit=IMAGE_LIMIT)
            except Unreachable as error:
                if attempt == self.attempts:
                    self._http.away(error, "while it sent a picture")
            time.sleep(self.poll_interval * attempt)
            attempt += 1


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise BadInputError(f"{name} must be a number of seconds above 0, got {value}")


def _take_in(run: _Run, event: Mapping[str, Any], on_progress: ProgressCallback | None) -> None:
    """Note what an event says; those of other workflows are none of ours."""
    kind, data = event.get("type"), event.get("data")
    if not isinstance(data, Mapping) or data.get("prompt_id") != run.prompt_id:
        return
    if run.on_event is not None:
        run.on_event(event, time.perf_counter())
    if kind == "progress":
        _report(run, data, on_progress)
    elif kind in ("execution_error", "execution_interrupted"):
        run.finished, run.failure = True, _failure(kind, data)
    elif kind == "execution_success" or (kind == "executing" and data.get("node") is None):
        run.finished = True


def _report(run: _Run, data: Mapping[str, Any], on_progress: ProgressCallback | None) -> None:
    node, step, total = data.get("node"), data.get("value"), data.get("max")
    if not (isinstance(node, str) and type(step) is int and type(total) is int):
        return
    if run.progress.get(node) != (step, total):
        run.progress[node] = (step, total)
        if on_progress is not None:
            on_progress(node, step, total)


def _refusal(answer: Mapping[str, Any], workflow: Workflow) -> str:
    """The first reason in a refusal by /prompt, with the node it is about."""
    where, error = "", answer.get("error")
    node_errors = answer.get("node_errors")
    for node, entry in node_errors.items() if isinstance(node_errors, Mapping) else ():
        errors = entry.get("errors") if isinstance(entry, Mapping) else None
        if isinstance(errors, list) and errors:
            where, error = f"node {node} ({entry.get('class_type')}): ", errors[0]
            break
    if not isinstance(error, Mapping):
        return where + (one_line(error) if error else "no reason given")
    message, details = str(error.get("message")).rstrip("."), error.get("details")
    message = f"{message}: {details}" if details else message
    needed = required_nodes(workflow)
    packs = {needed[name] for name in needed if name in message and name in NODE_PACKS}
    advice = f"; install {' and '.join(sorted(packs))}" if packs else ""
    return where + one_line(message) + advice


def _failure(kind: str, data: Mapping[str, Any]) -> str:
    where = one_line(f"node {data.get('node_id')} ({data.get('node_type')})")
    if kind == "execution_interrupted":
        return f"the run was interrupted on the server, in {where}"
    return f"{where}: {one_line(data.get('exception_message') or data.get('exception_type'))}"


def _recorded_failure(status: Mapping[str, Any]) -> str:
    """The failure as the history has it, for when the socket did not bring it."""
    messages = status.get("messages")
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, list) and len(message) == 2 and isinstance(message[1], Mapping):
            kind, data = message
            if kind in ("execution_error", "execution_interrupted"):
                return _failure(kind, data)
    return f"its status is {one_line(status.get('status_str'))}"


def _holds(queue: object, prompt_id: str) -> bool:
    return isinstance(queue, list) and any(
        isinstance(item, list) and len(item) > 1 and item[1] == prompt_id for item in queue
    )


def _picture_problem(data: bytes) -> str | None:
    """Why bytes are not a whole PNG picture; None if they are."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=["PNG"]) as image:
                image.verify()  # every chunk and its checksum, the last one included
            with Image.open(BytesIO(data), formats=["PNG"]) as image:
                image.load()  # the pixels
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return "the picture is too large"
    except (OSError, SyntaxError, ValueError) as error:
        return one_line(f"it is no whole PNG picture ({error})")
    return None
