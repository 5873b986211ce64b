"""Results files as the report sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.reporting.markup import plain
from bench.reporting.shape import check_shape
from bench.results import read_results

VERSIONS = ("turbo", "torch", "triton", "diffusers", "transformers", "python")

OUTSIDE_TOTAL = ("total", "load", "png")
"""Parts that are no piece of `total`; upscaling, timed apart, is one of its stage's."""


def is_piece(part: str) -> bool:
    """Whether a part's time is a piece of `total` of its own."""
    return part not in OUTSIDE_TOTAL and not part.startswith("upscale")


@dataclass(frozen=True, slots=True)
class MeasuredSide:
    """One side of a run or comparison."""

    name: str
    data: Mapping[str, Any]

    @property
    def program(self) -> str:
        """Sides of one program make a ladder."""
        return plain(self.entry("settings").get("program") or self.name.split(",")[0].strip())

    @property
    def approximate(self) -> bool:
        """Whether its picture may differ by more than rounding: network calls left out count."""
        skips = self.entry("skips").values()
        return bool(self.data.get("approximate")) or any(saved for saved, _ in skips)

    @property
    def setting(self) -> str:
        """Name and settings; equal in sides whose times may stand in one line of the history."""
        settings = {
            key: value
            for key, value in self.entry("settings").items()
            if key not in VERSIONS and "version" not in key
        }
        return json.dumps([self.name, settings], sort_keys=True)

    @property
    def withheld(self) -> str | None:
        """Why it has no figures."""
        for place in (self.data, self.data.get("check", {})):
            if "withheld" in place:
                return plain(place["withheld"])
        return None if "median_ms" in self.times.get("total", {}) else "no total was measured"

    @property
    def times(self) -> Mapping[str, Any]:
        times: Mapping[str, Any] = self.data.get("times", {})
        return times

    @property
    def total_ms(self) -> float:
        return float(self.times["total"]["median_ms"])

    @property
    def parts_ms(self) -> dict[str, float]:
        """Pieces of the total, in the file's order; what they leave over is `other`."""
        parts = {
            name: float(summary["median_ms"])
            for name, summary in self.times.items()
            if is_piece(name) and "median_ms" in summary
        }
        left = self.total_ms - sum(parts.values())
        return parts | ({"other": left} if left > 0 else {})

    def entry(self, name: str) -> Any:
        """An object of it, empty if it is not there."""
        return self.data.get(name) or {}


@dataclass(frozen=True)
class ResultsFile:
    """A results file that was read and checked."""

    path: Path
    data: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path, *kinds: str) -> ResultsFile:
        """Read one.

        Raises:
            ResultsFileError: It cannot be used; one line.
        """
        data = read_results(path, kinds) if kinds else read_results(path)
        check_shape(str(path), data)
        return cls(path, data)

    @property
    def kind(self) -> str:
        return str(self.data["kind"])

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def machine(self) -> Mapping[str, Any]:
        machine: Mapping[str, Any] = self.data["machine"]
        return machine

    @property
    def when(self) -> str:
        """When it was measured; empty if that is not known."""
        return self.machine.get("time") or ""

    @property
    def configuration(self) -> Mapping[str, Any]:
        configuration: Mapping[str, Any] = self.data.get("configuration", {})
        return configuration

    @property
    def partial(self) -> bool:
        return bool(self.data.get("partial", False))

    @cached_property
    def sides(self) -> tuple[MeasuredSide, ...]:
        """All sides, in the file's order."""
        return tuple(MeasuredSide(name, data) for name, data in self.data.get("sides", {}).items())

    @property
    def measured(self) -> tuple[MeasuredSide, ...]:
        """Sides whose check passed and that have a total."""
        return tuple(side for side in self.sides if side.withheld is None)

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        model = self.configuration.get("model")
        name = model.get("name") if isinstance(model, dict) else model
        facts = [name, self.configuration.get("dtype"), self.configuration.get("device")]
        known = [plain(fact) for fact in facts if fact is not None]
        return f"{', '.join(known)} ({self.name})" if known else self.name

    @property
    def what(self) -> str:
        """Equal in files whose times may stand in one line of the history."""
        same = {
            key: self.configuration.get(key)
            for key in ("model", "plan", "dtype", "device", "prompt", "negative_prompt")
        }
        return json.dumps([self.machine["id"], self.machine.get("threads"), same], sort_keys=True)

    def ratios(self) -> Iterator[tuple[MeasuredSide, MeasuredSide, Mapping[str, Any]]]:
        """(A, B, ratio of their totals) for every "A / B" of two sides with figures."""
        recorded: Mapping[str, Any] = self.data.get("ratios", {})
        for side in self.measured:
            for other in self.measured:
                found = recorded.get(f"{side.name} / {other.name}", {}).get("total", {})
                if "median" in found:
                    yield side, other, found

    def withheld(self) -> Iterator[tuple[str, str]]:
        """(where, reason) of all that is missing from the file, and why."""
        if self.partial:
            yield "partial", "the run ended before its last part"
        if "error" in self.data:
            error = self.data["error"]
            yield "ended early", f"{error.get('type', 'error')}: {error.get('message', '')}"
        for side in self.sides:
            if side.withheld is not None:
                yield side.name, side.withheld
        for name in ("limit", "parts", "options", "another_seed", "latency", "check"):
            yield from _reasons(self.data.get(name), (name,))


def _reasons(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        return
    if "withheld" in value:
        yield " / ".join(path), plain(value["withheld"]).removesuffix(": ")
    if isinstance(value.get("error"), dict):
        yield " / ".join(path), plain(value["error"].get("message"))
    for key, inner in value.items():
        if key != "error":
            yield from _reasons(inner, (*path, str(key)))


def newest_of_each(files: Sequence[ResultsFile]) -> list[ResultsFile]:
    """Of files that measured the same, the newest whole one; the others are for the history."""
    chosen: dict[object, ResultsFile] = {}
    for at, file in enumerate(files):
        settings = tuple(side.setting for side in file.sides)
        of_pictures = file.kind in ("run", "compare")
        same: object = (file.kind, file.what, settings) if of_pictures else at
        if same not in chosen or _worth(file) > _worth(chosen[same]):
            chosen[same] = file
    return [file for file in files if file in chosen.values()]


def _worth(file: ResultsFile) -> tuple[bool, str]:
    return not file.partial, file.when


def painted(files: Sequence[ResultsFile]) -> list[ResultsFile]:
    """Those that hold times of whole pictures."""
    return [file for file in files if file.kind in ("run", "compare") and file.measured]
