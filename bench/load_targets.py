"""What can be put under load: an engine in this process, or a server with OpenAI's images API."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.arrivals import Clock, FifoWorker, Record
from bench.described import describe_model
from bench.images_api import ROUTE, AnswerError, post, read_answer, request_body
from bench.model_parts import PICTURE_FLOOR
from bench.servers import ANOTHER_MACHINE, is_here
from bench.setting import distance
from bench.side import MissingRivalError, SideError
from turbo.comfyui_http import ServerHttp, Unreachable, is_loopback
from turbo.engine import Engine
from turbo.errors import BadInputError
from turbo.messages import one_line
from turbo.model_files import shown_name
from turbo.plan import ModelSettings, plan_to_dict

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
"""Of answers; what is in them is not compared."""
SUBJECTS = (
    "a lighthouse on a cliff at dawn",
    "an old tram in the rain",
    "a bowl of ripe pears",
    "a fox in a field of snow",
    "a harbour full of red boats",
)
WARM_UP = 1_000_000
"""Number of the first warm-up request: beyond those of any run."""


class CheckError(SideError):
    """What was answered is wrong, so that its times are worth nothing."""


class _Stopped(BaseException):
    """Raised inside the engine to leave a picture unfinished."""


def prompt_of(number: int) -> str:
    """A request's prompt; no two are equal, so that no cache of answers or captions helps."""
    return f"{SUBJECTS[number % len(SUBJECTS)]}, picture {number:06d}"


