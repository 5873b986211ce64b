"""HTML in which all text is escaped: results files are written by others.

Every piece is a `Markup`; what is no `Markup` is text and is escaped where it is put in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from markupsafe import Markup, escape

Content: TypeAlias = "str | Markup | Iterable[Content] | None"
TIMES = "\N{MULTIPLICATION SIGN}"
NOTHING = "\N{EN DASH}"
"""In the place of a figure that is not there."""
VOID = ("br", "img", "meta")


def join(*parts: Content) -> Markup:
    """Pieces one behind the other; None leaves nothing."""
    return Markup("").join(_flat(parts))


def _flat(parts: Iterable[Content]) -> Iterable[Markup]:
    for part in parts:
        if isinstance(part, str):
            yield escape(part)
        elif part is not None:
            yield from _flat(part)


def tag(name: str, /, *content: Content, **attributes: str | float | None) -> Markup:
    """An element; ``class_`` is `class`, ``view_box`` is ``view-box``, None leaves one out."""
    given = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None
    ]
    start = Markup("<{}{}>").format(Markup(name), Markup("").join(given))
    return start if name in VOID else start + join(*content) + Markup("</{}>").format(Markup(name))


def section(title: str, *content: Content) -> Markup:
    """A part of the page, with an anchor made of its title."""
    return tag("section", tag("h2", title), *content, id=anchor(title))


def anchor(title: str) -> str:
    """A title as an id."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def figure(title: Content, *content: Content) -> Markup:
    """A chart with its heading."""
    return tag("div", tag("h3", title), *content, class_="figure")


def note(*content: Content) -> Markup:
    """What a reader has to know of a chart."""
    return tag("p", *content, class_="note")


def badge(text: str, kind: str = "") -> Markup:
    """A small mark beside a name."""
    return tag("span", text, class_=f"badge {kind}".strip())


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]]) -> Markup:
    """A table in a box that scrolls by itself; the first column names its row."""
    kept = [list(row) for row in rows]
    if not kept:
        return Markup("")
    kinds = [_column_kind([row[at] for row in kept]) for at in range(len(head))]
    cells = [tag("th", cell, scope="col", class_=kind) for cell, kind in zip(head, kinds)]
    lines = [
        tag("tr", tag("th", row[0], scope="row"),
            [tag("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:])])
        for row in kept
    ]  # fmt: skip
    inner = tag("table", tag("thead", tag("tr", cells)), tag("tbody", lines))
    # Scrolling boxes are reached with the keyboard only if they can have the focus.
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label="table")


def _column_kind(cells: Sequence[Content]) -> str | None:
    """Numbers stand to the right; long texts may be broken."""
    texts = [str(cell) for cell in cells]
    if all(text in ("", NOTHING) or re.match(r"[-∞]?\d[^T]{0,40}$|∞", text) for text in texts):
        return "number"
    return "text" if max(map(len, texts)) > 32 else None


def figures(head: Sequence[Content], rows: Iterable[Sequence[Content]]) -> Markup:
    """The table of a chart, folded."""
    made = table(head, rows)
    summary = tag("summary", "Figures of this chart")
    return tag("details", summary, made) if made else made


def definitions(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Names with what they stand for."""
    return tag("dl", [
        tag("div", tag("dt", name), tag("dd", value), class_="long" if len(value) > 24 else None)
        for name, value in pairs
    ])  # fmt: skip


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    if value >= 100:
        return f"{value:.0f} s"
    if value >= 10:
        return f"{value:.1f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return milliseconds(value * 1000)


def milliseconds(value: float) -> str:
    """A time in the unit that suits it."""
    if abs(value) >= 1000:
        return seconds(value / 1000)
    if abs(value) < 1:
        return f"{value * 1000:.3g} µs"
    return f"{value:.0f} ms" if abs(value) >= 100 else f"{value:.3g} ms"


def percent(share: float) -> str:
    """A share."""
    return f"{share:.1%}".replace("%", " %")


def number(value: float | None, digits: int = 3) -> str:
    """A figure without a unit; what is not there is a dash."""
    return NOTHING if value is None else f"{value:.{digits}g}"


def fact(value: object) -> str:
    """A fact of the machine; what could not be read is said to be so."""
    return "not known" if value is None else plain(value)


def plain(value: object) -> str:
    """A setting or fact as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(plain(inner) for inner in value) or "none"
    return str(value)
