"""EasyCache as ComfyUI's node has it: reuse the last output's difference while little moved.

Before each network call the distance that the latent has moved since the last real run, times the
output's observed rate of change, is added up; while the sum stays below a threshold the network is
skipped and ``latent + (last output - last latent)`` returned in its place.

Differences from the paper (arXiv:2507.02860) that the reference has and the pictures depend on: the
latent and output of the *last real run* are compared, so the sum grows faster with each skip;
every 8th row and column is looked at; and all numbers have the network's dtype, sums included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turbo.sigmas import as_float32

STRIDE = 8
"""Every how many rows and columns the distances look at."""


class StepCache:
    """State of one sampler run; make a new one for each.

    Args:
        threshold: Sum of relative changes from which the network runs again.
        start: Sigma from which (downwards, inclusive) calls may be skipped.
        end: Sigma from which (downwards, inclusive) the cache is off.
    """

    def __init__(self, threshold: float, start: float, end: float) -> None:
        self.threshold = threshold
        self.start = as_float32(start)
        self.end = as_float32(end)
        self.skipped: list[bool] = []
        """For each call so far: was it skipped."""
        self.sums: list[float | None] | None = None
        """Set to a list to have, for each call, the sum that was held against the threshold."""
        self._skip_evaluation = False
        self._first: str | None = None
        self._rate: Tensor | None = None
        self._sum: Tensor | float = 0.0
        self._compared: Tensor | float | None = None
        self._last_input: Tensor | None = None
        self._last_output: Tensor | None = None
        self._output_norm: Tensor | None = None
        self._differences: dict[str, Tensor] = {}

    def begin_evaluation(self) -> None:
        """Announce the next denoiser evaluation; its calls are skipped together."""
        self._skip_evaluation = False

    def call(
        self,
        network: Callable[[], Tensor],
        latent: Tensor,
        sigma: float,
        captions: Sequence[str],
    ) -> tuple[Tensor, bool]:
        """One network call, run or skipped.

        Args:
            network: Runs the network on `latent`.
            latent: What the network sees, [captions * batch, channels, height, width].
            sigma: Noise level of the call.
            captions: Names of the captions in the call, in the order of `latent`'s equal parts.

        Returns:
            The output, real or approximated, and whether it was skipped.
        """
        self._compared = None
        if not sigma > self.end:
            return self._record(network(), skipped=False)
        distance = None
        if sigma <= self.start:
            if self._first is None:
                self._first = captions[0]
            if not self._skip_evaluation and self._first in captions:
                distance = self._distance(latent, captions)
                self._skip_evaluation = distance is not None and self._may_skip(distance)
            if self._skip_evaluation:
                return self._record(self._approximate(latent, captions), skipped=True)
        output = network()
        self._observe(latent, output, captions, distance)
        return self._record(output, skipped=False)

    def _distance(self, latent: Tensor, captions: Sequence[str]) -> Tensor | None:
        if self._last_input is None:
            return None
        return (self._part(latent, captions) - self._last_input).abs().mean()

    def _may_skip(self, distance: Tensor) -> bool:
        if self._output_norm is None or self._rate is None:
            return False
        self._sum = self._compared = self._sum + self._rate * distance / self._output_norm
        if self._sum < self.threshold:  # the loop's only value read back from the device
            return True
        self._sum = 0.0
        return False

    def _observe(
        self, latent: Tensor, output: Tensor, captions: Sequence[str], distance: Tensor | None
    ) -> None:
        """Remember a real run: its difference, and what the next distances are taken from."""
        parts = zip(captions, latent.chunk(len(captions)), output.chunk(len(captions)))
        for caption, x, y in parts:
            self._differences[caption] = y - x
        if self._first is None or self._first not in captions:
            return
        seen = self._part(output, captions)
        if distance is not None and self._last_output is not None:
            self._rate = (seen - self._last_output).abs().mean() / distance
        self._last_input = self._part(latent, captions).clone()
        self._last_output = seen.clone()
        self._output_norm = output.abs().mean()

    def _part(self, tensor: Tensor, captions: Sequence[str]) -> Tensor:
        """The first caption's rows, every 8th row and column."""
        assert self._first is not None
        rows = tensor.chunk(len(captions))[captions.index(self._first)]
        return rows[..., ::STRIDE, ::STRIDE]

    def _approximate(self, latent: Tensor, captions: Sequence[str]) -> Tensor:
        return latent + torch.cat([self._differences[caption] for caption in captions])

    def _record(self, output: Tensor, *, skipped: bool) -> tuple[Tensor, bool]:
        self.skipped.append(skipped)
        if self.sums is not None:
            self.sums.append(None if self._compared is None else float(self._compared))
        return output, skipped
