"""PNG charts for a README, drawn from results files only.

The ground is white in light and dark alike: GitHub shows a picture on either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.reporting.charts import part_colours
from bench.reporting.files import MeasuredSide, ResultsFile, newest_of_each, painted
from bench.reporting.ladder import ladders, rung_ratio, switches
from bench.reporting.markup import milliseconds
from bench.reporting.sides import ratio_text
from bench.reporting.stages import ratio_sentences

INK, MUTED, RULE = "#1b1f24", "#545d68", "#d3d9e0"
COLOURS = {
    "prompt": ("#a14d84", "#ffffff"),
    "stage-1": ("#5b9fd6", "#0a1a2a"),
    "stage-2": ("#2368a8", "#ffffff"),
    "stage-3": ("#0b3763", "#ffffff"),
    "stage-4": ("#4e7d76", "#ffffff"),
    "stage-5": ("#6b5f9e", "#ffffff"),
    "upscale": ("#007a59", "#ffffff"),
    "decode": ("#d58600", "#1c1200"),
    "other": ("#818a95", "#0d1013"),
}
"""Those of the page's light half, each with that of text on it."""
WIDTH_INCHES, DPI = 8.2, 200
ROW_INCHES, HEAD_INCHES = 0.6, 0.75
MOST_LETTERS = {"title": 46, "side": 28, "label": 52, "part": 14}
LETTER_SHARE = 0.014
"""Of the longest bar's width: what a letter of a label in a bar needs."""


def draw_charts(files: Sequence[ResultsFile], folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Write `stages.png` and `ladder.png`.

    Yields:
        Each path, with the reason if the files hold nothing for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    newest = painted(newest_of_each(files))
    stages = [(file, file.measured) for file in newest]
    rungs = [(file, sides) for file in newest for sides in ladders(file)]
    for name, panels, draw, missing in (
        ("stages.png", stages, _stages, "no run or compare file has figures"),
        ("ladder.png", rungs, _ladder, "no file has two sides of one program"),
    ):
        if panels:
            _write(folder / name, panels, draw)
        yield folder / name, None if panels else missing


def _write(
    path: Path, panels: Sequence[tuple[ResultsFile, Sequence[MeasuredSide]]], draw: Any
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [len(sides) for _, sides in panels]
    height = ROW_INCHES * sum(rows) + HEAD_INCHES * len(panels)
    style = {"font.size": 10, "font.family": "DejaVu Sans", "text.parse_math": False}
    with matplotlib.rc_context(style):
        drawing, axes = pyplot.subplots(
            len(panels),
            1,
            figsize=(WIDTH_INCHES, height),
            height_ratios=rows,
            squeeze=False,
            layout="constrained",
        )
        drawing.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
        for (file, sides), axis in zip(panels, axes[:, 0]):
            draw(axis, file, sides)
            _tidy(axis, sides)
            axis.set_title(_title(file), loc="left", fontsize=10, color=MUTED, pad=20)
        drawing.savefig(path, dpi=DPI, facecolor="white")
        pyplot.close(drawing)


def _short(text: str, most: int) -> str:
    """A text that leaves room for the bars, whatever a results file calls its sides."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _title(file: ResultsFile) -> str:
    gpu = file.machine.get("gpu", {}).get("name")
    facts = [file.title.rpartition(" (")[0], gpu or file.machine.get("processor")]
    shown = ", ".join(str(fact) for fact in facts if fact)
    return _short(shown, MOST_LETTERS["title"]) + ": seconds a picture, median"


def _tidy(axis: Any, sides: Sequence[MeasuredSide]) -> None:
    axis.set_yticks(range(len(sides)), [_marked(side) for side in sides], color=INK)
    axis.set_ylim(len(sides) - 0.5, -0.5)
    axis.set_xlim(0, axis.dataLim.x1)  # the layout makes room for the labels behind the bars
    axis.set_xticks([])
    axis.tick_params(length=0)
    for name, spine in axis.spines.items():
        spine.set_visible(name == "left")
        spine.set_color(RULE)


def _marked(side: MeasuredSide) -> str:
    kind = "approximate" if side.approximate else "exact"
    best = ", its best" if side.data.get("best") else ""
    return f"{_short(side.name, MOST_LETTERS['side'])}\n{kind}{best}"


def _stages(axis: Any, file: ResultsFile, sides: Sequence[MeasuredSide]) -> None:
    names = list(dict.fromkeys(part for side in sides for part in side.parts_ms))
    names.sort(key=lambda name: name == "other")
    colours = part_colours(names)
    longest = max(sum(side.parts_ms.values()) for side in sides)
    for at, side in enumerate(sides):
        begin = 0.0
        for name, ms in side.parts_ms.items():
            fill, ink = COLOURS[colours[name]]
            axis.barh(at, ms, left=begin, height=0.62, color=fill, edgecolor="white", linewidth=1)
            text = milliseconds(ms)
            if ms / longest > LETTER_SHARE * (len(text) + 1):
                axis.text(begin + ms / 2, at, text, color=ink, ha="center",
                          va="center", fontsize=8)  # fmt: skip
            begin += ms
        _label(axis, at, begin, [milliseconds(side.total_ms), *ratio_sentences(file, side)])
    swatches = [
        axis.barh(0, 0, color=COLOURS[colours[name]][0], label=_short(name, MOST_LETTERS["part"]))
        for name in names
    ]
    legend = axis.legend(
        handles=swatches, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names), fontsize=8,
        frameon=False, borderaxespad=0, handlelength=1, handleheight=1, columnspacing=1.2,
    )  # fmt: skip
    legend.set_in_layout(False)  # many parts must not push the bars aside


def _ladder(axis: Any, file: ResultsFile, sides: Sequence[MeasuredSide]) -> None:
    for at, side in enumerate(sides):
        total = side.times["total"]
        approximate = side.approximate
        fill, _ = COLOURS["decode" if approximate else "stage-3"]
        axis.barh(at, side.total_ms, height=0.5, color=fill, hatch="///" if approximate else None,
                  edgecolor="white", linewidth=0)  # fmt: skip
        low, high = side.total_ms - total["p20_ms"], total["p80_ms"] - side.total_ms
        axis.errorbar(side.total_ms, at, xerr=[[max(0, low)], [max(0, high)]], color=INK,
                      capsize=3, linewidth=1)  # fmt: skip
        found = rung_ratio(file, side, sides[0]) if at else None
        compared = f", {ratio_text(found)} of {sides[0].name}" if found else ""
        changed = "; ".join(switches(side, sides[at - 1])) if at else "baseline"
        end = max(side.total_ms, total["p80_ms"])
        _label(axis, at, end, [milliseconds(side.total_ms) + compared, changed])


def _label(axis: Any, at: int, end: float, lines: Sequence[str]) -> None:
    shown = "\n".join(_short(line, MOST_LETTERS["label"]) for line in lines)
    axis.annotate(shown, (end, at), xytext=(6, 0), textcoords="offset points",
                  va="center", fontsize=8, color=INK)  # fmt: skip
