"""Open-loop load: requests are sent at times fixed beforehand, whatever became of earlier ones.

A closed loop, which waits for an answer before it asks again, asks a stalled server nothing and so
never sees the stall. Here latency counts from the time at which a request was due, so neither a
stalled server nor a stalled sender can hide one.
"""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench.timing import percentile, summarise_rounds
from turbo.messages import one_line

LATE_MS = 10.0
"""A request sent later than this after its time counts as late."""
_POLL_SECONDS = 0.02
_MESSAGES_KEPT = 20


def poisson_arrivals(rate_per_s: float, duration_s: float, seed: int) -> tuple[float, ...]:
    """Times of a Poisson process: gaps are independent and exponential with mean 1 / rate.

    Args:
        rate_per_s: Mean number of arrivals in a second.
        duration_s: Arrivals lie in [0, duration).
        seed: Of the gaps.

    Returns:
        Rising times in seconds; perhaps none.
    """
    draw = random.Random(seed)
    times = []
    moment = draw.expovariate(rate_per_s)
    while moment < duration_s:
        times.append(moment)
        moment += draw.expovariate(rate_per_s)
    return tuple(times)


@dataclass(slots=True)
class Record:
    """What became of one request; seconds since the run began."""

    number: int
    """Counted from 0; prompt and seed depend on it."""
    arrival_s: float
    """When it was due."""
    sent_s: float | None = None
    """When it was sent."""
    begun_s: float | None = None
    """When its service began, where that can be told."""
    done_s: float | None = None
    """When its whole answer was there."""
    service_s: float | None = None
    """What the server says that it took, where it says so."""
    error: str | None = None
    """Why it has no answer, or a wrong one."""

    @property
    def is_over(self) -> bool:
        return self.done_s is not None or self.error is not None

    @property
    def is_good(self) -> bool:
        return self.done_s is not None and self.error is None


class Clock:
    """Seconds since it was made or last restarted."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Target(Protocol):
    """What is put under load."""

    def submit(self, record: Record) -> None:
        """Take a request and return at once; its record is filled in by another thread."""


def send_all(records: Sequence[Record], target: Target, clock: Clock, timeout_s: float) -> None:
    """Send every request at its time, then wait until all are over.

    Args:
        records: In order of arrival; filled in.
        target: Where to.
        clock: Restarted as the run begins.
        timeout_s: A request without an answer for so long is given up.
    """
    clock.restart()
    for record in records:
        _wait_until(record.arrival_s, clock)
        record.sent_s = clock.now()
        target.submit(record)
    last = max((record.sent_s or 0.0 for record in records), default=0.0)
    while not all(record.is_over for record in records):
        if clock.now() > last + timeout_s + 1:
            break
        clock.sleep(_POLL_SECONDS)
    for record in records:
        if not record.is_over:
            record.error = no_answer(timeout_s)


def no_answer(timeout_s: float) -> str:
    """What is said about a request that was given up."""
    return f"nothing within {timeout_s:g} s"


def _wait_until(moment: float, clock: Clock) -> None:
    while (left := moment - clock.now()) > 0:
        clock.sleep(left)


class FifoWorker:
    """A queue and one thread that serves it in order, as an engine does one picture at a time.

    Args:
        serve: Does the work for a record; raises what went wrong.
        clock: The run's.
        timeout_s: A request whose service has not begun so long after its arrival is given up.
    """

    def __init__(self, serve: Callable[[Record], None], clock: Clock, timeout_s: float) -> None:
        self._serve = serve
        self._clock = clock
        self._timeout_s = timeout_s
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self.work, name="bench-load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, record: Record) -> None:
        self._queue.put(record)

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        """Begin nothing more, and wait for what is being served."""
        self._stopped.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def work(self) -> None:
        """Serve until told to stop."""
        while (record := self._queue.get()) is not None and not self.is_stopped:
            record.begun_s = self._clock.now()
            if record.begun_s - record.arrival_s > self._timeout_s:
                record.error = f"waited longer than {self._timeout_s:g} s"
                continue
            try:
                self._serve(record)
            except Exception as error:
                record.error = one_line(error) or type(error).__name__


def figures(records: Sequence[Record], duration_s: float) -> dict[str, Any]:
    """What a results file of kind ``load`` says about its requests; see ``schema.md``.

    Args:
        records: All of them.
        duration_s: For how long requests arrived. Throughput is over at least so long: a server
            that dies early is not the faster for it.
    """
    good = [record for record in records if record.is_good]
    begun = [record for record in good if record.begun_s is not None]
    told = [record.service_s for record in good if record.service_s is not None]
    if begun:
        told = [_since(record.done_s, record.begun_s) for record in begun]
    over_s = max([duration_s, *(record.done_s or 0.0 for record in records)])
    return {
        "latency": _summary([_since(record.done_s, record.arrival_s) for record in good]),
        "queue": _summary([_since(record.begun_s, record.arrival_s) for record in begun], good),
        "service": _summary(told, good),
        "throughput_per_s": len(good) / over_s,
        "throughput_over_s": over_s,
        "completed": len(good),
        "unfinished": sum(not record.is_over for record in records),
        "errors": _count_errors(records),
        "late": lateness(records),
        "requests": [
            [
                record.arrival_s,
                _ms(record.begun_s, record.arrival_s),
                _ms(record.done_s, record.arrival_s),
                record.is_good,
            ]
            for record in records
        ],
    }


def percentile_of_all(answered: Sequence[float], unanswered: int, percent: float) -> float | None:
    """A percentile of all requests, of which those without an answer are the slowest.

    Args:
        answered: Times of the others.
        unanswered: How many had no answer, or a wrong one.
        percent: From 0 to 100.

    Returns:
        The time; None if it lies among those without an answer, or there was no request.
    """
    last = (len(answered) + unanswered - 1) * percent / 100
    if not answered or math.ceil(last) >= len(answered):
        return None
    return percentile([*answered, *[max(answered)] * unanswered], percent)


def lateness(records: Sequence[Record]) -> dict[str, float]:
    """How far the sender itself was behind: the share beyond `LATE_MS`, and the worst."""
    late_ms = [
        1000 * (record.sent_s - record.arrival_s) for record in records if record.sent_s is not None
    ]
    return {
        "share": sum(one > LATE_MS for one in late_ms) / len(late_ms) if late_ms else 0.0,
        "worst_ms": max(late_ms, default=0.0),
    }


def _count_errors(records: Sequence[Record]) -> dict[str, int]:
    counted = Counter(record.error for record in records if record.error is not None)
    shown = dict(counted.most_common(_MESSAGES_KEPT))
    others = counted.total() - sum(shown.values())
    return shown | ({"others": others} if others else {})


def _summary(seconds: Sequence[float], good: Sequence[Record] = ()) -> dict[str, Any]:
    if seconds:
        return summarise_rounds(seconds)
    return {"withheld": "the server does not tell" if good else "no request was answered"}


def _ms(moment: float | None, since: float) -> float | None:
    return None if moment is None else 1000 * (moment - since)


def _since(moment: float | None, since: float | None) -> float:
    assert moment is not None
    assert since is not None
    return moment - since
