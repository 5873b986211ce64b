"""How every command ends: an error is one line, and the exit code says whose fault it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.results import ResultsFileError
from bench.side import MissingRivalError, SideError
from turbo.errors import BadInputError, TurboError
from turbo.messages import one_line, reason
from turbo.whole_file import require_writable_folder

OK, FAILED, BAD_INPUT = 0, 1, 2


def exit_code(work: Callable[[], int]) -> int:
    """Run a command's work.

    Returns:
        What the work returns; 1 if it failed; 2 for bad input, a rival that is not there and a
        model that does not fit the device's memory.
    """
    try:
        return work()
    except (BadInputError, ResultsFileError, MissingRivalError, torch.OutOfMemoryError) as error:
        return complain(BAD_INPUT, one_line(error, limit=None))
    except (TurboError, SideError) as error:
        return complain(FAILED, one_line(error, limit=None))
    except (OSError, RuntimeError, ValueError) as error:
        return complain(FAILED, f"{type(error).__name__}: {one_line(error, limit=500)}")


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
