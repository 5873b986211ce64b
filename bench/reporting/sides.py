"""What the sections on sides share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from bench.reporting.charts import (
    Bar,
    Segment,
)
from bench.reporting.files import MeasuredSide
from bench.reporting.markup import (
    badge,
    join,
    milliseconds,
    tag,
)


def side_name(side: MeasuredSide) -> Markup:
    """A side's name with its marks."""
    return tag(
        "span",
        tag("span", side.name, class_="side"),
        " ",
        badge("approximate", "approximate") if side.approximate else badge("exact"),
        " ",
        badge("its best", "best") if side.data.get("best") else None,
    )


def ratio_text(found: Mapping[str, Any]) -> str:
    """A ratio with its spread."""
    return f"{found['median']:.2f} ({ratio_spread(found)})"


def ratio_spread(found: Mapping[str, Any]) -> str:
    """Where the middle of a ratio's rounds lies."""
    return f"{found['p20']:.2f} to {found['p80']:.2f}"


def spread_text(summary: Mapping[str, Any]) -> str:
    """Where the middle of the runs lies."""
    return f"{milliseconds(summary['p20_ms'])} to {milliseconds(summary['p80_ms'])}"


def plain_bar(
    name: str, value: float, text: str, colour: str, spread: tuple[float, float] | None = None
) -> Bar:
    """A bar of one piece, its figure above it."""
    shown = tag("span", text, class_="value")
    heading = join(tag("span", name), shown)
    return Bar(heading, f"{name}: {text}", [Segment(name, value, "", colour)], spread)


def is_summary(entry: Mapping[str, Any]) -> bool:
    """Whether it holds a median with its spread."""
    keys = ("median_ms", "p20_ms", "p80_ms")
    return all(
        isinstance(entry.get(key), int | float) and not isinstance(entry.get(key), bool)
        for key in keys
    )
