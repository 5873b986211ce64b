"""A results file that is whole at any moment, and the parts that fill it one after the other."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo.whole_file import write_whole

FORMAT = "turbo-bench/1"
"""What a results file says it is; `bench/schema.md` describes it."""
KINDS = ("run", "compare", "load", "quality", "device")

Found = dict[str, Any]
"""What a part has found so far, ready for JSON."""
LEAST_SECONDS = 3.0
"""A part for which less is left is not begun."""


class OutOfTimeError(BaseException):
    """A part's time is over. No `Exception`: what catches those must not catch this."""


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of the work."""

    name: str
    run: Callable[[Found, float], None]
    """Fills a dictionary as it goes, so that what it has found survives its end; told how many
    seconds it has."""
    seconds: float
    """How long it may take."""


class ResultsFileError(ValueError):
    """A results file that cannot be used; one line that says why."""


def read_results(path: Path, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """Read a results file.

    Args:
        path: The file.
        kinds: Those that will do.

    Raises:
        ResultsFileError: It is missing, truncated, of another format or of another kind.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultsFileError(f"{path}: no such file") from error
    except OSError as error:
        raise ResultsFileError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ResultsFileError(f"{path}: is no text file, so no results file") from error
    except (ValueError, RecursionError) as error:
        raise ResultsFileError(f"{path}: is no whole JSON file ({error}); measure again") from error
    written = data.get("format") if isinstance(data, dict) else None
    if written != FORMAT:
        had = "has no format entry" if written is None else f"has format {written!r}"
        raise ResultsFileError(f"{path}: {had}, this version reads {FORMAT!r}; measure again")
    if data.get("kind") not in kinds:
        raise ResultsFileError(
            f"{path}: holds {data.get('kind')!r} results, needed are {' or '.join(kinds)}"
        )
    if not isinstance(data.get("machine"), dict) or not isinstance(data["machine"].get("id"), str):
        raise ResultsFileError(f"{path}: does not say which machine it is from; measure again")
    checked: dict[str, Any] = data
    return checked


def require_same_machine(path: Path, data: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Refuse results of another machine.

    Raises:
        ResultsFileError: The ids differ; says what differs.
    """
    theirs = data["machine"]
    if theirs["id"] == machine["id"]:
        return
    named = ("processor", "vector_instructions", "cores", "memory_gib", "gpu")
    differing = [
        f"{name} {theirs.get(name)!r} there, {machine.get(name)!r} here"
        for name in named
        if theirs.get(name) != machine.get(name)
    ]
    raise ResultsFileError(
        f"{path}: was measured on another machine ({theirs['id']}, this is {machine['id']}: "
        f"{'; '.join(differing) or 'no detail'}); times of two machines are not compared"
    )


class Results:
    """A dictionary with a file that always holds its last written state, whole.

    Args:
        path: The file; None keeps nothing.
        header: What it begins with.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {**header, "partial": True, "parts": {}}

    def write(self) -> None:
        """Replace the file: another process sees the old or the new one, never half of one.

        Raises:
            SaveError: It cannot be written.
        """
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, (json.dumps(self.data, indent=1) + "\n").encode())


def run_parts(
    parts: Sequence[Part],
    results: Results,
    *,
    seconds: float,
    around: Callable[[Found], contextlib.AbstractContextManager[None]] | None = None,
) -> None:
    """Run parts in order and write the file after each; one that fails does not stop the others.

    Args:
        parts: In order of worth: what comes last may find no time left.
        results: Where they are recorded.
        seconds: For all of them.
        around: Made with a part's dictionary and entered around it.
    """
    deadline = time.monotonic() + seconds
    results.write()
    for part in parts:
        found: Found = {}
        results.data["parts"][part.name] = found
        left = min(part.seconds, deadline - time.monotonic())
        print(f"--- {part.name}", flush=True)
        if left < LEAST_SECONDS:
            found["error"] = {"type": "OutOfTimeError", "message": "no time was left to begin it"}
            continue
        try:
            _run_part(part, found, left, around)
        finally:
            results.write()
    results.data["partial"] = False
    results.write()


def _run_part(part: Part, found: Found, seconds: float, around: Any) -> None:
    begin = time.monotonic()
    try:
        with time_limit(seconds), around(found) if around else contextlib.nullcontext():
            part.run(found, seconds)
    except OutOfTimeError:
        message = f"stopped after {seconds:.0f} s; what it had found is kept"
        found["error"] = {"type": "OutOfTimeError", "message": message}
    except Exception as error:
        found["error"] = describe_error(error)
    except BaseException as error:  # Ctrl-C, or the end of the process
        found["error"] = describe_error(error)
        raise
    finally:
        found["seconds"] = round(time.monotonic() - begin, 2)
        if "error" in found:
            print(f"{part.name}: {found['error']['type']}: {found['error']['message']}", flush=True)


def describe_error(error: BaseException) -> dict[str, str]:
    """An exception for the file."""
    return {"type": type(error).__name__, "message": str(error)[:1000]}


@contextlib.contextmanager
def recorded(found: Found, name: str) -> Iterator[Found]:
    """A dictionary under `name`; what ends the block is the reason why it holds no number."""
    entry: Found = {}
    found[name] = entry
    try:
        yield entry
    except BaseException as error:
        entry.clear()
        entry["withheld"] = f"{type(error).__name__}: {str(error)[:1000]}"
        if not isinstance(error, Exception):  # the part's time, or the run, is over
            raise


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` in the block after so many seconds (in the main thread, on Unix)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    # Again every 5 s, because Python drops what is raised while an object is being deleted.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
