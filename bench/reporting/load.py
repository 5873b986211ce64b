"""Latency under load: percentiles, queue time, and all latencies in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from bench.arrivals import percentile_of_all
from bench.reporting.charts import Line, legend, lines
from bench.reporting.files import ResultsFile
from bench.reporting.markup import (
    Content,
    figure,
    figures,
    milliseconds,
    note,
    number,
    percent,
    section,
    table,
    tag,
)
from bench.servers import ANOTHER_MACHINE
from bench.timing import percentile

PERCENTS = (50, 80, 90, 95, 99)
LATE_SHARE = 0.01
"""Of the requests that may be sent late before the page warns."""


def load(files: Sequence[ResultsFile]) -> Markup:
    """All load files."""
    shown = [_figure(file) for file in files if file.kind == "load"]
    return section("Latency under load", [
        note(
            "Requests come at random moments (Poisson) whether or not the earlier ones are done. "
            "Latency counts from a request's planned moment; queue time is what it waited "
            "before its work began."
        ),
        shown,
    ]) if shown else Markup("")  # fmt: skip


def _figure(file: ResultsFile) -> Markup:
    data = file.data
    good = [row for row in data.get("requests", []) if row[3]]
    columns = {
        "latency": [row[2] for row in good if row[2] is not None],
        "queue": [row[1] for row in good if row[1] is not None],
        "service": [row[2] - row[1] for row in good if row[2] is not None and row[1] is not None],
    }
    offered = data.get("offered", {})
    return figure(
        f"{number(offered.get('rate_per_s'))} requests/s offered: {file.title}",
        tag("p", _sentence(file)),
        _warnings(file),
        table(
            ["", *(f"p{at}" for at in PERCENTS), "largest"],
            _percentiles(columns, len(data.get("requests", [])) - len(good)),
        ),
        _curve(columns),
    )


def _sentence(file: ResultsFile) -> str:
    data, offered = file.data, file.data.get("offered", {})
    if "requests" not in data:
        return "No figures: what is missing stands at the top of the page."
    failed = sum(data.get("errors", {}).values())
    return (
        f"{data.get('completed', 0)} completed and {failed} failed in "
        f"{number(offered.get('duration_s'))} s of arrivals; "
        f"throughput {number(data.get('throughput_per_s'))} a second."
    )


def _warnings(file: ResultsFile) -> Markup | None:
    late, errors = file.data.get("late", {}), file.data.get("errors", {})
    found: list[Content] = [
        tag("li", f"{count} requests failed: {message}") for message, count in errors.items()
    ]
    if file.configuration.get("server_machine") == ANOTHER_MACHINE:
        found.append(
            tag("li", "the server is on another machine than the one named here, which sent the "
                "requests: the network's time is in the figures")
        )  # fmt: skip
    if late.get("share", 0) > LATE_SHARE:
        found.append(
            tag("li", f"the generator sent {percent(late['share'])} of the requests late, "
                f"{milliseconds(late.get('worst_ms', 0))} at the worst")
        )  # fmt: skip
    return tag("div", tag("ul", found), class_="warning") if found else None


def _percentiles(columns: Mapping[str, Sequence[float]], unanswered: int) -> list[list[Content]]:
    rows: list[list[Content]] = []
    for name, values in columns.items():
        if values:
            slowest = unanswered if name == "latency" else 0
            found = (percentile_of_all(values, slowest, at) for at in (*PERCENTS, 100))
            rows.append([name, *("no answer" if ms is None else milliseconds(ms) for ms in found)])
    return rows


def _curve(columns: Mapping[str, Sequence[float]]) -> Markup | None:
    drawn = {name: sorted(columns[name]) for name in ("latency", "queue") if columns[name]}
    if not drawn:
        return None
    colours = {"latency": "series-1", "queue": "series-2"}
    curves = [
        Line(name, [(100 * (at + 1) / len(values), ms / 1000) for at, ms in enumerate(values)],
             colours[name], dashed=name == "queue")
        for name, values in drawn.items()
    ]  # fmt: skip
    chart = lines(
        curves,
        spoken="latencies and queue times in order; the table above has their percentiles",
        x_unit="% of the requests that took at most so long",
        y_unit="seconds",
        x_range=(0, 100),
        x_labels=[(at, str(at)) for at in (0, 25, 50, 75, 100)],
    )
    tenths = (
        [f"{at} %", *(milliseconds(percentile(values, at)) for values in drawn.values())]
        for at in range(0, 101, 10)
    )
    return tag(
        "div",
        legend({name: colours[name] for name in drawn}, ("queue",)),
        chart,
        figures(["of the requests", *drawn], tenths),
        class_="lines",
    )
