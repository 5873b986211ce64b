"""From network output to denoised latent: velocity, guidance, step cache.

Our network returns the velocity noise minus clean (the published one, turned around, as in
ComfyUI), so ``denoised = latent - sigma * output``; this file alone knows that. Guidance mixes the
estimates of two captions: ``negative + cfg * (positive - negative)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo.easycache import StepCache
from turbo.sigmas import as_float32
from turbo.transformer import Transformer

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`Transformer.forward` or a faster stand-in with its arguments and result."""

POSITIVE, NEGATIVE = "positive", "negative"


@dataclass(frozen=True, slots=True)
class Caption:
    """A prompt as the network takes it."""

    tokens: Tensor
    """Refined caption, [1, padded tokens, dim], network dtype."""
    length: int
    """Tokens of the prompt before padding."""


@dataclass(frozen=True, slots=True)
class ModulationTable:
    """The rows of factors for each sigma a stage evaluates."""

    rows: Tensor
    """[distinct sigmas, 4 * modulated blocks + 1, dim]."""
    index: dict[float, int]
    """float32 sigma -> row."""

    @classmethod
    def make(cls, transformer: Transformer, sigmas: Sequence[float]) -> ModulationTable:
        """Compute the table of all sigmas at once."""
        distinct = list(dict.fromkeys(map(as_float32, sigmas)))
        return cls(transformer.modulation_table(distinct), {s: k for k, s in enumerate(distinct)})

    def __getitem__(self, sigma: float) -> Tensor:
        return self.rows[self.index[sigma]]


@dataclass(frozen=True, slots=True)
class _Call:
    """One network call: its captions, stacked, and their rotary table."""

    captions: tuple[str, ...]
    tokens: Tensor
    rotary: Tensor


class Denoiser:
    """Estimates the clean latent; everything but latent and sigma is bound.

    Args:
        network: Runs one call.
        modulation: Factors for every sigma that will come.
        rotary: Maps a padded caption length to the stage's rotary table.
        positive: The caption to follow.
        negative: The caption to avoid; not needed when `cfg` is 1.
        cfg: Guidance scale; 1 leaves the negative caption out.
        cache: Step cache of this run, or None.
        aliased: Tests only: form the estimate of a skipped call from the changed latent, as a plain
            float32 run of the reference does by accident.
    """

    def __init__(
        self,
        network: Network,
        modulation: ModulationTable,
        rotary: Callable[[int], Tensor],
        positive: Caption,
        negative: Caption | None = None,
        *,
        cfg: float = 1.0,
        cache: StepCache | None = None,
        aliased: bool = False,
    ) -> None:
        self.network = network
        self.modulation = modulation
        self.cfg = cfg
        self.cache = cache
        self.aliased = aliased
        self._calls = _plan_calls(rotary, positive, None if is_unguided(cfg) else negative)

    @property
    def calls(self) -> int:
        """Network calls that one evaluation makes."""
        return len(self._calls)

    def __call__(self, latent: Tensor, sigma: float) -> Tensor:
        """Denoise.

        Args:
            latent: Noisy latent, [batch, channels, height, width], float32.
            sigma: Its noise level, one of the modulation table's.

        Returns:
            Shape and dtype of `latent`.
        """
        sigma = as_float32(sigma)
        if self.cache is not None:
            self.cache.begin_evaluation()
        estimates: dict[str, Tensor] = {}
        for call in self._calls:
            denoised = self._estimate(call, latent, sigma)
            estimates |= zip(call.captions, denoised.chunk(len(call.captions)))
        if NEGATIVE not in estimates:
            return estimates[POSITIVE]
        negative = estimates[NEGATIVE]
        return negative + (estimates[POSITIVE] - negative) * self.cfg

    def _estimate(self, call: _Call, latent: Tensor, sigma: float) -> Tensor:
        captions, batch = len(call.captions), latent.shape[0]
        modulation = self.modulation[sigma]
        latent = latent.repeat(captions, 1, 1, 1) if captions > 1 else latent
        seen = latent.to(modulation.dtype)

        def run() -> Tensor:
            tokens = call.tokens
            if batch > 1:
                tokens = tokens.repeat_interleave(batch, dim=0)
            return self.network(seen, tokens, modulation, call.rotary)

        skipped = False
        if self.cache is None:
            output = run()
        else:
            output, skipped = self.cache.call(run, seen, sigma, call.captions)
        if skipped and self.aliased:
            return (1 - sigma) * output.to(latent.dtype)
        return latent - sigma * output.to(latent.dtype)


def is_unguided(cfg: float) -> bool:
    """Whether a guidance scale counts as 1, at which the negative caption is never evaluated."""
    return abs(cfg - 1.0) <= 1e-9 * max(abs(cfg), 1.0)


def _plan_calls(
    rotary: Callable[[int], Tensor], positive: Caption, negative: Caption | None
) -> tuple[_Call, ...]:
    """Both captions in one batch, negative first, if they have one length; else positive first."""

    def call(*captions: tuple[str, Caption]) -> _Call:
        tokens = torch.cat([caption.tokens for _, caption in captions])
        names = tuple(name for name, _ in captions)
        return _Call(names, tokens, rotary(tokens.shape[1]))

    if negative is None:
        return (call((POSITIVE, positive)),)
    if negative.length == positive.length:
        return (call((NEGATIVE, negative), (POSITIVE, positive)),)
    return (call((POSITIVE, positive)), call((NEGATIVE, negative)))
