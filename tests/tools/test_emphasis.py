"""What counts more while the network learns."""

from __future__ import annotations

import pytest
import torch

from tools.demo_network import FADED, PARTS, Part, _things_in


def test_things_are_told_from_the_background() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 1, 1, generator=generator).expand(2, 16, 9, 7).clone()
    latents += 0.1 * torch.randn(latents.shape, generator=generator)
    latents[1, :, 2:4, 3:5] -= 1.5
    wanted = torch.zeros(2, 1, 9, 7)
    wanted[1, :, 2:4, 3:5] = 1
    assert torch.equal(_things_in(latents), wanted)
    wanted[1, :, 1:5, 2:6] = 1
    assert torch.equal(_things_in(latents, 1), wanted)


@pytest.mark.parametrize("part", PARTS)
def test_what_counts_more_early_ends_before_the_training_does(part: Part) -> None:
    assert part.after(0.0) == part
    half = part.after(FADED / 2)
    assert half.emphasis == pytest.approx(part.emphasis / 2)
    assert half.layout == pytest.approx(part.layout / 2)
    assert (part.after(1.0).emphasis, part.after(1.0).layout) == (0, 0)
