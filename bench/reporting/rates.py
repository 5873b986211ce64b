"""Share of the device's limit, and single network calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bench.reporting.charts import (
    bars,
    series_colour,
)
from bench.reporting.files import ResultsFile
from bench.reporting.markup import (
    NOTHING,
    Content,
    figure,
    figures,
    milliseconds,
    note,
    number,
    percent,
    section,
    tag,
)
from bench.reporting.sides import is_summary, plain_bar, spread_text


def shares(files: Sequence[ResultsFile]) -> Markup:
    """How much of the device's measured rate each stage reaches."""
    shown = [*filter(None, (_share_figure(file) for file in files))]
    return section("Share of the device's limit", [
        note(
            "Arithmetic of the real shapes (skipped calls left out) over the time, as a share of "
            "the rate of a large matrix product measured in the same run. The full width is 100 %."
        ),
        shown,
    ]) if shown else Markup("")  # fmt: skip


def _share_figure(file: ResultsFile) -> Markup:
    found = [(name, share) for name, share in _all_shares(file) if share]
    parts = list(dict.fromkeys(part for _, share in found for part in share))
    if not parts:
        return Markup("")
    colours = {name: series_colour(at) for at, (name, _) in enumerate(found)}
    groups: list[Content] = []
    largest = max([1.0, *(value for _, share in found for value in share.values())])
    for part in parts:
        rows = [
            plain_bar(
                part if len(found) == 1 else name, share[part], percent(share[part]), colours[name]
            )
            for name, share in found
            if part in share
        ]
        groups += [_title(part, found), bars(rows, largest, kind="compact")]
    limit = file.data.get("limit") or file.data.get("parts", {}).get("matmul", {}).get("limit", {})
    rate = limit.get("tflop_per_s") if isinstance(limit, dict) else None
    known = note(f"The limit: {number(rate)} TFLOP/s.") if isinstance(rate, int | float) else None
    rows_ = ([name, *(percent(share[part]) if part in share else NOTHING for part in parts)]
             for name, share in found)  # fmt: skip
    return figure(file.title, known, groups, figures(["side", *parts], rows_))


def _all_shares(file: ResultsFile) -> Iterator[tuple[str, dict[str, float]]]:
    """Shares by side; none of a file in which one is above 1: its limit was measured too low."""
    known = [share for side in file.measured for share in side.entry("share_of_limit").values()]
    if any(share is not None and share > 1 for share in known):
        return
    for side in file.measured:
        yield (
            side.name,
            {
                part: share
                for part, share in side.entry("share_of_limit").items()
                if share is not None
            },
        )
    found: dict[str, dict[str, float]] = {}
    for stage, variants in device_calls(file).items():
        for variant, entry in variants.items():
            if isinstance(entry.get("share_of_limit"), int | float):
                found.setdefault(variant, {})[stage] = entry["share_of_limit"]
    yield from found.items()


def network_calls(files: Sequence[ResultsFile]) -> Markup:
    """Single network calls by stage."""
    shown = [*filter(None, (_calls_figure(file) for file in files))]
    return section("Single network calls", [
        note("Median of one call of the network; the whisker runs from the 20th to the 80th "
             "percentile. With guidance one program calls the network once for both prompts, "
             "another once for each: see how many calls a picture has."),
        shown,
    ]) if shown else Markup("")  # fmt: skip


def _calls_figure(file: ResultsFile) -> Markup:
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for side in file.measured:
        for stage, entry in side.entry("network").items():
            if is_summary(entry):
                found.setdefault(stage, {})[side.name] = entry
    found |= device_calls(file)
    found = {stage: entries for stage, entries in found.items() if entries}
    if not found:
        return Markup("")
    skips = {side.name: side.entry("skips") for side in file.sides}
    names = list(dict.fromkeys(name for entries in found.values() for name in entries))
    colours = {name: series_colour(at) for at, name in enumerate(names)}
    groups: list[Content] = []
    cells: list[list[Content]] = []
    longest = max(entry["p80_ms"] for entries in found.values() for entry in entries.values())
    for stage, entries in found.items():
        rows = [
            plain_bar(stage if len(names) == 1 else name, entry["median_ms"],
                      milliseconds(entry["median_ms"]), colours[name],
                      (entry["p20_ms"], entry["p80_ms"]))
            for name, entry in entries.items()
        ]  # fmt: skip
        scale = longest if len(names) == 1 else None
        groups += [_title(stage, names), bars(rows, scale, kind="compact")]
        cells += [
            [f"{stage}, {name}", milliseconds(entry["median_ms"]), spread_text(entry),
             number(entry.get("calls_per_picture")), _skipped(skips.get(name, {}).get(stage))]
            for name, entry in entries.items()
        ]  # fmt: skip
    head = ["stage and side", "a call", "p20 to p80", "calls in a picture", "skipped of wanted"]
    scales = note("Each stage has a scale of its own.") if len(names) > 1 else None
    return figure(file.title, scales, groups, figures(head, cells))


def _title(part: str, sides: Sequence[object]) -> Markup | None:
    """A heading for the bars of a part, which one side alone does not need."""
    return tag("h4", part) if len(sides) > 1 else None


def _skipped(counts: Sequence[float] | None) -> str:
    return f"{counts[0]:g} of {counts[1]:g}" if counts else NOTHING


def device_calls(file: ResultsFile) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Stage -> variant -> its timed network call, of ``bench device``."""
    parts = file.data.get("parts", {}) if file.kind == "device" else {}
    return {
        stage: {
            variant: entry
            for variant, entry in variants.items()
            if isinstance(entry, dict) and is_summary(entry)
        }
        for stage, variants in parts.get("network", {}).items()
        if isinstance(variants, dict)
    }
