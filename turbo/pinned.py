"""Pinned host memory for many tensors, in buffers that PyTorch need not round up.

It rounds every piece of pinned memory up to a power of two: a matrix of 157 MB takes 268 MB, and
Z-Image's network in bfloat16, matrix by matrix, 19.7 GB for its 12.3. So tensors share buffers of
such sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGEST_BUFFER = 1 << 30
"""Bytes; what is larger has a buffer of its own."""
_ALIGNMENT = 64  # bytes: a cache line, and a multiple of what any dtype needs


def buffers_for(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Pack tensors into buffers whose sizes are powers of two, the largest first.

    Args:
        sizes: Bytes of each tensor.

    Returns:
        Bytes of each buffer; and for each tensor its buffer's number and where in it it begins.
    """
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    left = sum(padded)
    capacities: list[int] = []
    used: list[int] = []
    places = [(0, 0)] * len(sizes)
    for tensor in sorted(range(len(sizes)), key=lambda tensor: -padded[tensor]):
        size = padded[tensor]
        free = (n for n, capacity in enumerate(capacities) if capacity - used[n] >= size)
        buffer = next(free, len(capacities))
        if buffer == len(capacities):
            # No larger than what is left fills, unless this one needs it.
            usual = min(LARGEST_BUFFER, 1 << max(0, left.bit_length() - 1))
            capacities.append(max(usual, 1 << max(0, size - 1).bit_length()))
            used.append(0)
        places[tensor] = buffer, used[buffer]
        used[buffer] += size
        left -= size
    return capacities, places


def pinned_bytes(tensors: Sequence[Tensor]) -> int:
    """Pinned memory that `pinned_like` takes, in bytes."""
    return sum(buffers_for([tensor.nbytes for tensor in tensors])[0])


def pinned_like(
    tensors: Sequence[Tensor], check: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """Uninitialised pinned memory for tensors of these shapes and dtypes.

    Args:
        tensors: On any device, "meta" among them.
        check: Called before each buffer is made, which takes tenths of a second.
    """
    capacities, places = buffers_for([tensor.nbytes for tensor in tensors])
    buffers = []
    for capacity in capacities:
        check()
        buffers.append(_new_buffer(capacity))
    return [
        buffers[buffer][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, (buffer, start) in zip(tensors, places, strict=True)
    ]


def _new_buffer(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
