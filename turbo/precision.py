"""Which dtype to calculate in, which need not be the one that weights are kept in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def arithmetic_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype to calculate in with weights of `dtype`.

    It is `dtype` itself, but float32 on a CPU without instructions for it, where PyTorch imitates
    half precision: a product of 2336 x 512 and 512 x 1536 bfloat16 values took 243 ms there, the
    same with the weights widened on the way 28 ms (two cores with AVX2). The reference calculates
    in float32 on every CPU.
    """
    if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    has = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        supported = has._is_mkldnn_bf16_supported()
    else:
        supported = has._is_mkldnn_fp16_supported()
    return dtype if supported else torch.float32


@contextlib.contextmanager
def whole_float32(device: torch.device) -> Iterator[None]:
    """Have convolutions of float32 values calculated in float32.

    cuDNN rounds their factors to TF32, which has 10 bits of mantissa, unless it is told not to.
    """
    if device.type != "cuda":
        yield
        return
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before
