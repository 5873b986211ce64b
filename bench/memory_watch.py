"""Watches a side's memory from a thread, beside a picture whose time is not taken."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from bench.side import Side

INTERVAL_S = 0.1
"""Between two looks."""
FAMILY_LOOKS = 50
"""Looks after which a process's children are looked for anew, which takes milliseconds."""
MOST_POINTS = 400
"""Kept of a timeline; every second one is dropped when there are more."""


class MemoryWatch:
    """Peak and course of a side's memory.

    Args:
        side: Whose processes and device are watched.
    """

    def __init__(self, side: Side) -> None:
        self._side = side
        self.timeline: list[list[Any]] = []
        """[seconds, host GiB or None, device GiB or None, part]."""
        self.host_peak_gib: float | None = None
        self.device: dict[str, dict[str, float]] = {}
        """Part -> the most device memory of all looks, `allocated` and `reserved` as known."""
        self._step = 1
        self._family: list[Any] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look in regular intervals during the block."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event) -> None:
        begin = time.perf_counter()
        looks = 0
        while not over.is_set():
            if looks % FAMILY_LOOKS == 0 or not self._family:
                self._family = family(self._side.processes(), alone=self._side.in_process)
            self._look(time.perf_counter() - begin, keep=looks % self._step == 0)
            looks += 1
            over.wait(INTERVAL_S)

    def _look(self, seconds: float, keep: bool) -> None:
        host = resident_gib(self._family)
        device = self._side.device_memory_gib()
        if host is not None:
            self.host_peak_gib = max(self.host_peak_gib or 0.0, host)
        if host is None and device is None:
            return
        highest = self.device.setdefault(self._side.part, {}) if device and self._side.part else {}
        for name, gib in (device or {}).items():
            highest[name] = max(highest.get(name, 0.0), gib)
        held = None if device is None else device.get("allocated")
        if keep:
            point = [round(seconds, 2), _rounded(host), _rounded(held), self._side.part]
            self.timeline.append(point)
        if len(self.timeline) > MOST_POINTS:
            del self.timeline[1::2]
            self._step *= 2


def family(processes: tuple[int, ...], *, alone: bool) -> list[Any]:
    """Processes and, unless they are `alone`, their children, as psutil knows them."""
    import psutil

    found: list[Any] = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process)
            found += [parent] if alone else [parent, *parent.children(recursive=True)]
    return found


def resident_gib(processes: list[Any]) -> float | None:
    """Resident memory of processes in all; None if there are none to see."""
    import psutil

    found = None
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found = (found or 0.0) + process.memory_info().rss / 2**30
    return found


def _rounded(gib: float | None) -> float | None:
    return None if gib is None else round(gib, 3)
