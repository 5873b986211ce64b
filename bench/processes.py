"""Other processes side by side under one time limit; what they said is kept if it ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process that has ended or was ended."""

    code: int | None
    """Exit code; None where the time was over."""
    output: str
    """Both streams."""
    seconds: float


def run_together(
    commands: Mapping[str, Sequence[str]], *, seconds: float, environment: Mapping[str, str] = {}
) -> dict[str, Finished]:
    """Run commands side by side in the repository; whatever happens, none outlives the call.

    Args:
        commands: Name -> program and arguments.
        seconds: For all of them.
        environment: Set on top of this process's.
    """
    begin = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    finished: dict[str, Finished] = {}
    with tempfile.TemporaryDirectory(prefix="turbo-bench-") as folder:
        logs = {name: Path(folder, str(index)) for index, name in enumerate(commands)}
        try:
            for name, command in commands.items():
                with logs[name].open("wb") as log:
                    running[name] = subprocess.Popen(
                        list(command),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=REPOSITORY,
                        env={**os.environ, **environment},
                        start_new_session=True,  # so that its own children end with it
                    )
            while len(finished) < len(running):
                passed = time.monotonic() - begin
                for name, process in running.items():
                    code = process.poll()
                    if name not in finished and (code is not None or passed > seconds):
                        text = logs[name].read_text(encoding="utf-8", errors="replace")
                        finished[name] = Finished(code=code, output=text, seconds=passed)
                time.sleep(0.05)
        finally:
            for process in running.values():
                _end(process)
    return finished


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
