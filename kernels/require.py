"""Checks of a launcher's arguments: an error says what was given and all that is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels read and write; inside they work in float32."""

INTERPRETED: bool = knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels, on any device; decided when they are imported."""

MOST_VALUES = 2**30
"""Values a tensor may hold, so that a position in it and a step past its end fit 32 bits."""


def require(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    *,
    like: Tensor | None = None,
    contiguous: bool = False,
) -> None:
    """Check one tensor.

    Args:
        name: The argument's name.
        tensor: What was given.
        shape: A size for each dimension, or its name where any size from 1 on will do.
        dtypes: Those allowed.
        like: A tensor on whose device it has to be; None for any device.
        contiguous: Whether its values have to lie in order without gaps.

    Raises:
        ValueError: The tensor is something else, or holds more than `MOST_VALUES` values.
    """
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(shape) and all(
        size >= 1 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(sizes, shape)
    )
    placed = like is None or tensor.device == like.device
    ordered = tensor.is_contiguous() or not contiguous
    if not (fits and placed and ordered and tensor.dtype in dtypes):
        order = "contiguous " if contiguous else ""
        place = "" if like is None else f" on {like.device}"
        got = "" if tensor.is_contiguous() else "non-contiguous "
        raise ValueError(
            f"{name} must be a {order}tensor [{', '.join(map(str, shape))}] of "
            f"{' or '.join(map(_short, dtypes))}{place}, got a {got}tensor "
            f"[{', '.join(map(str, sizes))}] of {_short(tensor.dtype)} on {tensor.device}"
        )
    if tensor.numel() > MOST_VALUES:
        raise ValueError(
            f"{name} may hold at most {MOST_VALUES} values, got {tensor.numel()}: "
            f"[{', '.join(map(str, sizes))}]; split the batch"
        )


def require_launchable(name: str, tensor: Tensor, kernel: object, reference: str) -> None:
    """Check that Triton can run on a tensor's device.

    Args:
        name: The argument's name.
        tensor: What was given.
        kernel: The kernel; under TRITON_INTERPRET=1 it is not a `JITFunction` and runs anywhere.
        reference: Name of the implementation that runs on any device.

    Raises:
        ValueError: It cannot.
    """
    if isinstance(kernel, JITFunction) and tensor.device.type not in ("cuda", "meta"):
        raise ValueError(
            f"{name} must be on a CUDA device, got {tensor.device}; use {reference} there, or set "
            "TRITON_INTERPRET=1 before the start to try the kernel out in Triton's interpreter"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
