"""A results file as a side: rounds of an earlier run on the same machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.pictures import load_picture
from bench.results import ResultsFileError, read_results, require_same_machine
from bench.side import OutsideSide, Request, Round

SAME = ("fingerprint", "plan", "prompt", "negative_prompt", "seed", "dtype", "device")
CONDITIONS = ("threads", "torch")
"""Of the machine, that change times and are no part of its id."""


class RecordedSide(OutsideSide):
    """One side of a results file.

    Args:
        path: The results file, of `bench run` or `bench compare`.
        header: Of this run: machine and configuration must be those of the file.
        rounds: How many it must hold.
        requests: Prompt of a round -> its number.

    Raises:
        ResultsFileError: It cannot be used; says why.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Any], rounds: int, requests: Mapping[str, int]
    ) -> None:
        data = read_results(path, ("run", "compare"))
        require_same_machine(path, data, header["machine"])
        try:
            self._take(path, data, header, rounds)
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ResultsFileError(f"{path}: is damaged: {type(error).__name__} {error}") from error
        self._requests = requests
        self._picture(1)  # a file without its pictures is refused now, not after an hour

    def _take(
        self, path: Path, data: Mapping[str, Any], header: Mapping[str, Any], rounds: int
    ) -> None:
        _require_same(path, "configuration", SAME, data["configuration"], header["configuration"])
        _require_same(path, "machine", CONDITIONS, data["machine"], header["machine"])
        program, entry = _first_side(path, data)
        held = entry["times"]["total"]["runs"]
        if held < rounds:
            raise ResultsFileError(
                f"{path}: holds {held} rounds, wanted are {rounds}; use --rounds"
            )
        super().__init__(f"{program}, recorded", approximate=bool(entry.get("approximate")))
        self._path = path
        self._entry = entry
        self._machine = data["machine"]
        self._pictures = {kept["round"]: kept for kept in entry.get("pictures", [])}
        self._check = entry["check"]

    def settings(self) -> dict[str, Any]:
        """The settings it was measured with."""
        settings: dict[str, Any] = dict(self._entry.get("settings", {}))
        commit, when = self._machine.get("commit"), self._machine.get("time")
        return settings | {"recorded": {"commit": commit, "time": when, "file": self._path.name}}

    def start(self) -> dict[str, float]:
        """Nothing to start."""
        return {}

    def check(self) -> dict[str, Any]:
        """The check that the file records."""
        return {"recorded": self._check, "alternating": False}

    def paint(self, request: Request) -> Round:
        """The round of this request, as it was."""
        number = self._requests[request.prompt]
        if number == 0:
            return Round(seconds={"total": 0.0}, image=self._picture(0), recorded=True)
        seconds = {
            part: timed["all_ms"][number - 1] / 1000
            for part, timed in self._entry["times"].items()
            if len(timed.get("all_ms", ())) >= number
        }
        # No skips, so that its times are held against no limit but its own file's.
        return Round(seconds=seconds, image=self._picture(number), recorded=True)

    def close(self) -> None:
        """Nothing to give back."""

    def _picture(self, number: int) -> Any:
        if number not in self._pictures:
            raise ResultsFileError(f"{self._path}: has no picture of round {number}; measure again")
        return load_picture(self._path, self._pictures[number])


def _require_same(
    path: Path,
    what: str,
    names: Sequence[str],
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
) -> None:
    for name in names:
        there, here = (
            one["model"].get(name) if name == "fingerprint" else one.get(name)
            for one in (theirs, ours)
        )
        if there != here:
            raise ResultsFileError(
                f"{path}: was measured with another {name.replace('_', ' ')} in its {what}: "
                f"{_short(there)} there, {_short(here)} here; give the same"
            )


def _first_side(path: Path, data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The side that was compared with the others."""
    for name, entry in data.get("sides", {}).items():
        if isinstance(entry, dict) and entry.get("times", {}).get("total", {}).get("all_ms"):
            return name, entry
    raise ResultsFileError(f"{path}: holds no measured round; measure again")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
