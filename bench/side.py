"""One side of a comparison: a program with a model and a plan that makes pictures, and its rounds.

A side measures itself; `bench.measure` runs sides in turn and keeps what they say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL.Image import Image
from torch import Tensor


class SideError(Exception):
    """A side cannot run or gave a wrong answer; the message says why and what to do."""


class MissingRivalError(SideError):
    """What a side needs is not there; the message is one line that says what to give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What all sides are asked for in a round; the prompts are new ones in each."""

    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One picture and what it took."""

    seconds: Mapping[str, float]
    """Part -> seconds. `total` always; where they can be told apart `prompt`, each stage by its
    name, `decode`, `png`, and `load` for weights that are read again in each round. `total` leaves
    out `load` and, but for `total_has_png`, `png`."""
    image: Image
    """The last stage's picture, RGB."""
    stage_images: Mapping[str, Image] = field(default_factory=dict)
    """Pictures of stages by name, where the side makes them anyway."""
    latents: Mapping[str, Tensor] = field(default_factory=dict)
    """Outside latents by stage, where they can be had: [1, 16, height / 8, width / 8], CPU."""
    network_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Stage -> seconds of each network call that was made, where they can be told."""
    skips: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Stage -> (network calls saved by the step cache, calls wanted), where they can be told."""
    memory_gib: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Part -> peak device memory, `allocated` and `reserved`, where they can be told."""
    total_has_png: bool = False
    """Whether coding the PNG is in `total`, where a program does not tell it apart."""
    recorded: bool = False
    """Whether it was made in an earlier run."""
    spans: int = 0
    """Times that the harness looked at a clock for this round's sake."""


class Side(Protocol):
    """A program that makes pictures."""

    name: str
    """Unique in a comparison, such as ``turbo, compiled``."""
    approximate: bool
    """Whether its picture may differ from its baseline's by more than rounding."""
    best: bool
    """Whether it is this program's fastest setting rather than the one all sides share."""
    in_process: bool
    """Whether it runs in this process."""
    part: str
    """What it does now, such as a stage's name; read by the memory timeline from its own thread."""

    def settings(self) -> dict[str, Any]:
        """What it runs with, ready for JSON: versions, dtype, switches."""

    def start(self) -> dict[str, float]:
        """Load and warm up; returns seconds by step, such as `load` and `warm-up`.

        Raises:
            MissingRivalError: What it needs is not there.
            SideError: It cannot run.
        """

    def check(self) -> dict[str, Any]:
        """Prove that what will be timed is right, as far as the side alone can; see `measure`.

        Raises:
            SideError: It is not.
        """

    def others(self) -> dict[str, dict[str, Any]]:
        """Summaries of parts that a round does not show, measured now; empty if there are none."""

    def paint(self, request: Request) -> Round:
        """Make a picture.

        Raises:
            SideError: It could not.
        """

    def processes(self) -> tuple[int, ...]:
        """Ids of the processes whose memory counts; empty if they cannot be known."""

    def device_memory_gib(self) -> dict[str, float] | None:
        """Device memory now: `allocated` and `reserved` where known; None without a GPU."""

    def close(self) -> None:
        """Give back memory, child processes, ports. May be called twice and never fails."""


class OutsideSide:
    """What sides have in common that are not of this process and show nothing but their pictures.

    Args:
        name: Its name in the comparison.
        approximate: Whether its settings change the picture by more than rounding.
        best: Whether its settings make it its fastest.
    """

    in_process = False

    def __init__(self, name: str, *, approximate: bool = False, best: bool = False) -> None:
        self.name = name
        self.approximate = approximate
        self.best = best
        self.part = ""

    def check(self) -> dict[str, Any]:
        """Nothing can be told of it alone: its pictures are compared with the other sides'."""
        return {"compared_with": "the other sides' pictures"}

    def others(self) -> dict[str, dict[str, Any]]:
        """Nothing besides its rounds."""
        return {}

    def processes(self) -> tuple[int, ...]:
        """Not known."""
        return ()

    def device_memory_gib(self) -> dict[str, float] | None:
        """Not known."""
        return None