class Distinct:
    """Tells whether all pictures differ, as those of different prompts and seeds must."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._count = 0
        self._lock = threading.Lock()

    def note(self, image: Image.Image) -> None:
        digest = hashlib.sha256(image.tobytes()).digest()
        with self._lock:
            self._count += 1
            self._seen.add(digest)

    def check(self) -> dict[str, int]:
        """How many were compared.

        Raises:
            CheckError: Two were equal.
        """
        if len(self._seen) != self._count:
            raise CheckError(
                f"{self._count} different requests had only {len(self._seen)} different pictures: "
                "the answers were not made for them"
            )
        return {"distinct": self._count}


class EngineTarget:
    """An engine, its queue and the one thread that serves it.

    Args:
        engine: Loaded.
        clock: The run's.
        seed: Of picture 0.
        timeout_s: See `FifoWorker`.
    """

    name = "in-process"

    def __init__(self, engine: Engine, clock: Clock, seed: int, timeout_s: float) -> None:
        self._engine = engine
        self._clock = clock
        self._seed = seed
        self._worker = FifoWorker(self._serve, clock, timeout_s)
        self._distinct = Distinct()
        self._first: tuple[int, Image.Image] | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "model": describe_model(self._engine.models, shown_name(self._engine.files.network)),
            "plan": plan_to_dict(replace(self._engine.plan, model=ModelSettings())),  # no paths
            "dtype": str(self._engine.models.dtype).removeprefix("torch."),
            "device": str(self._engine.models.device),
        }

    def warm_up(self, requests: int) -> dict[str, Any]:
        """Warm up, then make one picture twice.

        Raises:
            CheckError: The two differ.
        """
        report = self._engine.warmup()
        first = self._paint(WARM_UP)
        for number in range(1, requests):
            self._paint(WARM_UP + number)
        same = self._compare(self._paint(WARM_UP), first)
        self._worker.start()
        return {
            "requests": requests + 1,
            "seconds": report.seconds,
            "check": {"warm-up picture made twice": same},
        }

    def submit(self, record: Record) -> None:
        self._worker.submit(record)

    def check(self) -> dict[str, Any]:
        """Make the first picture of the run again.

        Raises:
            CheckError: It differs, or two requests had one picture.
        """
        found: dict[str, Any] = dict(self._distinct.check())
        if self._first is not None:
            number, image = self._first
            found["first picture made again"] = self._compare(self._paint(number), image)
        return found

    def stop(self) -> None:
        self._worker.stop()

    def _serve(self, record: Record) -> None:
        try:
            image = self._paint(record.number)
        except _Stopped:
            return
        done = self._clock.now()
        self._distinct.note(image)
        if self._first is None:
            self._first = record.number, image
        record.done_s = done  # last: from here on the run may be over

    def _paint(self, number: int) -> Image.Image:
        seed = (self._seed + number) % 2**64
        result = self._engine.generate(
            prompt_of(number), seed=seed, on_progress=self._leave_if_stopped
        )
        return result.image

    def _leave_if_stopped(self, stage: str, done: int, total: int) -> None:
        if self._worker.is_stopped and threading.current_thread() is not threading.main_thread():
            raise _Stopped

    def _compare(self, again: Image.Image, first: Image.Image) -> dict[str, Any]:
        if again.tobytes() == first.tobytes():
            return {"identical": True}
        apart = distance(_values(again), _values(first))
        if self._engine.models.device.type == "cpu" or not apart <= PICTURE_FLOOR:
            raise CheckError(
                f"the same request gave another picture (relative distance {apart:.4f})"
            )
        return {"identical": False, "distance": apart}


class ServerTarget:
    """A server that answers OpenAI's ``POST /v1/images/generations``, a thread for each request.

    Args:
        url: Its address, without the route.
        size: Width and height to ask for.
        clock: The run's.
        seed: Of picture 0.
        timeout_s: For one answer.
        model: The name to ask for; None leaves it out.

    Raises:
        BadInputError: The address cannot be used.
    """

    name = "url"

    def __init__(
        self,
        url: str,
        size: tuple[int, int],
        clock: Clock,
        seed: int,
        timeout_s: float,
        model: str | None = None,
    ) -> None:
        self._http = ServerHttp(url, timeout_s)
        self._size = size
        self._clock = clock
        self._seed = seed
        self._timeout_s = timeout_s
        self._model = model
        self._distinct = Distinct()

    def describe(self) -> dict[str, Any]:
        return {
            "url": self._http.url if is_loopback(self._http.url) else "not shown",
            "server_machine": "this one" if is_here(self._http.url) else ANOTHER_MACHINE,
            "model": {"name": self._model},
            "size": list(self._size),
        }

    def warm_up(self, requests: int) -> dict[str, Any]:
        """Have some pictures made, one after the other.

        Raises:
            MissingRivalError: No answer came to the first.
        """
        errors = []
        for number in range(requests):
            try:
                self._ask(WARM_UP + number)
            except Unreachable as error:
                if number == 0:
                    raise MissingRivalError(
                        f"no answer from {self._http.url}{ROUTE} ({error}); start the server, or "
                        "check the address and --timeout"
                    ) from error
                errors.append(str(error))
            except AnswerError as error:
                errors.append(str(error))
        return {"requests": requests, "errors": errors}

    def submit(self, record: Record) -> None:
        thread = threading.Thread(target=self._serve, args=(record,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more
            record.error = one_line(error)

    def check(self) -> dict[str, Any]:
        """Every answer was a picture of the right size; say so if they also differ.

        Raises:
            CheckError: Two requests had one picture.
        """
        return {"size": list(self._size), **self._distinct.check()}

    def stop(self) -> None:
        """Nothing to stop: threads that wait for an answer end with the process."""

    def _serve(self, record: Record) -> None:
        try:
            data, done = self._ask(record.number)
        except (Unreachable, AnswerError) as error:
            record.error = record.error or str(error)
            return
        if record.is_over:  # given up meanwhile
            return
        record.service_s = _told_seconds(data)
        record.done_s = done

    def _ask(self, number: int) -> tuple[dict[str, Any], float]:
        """The answer to a request, checked, and when it was there."""
        named = {} if self._model is None else {"model": self._model}
        seed = (self._seed + number) % 2**63
        body = request_body(prompt_of(number), self._size, seed, **named)
        status, answer = post(self._http, body, self._timeout_s)
        done = self._clock.now()
        image, data = read_answer(status, answer, self._size, PICTURE_FORMATS)
        self._distinct.note(image)
        return data, done


def _values(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float64))


def _told_seconds(data: dict[str, Any]) -> float | None:
    """Seconds of service as SGLang tells them."""
    told: Any = data.get("inference_time_s")
    if type(told) not in (int, float) or not math.isfinite(told) or told <= 0:
        return None
    return float(told)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from ``WxH``.

    Raises:
        BadInputError: It is something else.
    """
    found = re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if found is None:
        raise BadInputError(f"--size must be WxH in pixels such as 672x864, got {text!r}")
    return int(found[1]), int(found[2])
