"""Charts as inline SVG that fits any width: shares of the width instead of a drawing that shrinks.

Text stays at its size on a narrow screen, because it is placed in per cent or stands in HTML beside
the drawing. Colours are names of the style sheet, so that light and dark each have their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bench.reporting.markup import Content, join, number, tag

SERIES, STAGES = 6, 5
"""Colours that the style sheet has for lines and for stages; more begin again."""
NAMED = ("prompt", "decode", "upscale", "other")
LETTER_PX, NARROW_PX, WIDE_PX = 7.0, 300, 900
"""To leave out labels that do not fit: a letter's width and that of a bar, phone and desk."""
MOST_POINTS = 400
"""Of a line; more would be finer than the picture."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a bar."""

    name: str
    value: float
    text: str
    colour: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a bar chart."""

    heading: Content
    """Above the bar."""
    spoken: str
    """The bar in words."""
    segments: Sequence[Segment]
    spread: tuple[float, float] | None = None
    """Where the whisker begins and ends."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a line chart; None in a point's place breaks it."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: str
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """A stretch of the x axis with a name."""

    name: str
    begin: float
    end: float
    colour: str


def series_colour(index: int) -> str:
    """The colour of a line or of a side."""
    return f"series-{index % SERIES + 1}"


def part_colours(parts: Sequence[str]) -> dict[str, str]:
    """Part -> colour: what is no named part is a stage, in order."""
    stages = [part for part in parts if part not in NAMED]
    colours = {part: part for part in NAMED}
    return colours | {stage: f"stage-{at % STAGES + 1}" for at, stage in enumerate(stages)}


def legend(colours: Mapping[str, str], dashed: Sequence[str] = ()) -> Markup:
    """Names with their colours."""

    def sample(name: str) -> Markup:
        kind = "swatch dashed" if name in dashed else "swatch"
        return tag("span", "", class_=kind, style=f"--own: var(--{colours[name]})")

    entries = [tag("li", sample(name), " ", name) for name in colours]
    return tag("ul", entries, class_="legend")


def bars(rows: Sequence[Bar], largest: float | None = None, *, kind: str | None = None) -> Markup:
    """Horizontal bars on one scale that begins at 0.

    Args:
        rows: From top to bottom.
        largest: What the whole width stands for; None takes the longest bar.
        kind: `thin` bars have no room for text; `compact` ones stand beside their names.
    """
    ends = [_end(row) for row in rows]
    scale = largest or max(ends, default=0) or 1.0
    return tag("div", [_bar(row, scale) for row in rows], class_=kind)


def _end(row: Bar) -> float:
    return max(sum(segment.value for segment in row.segments), *(row.spread or (0.0,)))


def _bar(row: Bar, scale: float) -> Markup:
    pieces: list[Markup] = []
    at = 0.0
    for segment in row.segments:
        pieces += _segment(segment, at / scale, segment.value / scale)
        at += segment.value
    if row.spread:
        pieces.append(_whisker(row.spread[0] / scale, row.spread[1] / scale))
    drawing = tag("svg", pieces, class_="bar", role="img", aria_label=row.spoken)
    return tag("div", tag("div", row.heading, class_="heading"), drawing, class_="row")


def _segment(segment: Segment, at: float, share: float) -> list[Markup]:
    title = tag("title", f"{segment.name}: {segment.text}")
    shape = tag(
        "rect", title, x=_place(at), width=_place(share), height="100%",
        style=f"fill: var(--{segment.colour})",
    )  # fmt: skip
    needed = len(segment.text) * LETTER_PX + 8
    if not segment.text or share * WIDE_PX < needed:
        return [shape]
    label = tag(
        "text", segment.text, x=_place(at + share / 2), y="50%", dy="0.36em", text_anchor="middle",
        class_=None if share * NARROW_PX >= needed else "wide-only",
        style=f"fill: var(--on-{segment.colour})",
    )  # fmt: skip
    return [shape, label]


def _whisker(low: float, high: float) -> Markup:
    def stroke(x1: float, x2: float, y1: float, y2: float) -> Markup:
        return tag("line", x1=_place(x1), x2=_place(x2), y1=_place(y1), y2=_place(y2))

    ends = [stroke(place, place, 0.25, 0.75) for place in (low, high)]
    return tag("g", stroke(low, high, 0.5, 0.5), ends, class_="whisker")


def _place(share: float) -> str:
    return f"{100 * share:.3f}%"


