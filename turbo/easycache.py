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

from turbo.host_read import HostRead
from turbo.sigmas import as_float32
from turbo.similarity import KernelSimilarity, PlainSimilarity, Similarity


class StepCache:
    """State of one sampler run; make a new one for each.

    Args:
        threshold: Sum of relative changes from which the network runs again.
        start: Sigma from which (downwards, inclusive) calls may be skipped.
        end: Sigma from which (downwards, inclusive) the cache is off.
        kernels: Take the sums by the fused kernels; see `require_kernels`.
    """

    def __init__(
        self, threshold: float, start: float, end: float, *, kernels: bool = False
    ) -> None:
        self.threshold = threshold
        self.start = as_float32(start)
        self.end = as_float32(end)
        self.skipped: list[bool] = []
        """For each call so far: was it skipped."""
        self.sums: list[float | None] | None = None
        """Set to a list to have, for each call, the sum that was held against the threshold."""
        self._similarity: Similarity = KernelSimilarity() if kernels else PlainSimilarity()
        self._read = HostRead()
        self._skip_evaluation = False
        self._first: str | None = None
        """The caption whose runs are compared."""
        self._has_run = False
        """Whether it has run since, so that there is something to compare with."""
        self._has_rate = False
        """Whether it has run after a comparison, so that a change can be expected."""
        self._compared: float | None = None
        self._differences: dict[tuple[str, ...], Tensor] = {}

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
            captions: Names of the captions in the call, in the order of `latent`'s equal parts; an
                evaluation's calls are those of the one before.

        Returns:
            The output, real or approximated, and whether it was skipped.
        """
        self._compared = None
        if not sigma > self.end:
            return self._record(network(), skipped=False)
        captions = tuple(captions)
        measured = False
        if sigma <= self.start:
            if self._first is None:
                self._first = captions[0]
            if not self._skip_evaluation and self._first in captions and self._has_run:
                measured = True
                self._skip_evaluation = self._may_skip(latent[self._rows(latent, captions)])
            if self._skip_evaluation:
                return self._record(latent + self._differences[captions], skipped=True)
        output = network()
        self._observe(latent, output, captions, measured)
        return self._record(output, skipped=False)

    def _may_skip(self, latent: Tensor) -> bool:
        below = self._similarity.compare(latent, self.threshold)
        if not self._has_rate:
            return False
        if self.sums is not None:
            self._compared = float(self._similarity.compared)
        return bool(self._read(below))  # the loop's only value read back from the device

    def _observe(
        self, latent: Tensor, output: Tensor, captions: tuple[str, ...], measured: bool
    ) -> None:
        """Remember a real run: its difference, and what the next distances are taken from."""
        difference = self._differences.get(captions)
        if difference is None:
            difference = self._differences[captions] = latent.new_empty(latent.shape)
        if self._first is None or self._first not in captions:
            torch.sub(output, latent, out=difference)
            return
        rows = self._rows(latent, captions)
        self._similarity.observe(latent, output, difference, rows, measured=measured)
        self._has_run = True
        self._has_rate = self._has_rate or measured

    def _rows(self, latent: Tensor, captions: tuple[str, ...]) -> slice:
        """The first caption's rows."""
        assert self._first is not None
        batch = len(latent) // len(captions)
        start = captions.index(self._first) * batch
        return slice(start, start + batch)

    def _record(self, output: Tensor, *, skipped: bool) -> tuple[Tensor, bool]:
        self.skipped.append(skipped)
        if self.sums is not None:
            self.sums.append(self._compared)
        return output, skipped
