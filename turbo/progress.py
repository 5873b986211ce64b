"""A progress bar for people: one line a stage on a terminal, nothing anywhere else."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

REDRAW_SECONDS = 0.05
"""A terminal far away should not slow the sampler down."""
BAR_WIDTH = 30

_ERASE_LINE = "\r\x1b[K"
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


def is_wanted(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can redraw a line, and `TQDM_DISABLE` is not set."""
    disabled = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    return not disabled and stream.isatty() and os.environ.get("TERM") != "dumb"


class ProgressBar:
    """Call it as ``on_progress(stage, step, total)``; use it in a ``with`` block.

    Args:
        stream: Where to draw, usually standard error. Nothing is drawn unless `is_wanted`.
        labels: What to show for a stage instead of its name.
        quiet: Never draw.
    """

    def __init__(
        self, stream: TextIO, labels: Mapping[str, str] | None = None, *, quiet: bool = False
    ) -> None:
        self.stream = stream
        self.labels = labels or {}
        self.prefix = ""
        """Shown before every stage."""
        self.is_on = is_wanted(stream) and not quiet
        self.is_colored = not os.environ.get("NO_COLOR")
        self._stage: str | None = None
        self._started = self._drawn = 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end_line()

    def __call__(self, stage: str, step: int, total: int) -> None:
        """Show that `step` of `total` steps of `stage` are done."""
        if not self.is_on:
            return
        now = time.monotonic()
        if stage != self._stage:
            self.end_line()
            self._stage, self._started, self._drawn = stage, now, 0.0
        if now - self._drawn >= REDRAW_SECONDS or step >= total:
            self._drawn = now
            self._write(_ERASE_LINE + self._line(stage, step, total, now - self._started))

    def end_line(self) -> None:
        """Leave the line as it is; what is printed next begins on a new one."""
        if self._stage is not None:
            self._stage = None
            self._write("\n")

    def _line(self, stage: str, step: int, total: int, seconds: float) -> str:
        columns = self._columns()
        label = f"{self.prefix}{self.labels.get(stage, stage)}"
        label = label.ljust(max(map(len, self.labels.values()), default=0) + len(self.prefix))
        numbers = f"{step:>{len(str(total))}}/{total} {seconds:6.1f} s"
        width = min(BAR_WIDTH, columns - len(label) - len(numbers) - 3)
        if width < 4:
            return f"{label} {numbers}"[: max(columns - 1, 0)]
        return f"{label} {self._bar(width, step, total)} {numbers}"

    def _columns(self) -> int:
        with contextlib.suppress(OSError, ValueError):  # standard output may lead elsewhere
            if columns := os.get_terminal_size(self.stream.fileno()).columns:
                return columns
        return shutil.get_terminal_size().columns

    def _bar(self, width: int, step: int, total: int) -> str:
        done = width * min(step, total) // max(total, 1)
        full, empty = ("━", "─") if self._has_lines() else ("#", ".")
        bar = full * done
        return (f"{_GREEN}{bar}{_PLAIN}" if self.is_colored else bar) + empty * (width - done)

    def _has_lines(self) -> bool:
        return (getattr(self.stream, "encoding", None) or "").lower().startswith("utf")

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # the terminal went away; the picture should still be made
            self.is_on = False
