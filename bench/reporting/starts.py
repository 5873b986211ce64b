"""Start: the seconds before the first picture."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from bench.reporting.charts import (
    Bar,
    Segment,
    bars,
    legend,
    series_colour,
)
from bench.reporting.files import ResultsFile
from bench.reporting.markup import (
    NOTHING,
    figure,
    figures,
    join,
    note,
    plain,
    seconds,
    section,
    tag,
)


def starts(files: Sequence[ResultsFile]) -> Markup:
    """From nothing to ready."""
    shown = [*filter(None, (_start_figure(file) for file in files))]
    return section("Start", [
        note("Seconds before the first timed picture, step by step; measured once."),
        shown,
    ]) if shown else Markup("")  # fmt: skip


def _start_figure(file: ResultsFile) -> Markup:
    found = {
        side.name: {step: s for step, s in side.entry("start").items() if s is not None}
        for side in file.measured
    }
    found |= _device_starts(file) | _cold_starts(file)
    found = {name: steps for name, steps in found.items() if steps}
    if not found:
        return Markup("")
    steps = list(dict.fromkeys(step for one in found.values() for step in one))
    colours = {step: series_colour(at) for at, step in enumerate(steps)}
    rows = [
        Bar(
            join(tag("span", name, class_="side"),
                 tag("span", seconds(sum(one.values())), class_="value")),
            f"{name}: " + ", ".join(f"{step} {seconds(s)}" for step, s in one.items()),
            [Segment(step, s, seconds(s), colours[step]) for step, s in one.items()],
        )
        for name, one in found.items()
    ]  # fmt: skip
    cells = ([name, *(seconds(one[step]) if step in one else NOTHING for step in steps)]
             for name, one in found.items())  # fmt: skip
    return figure(file.title, legend(colours), bars(rows), figures(["side", *steps], cells))


def _cold_starts(file: ResultsFile) -> dict[str, dict[str, float]]:
    """Whole processes, from their start to a picture on the disk."""
    found = file.data.get("cold_start", {})
    return {f"{name}, cold": steps for name, steps in found.items()}


def _device_starts(file: ResultsFile) -> dict[str, dict[str, float]]:
    """Steps of ``bench device``, whose file has the time since the beginning at each step."""
    parts = file.data.get("parts", {}) if file.kind == "device" else {}
    found = {}
    for name, entry in parts.get("start", {}).items():
        steps = entry.get("steps", []) if isinstance(entry, dict) else []
        taken, before = {}, 0.0
        for step in steps if isinstance(steps, list) else []:
            now = step.get("seconds") if isinstance(step, dict) else None
            if isinstance(now, int | float):
                taken[plain(step.get("step"))] = max(0.0, now - before)
                before = now
        found[f"{name} cache of compiled code"] = taken
    return found
