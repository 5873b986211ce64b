"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from turbo.errors import BadInputError, SaveError
from turbo.messages import reason


def write_whole(path: str | Path, content: bytes, *, overwrite: bool = True) -> None:
    """Write a file so that its name never holds half of it, not even after a power cut.

    Args:
        path: The file; its folder must exist. A link is followed.
        content: All of it.
        overwrite: Replace a file of that name.

    Raises:
        SaveError: The disk is full, the folder is missing or cannot be written; nothing is left.
        FileExistsError: The file exists and `overwrite` is false.
    """
    temporary = None
    try:
        target = Path(os.path.realpath(path))
        temporary = _temporary_name(target.parent)
        _write_through(temporary, content)
        _give_name(temporary, target, overwrite)
    except FileExistsError:
        raise
    except (OSError, ValueError) as error:
        raise cannot_save(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def cannot_save(path: str | Path, error: Exception) -> SaveError:
    """The error for a file that could not be written because of another error."""
    return SaveError(
        f"cannot save {str(path)!r}: {reason(error)}; nothing was written under that name"
    )


def require_writable_folder(folder: Path) -> None:
    """Find out before the work whether a file can be made in `folder`.

    Raises:
        BadInputError: There is no such folder.
        SaveError: No file can be made in it.
    """
    if not os.path.isdir(folder):
        raise BadInputError(f"the output folder {str(folder)!r} does not exist; make it first")
    probe = _temporary_name(folder)
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise SaveError(f"cannot write into the folder {str(folder)!r}: {reason(error)}") from error


def _temporary_name(folder: Path) -> Path:
    return folder / f".turbo-{secrets.token_hex(8)}.tmp"


def _write_through(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        write_out(file)


def write_out(file: BinaryIO) -> None:
    """Have what was written to a file on its disk, where its folder can tell."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network folders
            raise


def _give_name(temporary: Path, target: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)  # fails if the name is taken, also by someone just now
    except FileExistsError:
        raise
    except OSError:  # no hard links here: nearly as good
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.replace(temporary, target)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder, under another name until the block has ended well.

    Raises:
        SaveError: It cannot be written, or the disk is full; nothing is left.
    """
    temporary = out.parent / f".turbo-{secrets.token_hex(8)}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        os.rename(temporary, out)
    except OSError as error:
        raise cannot_save(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
