"""EasyCache's numbers: how far a latent has moved, and what change of the output that announces.

`StepCache` decides what to compare and when; this is the arithmetic behind it, twice with one
meaning. With x a network input and y its output, every 8th row and column of one caption, and last
those of its last real run:

    distance = mean |x - last x|
    rate     = mean |y - last y| / distance, of the last run that had a distance
    norm     = mean |y|, of the last run, over all captions of its call and all rows and columns
    sum      = sum + rate * distance / norm; a run that was compared sets it back to 0

Every number has the network's dtype, as in ComfyUI. The two differ in the order in which the means
are summed up: by roundings of float32, which reach a decision only where the sum lies that close to
the threshold (or where, in 16 bits, such a rounding turns one of the numbers over).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

STRIDE = 8
"""Every how many rows and columns the distances look at."""


class Similarity(Protocol):
    """What one sampler run knows of the compared caption's real runs."""

    @property
    def compared(self) -> Tensor:
        """The sum that the last comparison held against its threshold, a scalar."""

    def compare(self, latent: Tensor, threshold: float) -> Tensor:
        """Whether the change announced since the last real run is small; nothing is read back.

        Args:
            latent: What the network would see, [batch, channels, height, width], the compared
                caption's rows alone.
            threshold: The sum from which it is not small.

        Returns:
            A scalar, 0 for no. NaN is below no threshold, nor is anything before there is a rate.
        """

    def observe(
        self, latent: Tensor, output: Tensor, difference: Tensor, rows: slice, *, measured: bool
    ) -> None:
        """Remember a real run.

        Args:
            latent: What the network saw, [captions * batch, channels, height, width].
            output: What it returned, shape and dtype of `latent`.
            difference: Receives ``output - latent``.
            rows: The compared caption's.
            measured: Whether `compare` was called for this very input, and said no.
        """


class PlainSimilarity:
    """In plain PyTorch, on any device."""

    compared: Tensor
    _distance: Tensor
    _norm: Tensor
    _last_input: Tensor
    _last_output: Tensor

    def __init__(self) -> None:
        self._rate: Tensor | float = math.nan
        self._sum: Tensor | float = 0.0

    def compare(self, latent: Tensor, threshold: float) -> Tensor:
        self._distance = (_thinned(latent) - self._last_input).abs().mean()
        self._sum = self.compared = self._sum + self._rate * self._distance / self._norm
        return self._sum < threshold

    def observe(
        self, latent: Tensor, output: Tensor, difference: Tensor, rows: slice, *, measured: bool
    ) -> None:
        seen = _thinned(output[rows])
        if measured:
            self._rate = (seen - self._last_output).abs().mean() / self._distance
            self._sum = 0.0
        self._norm = output.abs().mean()
        self._last_input = _thinned(latent[rows]).clone()
        self._last_output = seen.clone()
        torch.sub(output, latent, out=difference)


class KernelSimilarity:
    """One launch a comparison and one a run; needs a CUDA device or Triton's interpreter."""

    _last_input: Tensor
    _last_output: Tensor

    def __init__(self) -> None:
        from turbo.kernels import easycache  # needs Triton

        self._kernels = easycache
        self._state: Tensor | None = None

    @property
    def compared(self) -> Tensor:
        assert self._state is not None
        return self._state[self._kernels.Place.COMPARED]

    def compare(self, latent: Tensor, threshold: float) -> Tensor:
        assert self._state is not None
        self._kernels.easycache_compare(
            latent, self._last_input, self._state, threshold, parity=True
        )
        return self._state[self._kernels.Place.SKIP]

    def observe(
        self, latent: Tensor, output: Tensor, difference: Tensor, rows: slice, *, measured: bool
    ) -> None:
        if self._state is None:
            self._last_input = torch.empty_like(
                _thinned(latent[rows]), memory_format=torch.contiguous_format
            )
            self._last_output = torch.empty_like(self._last_input)
            self._state = latent.new_zeros(self._kernels.STATE_SIZE, dtype=torch.float32)
        self._kernels.easycache_observe(
            latent,
            output,
            self._last_input,
            self._last_output,
            difference,
            self._state,
            rows.start,
            measured=measured,
            parity=True,
        )


def _thinned(latent: Tensor) -> Tensor:
    return latent[..., ::STRIDE, ::STRIDE]
