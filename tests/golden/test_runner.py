"""The command ``python -m tests.golden`` itself: that it can fail, and says so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import REPOSITORY
from tests.golden import __main__ as runner
from tests.golden.__main__ import main
from tests.golden.check import Case, Outcome, thinned
from tests.golden.models import ModelStore
from tests.kernels.conftest import INTERPRETED

EXACT = {"abs": 0.0}


def drawn(seed: int) -> Tensor:
    """What a noise case records for a seed."""
    return torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(seed))


def write_case(path: Path, facts: dict[str, Any], tensors: dict[str, Tensor] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))
    if tensors is not None:
        save_file(tensors, path.with_suffix(".safetensors"))


def write_noise(folder: Path, name: str, **tensors: Tensor) -> None:
    keys = {f"prepare/{key}/4x4": value for key, value in tensors.items()}
    write_case(folder / f"{name}.json", {"case": "noise", "tolerance": EXACT}, keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with no case yet; files that are no case lie in it."""
    folder = tmp_path / "golden"
    folder.mkdir()
    (folder / "weights.json").write_text("{}")
    (folder / "list.json").write_text("[1, 2]")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """Exit code and printed lines."""
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out.splitlines()


def test_right_values_pass(folder: Path, capsys: pytest.CaptureFixture[str]):
    write_noise(folder, "noise", seed0=drawn(0), seed7=drawn(7))
    write_noise(folder, "deep/er", seed1=drawn(1))
    code, lines = run(capsys, folder)
    assert code == 0
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["ok", "deep/er/prepare/seed1/4x4"],
        ["ok", "noise/prepare/seed0/4x4"],
        ["ok", "noise/prepare/seed7/4x4"],
    ]
    assert lines[-1] == "3 passed, 0 failed"


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (drawn(0) + 1e-6, "error"),
        (drawn(1), "error"),
        (torch.full((1, 16, 4, 4), torch.nan), "error nan"),
        (drawn(0)[..., :3].contiguous(), "shape"),
    ],
)
def test_a_wrong_value_fails_and_the_others_still_run(
    folder: Path, capsys: pytest.CaptureFixture[str], wrong: Tensor, problem: str
):
    if problem == "shape":  # the shape decides what is drawn, so record one of another kind
        facts = {"case": "latent_resize", "tolerance": EXACT, "cases": [RESIZE]}
        write_case(folder / "a.json", facts, {"in": drawn(0), "out": wrong})
    else:
        write_noise(folder, "a", seed0=wrong)
    write_noise(folder, "b", seed0=drawn(0))
    code, lines = run(capsys, folder)
    assert code == 1
    assert lines[0].startswith("FAIL a/")
    assert problem in lines[0]
    assert lines[1].startswith("ok   b/")
    assert lines[-1] == "1 passed, 1 failed"


RESIZE = {
    "out": "out",
    "input": "in",
    "node": "LatentUpscaleBy",
    "method": "nearest-exact",
    "scale_by": 1.0,
}


def test_a_line_has_the_largest_error_and_its_tolerance(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    facts = {"case": "noise", "tolerance": {"abs": 0.25, "rel": 0.0}}
    write_case(folder / "a.json", facts, {"prepare/seed0": drawn(0) + 0.125})
    code, [line, last] = run(capsys, folder)
    assert (code, last) == (0, "1 passed, 0 failed")
    assert line.split()[2:] == ["1.25e-01", "of", "2.50e-01"]


def test_an_unknown_kind_fails(folder: Path, capsys: pytest.CaptureFixture[str]):
    write_case(folder / "a.json", {"case": "audio"}, None)
    write_noise(folder, "b", seed0=drawn(0))
    code, lines = run(capsys, folder)
    assert code == 1
    assert lines[0].startswith("FAIL a ")
    assert "no handler for cases of kind 'audio'" in lines[0]
    assert lines[-1] == "1 passed, 1 failed"


def test_an_exception_fails_its_case_and_stops_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def explode(case: Case, *_: object) -> Iterator[Outcome]:
        outcome = case.outcome("first")
        outcome.compare("x", torch.ones(1), torch.ones(1), 0, 0)
        yield outcome
        raise ZeroDivisionError("what a handler must not do")

    monkeypatch.setitem(runner.HANDLERS, "explosive", explode)
    write_case(folder / "a.json", {"case": "explosive"}, None)
    write_case(folder / "b.json", {"case": "noise"}, None)  # its tensors are missing
    write_case(folder / "c.json", {"case": "dit", "weights": "nobody", "cases": []}, {})
    write_noise(folder, "d", seed0=drawn(0))
    code, lines = run(capsys, folder)
    assert code == 1
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["ok", "a/first"],
        ["FAIL", "a"],
        ["FAIL", "b"],
        ["FAIL", "c"],
        ["ok", "d/prepare/seed0/4x4"],
    ]
    assert "ZeroDivisionError: what a handler must not do" in lines[1]
    assert "KeyError: 'nobody'" in lines[3]
    assert lines[-1] == "2 passed, 3 failed"


def test_a_handler_that_compares_nothing_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(runner.HANDLERS, "idle", lambda case, *_: iter([case.outcome()]))
    write_case(folder / "a.json", {"case": "idle"}, None)
    code, lines = run(capsys, folder)
    assert code == 1
    assert lines[-1] == "0 passed, 1 failed"


