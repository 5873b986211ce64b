"""EasyCache's similarity check: one launch before a network call, one after a real one.

Before a call, `easycache_compare` measures how far the latent has moved since the last real run,
adds the change that this makes the output expect, and decides. After a real run,
`easycache_observe` remembers its input, output and difference. All numbers stay on the device in
one small float32 tensor, the state; the host reads its first value, 1 to skip and 0 to run.

``sub`` takes every 8th row and column. With x a network input, y its output, and last those of the
last real run:

    distance = mean |sub(x) - sub(last x)|
    rate     = mean |sub(y) - sub(last y)| / distance, of the last run that had a distance
    norm     = mean |y|, of the last run
    sum      = sum + rate * distance / norm; skip while sum < threshold, else sum = 0

A state of zeros is a fresh one: 0 / 0 makes the sum NaN, which is below no threshold, until two
runs have given norm and rate.

Sums over a whole output are taken on many multiprocessors without atomics: each program of
`easycache_observe` leaves its share in the state, and the next `easycache_compare` adds these in
a fixed order. So equal inputs give equal bits.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .require import FLOATS, require, require_launchable


class Place(IntEnum):
    """Where the state holds what."""

    SKIP = 0
    """The last decision: 1 to skip, 0 to run."""
    COMPARED = 1
    """The sum that was held against the threshold."""
    SUM = 2
    """The sum that the next comparison goes on from."""
    DISTANCE = 3
    """The last distance."""
    RUN_DISTANCE = 4
    """The distance that belongs to the last change."""
    CHANGE = 5
    """Mean change of the output in a real run; as of the last comparison, like the next two."""
    RATE = 6
    """Change over distance."""
    NORM = 7
    """Mean size of the last output."""
    COUNT = 8
    """Number of values in the last output."""


MOST_PROGRAMS = 128
"""Of `easycache_observe`: about as many as an H100 or H200 has multiprocessors."""
STATE_SIZE = 16 + 2 * MOST_PROGRAMS
"""Values in a state: 16 places, then each program's share of the norm, then of the change."""

_SKIP, _COMPARED, _SUM, _DISTANCE, _RUN_DISTANCE, _CHANGE, _RATE, _NORM, _COUNT = (
    tl.constexpr(place.value) for place in Place
)
_SHARES = tl.constexpr(16)
_PROGRAMS = tl.constexpr(MOST_PROGRAMS)
_STRIDE = tl.constexpr(8)
_COMPARE_BLOCK = 4096
_OBSERVE_BLOCK = 2048


def easycache_compare_reference(
    latent: Tensor, last_input: Tensor, state: Tensor, threshold: float, *, parity: bool = False
) -> None:
    """The specification: plain PyTorch, any device. A state goes with one implementation."""
    dtype = latent.dtype if parity else torch.float32
    seen = latent[..., ::8, ::8].to(dtype)
    distance = (seen - last_input.to(dtype)).abs().mean()
    rate = state[Place.CHANGE].to(dtype) / state[Place.RUN_DISTANCE].to(dtype)
    compared = state[Place.SUM].to(dtype) + rate * distance / state[Place.NORM].to(dtype)
    skip = compared < threshold
    state[Place.SKIP], state[Place.COMPARED] = skip, compared
    state[Place.SUM] = compared if skip else 0.0
    state[Place.DISTANCE], state[Place.RATE] = distance, rate


def easycache_observe_reference(
    latent: Tensor,
    output: Tensor,
    last_input: Tensor,
    last_output: Tensor,
    difference: Tensor,
    state: Tensor,
    row: int,
    *,
    measured: bool,
    parity: bool = False,
) -> None:
    """The specification: plain PyTorch, any device. A state goes with one implementation."""
    dtype = latent.dtype if parity else torch.float32
    rows = slice(row, row + last_input.shape[0])
    seen = output[rows, :, ::8, ::8]
    if measured:
        state[Place.CHANGE] = (seen.to(dtype) - last_output.to(dtype)).abs().mean()
        state[Place.RUN_DISTANCE] = state[Place.DISTANCE]
    state[Place.NORM] = output.to(dtype).abs().mean()
    last_input.copy_(latent[rows, :, ::8, ::8])
    last_output.copy_(seen)
    difference.copy_(output - latent)


