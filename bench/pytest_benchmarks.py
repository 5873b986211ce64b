"""A pytest plugin: ``pytest --benchmark`` runs ``tests/benchmarks`` and nothing else.

Over pytest-benchmark, which measures: every benchmark's median is held against the newest saved one
of the same machine (see `bench.saved_runs`), and the benchmark fails if it is slower by more than
``--benchmark-tolerance``. One that is not within the tolerance is measured again when all others
have been, three times at most, and each must show the change. Every run is saved; one in which a
benchmark was slower is marked, and later runs are not compared with it. A slowdown that is wanted
becomes what is compared with once a run with a larger tolerance has passed. Without the flag no
benchmark is collected.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from bench.processor_time import ProcessorTime
from bench.saved_runs import MEASUREMENTS, SLOWER, Judgement, SavedRuns, counting

FOLDER = Path("tests", "benchmarks")
"""Where they lie, below pytest's root folder."""
DEFAULT_TOLERANCE = 10.0
APART_S = 5.0
"""Between two measurements of a benchmark: about as long as slow spells were seen to last."""
_STORAGE = "file://./.benchmarks"
_AGAIN = "remeasured"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two flags beside pytest-benchmark's own."""
    group = parser.getgroup("benchmark")
    group.addoption(
        "--benchmark",
        action="store_true",
        dest="run_benchmarks",
        help=f"Run {FOLDER} alone, save the run and compare it with the last of this machine.",
    )
    group.addoption(
        "--benchmark-tolerance",
        metavar="PERCENT",
        type=_percent,
        default=None,
        help="By how much a median may be above the saved one before --benchmark fails "
        f"(default: {DEFAULT_TOLERANCE:g}).",
    )


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a percentage of at least 0, got {text!r}")
    return value


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options when its turn comes
def pytest_configure(config: pytest.Config) -> None:
    """Turn the flag into pytest-benchmark's options and into what is collected."""
    option = config.option
    if not option.run_benchmarks:
        if option.benchmark_tolerance is not None:
            raise pytest.UsageError("--benchmark-tolerance needs --benchmark")
        return
    if not hasattr(option, "benchmark_disable"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install pytest-benchmark")
    if option.benchmark_skip:
        raise pytest.UsageError("--benchmark runs what --benchmark-skip leaves out; give one")
    folder = config.rootpath / FOLDER
    if not folder.is_dir():
        raise pytest.UsageError(f"--benchmark: there is no folder {folder}")
    if config.args_source is not config.ArgsSource.ARGS:
        config.args[:] = [str(folder)]
    option.benchmark_disable = False  # which the settings of the other tests ask for
    option.benchmark_columns = option.benchmark_columns or ["median", "iqr", "min", "max", "rounds"]
    option.verbose += 2  # those settings are quiet too; here each benchmark is named as it runs
    # A check that fails before anything is timed is one failure, not one and a warning about it.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")
    config.pluginmanager.register(Benchmarks(config), "turbo-benchmarks")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without the flag nothing below the folder is imported, unless it is asked for by name."""
    is_left_out = not config.option.run_benchmarks and collection_path == config.rootpath / FOLDER
    return True if is_left_out else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With the flag only benchmarks run, without it none does."""
    folder = config.rootpath / FOLDER
    benchmarks = [item for item in items if folder in item.path.parents]
    if not config.option.run_benchmarks:
        for item in benchmarks:
            item.add_marker(pytest.mark.skip(reason="a benchmark: give --benchmark to run it"))
        return
    others = [item for item in items if folder not in item.path.parents]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = benchmarks


@dataclass(frozen=True, slots=True)
class _Measurement:
    stats: Any
    """pytest-benchmark's, whose list of them holds it."""
    others_share: float
    ended_s: float


class Benchmarks:
    """One run with the flag: judges each benchmark, then saves all that were measured."""

    def __init__(self, config: pytest.Config) -> None:
        from bench.machine import describe_machine  # imports PyTorch
        from turbo.engine import pick_device

        given = config.option.benchmark_tolerance
        self._config = config
        self._tolerance = (DEFAULT_TOLERANCE if given is None else given) / 100
        self._device = str(pick_device("auto"))
        self._machine = describe_machine(self._device)
        self._saved = SavedRuns(_storage(config), self._machine)
        self._measured: dict[str, list[_Measurement]] = {}
        self._again: set[str] = set()
        self._judged: dict[str, Judgement] = {}
        self._file: Path | None = None

    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any]:
        """Hardware and versions, without the names of people's machines."""
        return self._machine

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if session.config._benchmarksession.disabled:  # type: ignore[attr-defined]
            raise pytest.UsageError("--benchmark measures in one process: leave out -n and --dist")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Say what is run, where, and what it is compared with."""
        machine = self._machine
        lines = [
            f"{len(session.items)} benchmarks of {FOLDER} on {self._device}, "
            f"{machine['threads']} threads, machine {machine['id']}",
            f"a median more than {100 * self._tolerance:g}% above the newest saved one fails, "
            f"if {MEASUREMENTS} measurements agree",
            *self._saved.remarks,
        ]
        load, cores = os.getloadavg()[0], machine["cores"]
        if load > cores:
            lines.append(f"others work on this machine ({load:.1f} on {cores} cores): times vary")
        if not self._saved.baselines:
            lines.append(
                f"no earlier run of this machine: all are measured {MEASUREMENTS} times and pass"
            )
        for line in lines:
            self._say(f"benchmark: {line}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run a benchmark; if one measurement is not enough, run it again when all others have."""
        for last in self._measured.get(item.nodeid, [])[-1:]:
            time.sleep(max(0.0, last.ended_s + APART_S - time.monotonic()))
        self._again.discard(item.nodeid)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        if item.nodeid in self._again and all(report.passed for report in reports):
            reports = [report for report in reports if report.when == "call"]
            for report in reports:
                report.outcome = _AGAIN  # type: ignore[assignment]
            item.session.items.append(item)  # over which pytest still goes
        elif item.nodeid not in self._judged:
            self._measured.pop(item.nodeid, None)  # a check of its own failed
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return (_AGAIN, "A", "AGAIN") if report.outcome == _AGAIN else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Judge a benchmark whose own checks have passed, once enough measurements are there."""
        before = ProcessorTime.now()
        result = yield
        fixture = getattr(item, "funcargs", {}).get("benchmark")
        if fixture is not None and fixture.stats is not None:
            others = ProcessorTime.now().others_share(before)
            measured = self._measured.setdefault(item.nodeid, [])
            measured.append(_Measurement(fixture.stats, others, time.monotonic()))
            self._judge(item.nodeid, measured)
        return result

    def _judge(self, name: str, measured: list[_Measurement]) -> None:
        baseline = self._saved.baselines.get(name)
        medians_s = [each.stats.stats.median for each in measured]
        number = counting(medians_s, baseline, self._tolerance)
        if number is None:
            self._again.add(name)
            return
        counted = measured[number]
        kept = self._config._benchmarksession.benchmarks  # type: ignore[attr-defined]
        dropped = [each.stats for each in measured if each is not counted]
        kept[:] = [each for each in kept if each not in dropped]
        judgement = Judgement(
            medians_s[number], baseline, self._tolerance, counted.others_share, medians_s
        )
        self._judged[name] = judgement
        counted.stats.extra_info |= {
            "verdict": judgement.verdict,
            "others_share": round(counted.others_share, 3),
            "medians_s": medians_s,
        }
        if judgement.verdict == SLOWER:
            pytest.fail(f"slower: {judgement}", pytrace=False)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Save what was measured; what failed a check of its own has no place there."""
        measured = session.config._benchmarksession.benchmarks  # type: ignore[attr-defined]
        good = [one for one in measured if one.fullname in self._judged]
        if not good:
            return
        from pytest_benchmark import utils

        hook = session.config.hook
        output = hook.pytest_benchmark_generate_json(
            config=session.config,
            benchmarks=good,
            include_data=True,
            machine_info=self._machine,
            commit_info=hook.pytest_benchmark_generate_commit_info(config=session.config),
        )
        text: str = utils.safe_dumps(output, indent=1)  # type: ignore[no-untyped-call]
        self._file = self._saved.save(text, self._machine["commit"] or "")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Each benchmark beside its saved median."""
        unsure = [name for name in self._measured if name not in self._judged]
        if not (self._judged or unsure):
            return
        terminalreporter.section("compared with saved runs")
        for name, judged in self._judged.items():
            short = name.removeprefix(f"{FOLDER.as_posix()}/")
            terminalreporter.write_line(f"{short}: {judged.verdict}: {judged}")
        for name in unsure:
            short = name.removeprefix(f"{FOLDER.as_posix()}/")
            terminalreporter.write_line(f"{short}: was to be measured again; not saved")
        slower = [judged for judged in self._judged.values() if judged.verdict == SLOWER]
        if slower:
            terminalreporter.write_line(
                f"{len(slower)} of {len(self._judged)} benchmarks became slower: they are saved "
                "with that mark and not compared with later; if it is meant to be so, run once "
                "with a larger --benchmark-tolerance",
                red=True,
            )
        if self._file is not None:
            shown = Path(self._file.parent.parent.name, self._file.parent.name, self._file.name)
            terminalreporter.write_line(f"saved as {shown}")

    def _say(self, line: str) -> None:
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(line)


def _storage(config: pytest.Config) -> Path:
    """The folder of saved runs; unless another is given it lies in the root folder."""
    given: str = config.option.benchmark_storage
    if given == _STORAGE:
        return config.rootpath / ".benchmarks"
    if given.startswith("elasticsearch"):
        raise pytest.UsageError(
            "--benchmark saves to a folder: give --benchmark-storage=file://DIR"
        )
    return Path(given.removeprefix("file://")).absolute()
