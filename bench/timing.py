"""Times on the device's own clock: warm-up left out, median with the 20th and 80th percentile."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, between neighbours in proportion.

    Source: Hyndman and Fan 1996, definition 7, which is NumPy's default.

    Raises:
        ValueError: No values, or a percentage outside 0 to 100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"a percentile needs values and 0 to 100, got {len(values)}, {percent}")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarise(values_ms: Sequence[float]) -> dict[str, Any]:
    """Median and spread of some times."""
    return {
        "median_ms": statistics.median(values_ms),
        "p20_ms": percentile(values_ms, 20),
        "p80_ms": percentile(values_ms, 80),
        "p95_ms": percentile(values_ms, 95),
        "runs": len(values_ms),
    }


def summarise_rounds(seconds: Sequence[float]) -> dict[str, Any]:
    """As `summarise`, of seconds, with every value to the microsecond."""
    values_ms = [1000 * value for value in seconds]
    return summarise(values_ms) | {"all_ms": [round(value, 3) for value in values_ms]}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ours over theirs, round by round, so that what slows a round slows both of its sides.

    Raises:
        ValueError: No rounds, or not as many on both sides.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"a ratio needs pairs, got {len(ours)} and {len(theirs)} values")
    quotients = [one / other for one, other in zip(ours, theirs)]
    return {
        "median": statistics.median(quotients),
        "p20": percentile(quotients, 20),
        "p80": percentile(quotients, 80),
        "pairs": len(quotients),
    }


def synchronise(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_runs(
    run: Callable[[], object], device: torch.device, *, seconds: float, least: int = 3
) -> dict[str, Any]:
    """Time runs one behind the other, as a sampler makes them: the host's share is in it.

    Args:
        run: Has run before, so that nothing is compiled or captured any more.
        device: Where it works.
        seconds: How long to repeat it for, about.
        least: Runs at the least; 100 at the most.
    """
    run()
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    one = time.perf_counter() - begin
    runs = max(least, min(100, int(seconds / max(one, 1e-6))))
    spans = [Span(device) for _ in range(runs)]
    for span in spans:
        span.begin()
        run()
        span.end()
    synchronise(device)
    return summarise([span.ms() for span in spans])


def time_launches(
    runs: Sequence[Callable[[], object]], device: torch.device, *, seconds: float
) -> dict[str, Any]:
    """Time short runs without the host's share: all in one CUDA graph, divided by their number.

    On other devices, where there is no such difference, they run one behind the other.
    """

    def everything() -> None:
        for run in runs:
            run()

    timed = time_runs(_graph_of(everything, device), device, seconds=seconds)
    per_run = {
        name: value / len(runs) if name.endswith("_ms") else value for name, value in timed.items()
    }
    return per_run | {"launches": len(runs)}


def _graph_of(run: Callable[[], None], device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Span:
    """From one moment of the device's work to another; read it after `synchronise`."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[Any] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._clock = [0.0, 0.0]

    def begin(self) -> None:
        self._mark(0)

    def end(self) -> None:
        self._mark(1)

    def ms(self) -> float:
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1]))
        return (self._clock[1] - self._clock[0]) * 1000

    def _mark(self, which: int) -> None:
        if self._events:
            self._events[which].record()
        else:
            self._clock[which] = time.perf_counter()


class Meter:
    """Adds up the time that callables take, by name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Span]] = []

    def metered(self, name: str, run: Callable[..., Result]) -> Callable[..., Result]:
        """`run`, with its time taken."""

        def timed(*inputs: Any, **options: Any) -> Result:
            span = Span(self._device)
            span.begin()
            result = run(*inputs, **options)
            span.end()
            self._spans.append((name, span))
            return result

        return timed

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Take the time of a block."""
        span = Span(self._device)
        span.begin()
        yield
        span.end()
        self._spans.append((name, span))

    def read_s(self) -> dict[str, float]:
        """Seconds by name since the last reading."""
        synchronise(self._device)
        seconds: dict[str, float] = {}
        for name, span in self._spans:
            seconds[name] = seconds.get(name, 0.0) + span.ms() / 1000
        self._spans.clear()
        return seconds
