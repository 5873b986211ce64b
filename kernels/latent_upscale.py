"""Nearest-exact resize of a latent and its renoising: how each stage but the first begins.

One pass over the new size [batch, channels, height, width] instead of eager PyTorch's six; bound by
memory bandwidth. With ``x = (resized - shift) * scale`` the result is
``sigma * noise + (1 - sigma) * x``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .require import FLOATS, require, require_launchable

_BLOCK = 1024


def latent_upscale_reference(
    latent: Tensor,
    noise: Tensor,
    sigma: float,
    height: int,
    width: int,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The specification: plain PyTorch, any device, float32 inside."""
    resized = F.interpolate(latent, size=(height, width), mode="nearest-exact")
    clean = (resized.float() - shift) * scale
    return (sigma * noise + (1 - sigma) * clean).to(dtype or latent.dtype)


@triton_op("turbo::latent_upscale", mutates_args=())
def latent_upscale(
    latent: Tensor,
    noise: Tensor,
    sigma: float,
    height: int,
    width: int,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Resize a latent, bring it to the sampler's scale and renoise it.

    Each product and sum is rounded to float32 as in separate PyTorch operations, so a float32
    result equals theirs bit for bit, also where values are infinite or NaN: sigma 0 and 1 leave
    nothing out, and 0 times infinity is NaN. The source of a cell is the one that
    `torch.nn.functional.interpolate` takes on a CUDA device. (On a CPU, PyTorch reaches the same
    for channels-last tensors of 4 channels or more; for others it rounds differently and takes the
    neighbour at some sizes: the 23 found among 42,000 grow more than 20 times, such as 2 to 235.)

    Args:
        latent: [batch, channels, any height, any width] in any memory layout; float32, bfloat16 or
            float16.
        noise: [batch, channels, height, width], float32, contiguous.
        sigma: Noise level of the result, 0 or more. (A schedule's first, where it should be 1, may
            be a rounding above.)
        height: New number of rows, in latent cells.
        width: New number of columns, in latent cells.
        scale: Factor to the sampler's scale, applied after `shift`.
        shift: Subtracted first.
        dtype: Of the result, float32, bfloat16 or float16; None for that of `latent`.

    Returns:
        A new contiguous tensor [batch, channels, height, width].

    Raises:
        ValueError: A tensor, size, sigma or dtype is not as above, or the device is not CUDA.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be 1 or more cells, got {height} and {width}")
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be 0 or more and finite, got {sigma}")
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    require("latent", latent, ("batch", "channels", "height", "width"), FLOATS)
    batch, channels, rows, columns = latent.shape
    size = (batch, channels, height, width)
    require("noise", noise, size, (torch.float32,), like=latent, contiguous=True)
    require_launchable("latent", latent, _latent_upscale_kernel, "latent_upscale_reference")
    out = torch.empty(size, dtype=dtype or latent.dtype, device=latent.device)
    wrap_triton(_latent_upscale_kernel)[(batch * channels * triton.cdiv(height * width, _BLOCK),)](
        latent,
        noise,
        out,
        sigma,
        1 - sigma,  # here, in float64, as the reference does
        scale,
        shift,
        channels,
        rows,
        columns,
        height,
        width,
        *latent.stride(),
        BLOCK=_BLOCK,
    )
    return out


@triton.jit
def _latent_upscale_kernel(
    latent_ptr,
    noise_ptr,
    out_ptr,
    sigma,
    keep,
    scale,
    shift,
    channels,
    rows,
    columns,
    new_rows,
    new_columns,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    BLOCK: tl.constexpr,
):
    cells = new_rows * new_columns
    blocks = tl.cdiv(cells, BLOCK)
    plane = tl.program_id(0) // blocks
    cell = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    row = _source(cell // new_columns, rows, new_rows).to(tl.int64)
    column = _source(cell % new_columns, columns, new_columns).to(tl.int64)
    # int64: a view's strides may span far more memory than its values
    batch, channel = (plane // channels).to(tl.int64), (plane % channels).to(tl.int64)
    source = batch * batch_stride + channel * channel_stride
    source += row * row_stride + column * column_stride
    latent = tl.load(latent_ptr + source, mask=inside).to(tl.float32)
    target = plane.to(tl.int64) * cells + cell
    noise = tl.load(noise_ptr + target, mask=inside)
    sigma = tl.cast(sigma, tl.float32)
    clean = (latent - tl.cast(shift, tl.float32)) * tl.cast(scale, tl.float32)
    # A plain product may be merged with the sum after it and skip its own rounding, which moves the
    # last bit. Adding -0 leaves any product as it is, and a -0 that the compiler cannot see through
    # keeps this a fused operation of its own. (Sigma is not negative, so sigma * -0 is -0.)
    nothing = sigma * -0.0
    noisy = tl.fma(sigma, noise, nothing) + tl.fma(tl.cast(keep, tl.float32), clean, nothing)
    tl.store(out_ptr + target, noisy, mask=inside)


@triton.jit
def _source(index, size, new_size):
    """The cell under the middle of the new cell; the rounding steps are part of the result."""
    scale = tl.div_rn(tl.cast(size, tl.float32), tl.cast(new_size, tl.float32))
    return tl.minimum(tl.floor((index.to(tl.float32) + 0.5) * scale).to(tl.int32), size - 1)
