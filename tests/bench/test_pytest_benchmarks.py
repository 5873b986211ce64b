"""``pytest --benchmark`` on a small project whose benchmarks are timed by a fake clock."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import turbo.engine  # noqa: F401  (kept imported: a run in this process forgets what it imports)
from bench import pytest_benchmarks
from bench.machine import describe_machine, machine_id
from bench.processor_time import ProcessorTime
from bench.pytest_benchmarks import APART_S
from bench.saved_runs import (
    MEASUREMENTS,
    SLOWER,
    Baseline,
    Judgement,
    SavedRuns,
    counting,
    shown,
)
from tests.conftest import REPOSITORY

pytest_plugins = ["pytester"]

INI = """
[pytest]
testpaths = tests
addopts = -q --benchmark-disable
filterwarnings = error
"""
CLOCK = """
now = 0.0

def read():
    return now

def work(seconds):
    global now
    now += seconds
"""
BENCHMARK = """
import json, pathlib
import fake_clock

SECONDS = json.loads(pathlib.Path("seconds.json").read_text())
measurements = iter(SECONDS["planted"])
right = iter(SECONDS["right"])

def test_steady(benchmark):
    benchmark.pedantic(fake_clock.work, args=(1.0,), rounds=5)

def test_planted(benchmark):
    times = iter(next(measurements))
    benchmark.extra_info["stage1"] = 0.25
    benchmark.pedantic(lambda: fake_clock.work(next(times)), rounds=5)
    assert next(right)
"""
OTHER = """
def test_other():
    pass
"""


class Project:
    """A project with benchmarks; each run takes as long as it is told."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        pytester.syspathinsert()
        pytester.makepyfile(fake_clock=CLOCK)
        pytester.makeini(INI)
        for name, text in {
            "tests/test_other.py": OTHER,
            "tests/benchmarks/test_one.py": BENCHMARK,
        }.items():
            path = pytester.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def run(
        self,
        *arguments: str,
        planted: float | list[float] = 1.0,
        times: list[float] | None = None,
        right: list[bool] | None = None,
        flag: str = "--benchmark",
    ) -> pytest.RunResult:
        """`planted`: seconds of the second benchmark, of each measurement; `times`: of rounds."""
        each = planted if isinstance(planted, list) else [planted] * MEASUREMENTS
        rounds = [times or [one] * 5 for one in each]
        seconds = {"planted": rounds, "right": right or [True] * MEASUREMENTS}
        (self.pytester.path / "seconds.json").write_text(json.dumps(seconds))
        plugins = ("bench.pytest_benchmarks", "no:hypothesispytest", "no:anyio")
        named = [word for plugin in plugins for word in ("-p", plugin)]
        return self.pytester.runpytest_inprocess(
            *named, flag, "--benchmark-timer=fake_clock.read", *arguments
        )

    @property
    def folder(self) -> Path:
        return Path(self.pytester.path, ".benchmarks", machine_id())

    def saved(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def entry(self, number: int, name: str = "test_planted") -> dict[str, Any]:
        """A benchmark of a saved run."""
        entries = json.loads(self.saved()[number].read_text())["benchmarks"]
        found: dict[str, Any] = {each["name"]: each for each in entries}[name]
        return found

    def median_s(self, number: int) -> float:
        """Of the second benchmark in a saved run."""
        median_s: float = self.entry(number)["stats"]["median"]
        return round(median_s, 6)

    def verdicts(self, number: int) -> dict[str, str]:
        """Benchmark -> what a saved run says about it."""
        entries = json.loads(self.saved()[number].read_text())["benchmarks"]
        return {entry["name"]: entry["extra_info"]["verdict"] for entry in entries}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests may run side by side, the runs that they start are by themselves."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited between two measurements, which these tests do not."""
    seconds: list[float] = []
    fake = SimpleNamespace(sleep=seconds.append, monotonic=lambda: 100.0)
    monkeypatch.setattr(pytest_benchmarks, "time", fake)
    return seconds


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    return Project(pytester)


def test_a_planted_slowdown_of_20_percent_fails(project: Project):
    assert project.run().ret == 0
    result = project.run(planted=1.2)
    assert result.ret == 1
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*slower: 1.2 s is 20.0% slower than 1 s of 0001_*.json, allowed are 10%*"]
    )


def test_a_planted_slowdown_of_3_percent_passes(project: Project):
    assert project.run().ret == 0
    result = project.run(planted=1.03)
    assert result.ret == 0
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*test_planted: passed: 1.03 s is 3.0% slower than 1 s of*"])


