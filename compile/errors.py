"""Errors of this package: bad input is a `ValueError`, work that failed is a `RuntimeError`.

A message is one line: what was given, what is allowed, how to go on.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable


class InputError(ValueError):
    """A setting or an argument cannot be used as given; nothing was started."""


class SignatureError(InputError):
    """Arguments differ from those that were captured or compiled."""


class CaptureError(RuntimeError):
    """A callable could not be captured, or its capture cannot be run any more."""

    key: Hashable | None
    """The key under which a collection was to keep it, if one was asked."""
    needed_bytes: int | None
    """Bytes of its static buffers where memory ran out, else None."""

    def __init__(
        self, message: str, *, key: Hashable | None = None, needed_bytes: int | None = None
    ) -> None:
        super().__init__(message)
        self.key = key
        self.needed_bytes = needed_bytes


class CompileError(RuntimeError):
    """Inductor could not compile a callable."""


class CacheError(RuntimeError):
    """An entry of the cache folder could not be removed."""


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_OUT_OF_MEMORY = (
    "can't allocate memory",  # PyTorch's allocator on a CPU
    "Cannot allocate memory",  # the system, when a file is to be mapped
    "out of memory",  # CUDA's own, also as Triton and the allocator of pinned memory pass it on
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocator, or was raised from one."""
    import torch  # an error of the cache's needs none

    one: BaseException | None = error
    while one is not None:
        if isinstance(one, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(one, OSError) and one.errno == errno.ENOMEM:
            return True
        if isinstance(one, RuntimeError) and any(words in str(one) for words in _OUT_OF_MEMORY):
            return True
        one = one.__cause__
    return False
