"""The progress bar, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest

from turbo.progress import ProgressBar


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def drawn(stream: io.StringIO) -> list[str]:
    """Each state that a line had, without colour."""
    return [
        re.sub(r"\x1b\[\d*[mK]", "", part) for part in re.split("[\r\n]", stream.getvalue()) if part
    ]


def test_a_terminal_shows_stage_names_and_steps():
    stream = Terminal()
    with ProgressBar(stream, {"stage1": "stage1 176x224", "stage2": "stage2 336x432"}) as bar:
        for stage in ("stage1", "stage2"):
            for step in range(1, 10):
                bar(stage, step, 9)
    lines = stream.getvalue().split("\n")
    assert len(lines) == 3
    assert lines[2] == ""
    assert re.search(r"^stage1 176x224 ━{30} 9/9 +\d+\.\d s$", drawn(stream)[1])
    assert drawn(stream)[-1].startswith("stage2 336x432 ━")


@pytest.mark.parametrize("variable", ["TQDM_DISABLE", "TERM"])
def test_it_is_silent_where_it_should_be(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, {"TERM": "dumb"}.get(variable, "1"))
    stream = Terminal()
    with ProgressBar(stream) as bar:
        bar("stage1", 1, 2)
    assert stream.getvalue() == ""


def test_it_is_silent_in_a_file_and_when_asked():
    for stream, quiet in ((io.StringIO(), False), (Terminal(), True)):
        with ProgressBar(stream, quiet=quiet) as bar:
            bar("stage1", 2, 2)
        assert stream.getvalue() == ""


def test_tqdm_disable_0_means_no(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    assert ProgressBar(Terminal()).is_on


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch):
    def escapes() -> set[str]:
        stream = Terminal()
        ProgressBar(stream)("stage1", 2, 2)
        return set(re.findall(r"\x1b\[\d*\w", stream.getvalue()))

    assert escapes() == {"\x1b[K", "\x1b[32m", "\x1b[0m"}
    monkeypatch.setenv("NO_COLOR", "1")
    assert escapes() == {"\x1b[K"}


def test_an_old_terminal_gets_ascii():
    stream = Terminal()
    stream.encoding = "ascii"
    ProgressBar(stream)("stage1", 1, 2)
    assert "###############..............." in drawn(stream)[0]


@pytest.mark.parametrize("columns", ["1", "10", "30", "40", "200"])
def test_a_line_never_wraps(columns: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    ProgressBar(stream, {"stage1": "stage1 176x224"})("stage1", 9, 9)
    assert all(len(line) < int(columns) for line in drawn(stream))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminals")
def test_the_width_is_that_of_the_terminal_it_draws_on(monkeypatch: pytest.MonkeyPatch):
    import fcntl
    import pty
    import struct
    import termios

    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with open(terminal, "w", encoding="utf-8") as stream:
        ProgressBar(stream, {"stage1": "stage1 176x224"})("stage1", 9, 9)
        line = os.read(main, 1000).decode()
    os.close(main)
    assert len(re.sub(r"\x1b\[\d*[mK]|\r", "", line)) == 39


def test_a_fast_stage_is_not_redrawn_at_every_step():
    stream = Terminal()
    bar = ProgressBar(stream)
    for step in range(1, 10_001):
        bar("stage1", step, 10_000)
    assert len(drawn(stream)) < 1000
    assert "10000/10000" in drawn(stream)[-1]


def test_an_error_begins_on_a_line_of_its_own():
    stream = Terminal()
    bar = ProgressBar(stream)
    bar("stage1", 1, 2)
    bar.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert stream.getvalue().endswith("\n")


def test_strange_numbers_do_not_break_it():
    stream = Terminal()
    with ProgressBar(stream) as bar:
        for step, total in ((0, 0), (1, 0), (5, 3)):
            bar("stage1", step, total)
    assert stream.getvalue()


def test_a_terminal_that_goes_away_does_not_end_the_work():
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError("gone")

    with ProgressBar(Gone()) as bar:
        bar("stage1", 1, 2)
        bar("stage1", 2, 2)
    assert not bar.is_on