def test_the_median_counts_and_not_one_slow_round(project: Project):
    project.run()
    assert project.run(times=[1.0, 9.0, 1.0, 9.0, 1.0]).ret == 0
    assert project.run(times=[1.0, 1.2, 1.2, 1.2, 1.0]).ret == 1


def test_a_slow_spell_of_the_machine_is_no_slowdown(project: Project, naps: list[float]):
    project.run()
    naps.clear()
    result = project.run(planted=[1.2, 1.05])
    assert result.ret == 0
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "*::test_planted AGAIN*",
            "*::test_planted PASSED*",
            "*test_planted: passed: 1.05 s is 5.0% slower than 1 s of *; measured: 1.2 s, 1.05 s",
            "*2 passed, 1 remeasured*",
        ]
    )
    assert naps == [APART_S]
    entry = project.entry(1)
    assert (project.median_s(1), entry["stats"]["rounds"]) == (1.05, 5)
    assert entry["extra_info"]["medians_s"] == pytest.approx([1.2, 1.05])


def test_a_slowdown_is_what_all_measurements_show(project: Project):
    project.run()
    result = project.run(planted=[1.3, 1.12, 1.2])
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*slower: 1.12 s is 12.0% slower*measured: 1.3 s, 1.12 s, 1.2 s*"])
    assert project.median_s(1) == 1.12


def test_a_fast_spell_of_the_machine_does_not_become_what_is_compared_with(project: Project):
    project.run()
    assert project.run(planted=[0.7, 0.75, 1.02]).ret == 0
    assert project.median_s(1) == 1.02
    assert project.run(planted=[0.8, 0.7, 0.75]).ret == 0
    assert project.median_s(2) == 0.8


def test_of_a_first_run_the_middle_measurement_counts(project: Project):
    project.run(planted=[0.7, 1.3, 1.0])
    assert project.median_s(0) == 1.0
    assert project.run(planted=[1.05]).ret == 0


def test_a_check_that_fails_when_measured_again_leaves_no_number(project: Project):
    project.run()
    result = project.run(planted=[1.2, 1.0], right=[True, False])
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.no_fnmatch_line("*to be measured again*")
    assert project.verdicts(1) == {"test_steady": "passed"}


def test_a_run_that_ends_before_all_is_measured_again_says_so(project: Project):
    text = "def test_wrong(benchmark):\n    assert 1 == 2\n"
    (project.pytester.path / "tests" / "benchmarks" / "test_wrong.py").write_text(text)
    result = project.run("-x")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["test_one.py::test_planted: was to be measured again; not saved"])
    assert not project.saved()


@pytest.mark.parametrize(("tolerance", "code"), [("2", 1), ("30", 0), ("0", 1)])
def test_the_tolerance_is_a_percentage(project: Project, tolerance: str, code: int):
    project.run()
    assert project.run("--benchmark-tolerance", tolerance, planted=1.03).ret == code


def test_a_first_run_says_so_and_passes(project: Project):
    result = project.run()
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            f"benchmark: 2 benchmarks of tests/benchmarks on *machine {describe_machine()['id']}*",
            "benchmark: no earlier run of this machine: all are measured 3 times and pass",
            "*test_planted: first: 1 s, nothing saved to compare with; measured: 1 s, 1 s, 1 s",
            "saved as .benchmarks/*/0001_*.json",
        ]
    )


def test_a_busy_machine_is_pointed_out(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.getloadavg", lambda: (1e4, 0.0, 0.0))
    project.run().stdout.fnmatch_lines(["benchmark: others work on this machine (10000.0 on *"])
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.0, 0.0))
    project.run().stdout.no_fnmatch_line("*others work*")


def test_the_flags_cost_other_tests_no_import_of_pytorch():
    code = "import sys, bench.pytest_benchmarks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_a_slow_run_is_saved_but_not_compared_with(project: Project):
    project.run()
    for number in (1, 2):
        assert project.run(planted=1.2).ret == 1
        assert project.verdicts(number) == {"test_steady": "passed", "test_planted": "slower"}
    assert project.run(planted=1.05).ret == 0


def test_a_slowdown_is_accepted_by_a_run_with_a_larger_tolerance(project: Project):
    project.run()
    assert project.run(planted=1.2).ret == 1
    assert project.run("--benchmark-tolerance=25", planted=1.2).ret == 0
    assert project.run(planted=1.2).ret == 0
    assert project.run(planted=1.5).ret == 1


def test_a_run_of_one_benchmark_hides_no_other_from_the_next(project: Project):
    project.run()
    assert project.run("-k", "steady").ret == 0
    assert project.run(planted=1.2).ret == 1


