"""What approximate options change in the picture, beside what another seed changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bench.reporting.charts import Bar, Segment, bars
from bench.reporting.files import ResultsFile
from bench.reporting.markup import (
    NOTHING,
    TIMES,
    Content,
    figure,
    join,
    note,
    number,
    plain,
    section,
    table,
    tag,
)

MEASURES = {"psnr_db": "PSNR, dB", "ssim": "SSIM", "latent_l2": "latent, relative L2"}


def quality(files: Sequence[ResultsFile]) -> Markup:
    """All quality files."""
    shown = [
        figure(file.title, _chart(file), tag("h4", "By stage"), _table(file))
        for file in files
        if file.kind == "quality" and file.data.get("options")
    ]
    return section("Quality of approximate options", [
        note(
            "Each option's pictures against the exact run's at the same seed: median over the "
            "prompts, in brackets 20th to 80th percentile. Longer bars are nearer to the exact "
            "picture. “Another seed” is the distance of a wholly other picture. The time ratio is "
            "that to the exact run, round by round."
        ),
        shown,
    ]) if shown else Markup("")  # fmt: skip


def _options(file: ResultsFile) -> dict[str, Mapping[str, Any]]:
    return {
        name: option for name, option in file.data["options"].items() if "withheld" not in option
    }


def _last(option: Mapping[str, Any]) -> Mapping[str, Any]:
    stages = list(option.get("stages", {}).values())
    return stages[-1] if stages else {}


def _chart(file: ResultsFile) -> Markup:
    """SSIM of the last stage, which has a scale that ends at 1."""
    rows: list[Bar] = []
    for name, entry in {**_options(file), "another seed": _another_seed(file)}.items():
        spread = _last(entry).get("ssim")
        if not isinstance(spread, dict) or not usable(spread):
            continue
        quotient = entry.get("time_ratio", {})
        time = f"time {quotient['median']:.2f} {TIMES}, " if "median" in quotient else ""
        text = f"{time}SSIM {spread['median']:.3f}"
        heading = join(tag("span", name, class_="side"), tag("span", text, class_="value"))
        colour = "other" if name == "another seed" else "series-1"
        low, middle, high = (max(0.0, spread[key]) for key in ("p20", "median", "p80"))
        rows.append(
            Bar(heading, f"{name}: {text}", [Segment(name, middle, "", colour)], (low, high))
        )
    title = tag("h4", "SSIM of the last stage, 0 to 1")
    return join(title, bars(rows, 1.0, kind="thin")) if rows else Markup("")


def _another_seed(file: ResultsFile) -> Mapping[str, Any]:
    found: Mapping[str, Any] = file.data.get("another_seed", {})
    return found


def usable(spread: Mapping[str, Any]) -> bool:
    """Whether there are three finite values."""
    keys = ("median", "p20", "p80")
    return all(
        isinstance(spread.get(key), int | float) and math.isfinite(spread[key]) for key in keys
    )


def _table(file: ResultsFile) -> Markup:
    rows: list[list[Content]] = []
    entries = {**_options(file), "another seed": _another_seed(file)}
    exact = file.data.get("exact", {})
    is_judged = any("judged" in entry for entry in (exact, *entries.values()))
    if is_judged:
        rows.append(["exact", "", "", *[""] * len(MEASURES), _right(exact)])
    for name, option in entries.items():
        for at, (stage, measures) in enumerate(option.get("stages", {}).items()):
            quotient = option.get("time_ratio", {})
            has_time = at == 0 and "median" in quotient
            time = _spread(quotient, lambda value: f"{value:.2f} {TIMES}") if has_time else ""
            cells = (_spread(measures.get(key), number) for key in MEASURES)
            judged = [_right(option) if at == 0 else ""] if is_judged else []
            rows.append([name if at == 0 else "", stage, time, *cells, *judged])
    reasons = [
        tag("p", f"{name}: no figures, because {plain(option['withheld'])}", class_="warning")
        for name, option in file.data["options"].items()
        if "withheld" in option
    ]
    head = ["option", "stage", "time of the exact run", *MEASURES.values()]
    head += ["pictures that are wholly right"] * is_judged
    return join(table(head, rows), reasons)


def _right(entry: Mapping[str, Any]) -> str:
    """How many pictures show what was asked for, where that was judged."""
    share, pictures = entry.get("judged", {}).get("whole"), len(entry.get("pictures", ()))
    return NOTHING if share is None else f"{round(share * pictures)} of {pictures}"


def _spread(found: Any, shown: Callable[[float], str]) -> str:
    if not isinstance(found, dict) or "median" not in found:
        return NOTHING

    def text(value: float | None) -> str:
        # A PSNR of identical pictures is infinite, which JSON has no number for.
        return "∞" if value is None or math.isinf(value) else shown(value)

    return f"{text(found['median'])} ({text(found['p20'])} to {text(found['p80'])})"
