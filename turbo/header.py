"""The table of contents of a safetensors file, checked before anything in it is believed.

What a file is gets judged by its first bytes, never by its suffix: a pickle named
``.safetensors`` is still a pickle. Every defect is one `CheckpointError` of one line.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from turbo.errors import CheckpointError

# What PyTorch can represent; only tensors without or with few values reach these.
_LARGEST_DIMENSION = 1 << 32
_MOST_VALUES = 1 << 56
_MOST_DIMENSIONS = 64
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What a file's header says about one tensor."""

    dtype: str
    """Name in the file, such as ``BF16`` or ``Q8_0``."""
    shape: tuple[int, ...]
    offset: int
    """Position of the first byte, which tells the order on disk."""


@dataclass(frozen=True, slots=True)
class Header:
    """The table of contents of one model file."""

    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, Any]
    stamp: tuple[int, int]
    """Size in bytes and time of change in nanoseconds when the header was read."""
    format: str = "safetensors"
    """``safetensors`` or ``gguf``."""


def read_header(path: Path | str) -> Header:
    """Read and check the table of contents of a safetensors file.

    The safetensors library checks sizes and offsets; names that come twice, which it lets pass, are
    refused here.

    Raises:
        CheckpointError: The file is missing, empty, truncated, damaged or of another format.
    """
    path = Path(path)
    try:
        size, changed = file_stamp(path)
        with path.open("rb") as file:
            start = file.read(512)
            _refuse_other_formats(path, start, size)
            length = int.from_bytes(start[:8], "little")
            with safe_open(str(path), framework="pt", device="cpu"):
                pass  # opening is the library's check of header, offsets and file size
            file.seek(8)
            contents = json.loads(file.read(length), object_pairs_hook=_refuse_duplicates)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is truncated, damaged or no safetensors file ({one_line(error)}); "
            "get it again"
        ) from error
    metadata = contents.pop("__metadata__", None) or {}
    tensors = {name: _entry(path, name, fields) for name, fields in contents.items()}
    return Header(path, tensors, metadata, (size, changed))


def file_stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds, by which a change is noticed."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no such file, or it cannot be read") from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise CheckpointError(f"{path}: is {what}; give a safetensors file")
    return status.st_size, status.st_mtime_ns


def check_stamp(path: Path, stamp: tuple[int, int]) -> None:
    """Raise CheckpointError if the file is not as it was when `stamp` was taken."""
    if file_stamp(path) != stamp:
        raise CheckpointError(f"{path}: has changed since it was opened; load the model again")


def _refuse_other_formats(path: Path, start: bytes, size: int) -> None:
    """Name the format of a file that is not safetensors.

    A safetensors file begins with the header's length, whose bytes may well look like a pickle's
    (640 = 80 02) or like a zip's: so it is recognised first.
    """
    if not size:
        raise CheckpointError(f"{path}: is empty")
    length = int.from_bytes(start[:8], "little")
    if size >= 8 and length <= size - 8 and start[8:9] == b"{":
        return
    for magic, sentence in _OTHER_FORMATS:
        if start.startswith(magic):
            raise CheckpointError(f"{path}: {sentence}")


_PICKLE_SENTENCE = (
    "is a pickle (PyTorch .pt/.ckpt/.bin), which can run code when read and never is; "
    "give a safetensors file"
)
_OTHER_FORMATS = (
    (b"GGUF", "is a GGUF file, which cannot be used here; give a safetensors file"),
    (b"PK\x03\x04", _PICKLE_SENTENCE),
    *((bytes((0x80, version)), _PICKLE_SENTENCE) for version in range(2, 6)),
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights; fetch the file itself"),
    (b"<", "is a web page, not a model file; download it again"),
)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"a name comes twice in its header ({some_names(twice)})")
    return unique


def _entry(path: Path, name: str, fields: Mapping[str, Any]) -> TensorEntry:
    shape = tuple(fields["shape"])
    if not is_possible(shape):
        given = shorten(str(list(shape)))
        raise CheckpointError(f"{path}: {shorten(name)} has an impossible shape {given}")
    return TensorEntry(fields["dtype"], shape, fields["data_offsets"][0])


def is_possible(shape: Sequence[int]) -> bool:
    """Whether a tensor can have this shape; one without values can claim anything in a file."""
    return (
        len(shape) <= _MOST_DIMENSIONS
        and all(size <= _LARGEST_DIMENSION for size in shape)
        and math.prod(max(size, 1) for size in shape) <= _MOST_VALUES  # strides pass over zeros
    )


def some_names(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    shown = ", ".join(shorten(name) for name in names[:_NAMES_SHOWN])
    return f"{shown}, ..." if len(names) > _NAMES_SHOWN else shown or "none"


def shorten(text: str) -> str:
    """Keep a message one line long, whatever a damaged header calls its tensors."""
    printable = text if text.isprintable() else repr(text)[1:-1]
    return printable if len(printable) <= 120 else f"{printable[:117]}..."


def one_line(error: BaseException) -> str:
    """The first line of another library's message."""
    return shorten(next(iter(str(error).splitlines()), type(error).__name__))
