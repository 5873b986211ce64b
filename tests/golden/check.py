"""Comparison of tensors with recorded ones: one outcome a case, with the largest error in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Outcome:
    """What came of one case."""

    name: str
    problems: list[str] = field(default_factory=list)
    error: float = 0.0
    """Largest absolute error, of the comparison that used most of its tolerance."""
    allowed: float = 0.0
    """The tolerance of that comparison."""
    share: float = -1.0
    """Largest share of a tolerance that was used."""
    note: str = ""

    skipped: bool = False
    """Whether the case cannot be run here; `note` says why."""

    @property
    def passed(self) -> bool:
        """Whether everything compared was close enough, and something was compared."""
        return not self.problems and self.share >= 0

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Turn an exception into a problem of this case, so that the others still run."""
        try:
            yield
        except Exception as error:
            self.problems.append(f"{type(error).__name__}: {error}")

    def require(self, condition: bool, problem: str) -> None:
        """Note a problem unless `condition` holds."""
        if not condition:
            self.problems.append(problem)

    def compare(
        self, what: str, got: Tensor, want: Tensor, absolute: float, relative: float
    ) -> None:
        """Hold ``|got - want| <= absolute + relative * max|want|``; NaN equals NaN."""
        got = got.detach().cpu()
        if got.shape != want.shape:
            self.problems.append(f"{what}: shape {list(got.shape)}, recorded {list(want.shape)}")
            self.share = max(self.share, 0.0)
            return
        got, want = got.double(), want.double()
        same = (got == want) | (got.isnan() & want.isnan())  # infinities equal themselves only
        difference = (got - want).abs().masked_fill(same, 0.0)
        finite = want[want.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        allowed = absolute + relative * largest
        error = difference.max().item() if difference.numel() else 0.0
        if error != error or error > allowed:
            self.problems.append(f"{what}: error {error:.3g}, allowed {allowed:.3g}")
        share = float("inf") if error != error else error / allowed if allowed else float(error > 0)
        if share > self.share:
            self.share, self.error, self.allowed = share, error, allowed


@dataclass
class Case:
    """One JSON file of the folder with its tensors."""

    folder: Path
    """The folder given on the command line."""
    path: Path
    """The JSON file."""
    facts: dict[str, Any]
    """Its content."""

    @property
    def name(self) -> str:
        """Path below the folder, without suffix."""
        return self.path.relative_to(self.folder).with_suffix("").as_posix()

    @property
    def kind(self) -> str:
        """What the case computes; decides who handles it."""
        return str(self.facts["case"])

    @property
    def tolerance(self) -> Mapping[str, Any]:
        """The JSON's tolerances."""
        return cast("Mapping[str, Any]", self.facts.get("tolerance", {}))

    def tensors(self) -> dict[str, Tensor]:
        """The recorded tensors."""
        return cast("dict[str, Tensor]", load_file(self.path.with_suffix(".safetensors")))

    def limits(self, special: str = "") -> tuple[float, float]:
        """Absolute and relative tolerance; ``<special>_abs`` replaces both."""
        if special and f"{special}_abs" in self.tolerance:
            return float(self.tolerance[f"{special}_abs"]), 0.0
        return float(self.tolerance.get("abs", 0.0)), float(self.tolerance.get("rel", 0.0))

    def outcome(self, part: str = "") -> Outcome:
        """A fresh outcome for the case or one part of it."""
        return Outcome(f"{self.name}/{part}" if part else self.name)


def find_cases(folder: Path) -> Iterator[Case]:
    """Every case below a folder, in the order of their names."""
    for path in sorted(folder.rglob("*.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            facts = {"case": f"unreadable JSON ({error})"}
        if isinstance(facts, dict) and isinstance(facts.get("case"), str):
            yield Case(folder, path, facts)


def thinned(full: Tensor, recorded: Tensor, axes: tuple[int, ...], stride: int = 0) -> Tensor:
    """Thin out `full` on `axes`, by `stride` or the smallest that gives the sizes of `recorded`."""
    if stride:
        index = [slice(None, None, stride if axis in axes else None) for axis in range(full.dim())]
        return full[tuple(index)]
    for stride in range(1, max(full.shape) + 1):
        if all(-(-full.shape[axis] // stride) == recorded.shape[axis] for axis in axes):
            index = [slice(None)] * full.dim()
            for axis in axes:
                index[axis] = slice(None, None, stride)
            return full[tuple(index)]
    return full


def recorded_stride(stored: str, name: str) -> int:
    """The stride that a case's `stored` text gives for a tensor, 0 if it gives none."""
    match = re.search(rf"\b{name}\[(?:\.\.\., )?::(\d+), ::\1\]", stored)
    return int(match[1]) if match else 0


def as_tensor(values: Any) -> Tensor:
    """Python floats as float32."""
    return torch.tensor(values, dtype=torch.float32)