def test_a_benchmark_whose_check_fails_leaves_no_number(project: Project):
    project.run()
    result = project.run(planted=0.1, right=[False])
    result.assert_outcomes(passed=1, failed=1)
    assert project.verdicts(1) == {"test_steady": "passed"}
    assert project.run(planted=1.0).ret == 0


def test_a_check_that_fails_before_the_timing_is_one_failure(project: Project):
    text = "def test_wrong(benchmark):\n    assert 1 == 2\n"
    (project.pytester.path / "tests" / "benchmarks" / "test_wrong.py").write_text(text)
    result = project.run()
    result.assert_outcomes(passed=2, failed=1)
    assert set(project.verdicts(0)) == {"test_steady", "test_planted"}


def test_a_run_holds_machine_versions_and_extra_information(project: Project):
    project.run()
    [path] = project.saved()
    data = json.loads(path.read_text())
    assert data["machine_info"]["id"] == describe_machine()["id"]
    assert data["machine_info"]["torch"] == describe_machine()["torch"]
    assert "node" not in data["machine_info"]
    planted = data["benchmarks"][1]
    assert {"stage1": 0.25, "verdict": "first"}.items() < planted["extra_info"].items()
    assert 0 <= planted["extra_info"]["others_share"] <= 1
    assert planted["stats"]["data"] == [1.0] * 5


def test_runs_of_another_machine_are_ignored_and_said(project: Project):
    project.run(planted=0.5)
    project.folder.rename(project.folder.with_name("another"))
    result = project.run(planted=1.0)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["benchmark: 1 saved runs of another machine (another): ignored", "*times and pass"]
    )


def test_a_run_of_another_machine_in_this_ones_folder_is_ignored_and_named(project: Project):
    project.run(planted=0.5)
    [path] = project.saved()
    data = json.loads(path.read_text())
    data["machine_info"]["id"] = "another"
    path.write_text(json.dumps(data))
    result = project.run(planted=1.0)
    assert result.ret == 0
    result.stdout.fnmatch_lines([f"benchmark: */{path.name} is of another machine*ignored"])


def test_a_run_with_other_threads_is_ignored_and_named(project: Project):
    project.run(planted=0.5)
    [path] = project.saved()
    data = json.loads(path.read_text())
    data["machine_info"]["threads"] += 7
    path.write_text(json.dumps(data))
    result = project.run(planted=1.0)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*was measured with * threads, here are *: ignored"])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"benchm', "is no whole JSON file"),
        ("\x00", "is no whole JSON file"),
        ("[" * 100_000, "is no whole JSON file"),
        ("[]", "is no run of these benchmarks"),
        ("{}", "is no run of these benchmarks"),
        ('{"machine_info": {"id": 1, "threads": 1}, "benchmarks": [1]}', "is no run of these"),
    ],
)
def test_a_damaged_file_is_named_and_the_one_before_it_serves(
    project: Project, content: str, why: str
):
    project.run()
    (project.folder / "0002_damaged.json").write_text(content)
    result = project.run(planted=1.2)
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"benchmark: */0002_damaged.json {why}*: ignored"])
    assert [path.name[:4] for path in project.saved()] == ["0001", "0002", "0003"]


@pytest.mark.parametrize("median", ["NaN", "0", "-1", "true", '"1"', "Infinity"])
def test_a_saved_median_that_is_no_time_is_not_believed(project: Project, median: str):
    project.run()
    [path] = project.saved()
    data = json.loads(path.read_text())
    data["benchmarks"][1]["stats"]["median"] = json.loads(median)
    path.write_text(json.dumps(data))
    result = project.run()
    result.stdout.fnmatch_lines(["*is no run of these benchmarks: ignored"])


def test_without_the_flag_no_benchmark_is_collected(project: Project):
    result = project.run(flag="--verbose")
    result.assert_outcomes(passed=1)
    assert not project.saved()


def test_without_the_flag_a_benchmark_asked_for_by_name_says_what_to_give(project: Project):
    result = project.run("tests/benchmarks", "-rs", flag="--verbose")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["*give --benchmark to run it*"])


def test_with_the_flag_other_tests_are_left_out(project: Project):
    project.run().assert_outcomes(passed=2)
    project.run("tests").assert_outcomes(passed=2, deselected=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark-tolerance", "-1"], "must be a percentage of at least 0, got '-1'"),
        (["--benchmark-tolerance", "nan"], "must be a percentage of at least 0, got 'nan'"),
        (["--benchmark-skip"], "--benchmark runs what --benchmark-skip leaves out"),
        (["--benchmark-storage", "elasticsearch+http://x"], "saves to a folder"),
        (["--bench"], "unrecognized arguments: --bench"),
    ],
)
def test_options_that_cannot_work_are_refused(project: Project, arguments: list[str], message: str):
    result = project.run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str() + result.stdout.str()


