"""The page: one HTML file that asks for nothing else and runs no script."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bench.reporting.files import VERSIONS, MeasuredSide, ResultsFile, newest_of_each, painted
from bench.reporting.gallery import gallery
from bench.reporting.history import history
from bench.reporting.ladder import ladder
from bench.reporting.load import load
from bench.reporting.markup import (
    NOTHING,
    Content,
    anchor,
    definitions,
    fact,
    figure,
    join,
    milliseconds,
    note,
    number,
    plain,
    section,
    table,
    tag,
)
from bench.reporting.memory import memory
from bench.reporting.quality import quality
from bench.reporting.rates import network_calls, shares
from bench.reporting.sides import is_summary, ratio_spread
from bench.reporting.stages import stages
from bench.reporting.starts import starts

TITLE = "Benchmark report"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Even if a piece of a results file came through unescaped, it could load and run nothing."""
SECTIONS = (
    stages, shares, ladder, network_calls, starts, memory, load, quality, history, gallery,
)  # fmt: skip
MACHINE_FACTS = {
    "processor": "Processor",
    "cores": "Cores",
    "vector_instructions": "Vector instructions",
    "memory_gib": "Memory, GiB",
}
GPU_FACTS = {"name": "GPU", "memory_gib": "GPU memory, GiB", "cuda": "CUDA", "cudnn": "cuDNN"}
SMI_FACTS = {
    "driver_version": "Driver",
    "power.limit": "Power limit",
    "power.default_limit": "Default power limit",
    "clocks.max.sm": "Highest clock",
    "clocks.max.mem": "Highest memory clock",
    "mig.mode.current": "MIG",
}
SETTINGS = ("dtype", "device", "rounds", "warm_up_rounds", "order", "seed")


def make_page(files: Sequence[ResultsFile]) -> str:
    """The whole page."""
    newest = newest_of_each(files)
    older = [file.name for file in files if file not in newest]
    shown = [*(make(files if make is history else newest) for make in SECTIONS), raw(files)]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", TITLE),
        tag("style", Markup(style_sheet())),
    )
    main = tag("main", machines(files), left_out(older), shown)
    body = tag("body", header(files), contents(shown), main)
    return Markup("<!doctype html>\n") + tag("html", head, body, lang="en") + "\n"


def left_out(older: Sequence[str]) -> Markup | None:
    """Which files have no charts of their own."""
    if not older:
        return None
    return note(
        f"Not drawn one by one, because there is a newer file of the same machine, configuration "
        f"and sides: {', '.join(older)}. They are in the history and among the raw figures."
    )


def style_sheet() -> str:
    """The page's own."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def contents(sections: Sequence[Markup]) -> Markup:
    """Links to the sections that are there."""
    titles = [part.partition("<h2>")[2].partition("</h2>")[0] for part in sections if part]
    entries = [
        tag("li", tag("a", Markup(title), href=f"#{anchor(Markup(title).unescape())}"))
        for title in titles
    ]
    return tag("nav", tag("ul", entries), aria_label="contents")


def header(files: Sequence[ResultsFile]) -> Markup:
    """The title, the newest comparison in a sentence, and what is missing."""
    reasons = [
        tag("li", f"{file.name}, {where}: {reason}")
        for file in files
        for where, reason in file.withheld()
    ]
    warning = tag("p", tag("strong", "Not everything was measured.")), tag("ul", reasons)
    return tag(
        "header",
        tag("h1", TITLE),
        headline(files),
        tag("div", warning, class_="warning") if reasons else None,
    )


def headline(files: Sequence[ResultsFile]) -> Markup | None:
    """The newest comparison's fastest exact side beside another program in like setting."""
    compared = [
        (file, side, other, found)
        for file in painted(files)
        for side, other, found in file.ratios()
        if not file.partial
        and side.program != other.program
        and side.approximate == other.approximate
        and side.data.get("best") == other.data.get("best")
    ]
    if not compared:
        return None
    newest = max(file.when for file, *_ in compared)
    _, side, other, found = min(
        (one for one in compared if one[0].when == newest), key=lambda one: one[1].total_ms
    )
    return tag(
        "p", side.name, " makes a picture in ", tag("strong", milliseconds(side.total_ms)), ", ",
        tag("strong", f"{found['median']:.2f}"), " of the time that ", other.name,
        f" takes (in the middle of the rounds {ratio_spread(found)}).",
        class_="lead",
    )  # fmt: skip


def machines(files: Sequence[ResultsFile]) -> Markup:
    """Each machine once, with its files."""
    groups: dict[str, list[ResultsFile]] = {}
    for file in files:
        groups.setdefault(file.machine["id"], []).append(file)
    return join(_machine(identity, group) for identity, group in groups.items())


