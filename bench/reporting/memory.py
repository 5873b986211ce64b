"""Memory over the time of a picture, and its peaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from bench.reporting.charts import (
    Band,
    Line,
    legend,
    lines,
    part_colours,
)
from bench.reporting.files import OUTSIDE_TOTAL, MeasuredSide, ResultsFile, painted
from bench.reporting.markup import (
    NOTHING,
    Content,
    figure,
    figures,
    join,
    note,
    number,
    section,
    table,
    tag,
)


def memory(files: Sequence[ResultsFile]) -> Markup:
    """Memory over the time of a picture."""
    shown = [*filter(None, (_memory_figure(file) for file in painted(list(files))))]
    return section("Memory", [
        note("Memory of the side's processes (host) and on the device over the time of a picture; "
             "the strip below tells the part. Device memory is drawn only where there is a GPU."),
        shown,
    ]) if shown else Markup("")  # fmt: skip


def _memory_figure(file: ResultsFile) -> Markup:
    drawn = [side for side in file.measured if side.entry("memory").get("timeline")]
    peaks = [*filter(None, (_peaks(side) for side in file.measured))]
    if not drawn and not peaks:
        return Markup("")
    return figure(
        file.title,
        _timelines(drawn) if drawn else None,
        tag("h4", "Peaks"),
        table(["side", "host", "device by stage: allocated (reserved)"], peaks),
    )


def _timelines(sides: Sequence[MeasuredSide]) -> Markup:
    """A chart a side, all on one scale."""
    points = {side.name: side.entry("memory")["timeline"] for side in sides}
    every = [point for line in points.values() for point in line]
    parts = list(dict.fromkeys(part for *_, part in every if part))
    colours = part_colours([part for part in parts if part not in OUTSIDE_TOTAL])
    end = max(when for when, *_ in every)
    top = max((value for _, *pair, _ in every for value in pair if value is not None), default=1.0)
    has_device = any(device is not None for _, _, device, _ in every)
    kinds = {"host": "series-1"} | ({"device": "series-2"} if has_device else {})
    plots = [tag("div", tag("h4", side.name), _plot(side, colours, end, top)) for side in sides]
    return join(
        tag("div", legend(kinds, ("device",)), class_="lines"),
        legend({part: colours.get(part, "other") for part in parts}),
        tag("div", plots, class_="plots"),
        figures(["side", "part", "highest host, GiB", "highest device, GiB"],
                (row for side in sides for row in _by_part(side))),
    )  # fmt: skip


def _plot(side: MeasuredSide, colours: Mapping[str, str], end: float, top: float) -> Markup:
    points = side.entry("memory")["timeline"]
    drawn = [Line("host", [(when, host) for when, host, _, _ in points], "series-1")]
    on_device = [(when, device) for when, _, device, _ in points]
    if any(value is not None for _, value in on_device):
        drawn.append(Line("device", on_device, "series-2", dashed=True))
    peak = number(side.entry("memory").get("host_peak_gib"))
    return lines(
        drawn,
        spoken=f"{side.name}: memory over time, host peak {peak} GiB",
        x_unit="seconds",
        y_unit="GiB",
        x_range=(0.0, end),
        y_top=top,
        bands=_stretches(points, colours),
    )


def _stretches(points: Sequence[Sequence[Any]], colours: Mapping[str, str]) -> list[Band]:
    """Where each part begins and ends."""
    found: list[Band] = []
    for at, (when, _, _, part) in enumerate(points):
        end = points[at + 1][0] if at + 1 < len(points) else when
        if not part:
            continue
        if found and found[-1].name == part and found[-1].end == when:
            found[-1] = replace(found[-1], end=end)
        else:
            found.append(Band(part, when, end, colours.get(part, "other")))
    return found


def _by_part(side: MeasuredSide) -> Iterator[list[Content]]:
    highest: dict[str, list[float | None]] = {}
    for _, host, device, part in side.entry("memory")["timeline"]:
        so_far = highest.setdefault(part or NOTHING, [None, None])
        for at, value in enumerate((host, device)):
            if value is not None:
                so_far[at] = max(value, so_far[at] if so_far[at] is not None else value)
    for part, values in highest.items():
        yield [side.name, part, *map(number, values)]


def _peaks(side: MeasuredSide) -> list[Content] | None:
    found = side.entry("memory")
    device = {stage: entry for stage, entry in (found.get("device") or {}).items() if entry}
    if found.get("host_peak_gib") is None and not device:
        return None
    on_device = ", ".join(
        f"{stage} {number(entry.get('allocated_gib'))} ({number(entry.get('reserved_gib'))}) GiB"
        for stage, entry in device.items()
    )
    shared = found.get("shared_with") or []
    name = f"{side.name} (one process with {', '.join(map(str, shared))})" if shared else side.name
    return [name, f"{number(found.get('host_peak_gib'))} GiB", on_device or NOTHING]
