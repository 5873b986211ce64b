"""How every command ends: an error is one line, and the exit code says whose fault it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

import turbo.errors
from bench.results import ResultsFileError
from bench.side import MissingRivalError, SideError
from turbo.errors import BadInputError, TurboError
from turbo.messages import one_line, reason
from turbo.whole_file import require_writable_folder

OK, FAILED, BAD_INPUT = 0, 1, 2
OUT_OF_MEMORY = (torch.OutOfMemoryError, turbo.errors.OutOfMemoryError)
"""PyTorch's own error and what an engine makes of it."""


def exit_code(work: Callable[[], int]) -> int:
    """Run a command's work.

    Returns:
        What the work returns; 1 if it failed; 2 for bad input, a rival that is not there and a
        model that does not fit the device's memory.
    """
    try:
        return work()
    except (BadInputError, ResultsFileError, MissingRivalError, *OUT_OF_MEMORY) as error:
        return complain(BAD_INPUT, one_line(error, limit=None))
    except ModuleNotFoundError as error:
        return complain(BAD_INPUT, missing_packages([error.name or str(error)]))
    except (TurboError, SideError) as error:
        return complain(FAILED, one_line(error, limit=None))
    except (OSError, RuntimeError, ValueError) as error:
        return complain(FAILED, f"{type(error).__name__}: {one_line(error, limit=500)}")


def require_packages(*names: str) -> None:
    """See before the work that what the measuring needs is installed.

    Raises:
        BadInputError: It is not; says what installs it.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise BadInputError(missing_packages(missing))


def missing_packages(names: Sequence[str]) -> str:
    """What is said about packages that are not installed."""
    listed = " and ".join(names)
    return f"measuring needs {listed}, not installed here; pip install -e '.[bench]' adds them"


def complain(code: int, message: str) -> int:
    """Say what is wrong; returns the code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def require_writable(output: Path | None, option: str = "-o") -> None:
    """See before the work that a file can be written; its folder is made if it is not there.

    Args:
        output: The file; None asks for nothing.
        option: With which it was given.

    Raises:
        BadInputError: It cannot be.
    """
    if output is None:
        return
    try:
        if output.is_dir():
            raise IsADirectoryError("is a folder")
        require_writable_within(output.parent)
    except (OSError, TurboError) as error:
        raise BadInputError(
            f"cannot write {output}: {reason(error)}; give another {option}"
        ) from error


def require_writable_within(folder: Path) -> None:
    """As `require_writable`, of any file in a folder.

    Raises:
        OSError: The folder cannot be made.
        TurboError: Nothing can be made in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    require_writable_folder(folder)
