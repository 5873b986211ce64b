"""What counts more while the network learns."""

from __future__ import annotations

import pytest
import torch

from tools.demo_network import EMPHASIS, EMPHASISED, _things_in, emphasis_at


def test_things_are_told_from_the_background() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 1, 1, generator=generator).expand(2, 16, 9, 7).clone()
    latents += 0.1 * torch.randn(latents.shape, generator=generator)
    latents[1, :, 2:4, 3:5] -= 1.5
    wanted = torch.zeros(2, 1, 9, 7)
    wanted[1, :, 2:4, 3:5] = 1
    assert torch.equal(_things_in(latents), wanted)


def test_the_emphasis_ends_before_the_training_does() -> None:
    assert emphasis_at(0.0) == EMPHASIS
    assert emphasis_at(EMPHASISED / 2) == pytest.approx(EMPHASIS / 2)
    assert emphasis_at(EMPHASISED) == pytest.approx(0)
    assert emphasis_at(1.0) == 0
