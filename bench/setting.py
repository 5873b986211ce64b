"""What the parts of ``bench device`` share: device, model, its faster variants, the limit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import arithmetic
from bench.random_model import FULL, SMALL, RandomModel, make_random_model
from bench.timing import time_launches
from turbo.acceleration import Accelerator, SpeedUps
from turbo.checkpoint import native_weights
from turbo.errors import BadInputError
from turbo.kernel_support import require_kernels
from turbo.pipeline import Models
from turbo.plan import Stage
from turbo.quantize import QuantizedRows, check_quantization
from turbo.transformer import Transformer

VARIANTS = ("eager", "captured", "compiled", "compiled, captured")
"""How the parts can run. Capturing changes no arithmetic: the results should be equal."""
FASTEST = VARIANTS[-1]
FP8 = "fp8"
"""In front of a variant's name: the network in 8 bits."""
UNCAPTURED = {"captured": "eager", "compiled, captured": "compiled"}


@dataclass(frozen=True, slots=True)
class Variant:
    """The model as one of `VARIANTS` runs it."""

    models: Models
    accelerator: Accelerator | None


@dataclass
class Setting:
    """Made once for a run; what is costly comes at its first use."""

    device: torch.device
    small: bool = False
    dtype: torch.dtype | None = None
    """Of matrix products; None: bfloat16 on CUDA, float32 elsewhere."""

    def __post_init__(self) -> None:
        self.size = SMALL if self.small else FULL
        self.seconds = 0.1 if self.small else 1.0
        """How long a measurement is repeated for, about."""
        self._sides: dict[str, Variant] = {}

    @cached_property
    def model(self) -> RandomModel:
        return make_random_model(self.size, self.device)

    @cached_property
    def in_fp8(self) -> Models:
        """The same model with the network's large matrices quantised to fp8."""
        plain = self.model.models
        network = _in_fp8(plain)
        return replace(plain, transformer=network, network=network)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(self.size.plan.stages)

    @cached_property
    def missing_kernels(self) -> str | None:
        """Why the fused kernels cannot run here; None if they can."""
        try:
            require_kernels(self.device)
        except BadInputError as error:
            return str(error)
        return None

    @cached_property
    def limit(self) -> dict[str, Any]:
        """The rate of a large matrix product in the network's dtype: the limit of all shares."""
        size = 512 if self.small else 8192 if self.device.type == "cuda" else 2048
        return self.product_rate((size, size, size), copies=1)

    @property
    def product_dtype(self) -> torch.dtype:
        """What matrix products are measured in."""
        return self.dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def product_rate(self, shape: arithmetic.Shape, copies: int | None = None) -> dict[str, Any]:
        """Check, then time, ``x @ weight.T``.

        Args:
            shape: Rows of `x`, rows of `weight`, columns of both.
            copies: Of the weight, taken in turn. None: as many as no cache holds (256 MiB), as a
                network's blocks each have their own.
        """
        rows, columns, inner = shape
        dtype = self.product_dtype
        weight_bytes = columns * inner * dtype.itemsize
        room = (1 if self.small else 256) << 20
        count = copies or max(1, -(-room // weight_bytes))
        x = torch.randn(rows, inner, device=self.device, dtype=dtype)
        weights = [
            torch.randn(columns, inner, device=self.device, dtype=dtype) for _ in range(count)
        ]
        seen = slice(0, 64)
        require_near(
            F.linear(x, weights[0])[seen], F.linear(x[seen].float(), weights[0].float()), 1e-2
        )
        timed = time_launches(
            [lambda weight=weight: F.linear(x, weight) for weight in weights]
            * (4 if copies else 1),
            self.device,
            seconds=self.seconds * (2 if copies else 0.2),
        )
        return timed | self.rate(2 * rows * columns * inner, timed)

    def share(self, operations: int, timed: dict[str, Any]) -> dict[str, float]:
        """Arithmetic, rate and share of the measured limit."""
        found = self.rate(operations, timed)
        limit = self.limit["tflop_per_s"]
        return found | {"share_of_limit": found["tflop_per_s"] / limit}

    @staticmethod
    def rate(operations: int, timed: dict[str, Any]) -> dict[str, float]:
        return {
            "tflop": operations / 1e12,
            "tflop_per_s": operations / 1e9 / timed["median_ms"],
        }

    def side(self, variant: str) -> Variant:
        """The model as a variant runs it; what one part has compiled serves the next."""
        if variant not in self._sides:
            self._sides[variant] = self._make_side(variant)
        return self._sides[variant]

    @property
    def fastest(self) -> str:
        """What an engine does by default on CUDA; without compiling where that takes too long."""
        return "captured" if self.small else FASTEST

    def _make_side(self, variant: str) -> Variant:
        models = replace(self.in_fp8 if variant.startswith(FP8) else self.model.models)
        if variant == "eager":
            return Variant(models, None)
        models.kernels = self.missing_kernels is None
        backend = "cuda-graph" if self.device.type == "cuda" else "replay"
        speed_ups = SpeedUps(
            compile="compiled" in variant,
            capture=backend if "captured" in variant else "eager",
            kernels=models.kernels,
            strict=True,
        )
        accelerator = Accelerator(models, speed_ups)
        accelerator.install(models)
        return Variant(models, accelerator)

    def in_float32(self) -> contextlib.AbstractContextManager[None]:
        """Have the network calculate in float32 with the same weights: the reference."""
        return in_float32(self.model.models.transformer)

    def draw(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values on the device, the same on every device."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.device, dtype or self.model.models.dtype)


@contextlib.contextmanager
def in_float32(network: Transformer) -> Iterator[None]:
    """Have a network calculate in float32 in the block, whatever its weights' dtype."""
    before = network.compute_dtype
    network.compute_dtype = torch.float32
    try:
        yield
    finally:
        network.compute_dtype = before


@torch.inference_mode(False)
def _in_fp8(models: Models) -> Transformer:
    """A network of the same weights, rounded.

    Raises:
        BadInputError: The device has no such arithmetic, or torchao is not installed.
    """
    check_quantization(FP8, models.device)
    plain = models.transformer
    weight = next(plain.parameters())
    made = Transformer(
        plain.config,
        weight.device,
        weight.dtype,
        compute_dtype=plain.compute_dtype,
        quantize=FP8,
    )
    sources = plain.native_tensors()
    for name, target in native_weights(made).items():
        if isinstance(target, QuantizedRows):
            target.quantize(sources[name])
        elif isinstance(target, Tensor):
            target.copy_(sources[name])
    return made


def distance(result: Tensor, reference: Tensor) -> float:
    """Relative distance, L2; NaN for what is not finite."""
    reference = reference.double()
    return float((result.double() - reference).norm() / reference.norm())


def require_near(result: Tensor, reference: Tensor, allowed: float) -> float:
    """The distance of two results.

    Raises:
        ValueError: It is larger than allowed, or not finite; no number may be given.
    """
    found = distance(result, reference)
    if not found <= allowed:
        raise ValueError(f"check failed: relative distance {found:.3g}, allowed {allowed:.3g}")
    return found


@dataclass(frozen=True, slots=True)
class Judge:
    """Low precision by its distance to float32: at most twice that of plain eager code."""

    reference: Tensor
    """Float32 result."""
    eager: Tensor
    floor: float = 1e-3
    """Always allowed: where eager code calculates in float32 too, its distance is rounding."""

    def check(self, result: Tensor, uncaptured: Tensor | None = None) -> dict[str, Any]:
        """What is written beside a number that may be given.

        Raises:
            ValueError: The result is too far off.
        """
        eager = require_near(self.eager, self.reference, 1.0)
        found: dict[str, Any] = {
            "distance": require_near(result, self.reference, max(2 * eager, self.floor)),
            "eager_distance": eager,
        }
        if uncaptured is not None:
            found["equals_uncaptured"] = torch.equal(result, uncaptured)
        return found
