"""Sides that need no model: what they say is set by the test."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from bench.side import Request, Round, SideError


def picture(seed: int, shift: int = 0) -> Image.Image:
    """Noise of a seed; `shift` adds as many levels to every value."""
    values = np.random.default_rng(seed).integers(0, 200, (48, 32, 3))
    return Image.fromarray((values + shift).astype(np.uint8))


class FakeSide:
    """A side that takes the seconds it is told to."""

    in_process = True

    def __init__(
        self,
        name: str,
        seconds: Callable[[int], float] = lambda number: 1.0,
        *,
        draw: Callable[[Request], Image.Image] = lambda request: picture(request.seed),
        approximate: bool = False,
        best: bool = False,
        problem: str | None = None,
    ) -> None:
        self.name = name
        self.approximate = approximate
        self.best = best
        self.part = ""
        self.asked: list[Request] = []
        self.closed = 0
        self._seconds = seconds
        self._draw = draw
        self._problem = problem

    def settings(self) -> dict[str, Any]:
        return {"program": self.name}

    def start(self) -> dict[str, float]:
        return {"load": 0.5}

    def check(self) -> dict[str, Any]:
        if self._problem:
            raise SideError(self._problem)
        return {"fine": True}

    def others(self) -> dict[str, dict[str, Any]]:
        return {}

    def paint(self, request: Request) -> Round:
        self.asked.append(request)
        total = self._seconds(len(self.asked))
        return Round(
            seconds={"total": total, "stage1": total / 2},
            image=self._draw(request),
            network_s={"stage1": (total / 4, total / 4)},
            skips={"stage1": (1, 3)},
            spans=2,
        )

    def processes(self) -> tuple[int, ...]:
        return (os.getpid(),)

    def device_memory_gib(self) -> dict[str, float] | None:
        return None

    def close(self) -> None:
        self.closed += 1
