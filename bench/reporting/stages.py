"""Bars of the seconds that each stage takes, side under side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from bench.reporting.charts import (
    Bar,
    Segment,
    bars,
    legend,
    part_colours,
)
from bench.reporting.files import MeasuredSide, ResultsFile, painted
from bench.reporting.markup import (
    NOTHING,
    Content,
    figure,
    figures,
    join,
    milliseconds,
    note,
    number,
    plain,
    section,
    tag,
)
from bench.reporting.sides import ratio_spread, side_name, spread_text

SHARED, BEST, APPROXIMATE = "Same precision", "Each program's best", "Approximate"


def stages(files: Sequence[ResultsFile]) -> Markup:
    """Seconds of each part, side under side."""
    shown = [_stage_figure(file) for file in painted(list(files))]
    return section("Seconds by stage", [
        note(
            "Medians over the rounds; warm-up, loading and the PNG are left out. Bars of one chart "
            "have one scale. A ratio is the median of the quotients round by round, with their "
            "20th and 80th percentile. Medians of parts need not add "
            "up to the median total; “other” is what no part accounts for."
        ),
        shown,
    ]) if shown else Markup("")  # fmt: skip


def _stage_figure(file: ResultsFile) -> Markup:
    names = list(dict.fromkeys(part for side in file.measured for part in side.parts_ms))
    names.sort(key=lambda name: name == "other")
    colours = part_colours(names)
    groups: list[Content] = []
    scale = max(max(side.total_ms, sum(side.parts_ms.values())) for side in file.measured) / 1000
    for title, sides in _grouped(file.measured).items():
        rows = [_stage_bar(file, side, colours) for side in sides]
        groups += [tag("h4", title), bars(rows, scale)]
    return figure(
        file.title,
        legend({name: colours[name] for name in names}),
        groups,
        [tag("p", f"{side.name}: no figures, because {side.withheld}", class_="warning")
         for side in file.sides if side.withheld],
        [note(sentence) for sentence in included_sentences(file.measured)],
        figures(
            ["side", "total", "p20 to p80", "p95", "rounds", *names],
            (_stage_row(side, names) for side in file.measured),
        ),
    )  # fmt: skip


def included_sentences(sides: Sequence[MeasuredSide]) -> list[str]:
    """What is in some sides' totals that others leave out."""
    included = {side.name: side.entry("settings").get("total_includes") for side in sides}
    return [
        f"The total of {name} includes {' and '.join(map(plain, parts))}, which its program does "
        "not tell apart; for the ratios the other side's PNG is added to its total."
        for name, parts in included.items()
        if isinstance(parts, list)
    ]


def _grouped(sides: Sequence[MeasuredSide]) -> dict[str, list[MeasuredSide]]:
    """Sides that may be compared as they are, apart from each program's fastest setting."""
    groups: dict[str, list[MeasuredSide]] = {SHARED: [], BEST: [], APPROXIMATE: []}
    for side in sides:
        if side.data.get("best"):
            groups[BEST].append(side)
        else:
            like_the_first = side.approximate == sides[0].approximate
            groups[SHARED if like_the_first else APPROXIMATE].append(side)
    return {title: group for title, group in groups.items() if group}


def _stage_bar(file: ResultsFile, side: MeasuredSide, colours: Mapping[str, str]) -> Bar:
    segments = [
        Segment(name, ms / 1000, milliseconds(ms), colours[name])
        for name, ms in side.parts_ms.items()
    ]
    ratios = [tag("span", text, class_="switch") for text in ratio_sentences(file, side)]
    total = milliseconds(side.total_ms)
    value = tag("span", tag("strong", total), class_="value")
    spoken = ", ".join(f"{segment.name} {segment.text}" for segment in segments)
    heading = join(side_name(side), value, ratios)
    return Bar(heading, f"{side.name}: total {total}; {spoken}", segments)


def ratio_sentences(file: ResultsFile, side: MeasuredSide) -> list[str]:
    """What other programs take of this side's time, as the file has it.

    Sides of one program are compared by the ladder, unless there is nothing else.
    """
    alone = len({one.program for one in file.measured}) == 1
    return [
        f"{above.name} takes {found['median']:.2f} of this ({ratio_spread(found)})"
        for above, below, found in file.ratios()
        if below is side and (alone or above.program != side.program)
    ]


def _stage_row(side: MeasuredSide, names: Sequence[str]) -> list[Content]:
    total = side.times["total"]
    p95 = milliseconds(total["p95_ms"]) if "p95_ms" in total else NOTHING
    parts = side.parts_ms
    return [
        side.name, milliseconds(side.total_ms), spread_text(total), p95,
        number(total.get("runs")),
        *(milliseconds(parts[name]) if name in parts else NOTHING for name in names),
    ]  # fmt: skip
