"""What is done when memory runs out: say in which phase, and let go of what filled it."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator

import torch

from turbo.compile import CaptureError
from turbo.compile import is_out_of_memory as is_out_of_memory
from turbo.errors import OutOfMemoryError
from turbo.messages import one_line

_WORK = {
    "loading": "the model was loaded",
    "encoding": "a prompt or a picture was encoded",
    "capture": "a part was captured",
    "sampling": "the network ran",
    "decoding": "the picture was decoded",
}


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from or beside, the newest first."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Give an error of an allocator the phase of the innermost such block; others pass as is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        in_capture = any(isinstance(one, CaptureError) for one in chain(error))
        raise _typed("capture" if in_capture else name, error) from error


def _typed(name: str, error: BaseException) -> OutOfMemoryError:
    first = next(one for one in chain(error) if one.__cause__ is None)
    told = one_line(str(first) or type(first).__name__, 200)
    return OutOfMemoryError(f"memory ran out while {_WORK[name]} ({told})", name)


def drop_frames(error: BaseException) -> None:
    """Let go of what the frames of an error hold: the tensors that filled the memory."""
    for one in chain(error):
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        _empty_pinned_cache()


def _empty_pinned_cache() -> None:
    """Give pinned host memory back that nothing uses; PyTorch has no public name for it yet."""
    for name in ("_accelerator_emptyHostCache", "_host_emptyCache"):
        empty = getattr(torch._C, name, None)
        if empty is not None:
            empty()
            return


def out_of_memory(
    error: OutOfMemoryError, plan: str, lower: str | None, *, may_allow_fallback: bool
) -> OutOfMemoryError:
    """The error to show, which holds no tensor: what happened, and what would help.

    Args:
        error: What happened.
        plan: Name of the memory plan in which it did.
        lower: The next smaller one; None if there is none.
        may_allow_fallback: Whether `allow_fallback` is off and would have had that one tried.
    """
    help_ = "use 8-bit weights (quantize), bfloat16, or a smaller last stage"
    if lower is not None:
        by_itself = ", or allow_fallback to have it tried by itself" * may_allow_fallback
        help_ = f"use memory {lower!r}{by_itself}; or {help_}"
    return OutOfMemoryError(f"{error}, with memory {plan!r}; {help_}", error.phase)


def tried_again(error: OutOfMemoryError, plan: str, lower: str) -> str:
    """The line to log where the next smaller memory plan is tried after an error."""
    return f"{error}, with memory {plan!r}; memory {lower!r} is tried (allow_fallback)"
