"""8-bit weights, and products with them.

A matrix is kept as int8 or float8 values and one float32 scale for each of its rows, made by
torchao. The product is torchao's too, written out over plain tensors: its tensor subclasses have no
stable hash, so code compiled over them would not be found in the cache by the next process. The
tests hold both to the same bits.

* ``fp8``: float8 (e4m3) weights; activations are made float8 on the way, a scale for each token.
  A scale for a whole tensor, as other programs choose it, turns this network's outliers into noise.
* ``int8``: the same in int8.
* ``int8-weight-only``: int8 weights, widened for the product; activations stay as they are.

Quantised are the attention's and the feed-forward's matrices of the blocks that every network call
runs. Embedders, modulation, the final layer and the caption's refiner are a few per cent of the
weights and decide all the rest: they stay in the dtype asked for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo.errors import BadInputError

QUANTIZATIONS: tuple[str, ...] = ("fp8", "int8", "int8-weight-only")
"""The ways to keep weights in 8 bits, by the names that settings give them."""

METADATA_KEY = "turbo.quantize"
"""Where the metadata of a file that `turbo quantize` wrote say which of `QUANTIZATIONS` it is."""

VALUE_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int8-weight-only": torch.int8,
}
"""How each keeps its values."""

FLOAT8_CAPABILITY = (8, 9)
"""The first CUDA devices with float8 products: Ada."""
INT8_CAPABILITY = (8, 0)
LEAST_MAXIMUM = 1e-12
"""Floor of a row's largest float8 value, so that a row of zeros has a scale to be divided by."""

_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
_INT8_RANGE = 127.5
_INT8_LEAST_SCALE = torch.finfo(torch.float32).eps
_LEAST_ROWS = 32  # CUDA's int8 product wants more than 16
_CHUNK_VALUES = 4 << 20
_IMPORTING = threading.Lock()  # logging is silenced meanwhile, for all threads


def pick_quantization(asked: str | None, stored: str | None, device: torch.device) -> str | None:
    """How to keep the network's large matrices.

    Args:
        asked: None or "auto": as the file has them; "none": in the dtype asked for; or one of
            `QUANTIZATIONS`.
        stored: As what `turbo quantize` wrote the file, if it did.
        device: Where they are used.

    Raises:
        BadInputError: It is none of these, or the device has no such arithmetic.
    """
    if asked == "none":
        return None
    kind = stored if asked in (None, "auto") else asked
    if kind is not None:
        check_quantization(kind, device)
    return kind


def check_quantization(kind: str, device: torch.device) -> None:
    """Whether weights can be kept in this way and used on this device.

    Raises:
        BadInputError: The device has no such arithmetic; says what would do.
    """
    if kind not in QUANTIZATIONS:
        allowed = ", ".join(QUANTIZATIONS)
        raise BadInputError(f"quantize must be auto, none, {allowed}, got {kind!r}")
    if device.type != "cuda":
        return
    has = torch.cuda.get_device_capability(device)
    if kind == "fp8" and has < FLOAT8_CAPABILITY:
        raise BadInputError(
            f"quantize 'fp8' needs a device of compute capability 8.9 (Ada, Hopper) or newer, "
            f"{device} has {has[0]}.{has[1]}; use 'int8'"
        )
    if kind == "int8" and has < INT8_CAPABILITY:
        raise BadInputError(
            f"quantize 'int8' needs a device of compute capability 8.0 (Ampere) or newer, {device} "
            f"has {has[0]}.{has[1]}; use 'int8-weight-only'"
        )


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of a quantised matrix: views into the storage that products read."""

    kind: str
    """One of `QUANTIZATIONS`."""
    values: Tensor
    """[rows, columns], int8 or float8."""
    scales: Tensor
    """[rows, 1], float32."""

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    def narrow(self, dim: int, start: int, length: int) -> QuantizedRows:
        """Some of the rows (`dim` 0) or columns (1)."""
        scales = self.scales.narrow(0, start, length) if dim == 0 else self.scales
        return QuantizedRows(self.kind, self.values.narrow(dim, start, length), scales)

    @torch.no_grad()
    def quantize(self, matrix: Tensor) -> None:
        """Quantise `matrix` into this storage, some rows at a time.

        Args:
            matrix: Any float dtype, of this shape, on any device.
        """
        rows, columns = self.shape
        step = max(1, _CHUNK_VALUES // columns)
        for start in range(0, rows, step):
            part = self.narrow(0, start, min(step, rows - start))
            chunk = matrix.narrow(0, start, len(part.values)).to(self.device)
            values, scales = quantize_rows(part.kind, chunk)
            part.values.copy_(values)
            part.scales.copy_(scales)

    def dequantize(self) -> Tensor:
        """The matrix in float32."""
        return self.values.float() * self.scales


def quantize_rows(kind: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix of weights, each row by its largest value.

    Args:
        kind: One of `QUANTIZATIONS`.
        matrix: [rows, columns], any float dtype; NaN and infinity make their row NaN.

    Returns:
        Values of the matrix' shape, int8 or float8; scales [rows, 1], float32.

    Raises:
        BadInputError: torchao is not installed.
    """
    torchao = _torchao()
    matrix = matrix.float().contiguous()
    if kind == "fp8":
        made = torchao.Float8Tensor.from_hp(
            matrix,
            granularity=torchao.PerRow(),
            hp_value_lb=LEAST_MAXIMUM,
            kernel_preference=_kernel_preference(),
        )
        return made.qdata, made.scale
    made = torchao.Int8Tensor.from_hp(matrix, torchao.PerRow())
    return made.qdata, made.scale


