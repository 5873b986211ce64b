"""What counts more while the network learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tools.demo_network import (
    FADED,
    PARTS,
    Painter,
    Part,
    _choose_tokens,
    _things_in,
    model_size,
    only_tokens,
)
from turbo.transformer import padded_length


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


@pytest.mark.parametrize("part", PARTS)
def test_a_step_that_sees_some_tokens_needs_no_padding(part: Part) -> None:
    assert padded_length(part.tokens) == part.tokens


def test_tokens_are_chosen_where_things_are_and_no_token_twice() -> None:
    things = torch.zeros(2, 1, 8, 6)
    things[:, :, 2:4, 2:6] = 1  # tokens 4 and 5 of 12
    counts = np.zeros(12)
    rng = np.random.default_rng(0)
    for _ in range(300):
        chosen = _choose_tokens(things, 6, rng)
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        counts[chosen.numpy()] += 1
    assert (counts[4:6] > 280).all()
    assert (np.delete(counts, [4, 5]) > 50).all()


def test_only_some_tokens_are_those_of_the_picture_where_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tools.demo_network._start", lambda name, value: value)  # no gate at 0
    latents = torch.arange(24.0).view(1, 1, 4, 6)
    assert only_tokens(latents, torch.tensor([1, 5]))[0, 0].tolist() == [
        [2, 3, 16, 17],
        [8, 9, 22, 23],
    ]
    painter = Painter.make(model_size(448), 0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 16, 16, generator=generator)
    caption = torch.randn(2, 32, 192, generator=generator)
    sigmas = torch.tensor([0.9, 0.5])
    whole = painter.velocity(latents, sigmas, caption)
    same = painter.velocity(latents, sigmas, caption, torch.arange(64))
    torch.testing.assert_close(same, only_tokens(whole, torch.arange(64)), rtol=1e-4, atol=1e-4)
    # Where a token is, is known: in another order each gives what it gave before.
    order = torch.randperm(64, generator=generator)
    turned = painter.velocity(latents, sigmas, caption, order)
    torch.testing.assert_close(turned, only_tokens(whole, order), rtol=1e-4, atol=1e-4)
