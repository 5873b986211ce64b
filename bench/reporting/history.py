"""Totals over commits; a line never joins two machines or two configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bench.reporting.charts import Line, legend, lines, series_colour
from bench.reporting.files import MeasuredSide, ResultsFile, painted
from bench.reporting.markup import (
    Content,
    fact,
    figure,
    figures,
    milliseconds,
    note,
    plain,
    section,
    tag,
)
from bench.reporting.sides import spread_text

MOST_LABELS = 8


@dataclass(frozen=True, slots=True)
class Point:
    """A side's total in one file."""

    file: ResultsFile
    side: MeasuredSide

    @property
    def label(self) -> str:
        """The commit, shortened."""
        commit = fact(self.file.machine.get("commit"))
        return commit[:7] + ("*" if self.file.machine.get("dirty") else "")


def history(files: Sequence[ResultsFile]) -> Markup:
    """A chart for each machine and configuration of which there are two files or more."""
    groups: dict[str, list[ResultsFile]] = {}
    for file in painted(list(files)):
        if not file.partial:
            groups.setdefault(file.what, []).append(file)
    several = [
        sorted(group, key=lambda file: file.when) for group in groups.values() if len(group) > 1
    ]
    return section("History over commits", [
        note(
            "Median total of each side, the files of one machine and one configuration in the "
            "order of their times. Machines are never compared: each has a chart of its own. "
            "A commit with * had changes that were not committed."
        ),
        [_figure(group) for group in several],
    ]) if several else Markup("")  # fmt: skip


def _figure(group: Sequence[ResultsFile]) -> Markup:
    names = _line_names(group)
    colours = {name: series_colour(at) for at, name in enumerate(names.values())}
    totals = {name: [_point(file, setting) for file in group] for setting, name in names.items()}
    drawn = [
        Line(
            name,
            [(at, point.side.total_ms / 1000) for at, point in enumerate(points) if point],
            colours[name],
            dots=True,
        )
        for name, points in totals.items()
    ]
    step = -(-len(group) // MOST_LABELS)
    labels = [(at, Point(file, file.measured[0]).label) for at, file in enumerate(group)]
    machine = group[0].machine
    chart = lines(
        drawn,
        spoken=f"totals of {', '.join(totals)} over {len(group)} files",
        x_unit="commit",
        y_unit="seconds",
        x_range=(0, len(group) - 1),
        x_labels=labels[::step],
    )
    cells: list[list[Content]] = [
        [point.label, point.file.when, name, milliseconds(point.side.total_ms),
         spread_text(point.side.times["total"]), point.file.name]
        for name, points in totals.items()
        for point in points
        if point
    ]  # fmt: skip
    head = ["commit", "time", "side", "total", "p20 to p80", "file"]
    title = f"Machine {machine['id']}: {plain(machine.get('processor'))}"
    gpu = machine.get("gpu", {}).get("name")
    return figure(
        f"{title}, {plain(gpu)}" if gpu else title,
        tag("div", legend(colours), chart, class_="lines"),
        figures(head, cells),
    )


def _line_names(group: Sequence[ResultsFile]) -> dict[str, str]:
    """Setting -> name of its line; sides of one name in several settings are numbered."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for file in group:
        for side in file.measured:
            if side.setting not in names:
                counts[side.name] = counts.get(side.name, 0) + 1
                extra = f" (setting {counts[side.name]})" if counts[side.name] > 1 else ""
                names[side.setting] = side.name + extra
    return names


def _point(file: ResultsFile, setting: str) -> Point | None:
    return next((Point(file, side) for side in file.measured if side.setting == setting), None)
