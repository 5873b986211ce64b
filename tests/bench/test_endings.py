"""How commands end: what cannot be written, errors and exit codes, the same in all of them."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path

import pytest

from bench.__main__ import end_on_signals
from bench.endings import exit_code, require_packages
from bench.results import ResultsFileError
from bench.side import MissingRivalError, SideError
from tests.bench import samples
from turbo.errors import BackendError, BadInputError, OutOfMemoryError

COMMANDS = {
    "run": "--model nowhere -o {output}",
    "compare": "--baseline diffusers --model nowhere -o {output}",
    "quality": "--model nowhere -o {output}",
    "quality ": "--model nowhere --grid {output}",
    "load": "--rate 1 --duration 9 --model nowhere -o {output}",
    "device": "--device cpu --small -o {output}",
    "export": "--github-action {results} -o {output}",
    "report": "{results} -o {output}",
    "report ": "{results} --charts {output}",
    "model": "{output} --size tiny",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_written_is_refused_before_the_work_begins(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = samples.write(tmp_path, "results.json", samples.compare(tmp_path, pictures=False))
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "out.png"
    given = COMMANDS[command].format(output=output, results=results).split()
    assert importlib.import_module(f"bench.{command.strip()}").main(given) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: cannot write {output}")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_folder_is_no_file_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = importlib.import_module("bench.run")
    assert run.main(["--model", "nowhere", "-o", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"error: cannot write {tmp_path}: is a folder; give another -o\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BadInputError("no such\nmodel"), 2, "no such model"),
        (ResultsFileError("truncated"), 2, "truncated"),
        (MissingRivalError("give --sdcpp"), 2, "give --sdcpp"),
        (SideError("another picture"), 1, "another picture"),
        (BackendError("no answer"), 1, "no answer"),
        (OSError("disk full"), 1, "OSError: disk full"),
        (OutOfMemoryError("full; use memory 'low'", "loading"), 2, "full; use memory 'low'"),
        (
            ModuleNotFoundError("No module named 'diffusers'", name="diffusers"),
            2,
            "measuring needs diffusers, not installed here; pip install -e '.[bench]' adds them",
        ),
    ],
)
def test_an_error_is_one_line_and_its_code_says_whose_fault_it_was(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
):
    def work() -> int:
        raise error

    assert exit_code(work) == code
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)


def test_a_package_that_is_missing_is_named_before_the_work():
    require_packages("torch")
    with pytest.raises(BadInputError, match=r"needs nowhere1 and nowhere2, .* '\.\[bench\]'"):
        require_packages("nowhere1", "torch", "nowhere2")


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hang_up_ends_a_command_unless_it_was_told_to_ignore_it(
    ignored: bool,
):
    before = signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        end_on_signals()
        if ignored:
            signal.raise_signal(signal.SIGHUP)
        else:
            with pytest.raises(SystemExit) as ended:
                signal.raise_signal(signal.SIGHUP)
            assert ended.value.code == 129
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