def _machine(identity: str, group: Sequence[ResultsFile]) -> Markup:
    """What is the same in all of its files stands above the table."""
    rows = [_file_row(file) for file in group]
    shared = [
        at for at in range(KEPT_COLUMNS, len(FILE_HEAD)) if len({row[at] for row in rows}) == 1
    ]
    facts = [*_machine_facts(group[0].machine), *((FILE_HEAD[at], rows[0][at]) for at in shared)]
    own = [at for at in range(len(FILE_HEAD)) if at not in shared]
    return figure(
        f"Machine {identity}",
        definitions(facts),
        table([FILE_HEAD[at] for at in own], ([row[at] for at in own] for row in rows)),
    )


def _machine_facts(machine: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, name in MACHINE_FACTS.items():
        if key in machine:
            yield name, _rounded(machine[key])
    gpu = machine.get("gpu", {})
    for key, name in GPU_FACTS.items():
        if key in gpu:
            yield name, _rounded(gpu[key])
    for key, name in SMI_FACTS.items():
        if key in gpu.get("nvidia_smi", {}):
            yield name, fact(gpu["nvidia_smi"][key])


def _rounded(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else fact(value)


FILE_HEAD = ("File", "Kind", "Measured at", "Commit", "Threads", "Versions", "Configuration")
KEPT_COLUMNS = 4
"""Stand in the table even if they are the same in all files."""


def _file_row(file: ResultsFile) -> list[str]:
    machine = file.machine
    versions = ", ".join(f"{name} {machine[name]}" for name in VERSIONS if machine.get(name))
    kind = f"{file.kind}, partial" if file.partial else file.kind
    commit = fact(machine.get("commit"))
    if machine.get("dirty") and not commit.endswith("-dirty"):
        commit += "-dirty"
    return [
        file.name, kind, _minute(machine.get("time")), commit, fact(machine.get("threads")),
        versions, _configuration(file),
    ]  # fmt: skip


def _minute(when: str | None) -> str:
    """A time without its seconds."""
    found = re.match(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d\+00:00$", when or "")
    return f"{found[1]} {found[2]} UTC" if found else fact(when)


def _configuration(file: ResultsFile) -> str:
    found = file.configuration
    model = found.get("model")
    facts = []
    if isinstance(model, dict):
        facts.append(f"model {plain(model.get('name'))} ({plain(model.get('fingerprint'))[:12]})")
    facts += [f"{key.replace('_', ' ')} {plain(found[key])}" for key in SETTINGS if key in found]
    return ", ".join(facts) or NOTHING


def raw(files: Sequence[ResultsFile]) -> Markup:
    """The command of each file, and its figures as they are in it."""
    return section("Raw figures and commands", [_raw_file(file) for file in files])


def _raw_file(file: ResultsFile) -> Markup:
    command = shlex.join(["python", "-m", "bench", *map(str, file.data.get("command", []))])
    plan = file.configuration.get("plan")
    settings = ([side.name, *_settings(side)] for side in file.sides)
    return tag(
        "div",
        tag("h3", file.name),
        tag("pre", tag("code", command)),
        tag("details", tag("summary", "Plan"), tag("pre", _outline(plan))) if plan else None,
        table(["side", "settings", "check", "share of time for clocks"], settings),
        table(FIGURE_HEAD, _figures(file)),
        class_="figure",
    )


def _settings(side: MeasuredSide) -> list[Content]:
    overhead = side.data.get("overhead_share")
    clocks = NOTHING if overhead is None else f"{100 * overhead:.2g} %"
    return [*(plain(side.entry(name)) or NOTHING for name in ("settings", "check")), clocks]


def _outline(value: Any, depth: int = 0) -> str:
    if not isinstance(value, dict):
        return plain(value)
    lead = "  " * depth
    return "\n".join(
        f"{lead}{key}:\n{_outline(inner, depth + 1)}"
        if isinstance(inner, dict) and inner
        else f"{lead}{key}: {plain(inner)}"
        for key, inner in value.items()
    )


FIGURE_HEAD = ["figure", "median", "p20", "p80", "p95", "runs", "unit"]


def _figures(file: ResultsFile) -> Iterator[list[Content]]:
    """Every median of the file with its spread, wherever it is."""
    for path, entry in _entries(file.data, ()):
        name = " / ".join(path)
        if is_summary(entry):
            yield [name, *(_exact(entry.get(f"{key}_ms")) for key in _SPREAD), _runs(entry), "ms"]
        elif all(f"{key}_us" in entry for key in _SPREAD[:3]):
            yield [name, *(_exact(entry.get(f"{key}_us")) for key in _SPREAD), NOTHING, "µs"]
        elif all(key in entry for key in _SPREAD[:3]):
            unit = "dB" if path[-1] == "psnr_db" else ""
            pairs = plain(entry.get("pairs", NOTHING))
            yield [name, *(_exact(entry.get(key)) for key in _SPREAD), pairs, unit]


_SPREAD = ("median", "p20", "p80", "p95")


def _runs(entry: Mapping[str, Any]) -> str:
    return plain(entry.get("runs", NOTHING))


def _exact(value: object) -> str:
    return number(value, 6) if isinstance(value, int | float) else NOTHING


def _entries(
    value: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield (*path, str(name)), inner
            yield from _entries(inner, (*path, str(name)))
