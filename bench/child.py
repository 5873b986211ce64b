"""A rival's process: a group of its own, a log in a file, and an end that leaves nothing behind."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.side import MissingRivalError, SideError
from turbo.messages import one_line, reason

GRACE_SECONDS = 10.0
"""How long a process has to end by itself before it is killed."""
LAST_LINES = 3
"""Lines of the log that an error quotes."""


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Child:
    """A running program. Ctrl-C on the terminal does not reach it: whoever made it ends it.

    Args:
        name: What errors call it.
        command: Program and arguments.
        log: File for both of its streams.
        folder: Where it runs.
        environment: Set on top of this process's.

    Raises:
        MissingRivalError: The program cannot be run.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._over = False
        with log.open("wb") as stream:
            try:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,  # so that its own children end with it
                )
            except OSError as error:
                raise MissingRivalError(
                    f"cannot run {one_line(command[0])} for {name}: {reason(error)}; give an "
                    "existing program that may be executed"
                ) from error
        atexit.register(self.end)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def processes(self) -> tuple[int, ...]:
        """Ids of the process and of those that it started, as far as they are still its own."""
        import psutil

        try:
            own = psutil.Process(self.pid)
            return (self.pid, *(child.pid for child in own.children(recursive=True)))
        except psutil.Error:
            return ()

    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def text(self, start: int = 0) -> str:
        """The log from a byte on."""
        with self.log.open("rb") as stream:
            stream.seek(start)
            return stream.read().decode("utf-8", errors="replace")

    def last_lines(self) -> str:
        """The end of the log in one line."""
        lines = [line.strip() for line in re.split(r"[\r\n]+", self.text()) if line.strip()]
        return one_line(" | ".join(lines[-LAST_LINES:]), 400) or "none"

    def check(self, when: str) -> None:
        """Go on if it runs.

        Raises:
            SideError: It has ended; tells how, and the end of its log.
        """
        code = self.code()
        if code is not None:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            raise SideError(
                f"{self.name} {how} {when}; the last lines of its log: {self.last_lines()}"
            )

    def wait_for(self, ready: Callable[[], bool], seconds: float, when: str) -> None:
        """Ask again and again until it is ready.

        Raises:
            SideError: It ended, or is not ready in time.
        """
        end = time.monotonic() + seconds
        while not ready():
            self.check(when)
            if time.monotonic() > end:
                raise SideError(
                    f"{self.name} gave no answer within {seconds:g} s {when}; the last lines of "
                    f"its log: {self.last_lines()}"
                )
            time.sleep(0.05)
        self.check(when)

    def end(self) -> None:
        """Ask it to end, then kill what is left of its group. May be called twice."""
        if self._over:
            return
        try:
            if self.code() is None:
                self._signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(GRACE_SECONDS)
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._over = True
            atexit.unregister(self.end)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
