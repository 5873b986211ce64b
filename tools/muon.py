"""Muon, https://kellerjordan.github.io/posts/muon: steps whose directions are all equally long.

The autoencoder came to 30.8 dB in 513 steps with it; with AdamW it had 14 dB after 600.
PyTorch's own works in bfloat16 alone, which many CPUs have no arithmetic for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

_MOMENTUM = 0.95
_ITERATION = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_LENGTH = 0.4
"""Root of the mean square of a step at rate 1: about what AdamW's have."""


class Muon:
    """For matrices and convolutions; `state` holds a momentum for each, by name."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        parts: Mapping[str, int],
        decay: float,
        precision: torch.dtype = torch.float32,
    ):
        """Make one.

        Args:
            weights: Name -> [rows, ...], that requires a gradient. A kernel is a matrix with a row
                for each channel that comes out.
            parts: Name -> how many matrices are stacked in it, which are taken one by one.
            decay: Of weights, as AdamW's.
            precision: Of the products.
        """
        self.weights, self.decay, self.precision = dict(weights), decay, precision
        self.state = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._groups: dict[torch.Size, list[tuple[str, int, int]]] = defaultdict(list)
        for name, weight in weights.items():
            for index in range(parts[name]):
                shape = weight.chunk(parts[name])[index].flatten(1).shape
                self._groups[shape].append((name, index, parts[name]))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take one step along the gradients."""
        wanted = {}
        for name, weight in self.weights.items():
            assert weight.grad is not None
            self.state[name].lerp_(weight.grad, 1 - _MOMENTUM)
            wanted[name] = weight.grad.lerp(self.state[name], _MOMENTUM)  # Nesterov's
            weight.mul_(1 - rate * self.decay)
        for shape, members in self._groups.items():
            stack = [wanted[name].chunk(count)[index].flatten(1) for name, index, count in members]
            length = rate * _LENGTH * max(shape) ** 0.5
            directions = orthogonal(torch.stack(stack).to(self.precision))
            for (name, index, count), one in zip(members, directions):
                weight = self.weights[name].chunk(count)[index]
                weight.sub_(one.reshape(weight.shape), alpha=length)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [count, rows, columns] with all singular values brought near 1."""
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if turned else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = _ITERATION
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if turned else x
