"""The ladder of optimisations: a program's sides from its baseline to its fullest setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bench.reporting.charts import (
    Bar,
    Segment,
    bars,
    legend,
)
from bench.reporting.files import MeasuredSide, ResultsFile, painted
from bench.reporting.markup import (
    NOTHING,
    figure,
    figures,
    join,
    milliseconds,
    note,
    plain,
    section,
    tag,
)
from bench.reporting.sides import ratio_text, side_name, spread_text
from bench.timing import ratio


def ladder(files: Sequence[ResultsFile]) -> Markup:
    """Each program's sides from its baseline to its fullest setting."""
    shown = [
        _ladder_figure(file, rungs) for file in painted(list(files)) for rungs in ladders(file)
    ]
    return section("The ladder of optimisations", [
        note(
            "Sides of one program in the file's order, the first being its baseline; under each, "
            "what changed in its settings since the rung above it. “Exact” changes rounding at "
            "the most, “approximate” may change the picture."
        ),
        shown,
    ]) if shown else Markup("")  # fmt: skip


def ladders(file: ResultsFile) -> list[list[MeasuredSide]]:
    """The sides of each program that has two or more."""
    programs: dict[str, list[MeasuredSide]] = {}
    for side in file.measured:
        programs.setdefault(side.program, []).append(side)
    return [rungs for rungs in programs.values() if len(rungs) > 1]


def rung_ratio(
    file: ResultsFile, rung: MeasuredSide, first: MeasuredSide
) -> Mapping[str, Any] | None:
    """The rung's time over the first one's: as the file has it, or else round by round."""
    for side, other, found in file.ratios():
        if side is rung and other is first:
            return found
    ours, theirs = (side.times["total"].get("all_ms", []) for side in (rung, first))
    fits = ours and len(ours) == len(theirs) and all(value > 0 for value in theirs)
    return ratio(ours, theirs) if fits else None


def switches(rung: MeasuredSide, above: MeasuredSide | None) -> list[str]:
    """What differs in the settings from the rung above."""
    now, before = rung.entry("settings"), above.entry("settings") if above else {}
    return [
        f"{key}: {plain(now.get(key))}"
        for key in dict.fromkeys([*before, *now])
        if now.get(key) != before.get(key)
    ]


def _ladder_figure(file: ResultsFile, rungs: Sequence[MeasuredSide]) -> Markup:
    rows, cells = [], []
    for at, rung in enumerate(rungs):
        total = rung.times["total"]
        found = rung_ratio(file, rung, rungs[0]) if at else None
        changed = "; ".join(switches(rung, rungs[at - 1] if at else None)) or "no setting differs"
        compared = ratio_text(found) if found else NOTHING if at else "1"
        of_first = tag("span", " ", compared, class_="ratio") if at else None
        value = tag("span", tag("strong", milliseconds(rung.total_ms)), of_first, class_="value")
        heading = join(side_name(rung), value, tag("span", changed, class_="note switch"))
        spoken = f"{rung.name}: {milliseconds(rung.total_ms)}, {compared} of {rungs[0].name}"
        colour = "stage-3" if not rung.approximate else "decode"
        rows.append(
            Bar(
                heading,
                spoken,
                [Segment(rung.name, rung.total_ms, "", colour)],
                (total["p20_ms"], total["p80_ms"]),
            )
        )
        mark = "approximate" if rung.approximate else "exact"
        cells.append([rung.name, mark, milliseconds(rung.total_ms), spread_text(total),
                      compared, tag("span", changed)])  # fmt: skip
    return figure(
        f"{rungs[0].program}: {file.title}",
        legend({"exact": "stage-3", "approximate": "decode"}),
        bars(rows, kind="thin"),
        figures(
            ["rung", "kind", "total", "p20 to p80", "of the first rung", "switched"],
            cells,
        ),
    )