def test_a_tolerance_without_the_flag_is_refused(project: Project):
    result = project.run("--benchmark-tolerance=5", flag="--verbose")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--benchmark-tolerance needs --benchmark" in result.stderr.str()


def test_a_project_without_benchmarks_is_told_so(project: Project):
    (project.pytester.path / "tests" / "benchmarks").rename(project.pytester.path / "elsewhere")
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "there is no folder" in result.stderr.str()


@pytest.mark.parametrize("command", ["pytest", "python -m pytest"])
def test_the_flag_is_known_in_this_repository(command: str):
    beside = Path(sys.executable).with_name("pytest")
    module = [sys.executable, "-m", "pytest"]
    if command == "pytest" and not beside.is_file():
        pytest.skip("pytest's command is not installed beside this Python")
    program = [str(beside)] if command == "pytest" else module
    done = subprocess.run(
        [*program, "--benchmark", "--collect-only", "-q"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "benchmarks of tests/benchmarks on" in done.stdout
    assert "<Module test_parts.py>" in done.stdout
    assert "<Module test_load.py>" not in done.stdout


# Judging.


@pytest.mark.parametrize(
    ("median_s", "verdict"), [(1.1, "passed"), (1.1000001, "slower"), (0.1, "passed")]
)
def test_the_limit_itself_still_passes(median_s: float, verdict: str):
    assert Judgement(median_s, Baseline(1.0, "a"), 0.1).verdict == verdict


@pytest.mark.parametrize(
    ("medians_s", "number"),
    [
        ([1.0], 0),
        ([1.1], 0),
        ([1 / 1.1], 0),
        ([1.11], None),
        ([0.9], None),
        ([0.9, 1.2], None),
        ([0.9, 1.2, 1.05], 2),
        ([0.9, 1.2, 1.3], 0),
        ([1.5, 1.2, 1.3], 1),
    ],
)
def test_of_all_measurements_the_nearest_to_the_saved_one_counts(
    medians_s: list[float], number: int | None
):
    assert counting(medians_s, Baseline(1.0, "a"), 0.1) == number


@pytest.mark.parametrize(
    ("medians_s", "number"), [([1.0], None), ([1.0, 1.0], None), ([3.0, 1.0, 2.0], 2)]
)
def test_with_nothing_saved_the_middle_of_all_measurements_counts(
    medians_s: list[float], number: int | None
):
    assert counting(medians_s, None, 0.1) == number


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00012, "0.12 ms"), (0.9, "900 ms"), (57.3171, "57.32 s")]
)
def test_times_are_shown_in_a_fitting_unit(seconds: float, text: str):
    assert shown(seconds) == text


def test_two_runs_at_once_do_not_write_over_each_other(tmp_path: Path):
    machine = {"id": "here", "threads": 1}
    one, other = SavedRuns(tmp_path, machine), SavedRuns(tmp_path, machine)
    paths = [one.save("{}", "abc"), other.save("{}", "abc"), one.save("{}", "a/b c")]
    assert [path.name for path in paths] == ["0001_abc.json", "0002_abc.json", "0003_abc.json"]
    assert len(list((tmp_path / "here").iterdir())) == 3


def test_what_other_programs_use_is_all_but_our_own():
    before = ProcessorTime(passed_s=10.0, all_s=100.0, ours_s=5.0, processors=2)
    after = ProcessorTime(passed_s=20.0, all_s=118.0, ours_s=14.0, processors=2)
    assert after.others_share(before) == 9 / 20
    assert before.others_share(before) == 0


def test_our_own_work_is_not_the_others():
    before, begin = ProcessorTime.now(), time.process_time()
    while time.process_time() < begin + 0.2:
        pass
    after = ProcessorTime.now()
    assert after.ours_s - before.ours_s >= 0.15  # the system counts in hundredths
    assert 0 <= after.others_share(before) <= 1


def test_a_slower_median_beside_others_says_so():
    judged = Judgement(1.5, Baseline(1.0, "0001_abc.json"), 0.1, others_share=0.7)
    assert judged.verdict == SLOWER
    assert str(judged).endswith("used 70% of the processors meanwhile: measure again on an idle "
                                "machine")  # fmt: skip
    assert "other programs" not in str(replace(judged, others_share=0.05))