class QuantizedLinear(nn.Module):
    """``x @ weight.T`` over the last axis with a weight of 8 bits; parameters are uninitialised.

    Args:
        kind: One of `QUANTIZATIONS`.
        inputs: Columns of the weight.
        outputs: Rows of the weight.
        device: Where it is made.
    """

    bias = None
    counted_on: str | None = None
    """Type of the device whose arithmetic is meant where values are on the meta device."""

    def __init__(
        self, kind: str, inputs: int, outputs: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        values = torch.empty(outputs, inputs, device=device, dtype=VALUE_DTYPES[kind])
        scales = torch.empty(outputs, 1, device=device, dtype=torch.float32)
        self.kind = kind
        self.values = nn.Parameter(values, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def rows(self) -> QuantizedRows:
        """All of the weight."""
        return QuantizedRows(self.kind, self.values.detach(), self.scales.detach())

    def zero_(self) -> None:
        """Make all values 0."""
        self.values.view(torch.int8).zero_()
        self.scales.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The product.

        Args:
            x: [..., inputs], any float dtype.

        Returns:
            [..., outputs] in the dtype of `x`.
        """
        is_imitated = (self.counted_on or x.device.type) != "cuda"
        product = _PRODUCTS[self.kind](x.flatten(0, -2), self.values, self.scales, is_imitated)
        return product.view(*x.shape[:-1], -1)

    if TYPE_CHECKING:
        __call__ = forward


def _float8_product(x: Tensor, values: Tensor, scales: Tensor, is_imitated: bool) -> Tensor:
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=LEAST_MAXIMUM) / _FLOAT8_MAX
    narrow = (wide / scale).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(values.dtype)
    if is_imitated:
        return _imitated_product(narrow, scale, values, scales).to(x.dtype)
    # By rows there is a product with results in bfloat16 alone.
    product = torch._scaled_mm(
        narrow, values.t(), scale, scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product.to(x.dtype)


def _int8_product(x: Tensor, values: Tensor, scales: Tensor, is_imitated: bool) -> Tensor:
    wide = x.float()
    scale = (wide.abs().amax(1, keepdim=True) / _INT8_RANGE).clamp(min=_INT8_LEAST_SCALE)
    narrow = (wide * scale.reciprocal()).round().clamp(-128, 127).to(values.dtype)
    if is_imitated:
        return _imitated_product(narrow, scale, values, scales).to(x.dtype)
    rows = len(x)
    if rows < _LEAST_ROWS:
        narrow = F.pad(narrow, (0, 0, 0, _LEAST_ROWS - rows))
    product = torch._int_mm(narrow, values.t())[:rows]
    return (product.float() * scale * scales.t()).to(x.dtype)


def _imitated_product(narrow: Tensor, scale: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """The same product in float32, for a CPU.

    Without instructions for it PyTorch's int8 product takes far longer there: 682 against 46 ms in
    float32 for 2304 x 512 by 512 x 1536 on two cores with AVX2. What is gained is memory alone.
    """
    return F.linear(narrow.float(), values.float()) * scale * scales.t()


def _widened_product(x: Tensor, values: Tensor, scales: Tensor, is_imitated: bool) -> Tensor:
    if x.dtype == torch.float16:  # sums of the bare integers would overflow
        return F.linear(x, (values.float() * scales).to(x.dtype))
    return (F.linear(x, values.to(x.dtype)) * scales.t()).to(x.dtype)


_PRODUCTS = {
    "fp8": _float8_product,
    "int8": _int8_product,
    "int8-weight-only": _widened_product,
}


def _kernel_preference() -> Any:
    """PyTorch's kernel: another one, that may be installed, makes other bits."""
    from torchao.quantization.quantize_.common import KernelPreference

    return KernelPreference.TORCH


@functools.cache
def _torchao() -> Any:
    """torchao's quantisation; it tells about parts it was built without, which are not used."""
    try:
        with _IMPORTING, _quiet_logs():
            import torchao.quantization
    except ImportError as error:
        raise BadInputError(
            f"quantising weights needs the package torchao ({error}); install it "
            "(pip install torchao), or give weights that turbo quantize wrote"
        ) from None
    return torchao.quantization


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
