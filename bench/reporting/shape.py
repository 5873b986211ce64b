"""What a results file must look like for the report to draw it: types, checked at the door."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.results import ResultsFileError


@dataclass(frozen=True, slots=True)
class Each:
    """An object whose keys are names that the file chooses."""

    inner: Any


@dataclass(frozen=True, slots=True)
class Maybe:
    """A value that may be null."""

    inner: Any


@dataclass(frozen=True, slots=True)
class Row:
    """A list with a value of its own kind at each place."""

    inner: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Whole:
    """An object that is of no use without all of its keys, unless its figures were withheld."""

    inner: dict[str, Any]
    more: dict[str, Any]
    """Keys that may be missing."""


ANY = object()
LEVEL = "a number, or infinity"
MEDIAN = {"median_ms": float, "p20_ms": float, "p80_ms": float}
DETAIL = {"p95_ms": float, "runs": int, "all_ms": [float]}
SUMMARY = Whole(MEDIAN, DETAIL)
RATIO = Whole({"median": float, "p20": float, "p80": float}, {"pairs": int})
SPREAD = Whole(dict.fromkeys(("median", "p20", "p80"), Maybe(LEVEL)), {})
PICTURE = {"round": int, "file": str, "sha256": str}
SIDE = {
    "settings": {},
    "approximate": bool,
    "best": bool,
    "start": Each(Maybe(float)),
    "check": {},
    "withheld": ANY,
    "times": Each(SUMMARY),
    "network": Each(Whole(MEDIAN, DETAIL | {"calls_per_picture": float})),
    "skips": Each(Row((float, float))),
    "tflop": Each(Maybe(float)),
    "share_of_limit": Each(Maybe(float)),
    "memory": {
        "host_peak_gib": Maybe(float),
        "device": Maybe(Each(Maybe({"allocated_gib": Maybe(float), "reserved_gib": Maybe(float)}))),
        "shared_with": [str],
        "timeline": [Row((float, Maybe(float), Maybe(float), Maybe(str)))],
    },
    "overhead_share": Maybe(float),
    "pictures": [PICTURE],
}
DISTANCE = {"round": int, "psnr_db": Maybe(LEVEL), "ssim": Maybe(float), "identical": bool}
STAGES = Each({"psnr_db": SPREAD, "ssim": SPREAD, "latent_l2": SPREAD})
OF_PROMPT = {"prompt": int, "file": str, "sha256": str, "stages": Each(DISTANCE)}
OPTION = {
    "approximate": bool,
    "settings": {},
    "time_ratio": RATIO,
    "stages": STAGES,
    "pictures": [OF_PROMPT],
    "judged": Each(float),
}
GENERAL = {
    "command": [ANY],
    "machine": {"id": str, "time": Maybe(str), "commit": Maybe(str), "gpu": {"nvidia_smi": {}}},
    "partial": bool,
    "error": {"type": str, "message": str},
    "configuration": {},
}
PAINTED = {
    "cold_start": Each(Each(float)),
    "limit": {"tflop_per_s": float, "median_ms": float},
    "sides": Each(SIDE),
    "ratios": Each(Each(RATIO)),
    "pictures": Each([DISTANCE]),
}
LOAD = {
    "offered": {"rate_per_s": float, "duration_s": float},
    "latency": Maybe(MEDIAN | DETAIL),
    "queue": Maybe(MEDIAN | DETAIL),
    "service": Maybe(MEDIAN | DETAIL),
    "throughput_per_s": float,
    "completed": int,
    "errors": Each(int),
    "late": {"share": float, "worst_ms": float},
    "requests": [Row((float, Maybe(float), Maybe(float), bool))],
}
QUALITY = {
    "exact": {"pictures": [OF_PROMPT], "judged": Each(float)},
    "options": Each(OPTION),
    "another_seed": {"stages": STAGES, "pictures": [OF_PROMPT], "judged": Each(float)},
}
SHAPES: dict[str, dict[str, Any]] = {
    "run": GENERAL | PAINTED,
    "compare": GENERAL | PAINTED,
    "load": GENERAL | LOAD,
    "quality": GENERAL | QUALITY,
    "device": GENERAL | {"parts": Each({})},
}
"""Kind -> keys that the report reads, each with its type. Any may be missing, others be there."""
NAMES = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}


def check_shape(name: str, data: Mapping[str, Any]) -> None:
    """Refuse a file with values of other types than `bench/schema.md` gives.

    Raises:
        ResultsFileError: Says which value, in one line.
    """
    _check(data, SHAPES[data["kind"]], [name])


def _check(value: Any, shape: Any, path: list[str]) -> None:
    if shape is ANY:
        return
    if isinstance(shape, Maybe):
        if value is not None:
            _check(value, shape.inner, path)
    elif isinstance(shape, Whole):
        _check(value, shape.inner | shape.more, path)
        missing = [key for key in shape.inner if key not in value and "withheld" not in value]
        _require(not missing, f"an object with {' and '.join(missing)}", value, path)
    elif isinstance(shape, Each | dict):
        _require(isinstance(value, dict), "an object", value, path)
        chosen = dict.fromkeys(value, shape.inner) if isinstance(shape, Each) else shape
        for key in chosen.keys() & value.keys():
            _check(value[key], chosen[key], [*path, key])
    elif isinstance(shape, list | Row):
        _require(isinstance(value, list), "a list", value, path)
        places = shape.inner if isinstance(shape, Row) else shape * len(value)
        _require(len(value) == len(places), f"a list of {len(places)} values", value, path)
        for place, (one, inner) in enumerate(zip(value, places)):
            _check(one, inner, [*path, str(place)])
    else:
        wanted = "a number" if shape is LEVEL else NAMES[shape]
        _require(_is(value, shape), wanted, value, path)


def _is(value: Any, kind: Any) -> bool:
    if kind in (str, bool):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return not math.isnan(value) if kind is LEVEL else math.isfinite(value)


def _require(holds: bool, wanted: str, value: Any, path: list[str]) -> None:
    if not holds:
        file, *keys = path
        where = " / ".join(keys) or "the file"
        raise ResultsFileError(
            f"{file}: {where} must be {wanted}, got {str(value)[:60]!r}; measure again"
        )
