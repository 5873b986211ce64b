"""Results files and the statistics in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.machine import describe_machine
from bench.results import (
    FORMAT,
    Results,
    ResultsFileError,
    read_results,
    require_same_machine,
)
from bench.timing import percentile, ratio, summarise, summarise_rounds

TIMES = st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=30)


def test_the_summary_of_a_known_sample():
    found = summarise([50.0, 10.0, 20.0, 40.0, 30.0])
    assert (found["median_ms"], found["p20_ms"], found["p80_ms"]) == (30.0, 18.0, 42.0)
    assert found["p95_ms"] == pytest.approx(48.0)
    assert found["runs"] == 5
    rounds = summarise_rounds([0.05, 0.01, 0.02, 0.04, 0.03])
    assert rounds.pop("all_ms") == [50.0, 10.0, 20.0, 40.0, 30.0]
    assert rounds == pytest.approx(found)


@given(TIMES, st.floats(min_value=0, max_value=100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float):
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_a_percentile_of_nothing_or_beyond_all_is_refused(values: list[float], percent: float):
    with pytest.raises(ValueError, match="a percentile needs values"):
        percentile(values, percent)


def test_a_ratio_compares_round_by_round():
    # A machine that becomes ten times slower halfway changes both medians but no quotient.
    found = ratio([8.0, 8.0, 80.0], [10.0, 10.0, 100.0])
    assert found == {"median": 0.8, "p20": 0.8, "p80": 0.8, "pairs": 3}


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_a_ratio_without_pairs_is_refused(ours: list[float], theirs: list[float]):
    with pytest.raises(ValueError, match="a ratio needs pairs"):
        ratio(ours, theirs)


def results_file(path: Path, **entries: Any) -> Path:
    machine = describe_machine()
    path.write_text(json.dumps({"format": FORMAT, "kind": "run", "machine": machine, **entries}))
    return path


def test_what_was_written_is_read(tmp_path: Path):
    path = tmp_path / "results.json"
    results = Results(path, {"format": FORMAT, "kind": "run", "machine": describe_machine()})
    results.write()
    assert read_results(path)["partial"] is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "turbo-be', "no whole JSON"),
        (b"\xff\xfe\x00", "no text file"),
        (b"[]", "has no format entry"),
        (b'{"format": "turbo-bench/99"}', "this version reads 'turbo-bench/1'"),
        (b'{"format": "turbo-bench/1", "kind": "load"}', "holds 'load' results"),
        (b'{"format": "turbo-bench/1", "kind": "run"}', "does not say which machine"),
        (b"[" * 100_000, "no whole JSON"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, content: bytes, message: str
):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ResultsFileError, match=message) as caught:
        read_results(path, ["run", "compare"])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ResultsFileError, match="no such file"):
        read_results(tmp_path / "none.json")


def test_times_of_another_machine_are_refused(tmp_path: Path):
    here = describe_machine()
    there = results_file(tmp_path / "a.json", machine={**here, "id": "f00", "cores": 96})
    with pytest.raises(ResultsFileError, match="cores 96 there"):
        require_same_machine(there, read_results(there), here)
    require_same_machine(there, read_results(results_file(tmp_path / "b.json")), here)