def lines(
    drawn: Sequence[Line],
    *,
    spoken: str,
    x_unit: str,
    y_unit: str,
    x_range: tuple[float, float] | None = None,
    y_top: float | None = None,
    x_labels: Sequence[tuple[float, str]] | None = None,
    bands: Sequence[Band] = (),
) -> Markup:
    """Lines over a common x axis; y begins at 0."""
    xs = [x for line in drawn for x, _ in line.points]
    low, high = x_range or (min(xs, default=0.0), max(xs, default=1.0))
    width = high - low or 1.0
    ys = [y for line in drawn for _, y in line.points if y is not None]
    y_ticks = ticks(y_top or max(ys, default=1.0))
    top = y_ticks[-1]
    grid = [_stroke(f"M0 {_down(y, top)}H100", "grid") for y in y_ticks]
    areas = [_band(band, low, width) for band in bands]
    curves = [_curve(line, low, width, top) for line in drawn]
    drawing = tag(
        "svg", areas, grid, curves, viewBox="0 0 100 100", preserveAspectRatio="none",
        role="img", aria_label=spoken,
    )  # fmt: skip
    x_texts = x_labels or [(x, number(x)) for x in ticks(high, low) if x <= high]
    return tag(
        "div",
        tag("div", tag("span", y_unit), class_="y-unit"),
        tag("div", [_y_label(y, top) for y in y_ticks], class_="y-axis", aria_hidden="true"),
        tag("div", drawing, class_="area"),
        tag("div", [_x_label((x - low) / width, text) for x, text in x_texts], class_="x-axis"),
        tag("div", x_unit, class_="x-unit"),
        class_="plot",
    )


def _down(y: float, top: float) -> str:
    return f"{100 - 100 * y / top:.2f}"


def _stroke(path: str, kind: str, colour: str | None = None) -> Markup:
    style = f"stroke: var(--{colour})" if colour else None
    return tag("path", d=path, class_=kind, style=style, vector_effect="non-scaling-stroke")


def _band(band: Band, low: float, width: float) -> Markup:
    begin, end = (100 * (x - low) / width for x in (band.begin, band.end))
    shape = {"x": f"{begin:.2f}", "width": f"{max(0.0, end - begin):.2f}"}
    style = f"fill: var(--{band.colour})"
    title = tag("title", band.name)
    return join(
        tag("rect", title, y=0, height=100, class_="band", style=style, **shape),
        tag("rect", title, y=96, height=4, style=style, **shape),
    )


def _curve(line: Line, low: float, width: float, top: float) -> Markup:
    path, moved = "", True
    places: list[str] = []
    for x, y in thinned(line.points):
        if y is None:
            moved = True
            continue
        place = f"{100 * (x - low) / width:.2f} {_down(y, top)}"
        path += f"{'M' if moved else 'L'}{place}"
        moved = False
        places.append(place)
    # A line of no length with round ends is a dot that no stretching makes an ellipse.
    dots = "".join(f"M{place}h0" for place in places) if line.dots or len(places) == 1 else ""
    kind = "line dashed" if line.dashed else "line"
    shapes = [_stroke(path, kind, line.colour), _stroke(dots, "dot", line.colour) if dots else None]
    return tag("g", tag("title", line.name), shapes)


def thinned(
    points: Sequence[tuple[float, float | None]], most: int = MOST_POINTS
) -> list[tuple[float, float | None]]:
    """Fewer points, of each group the highest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return [max(group, key=lambda point: -math.inf if point[1] is None else point[1])
            for group in groups]  # fmt: skip


def _y_label(y: float, top: float) -> Markup:
    return tag("span", number(y, 4), style=f"top: {100 - 100 * y / top:.1f}%")


def _x_label(share: float, text: str) -> Markup:
    kind = "first" if share < 0.08 else "last" if share > 0.92 else None
    place = 0 if share < 0.08 else 100 if share > 0.92 else 100 * share
    return tag("span", text, style=f"left: {place:.1f}%", class_=kind)


def ticks(high: float, low: float = 0.0) -> list[float]:
    """Round values from `low` to `high`; from 0, up to the first one not below `high`."""
    span = high - low
    if not span > 0:
        return [low, low + 1]
    rough = span / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * size for size in (1, 2, 2.5, 5, 10) if power * size >= rough * 0.999)
    if low == 0:
        return [step * at for at in range(math.ceil(high / step * 0.9999) + 1)]
    first = math.ceil(low / step)
    return [step * at for at in range(first, math.floor(high / step) + 1)]