@triton_op("turbo::easycache_compare", mutates_args=("state",))
def easycache_compare(
    latent: Tensor, last_input: Tensor, state: Tensor, threshold: float, *, parity: bool = False
) -> None:
    """Decide whether a network call may be skipped: ``state[Place.SKIP]`` becomes 1 or 0.

    Args:
        latent: What the network would see, the rows of the compared caption alone, [batch,
            channels, height, width] in any memory layout; float32, bfloat16 or float16.
        last_input: As `easycache_observe` left it, [batch, channels, ceil(height / 8),
            ceil(width / 8)], dtype of `latent`, contiguous.
        state: [STATE_SIZE], float32, contiguous; zeros at a run's start. Changed.
        threshold: Sum from which the network runs again.
        parity: Round every number that PyTorch would hold in a tensor, and the threshold, to the
            dtype of `latent`, as ComfyUI's arithmetic does; else float32 throughout.

    Raises:
        ValueError: A tensor is not as above, or the device is not CUDA.

    Source: ComfyUI's EasyCache node, after arXiv:2507.02860.
    """
    require("latent", latent, ("batch", "channels", "height", "width"), FLOATS)
    batch, channels, height, width = latent.shape
    rows, columns = -(-height // 8), -(-width // 8)
    kept = (batch, channels, rows, columns)
    require("last_input", last_input, kept, (latent.dtype,), like=latent, contiguous=True)
    require("state", state, (STATE_SIZE,), (torch.float32,), like=latent, contiguous=True)
    require_launchable("latent", latent, _compare_kernel, "easycache_compare_reference")
    wrap_triton(_compare_kernel)[(1,)](
        latent,
        last_input,
        state,
        threshold,
        last_input.numel(),
        channels,
        rows,
        columns,
        *latent.stride(),
        PARITY=parity,
        BLOCK=_COMPARE_BLOCK,
        num_warps=32,
    )


@triton_op(
    "turbo::easycache_observe", mutates_args=("last_input", "last_output", "difference", "state")
)
def easycache_observe(
    latent: Tensor,
    output: Tensor,
    last_input: Tensor,
    last_output: Tensor,
    difference: Tensor,
    state: Tensor,
    row: int,
    *,
    measured: bool,
    parity: bool = False,
) -> None:
    """Remember a real run: its input and output, their difference, and how much changed.

    Args:
        latent: What the network saw, all captions, [rows, channels, height, width] in any memory
            layout; float32, bfloat16 or float16.
        output: What it returned, shape and dtype of `latent` in any memory layout.
        last_input: Receives every 8th row and column of `latent`, [batch, channels,
            ceil(height / 8), ceil(width / 8)], dtype of `latent`, contiguous. Changed.
        last_output: The same of `output`. Changed.
        difference: Receives ``output - latent``, their shape and dtype, contiguous. Changed.
        state: See `easycache_compare`. Changed.
        row: Where in `latent` the compared caption's `batch` rows begin.
        measured: Whether `easycache_compare` was called for this very input, so that the change of
            the output belongs to the state's distance; false also for a first run, whose
            `last_output` means nothing.
        parity: See `easycache_compare`.

    Raises:
        ValueError: A tensor or `row` is not as above, or the device is not CUDA.

    Source: ComfyUI's EasyCache node, after arXiv:2507.02860.
    """
    require("latent", latent, ("rows", "channels", "height", "width"), FLOATS)
    everything, channels, height, width = latent.shape
    rows, columns = -(-height // 8), -(-width // 8)
    kept = ("batch", channels, rows, columns)
    dtypes = (latent.dtype,)
    require("output", output, tuple(latent.shape), dtypes, like=latent)
    require("difference", difference, tuple(latent.shape), dtypes, like=latent, contiguous=True)
    require("last_input", last_input, kept, dtypes, like=latent, contiguous=True)
    batch = last_input.shape[0]
    require("last_output", last_output, (batch, *kept[1:]), dtypes, like=latent, contiguous=True)
    require("state", state, (STATE_SIZE,), (torch.float32,), like=latent, contiguous=True)
    if not 0 <= row <= everything - batch:
        raise ValueError(
            f"row must be from 0 to {everything - batch}, so that the {batch} rows of last_input "
            f"lie in the {everything} of latent, got {row}"
        )
    require_launchable("latent", latent, _observe_kernel, "easycache_observe_reference")
    programs = min(MOST_PROGRAMS, triton.cdiv(output.numel(), _OBSERVE_BLOCK))
    wrap_triton(_observe_kernel)[(programs,)](
        latent,
        output,
        last_input,
        last_output,
        difference,
        state,
        row,
        output.numel(),
        last_input.numel(),
        channels,
        height,
        width,
        rows,
        columns,
        *latent.stride(),
        *output.stride(),
        MEASURED=measured,
        PARITY=parity,
        BLOCK=_OBSERVE_BLOCK,
        num_warps=16,
    )


@triton.jit
def _compare_kernel(
    latent_ptr,
    last_input_ptr,
    state_ptr,
    threshold,
    count,
    channels,
    rows,
    columns,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    PARITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = latent_ptr.dtype.element_ty
    moved = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < count
        source = _offset(
            index,
            channels,
            rows,
            columns,
            batch_stride,
            channel_stride,
            row_stride,
            column_stride,
            _STRIDE,
        )
        x = tl.load(latent_ptr + source, mask=inside, other=0).to(tl.float32)
        last = tl.load(last_input_ptr + index, mask=inside, other=0).to(tl.float32)
        moved += tl.abs(_rounded(x - last, dtype, PARITY))
    distance = _mean(tl.sum(moved, axis=0), count, dtype, PARITY)
    share = _SHARES + tl.arange(0, _PROGRAMS)
    change = tl.sum(tl.load(state_ptr + _PROGRAMS + share), axis=0)
    change = _mean(change, count, dtype, PARITY)
    norm = tl.sum(tl.load(state_ptr + share), axis=0)
    norm = _mean(norm, tl.load(state_ptr + _COUNT), dtype, PARITY)
    rate = _rounded(tl.div_rn(change, tl.load(state_ptr + _RUN_DISTANCE)), dtype, PARITY)
    expected = _rounded(rate * distance, dtype, PARITY)
    expected = _rounded(tl.div_rn(expected, norm), dtype, PARITY)
    compared = _rounded(tl.load(state_ptr + _SUM) + expected, dtype, PARITY)
    skip = compared < _rounded(tl.cast(threshold, tl.float32), dtype, PARITY)
    tl.store(state_ptr + _SKIP, tl.where(skip, 1.0, 0.0))
    tl.store(state_ptr + _COMPARED, compared)
    tl.store(state_ptr + _SUM, tl.where(skip, compared, 0.0))
    tl.store(state_ptr + _DISTANCE, distance)
    tl.store(state_ptr + _CHANGE, change)
    tl.store(state_ptr + _RATE, rate)
    tl.store(state_ptr + _NORM, norm)


@triton.jit
def _observe_kernel(
    latent_ptr,
    output_ptr,
    last_input_ptr,
    last_output_ptr,
    difference_ptr,
    state_ptr,
    first_row,
    count,
    kept_count,
    channels,
    height,
    width,
    rows,
    columns,
    latent_batch_stride,
    latent_channel_stride,
    latent_row_stride,
    latent_column_stride,
    output_batch_stride,
    output_channel_stride,
    output_row_stride,
    output_column_stride,
    MEASURED: tl.constexpr,
    PARITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = latent_ptr.dtype.element_ty
    program = tl.program_id(0)
    step = tl.num_programs(0) * BLOCK

    size = tl.zeros((BLOCK,), tl.float32)
    for start in range(program * BLOCK, count, step):
        index = start + tl.arange(0, BLOCK)
        inside = index < count
        source = _offset(
            index,
            channels,
            height,
            width,
            latent_batch_stride,
            latent_channel_stride,
            latent_row_stride,
            latent_column_stride,
            1,
        )
        x = tl.load(latent_ptr + source, mask=inside, other=0).to(tl.float32)
        source = _offset(
            index,
            channels,
            height,
            width,
            output_batch_stride,
            output_channel_stride,
            output_row_stride,
            output_column_stride,
            1,
        )
        y = tl.load(output_ptr + source, mask=inside, other=0).to(tl.float32)
        tl.store(difference_ptr + index, y - x, mask=inside)
        size += tl.abs(y)
    tl.store(state_ptr + _SHARES + program, tl.sum(size, axis=0))

    changed = tl.zeros((BLOCK,), tl.float32)
    latent_ptr += tl.cast(first_row, tl.int64) * latent_batch_stride
    output_ptr += tl.cast(first_row, tl.int64) * output_batch_stride
    for start in range(program * BLOCK, kept_count, step):
        index = start + tl.arange(0, BLOCK)
        inside = index < kept_count
        source = _offset(
            index,
            channels,
            rows,
            columns,
            latent_batch_stride,
            latent_channel_stride,
            latent_row_stride,
            latent_column_stride,
            _STRIDE,
        )
        x = tl.load(latent_ptr + source, mask=inside, other=0)
        source = _offset(
            index,
            channels,
            rows,
            columns,
            output_batch_stride,
            output_channel_stride,
            output_row_stride,
            output_column_stride,
            _STRIDE,
        )
        y = tl.load(output_ptr + source, mask=inside, other=0)
        if MEASURED:
            last = tl.load(last_output_ptr + index, mask=inside, other=0).to(tl.float32)
            changed += tl.abs(_rounded(y.to(tl.float32) - last, dtype, PARITY))
            # Nothing says that the thread which read a value is the one to overwrite it.
            tl.debug_barrier()
        tl.store(last_input_ptr + index, x, mask=inside)
        tl.store(last_output_ptr + index, y, mask=inside)
    if MEASURED:
        tl.store(state_ptr + _SHARES + _PROGRAMS + program, tl.sum(changed, axis=0))
    if program == 0:
        tl.store(state_ptr + _COUNT, tl.cast(count, tl.float32))
        if MEASURED:
            tl.store(state_ptr + _RUN_DISTANCE, tl.load(state_ptr + _DISTANCE))


@triton.jit
def _offset(
    index,
    channels,
    rows,
    columns,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    STEP: tl.constexpr,
):
    """Where in memory each value of [batch, channels, rows, columns] lies, counted in that order.

    The strides are those of the tensor of which every STEP-th row and column is looked at.
    """
    line = index // columns
    plane = line // rows
    # int64: a view's strides may span far more memory than its values
    offset = (plane // channels).to(tl.int64) * batch_stride
    offset += (plane % channels).to(tl.int64) * channel_stride
    offset += (line % rows).to(tl.int64) * STEP * row_stride
    return offset + (index % columns).to(tl.int64) * STEP * column_stride


@triton.jit
def _mean(total, count, dtype: tl.constexpr, PARITY: tl.constexpr):
    return _rounded(tl.div_rn(total, tl.cast(count, tl.float32)), dtype, PARITY)


@triton.jit
def _rounded(value, dtype: tl.constexpr, PARITY: tl.constexpr):
    if PARITY:
        value = value.to(dtype).to(tl.float32)
    return value
