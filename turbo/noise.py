"""The random numbers of a picture, bit for bit those that ComfyUI draws for the same seed.

Three kinds: the start noise of a stage, the fresh noise of ancestral samplers, and the Brownian
path of the stochastic solvers. All depend on seed and shape alone, never on what was drawn before,
so they can be drawn ahead of time and each picture of a batch on its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbo.errors import BadInputError

MAX_SEED = 2**64 - 1
PATH_DIGITS = 6
"""Decimals to which torchsde rounds times at its default tolerance of 1e-6."""


def check_seed(seed: int) -> int:
    """Return `seed` if it is one.

    Raises:
        BadInputError: It is not an integer in 0 .. 2**64 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise BadInputError(f"seed must be an integer from 0 to {MAX_SEED}, got {seed!r}")
    return seed


def start_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise for a whole latent, float32, on the CPU whatever runs the network."""
    return torch.randn(tuple(shape), generator=_generator(seed))


def indexed_noise(shape: Sequence[int], seed: int, index: Sequence[int]) -> Tensor:
    """Noise of single pictures of a batch: row k is draw number ``index[k]`` of the seed.

    Args:
        shape: Of the batch, [batch, channels, height, width]; each draw has batch 1.
        seed: Seed of the batch.
        index: Which draws to return, in this order, repeats allowed.
    """
    generator = _generator(seed)
    one = (1, *shape[1:])
    draws = [torch.randn(one, generator=generator) for _ in range(max(index) + 1)]
    return torch.cat([draws[k] for k in index])


def ancestral_noise(
    shape: Sequence[int], seed: int, count: int, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Fresh noise for `count` steps of an ancestral sampler, float32.

    On the CPU the generator is seeded with seed + 1, on an accelerator that device's own generator
    with the seed itself: the reference does so, and so does this. Pass "cpu" for the same numbers
    on every machine.
    """
    device = torch.device(device)
    generator = _generator(seed + 1) if device.type == "cpu" else _generator(seed, device)
    return [torch.randn(tuple(shape), generator=generator, device=device) for _ in range(count)]


class BrownianNoise:
    """Increments of one Brownian path over sigma, scaled to unit variance.

    ``noise(a, b)`` for a > b is the negated increment from b to a over sqrt(a - b). A value does
    not depend on which were asked for before.

    Args:
        shape: Of the latent.
        seed: Entropy of the path.
        sigmas: The stage's schedule as it was made; its smallest positive and its largest value are
            the path's ends.

    Source: torchsde (Li et al. 2020, arXiv:2001.01328), the library that the reference calls.
    """

    def __init__(self, shape: Sequence[int], seed: int, sigmas: Sequence[float]) -> None:
        import torchsde

        lowest, highest = min(sigma for sigma in sigmas if sigma > 0), max(sigmas)
        self._start, self._end = round(lowest, PATH_DIGITS), round(highest, PATH_DIGITS)
        self._tree = torchsde.BrownianTree(
            t0=torch.tensor(lowest),
            w0=torch.zeros(tuple(shape)),
            t1=torch.tensor(highest),
            entropy=seed,
        )

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        # The path's ends are rounded inside, and what lies outside them is moved there with a
        # warning: moved here, without one.
        start, end = (min(max(s, self._start), self._end) for s in (sigma_next, sigma))
        span = torch.tensor(sigma) - torch.tensor(sigma_next)
        noise: Tensor = -self._tree(start, end) / span.abs().sqrt()
        return noise


def _generator(seed: int, device: torch.device | None = None) -> torch.Generator:
    generator = torch.Generator(device or "cpu")
    # A seed may have 64 bits, and seed + 1 one more; torch takes it modulo 2**64.
    return generator.manual_seed(seed % 2**64)
