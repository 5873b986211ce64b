"""``python -m bench export``: the figures of a results file in another tool's form.

``--github-action`` writes what benchmark-action/github-action-benchmark reads as
``customSmallerIsBetter``: a list of ``{name, unit, value, range, extra}``. That action takes two
figures of one name for comparable, so every name carries what was measured, by which machine and
with which settings, and at its end a key that differs wherever anything of that does, but for the
commit and versions of libraries.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.arguments import Parser
from bench.endings import OK, exit_code, require_writable
from bench.reporting.files import MeasuredSide, ResultsFile
from bench.reporting.markup import plain
from bench.results import ResultsFileError
from turbo.whole_file import write_whole

SWITCHES = ("compile", "compile_repeated_blocks", "capture", "kernels", "quantize", "easycache")
"""Settings that a name spells out where they are on; the key at its end has all of them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m bench export", description=__doc__)
    parser.add_argument("results", type=Path, help="results file of `run` or `compare`")
    parser.add_argument("--github-action", action="store_true", required=True,
                        help="as customSmallerIsBetter of github-action-benchmark")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: the terminal)")
    options = parser.parse_args(arguments)

    def work() -> int:
        require_writable(options.output)
        return _export(options.results, options.output)

    return exit_code(work)


def _export(results: Path, output: Path | None) -> int:
    file = ResultsFile.read(results, "run", "compare")
    entries = [*github_action(file)]
    if not entries:
        raise ResultsFileError(f"{file.path}: no side has figures; nothing was exported")
    for side in file.sides:
        if side.withheld is not None:
            print(f"left out: {side.name}: {side.withheld}", file=sys.stderr)
    written = json.dumps(entries, indent=1) + "\n"
    if output is None:
        print(written, end="")
    else:
        write_whole(output, written.encode())
    return OK


def github_action(file: ResultsFile) -> Iterator[dict[str, Any]]:
    """Entries of every side that has figures: its times, then its memory.

    Raises:
        ResultsFileError: The file is partial: its medians are of fewer rounds than they should be.
    """
    if file.partial:
        raise ResultsFileError(f"{file.path}: is of a run that ended early; measure again")
    for side in file.measured:
        yield from _times(file, side)
        yield from _memory(file, side)


def _times(file: ResultsFile, side: MeasuredSide) -> Iterator[dict[str, Any]]:
    for part, summary in side.times.items():
        if "median_ms" in summary:
            low, high = f"{summary['p20_ms']:.6g}", f"{summary['p80_ms']:.6g}"
            runs = f"runs: {summary['runs']}\n" if "runs" in summary else ""
            yield _entry(file, side, part, "ms", summary["median_ms"]) | {
                "range": f"p20 {low} .. p80 {high}",
                "extra": runs + _extra(file, side),
            }


def _memory(file: ResultsFile, side: MeasuredSide) -> Iterator[dict[str, Any]]:
    for name, gib in _peaks_gib(side.entry("memory")):
        yield _entry(file, side, name, "GiB", gib) | {"extra": _extra(file, side)}


def _peaks_gib(memory: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if memory.get("host_peak_gib") is not None:
        yield "host memory", memory["host_peak_gib"]
    for stage, entry in (memory.get("device") or {}).items():
        for kind in ("allocated", "reserved"):
            gib = (entry or {}).get(f"{kind}_gib")
            if gib is not None:
                yield f"{stage}, device memory {kind}", gib


def _entry(
    file: ResultsFile, side: MeasuredSide, name: str, unit: str, value: float
) -> dict[str, Any]:
    return {"name": f"{side.name} / {name} [{identity(file, side)}]", "unit": unit, "value": value}


def identity(file: ResultsFile, side: MeasuredSide) -> str:
    """What two figures share only if they may be compared, for a reader and then as a key."""
    key = hashlib.sha256(f"{file.what}\n{side.setting}".encode()).hexdigest()[:8]
    threads = f"{file.machine.get('threads')} threads"
    known = [*_configured(file.configuration), threads, *_switched_on(side.entry("settings"))]
    return ", ".join([*known, f"machine {file.machine['id']}", f"key {key}"])


def _configured(configuration: Mapping[str, Any]) -> Iterator[str]:
    """Model, dtype, device and last size, where the file has them."""
    model = configuration.get("model")
    named = model.get("name") if isinstance(model, dict) else model
    yield from (plain(v) for v in (named, configuration.get("dtype"), configuration.get("device")))
    plan = configuration.get("plan")
    generation = plan.get("generation") if isinstance(plan, dict) else None
    stages = generation.values() if isinstance(generation, dict) else ()
    sizes = [(one.get("width"), one.get("height")) for one in stages if isinstance(one, dict)]
    yield from (f"{width}x{height}" for width, height in sizes[-1:])


def _switched_on(settings: Mapping[str, Any]) -> Iterator[str]:
    for switch in SWITCHES:
        value = settings.get(switch)
        if value not in (None, False, [], "", "eager"):
            yield switch if value is True else f"{switch} {plain(value)}"


def _extra(file: ResultsFile, side: MeasuredSide) -> str:
    """What a reader of the action's chart sees beside a point."""
    machine = file.machine
    kind = "approximate" if side.approximate else "exact"
    facts = [
        f"commit: {machine.get('commit') or 'not known'}",
        f"machine: {machine.get('processor') or 'not known'}, {machine.get('threads')} threads",
        f"GPU: {machine['gpu'].get('name')}" if "gpu" in machine else None,
        f"configuration: {file.title.rpartition(' (')[0] or 'not known'}, {kind}",
    ]
    return "\n".join(fact for fact in facts if fact)
