"""``bench export --github-action``: entries that github-action-benchmark reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.export import github_action, main
from bench.reporting.files import ResultsFile
from tests.bench import samples


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return samples.write(
        tmp_path, "compare.json", samples.compare(tmp_path, pictures=False, gpu=True)
    )


def named(found: dict[str, dict[str, Any]], start: str) -> dict[str, Any]:
    """The one entry whose name begins so."""
    [entry] = [entry for name, entry in found.items() if name.startswith(f"{start} [")]
    return entry


def entries(path: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in github_action(ResultsFile.read(path))}


def test_each_part_of_each_side_is_an_entry_with_its_median_and_spread(path: Path):
    data = json.loads(path.read_text())["sides"]["diffusers"]["times"]["stage3"]
    entry = named(entries(path), "diffusers / stage3")
    assert (entry["unit"], entry["value"]) == ("ms", data["median_ms"])
    assert entry["range"] == f"p20 {data['p20_ms']:.6g} .. p80 {data['p80_ms']:.6g}"
    assert "commit: 1234567890ab" in entry["extra"]
    assert "GPU: Sample GPU (invented)" in entry["extra"]


def test_memory_is_exported_in_gib(path: Path):
    found = entries(path)
    assert named(found, "turbo / host memory")["value"] == 2.2
    reserved = named(found, "turbo / stage3, device memory reserved")
    assert (reserved["unit"], reserved["value"]) == ("GiB", 15.0)


def test_entries_have_the_types_that_the_action_expects(path: Path):
    allowed = {"name": str, "unit": str, "value": float, "range": str, "extra": str}
    for entry in entries(path).values():
        assert {"name", "unit", "value"} <= entry.keys() <= allowed.keys()
        assert all(isinstance(value, allowed[key]) for key, value in entry.items())


def test_names_stay_the_same_from_commit_to_commit_and_differ_between_machines(tmp_path: Path):
    first, second, elsewhere = (
        entries(samples.write(tmp_path, f"{commit}{identity}.json", run))
        for commit, identity in (("a", "m"), ("b", "m"), ("a", "other"))
        for run in [samples.run(commit, "2026-11-20T10:00:00+00:00", 1.0, id=identity)]
    )
    assert first.keys() == second.keys()
    assert not first.keys() & elsewhere.keys()


def test_a_name_says_what_was_measured_and_how(path: Path):
    name = named(entries(path), "turbo, compiled / total")["name"]
    assert name.startswith(
        "turbo, compiled / total [sample-512, float32, cpu, 176x224, 2 threads, compile, "
        "capture replay, machine 5a3b1ec0ffee, key "
    )


@pytest.mark.parametrize(
    "change",
    [
        {"configuration": {"dtype": "bfloat16"}},
        {"configuration": {"device": "cuda"}},
        {"configuration": {"model": {"name": "sample-512", "fingerprint": "0ther"}}},
        {"configuration": {"plan": {"generation": {"stage1": {"height": 448, "width": 352}}}}},
        {"machine": {"threads": 4}},
        {"settings": {"compile": True}},
        {"settings": {"attention": "another"}},
    ],
)
def test_no_two_configurations_share_a_name(tmp_path: Path, change: dict[str, Any]):
    def names(change: dict[str, Any]) -> set[str]:
        data = samples.run("a", "2026-11-20T10:00:00+00:00", 1.0)
        places = {**data, "settings": data["sides"]["turbo"]["settings"]}
        for place, values in change.items():
            places[place] |= values
        return set(entries(samples.write(tmp_path, "x.json", data)))

    assert names({}) == names({"settings": {"torch": "9.9"}})
    assert not names({}) & names(change)


def test_the_command_writes_a_list_and_names_what_it_left_out(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--github-action", str(path), "-o", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == [*entries(path).values()]
    assert not any("int8" in entry["name"] for entry in written)
    assert "left out: turbo, int8: SideError: relative distance" in capsys.readouterr().err


def test_without_a_file_the_list_goes_to_the_terminal(
    path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(path), "--github-action"]) == 0
    assert json.loads(capsys.readouterr().out) == [*entries(path).values()]


def refused(folder: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    output = folder / "out.json"
    given = [str(samples.write(folder, "x.json", data)), "--github-action", "-o", str(output)]
    assert main(given) == 2
    assert not output.exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_partial_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = samples.compare(tmp_path, pictures=False) | {"partial": True}
    assert "is of a run that ended early; measure again" in refused(tmp_path, data, capsys)


def test_a_file_without_any_figures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = samples.compare(tmp_path, pictures=False)
    data["sides"] = {"turbo, int8": data["sides"]["turbo, int8"]}
    assert "no side has figures" in refused(tmp_path, data, capsys)


def test_another_kind_of_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "holds 'load' results" in refused(tmp_path, samples.load(), capsys)