def test_nothing_ran_is_no_success(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(capsys, folder) == (1, ["0 passed, 0 failed"])
    write_noise(folder, "noise", seed0=drawn(0))
    assert run(capsys, folder, "--only", "vae") == (1, ["0 passed, 0 failed"])
    code, lines = run(capsys, folder, "--only", "ois")
    assert (code, lines[-1]) == (0, "1 passed, 0 failed")


@pytest.fixture
def words(folder: Path) -> Path:
    """A folder with one case, which holds nothing but ids of a text."""
    config = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    (folder / "weights.json").write_text(json.dumps({"te": {"config": config, "seed": 0}}))
    entries = [{"text": "a cat", "ids": [[0, 1, 2]]}]
    facts = {"case": "text_encoder", "weights": "te", "tokenizer": entries}
    write_case(folder / "a.json", facts, {})
    return folder


def test_what_is_skipped_is_not_counted_as_passed(words: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = run(capsys, words)
    assert code == 1
    assert "skipped: no tokenizer folder beside the cases" in lines[0]
    assert lines[-2:] == ["1 skipped", "0 passed, 0 failed"]


def test_wrong_token_ids_fail(words: Path, shared: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = run(capsys, words, "--tokenizer", shared / "tokenizer")
    assert code == 1
    assert "'a cat': shape [10], recorded [3]" in lines[0]
    assert lines[-1] == "0 passed, 1 failed"


def test_a_folder_that_holds_no_cases_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2
    assert "weights.json is missing" in capsys.readouterr().err


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs them")
def test_kernels_where_they_cannot_run_are_a_usage_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        main([str(folder), "--kernels"])
    assert end.value.code == 2
    assert "kernels need " in capsys.readouterr().err


def test_the_command_exits_with_its_result(folder: Path):
    write_noise(folder, "noise", seed0=drawn(1))
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "0 passed, 1 failed"


@pytest.mark.parametrize(
    ("kind", "least"), [("noise", 20), ("latent_resize", 10), ("sigmas", 20), ("vae", 3)]
)
def test_recorded_cases_pass(
    shared: Path, capsys: pytest.CaptureFixture[str], kind: str, least: int
):
    code, lines = run(capsys, shared / "golden", "--only", kind)
    assert (code, [line for line in lines if line.startswith("FAIL")]) == (0, [])
    assert int(lines[-1].split()[0]) >= least


# The comparison.


def compared(got: Any, want: Any, absolute: float = 0.0, relative: float = 0.0) -> Outcome:
    outcome = Outcome("x")
    outcome.compare("x", torch.tensor(got), torch.tensor(want), absolute, relative)
    return outcome


def test_the_tolerance_is_absolute_plus_a_share_of_the_largest_value():
    assert compared([1.0, 11.0], [1.0, 10.0], 0.5, 0.0625).passed
    assert not compared([1.0, 11.25], [1.0, 10.0], 0.5, 0.0625).passed
    assert compared([1.5, -10.0], [1.0, -10.0], 0.0, 0.0625).passed


@pytest.mark.parametrize(
    ("got", "want", "passes"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], True),
        ([1.0, float("nan")], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, float("nan")], False),
        ([1.0, float("inf")], [1.0, 2.0], False),
        ([1, 2, 3], [1, 2, 3], True),
        ([1, 2, 3], [1, 2, 4], False),
        ([1.0], [[1.0]], False),
    ],
)
def test_values_that_are_no_numbers_and_other_shapes_are_noticed(
    got: list[float], want: list[Any], passes: bool
):
    assert compared(got, want).passed is passes


def test_a_recorded_infinity_excuses_nothing():
    outcome = compared([1.0, 1.0], [1.0, 1.0])
    outcome.compare("y", torch.tensor([5.0, 9.0]), torch.tensor([torch.inf, 1.0]), 1e-3, 1e-3)
    assert not outcome.passed


def test_the_comparison_that_used_most_of_its_tolerance_is_told():
    outcome = compared([1.0], [1.5], absolute=1.0)
    outcome.compare("y", torch.tensor([1.0]), torch.tensor([1.03]), 0.04, 0)
    outcome.compare("z", torch.tensor([1.0]), torch.tensor([1.0]), 0, 0)
    assert outcome.passed
    assert outcome.allowed == 0.04
    assert outcome.error == pytest.approx(0.03)


def test_a_tensor_is_thinned_as_the_recorded_one_was():
    full = torch.arange(56.0).reshape(7, 8)
    assert torch.equal(thinned(full, full[::3, ::3], (0, 1)), full[::3, ::3])
    assert torch.equal(thinned(full, full, (0, 1)), full)


def test_weights_come_from_the_file_or_else_from_the_seed(folder: Path):
    config = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 16}
    entry = {"file": "weights/vae.safetensors", "config": config, "seed": 5}
    (folder / "weights.json").write_text(json.dumps({"vae": entry}))
    seeded = ModelStore(folder, torch.device("cpu")).values("vae")
    (folder / "weights").mkdir()
    save_file(
        {name: (2 * value).bfloat16() for name, value in seeded.items()},
        folder / "weights" / "vae.safetensors",
    )
    stored = ModelStore(folder, torch.device("cpu")).values("vae")
    assert all(torch.equal(stored[name], 2 * value) for name, value in seeded.items())
