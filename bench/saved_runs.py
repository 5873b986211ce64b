"""Runs of the benchmarks on disk, and whether a new median is slower than the saved one.

A run is a file ``STORAGE/<machine id>/NNNN_<commit>.json`` in pytest-benchmark's own format, so
that its tools read it too. Each benchmark in it carries a verdict. What a new median is held
against is the newest saved result of that benchmark on the same machine that was not itself found
slower: a slow run is kept, but never becomes what later ones are measured by.

A machine whose processors others share has slow and fast spells of some seconds, in which medians
were seen to move by 15 % and more. So a change, whichever way, is believed only where several
measurements that lie apart agree on it: see `counting`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo.messages import one_line, reason
from turbo.whole_file import write_whole

FIRST = "first"
"""Nothing was there to compare with."""
PASSED = "passed"
SLOWER = "slower"
VERDICTS = (FIRST, PASSED, SLOWER)

MEASUREMENTS = 3
"""Of a benchmark whose first did not give the saved median again, or that has none."""
BUSY_SHARE = 0.1
"""Of the processors, what others may use before a result says so."""

_NAME = re.compile(r"(\d{4,})_[^/]*\.json")


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a benchmark's new median is held against."""

    median_s: float
    file: str
    """Name of the run's file."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A new median beside the saved one."""

    median_s: float
    baseline: Baseline | None
    tolerance: float
    """Share of the saved median by which the new one may be above it."""
    others_share: float = 0.0
    """Of the machine's processors, what other programs used meanwhile."""
    medians_s: Sequence[float] = ()
    """Of all measurements in their order; `median_s` is the one that counts."""

    @property
    def verdict(self) -> str:
        if self.baseline is None:
            return FIRST
        limit = self.baseline.median_s * (1 + self.tolerance)
        return SLOWER if self.median_s > limit else PASSED

    @property
    def change(self) -> float | None:
        """Share by which the new median is above the saved one; below 0 if it is faster."""
        return None if self.baseline is None else self.median_s / self.baseline.median_s - 1

    def __str__(self) -> str:
        if self.baseline is None:
            return f"{shown(self.median_s)}, nothing saved to compare with{self._aside}"
        assert self.change is not None
        side = "slower" if self.change > 0 else "faster"
        allowed = f", allowed are {100 * self.tolerance:g}%" * (self.verdict == SLOWER)
        return (
            f"{shown(self.median_s)} is {abs(self.change):.1%} {side} than "
            f"{shown(self.baseline.median_s)} of {self.baseline.file}{allowed}{self._aside}"
        )

    @property
    def _aside(self) -> str:
        text = ""
        if len(self.medians_s) > 1:
            text += f"; measured: {', '.join(map(shown, self.medians_s))}"
        if self.others_share > BUSY_SHARE:
            text += f"; other programs used {self.others_share:.0%} of the processors meanwhile"
            text += ": measure again on an idle machine" * (self.verdict == SLOWER)
        return text


def counting(medians_s: Sequence[float], baseline: Baseline | None, tolerance: float) -> int | None:
    """Which of a benchmark's measurements counts, once there are enough of them.

    One is enough if it is within the tolerance of the saved median, above or below. Of
    `MEASUREMENTS` the nearest to it counts, so that only what all of them show is a change; where
    nothing is saved, the middle one.

    Returns:
        Its position, or None: measure again.
    """
    numbers = range(len(medians_s))
    if baseline is None:
        in_order = sorted(numbers, key=medians_s.__getitem__)
        return in_order[len(in_order) // 2] if len(medians_s) >= MEASUREMENTS else None
    apart = [abs(math.log(each / baseline.median_s)) for each in medians_s]
    nearest = min(numbers, key=apart.__getitem__)
    lowest, highest = baseline.median_s / (1 + tolerance), baseline.median_s * (1 + tolerance)
    is_near = lowest <= medians_s[nearest] <= highest
    return nearest if is_near or len(medians_s) >= MEASUREMENTS else None


def shown(seconds: float) -> str:
    """A time with four digits."""
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1000 * seconds:.4g} ms"


class SavedRuns:
    """What earlier runs left, read at once; what cannot serve is passed over and named.

    Args:
        storage: Folder with a folder for each machine id.
        machine: `describe_machine`'s facts about this one.
    """

    def __init__(self, storage: Path, machine: Mapping[str, Any]) -> None:
        self.baselines: dict[str, Baseline] = {}
        """Benchmark -> what it is compared with."""
        self.remarks: list[str] = []
        """A line for everything that was passed over."""
        self._machine = machine
        self._folder = Path(storage, machine["id"])
        self._note_other_machines(storage)
        for path in sorted(self._files(), key=_number_of):
            self._read(path)

    def save(self, text: str, commit: str) -> Path:
        """Keep a run under the next free number, whole or not at all.

        Args:
            text: JSON.
            commit: Goes into the name.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]", "", commit) or "no-commit"
        number = max(map(_number_of, self._files()), default=0)
        while True:
            number += 1
            path = self._folder / f"{number:04}_{name}.json"
            with contextlib.suppress(FileExistsError):  # another run's, saved meanwhile
                write_whole(path, text.encode(), overwrite=False)
                return path

    def _files(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]

    def _note_other_machines(self, storage: Path) -> None:
        if not storage.is_dir():
            return
        count = Counter(
            folder.name
            for folder in storage.iterdir()
            if folder.is_dir() and folder != self._folder
            for _ in folder.glob("*.json")
        )
        for name, runs in sorted(count.items()):
            self.remarks.append(f"{runs} saved runs of another machine ({one_line(name)}): ignored")

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            info = data["machine_info"]
            whose, threads = info["id"], info["threads"]
            found = {entry["fullname"]: _entry(entry) for entry in data["benchmarks"]}
        except OSError as error:
            self._pass_over(path, reason(error))
        except (ValueError, RecursionError):
            self._pass_over(path, "is no whole JSON file")
        except (KeyError, TypeError, AttributeError):
            self._pass_over(path, "is no run of these benchmarks")
        else:
            if whose != self._machine["id"]:
                self._pass_over(path, f"is of another machine ({one_line(whose)})")
            elif threads != self._machine["threads"]:
                here = self._machine["threads"]
                self._pass_over(path, f"was measured with {threads} threads, here are {here}")
            else:
                self._take(path, found)

    def _take(self, path: Path, found: Mapping[str, tuple[float, str]]) -> None:
        for name, (median_s, verdict) in found.items():
            if verdict != SLOWER:
                self.baselines[name] = Baseline(median_s, path.name)

    def _pass_over(self, path: Path, why: str) -> None:
        self.remarks.append(f"{path.parent.name}/{path.name} {why}: ignored")


def _entry(entry: Mapping[str, Any]) -> tuple[float, str]:
    """Median and verdict of a saved benchmark.

    Raises:
        TypeError: They are not that.
    """
    median_s, verdict = entry["stats"]["median"], entry["extra_info"]["verdict"]
    if type(median_s) not in (int, float) or not 0 < median_s < math.inf or verdict not in VERDICTS:
        raise TypeError
    return median_s, verdict


def _number_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])
