"""What counts more while the network learns."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tools.demo_autoencoder import SIZES
from tools.demo_network import (
    FADED,
    FIRST_SIGMA,
    MOST_SIGMA,
    PARTS,
    WINDOWS,
    Latents,
    Painter,
    Part,
    _choose_tokens,
    _choose_windows,
    _things_in,
    _upscaling_error,
    batch_loss,
    model_size,
    only_tokens,
)
from turbo.latent import resize, start_latent
from turbo.plan import DEFAULT_PLAN
from turbo.sigmas import stage_sigmas
from turbo.transformer import padded_length

LARGE = replace(PARTS[-1], upscaled=0.0, ragged=0.0)


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
    assert (part.after(1.0).emphasis, part.after(1.0).layout) == (part.lasting, 0)


@pytest.mark.parametrize("part", PARTS)
def test_a_step_that_sees_some_tokens_needs_no_padding(part: Part) -> None:
    assert padded_length(part.tokens) == part.tokens


def test_a_window_needs_no_padding_and_fits_its_size() -> None:
    for side, (height, width) in zip(WINDOWS, SIZES):
        assert padded_length(side**2) == side**2
        assert side <= min(height, width) // 16


def test_windows_show_a_thing_in_most_pictures_and_are_at_one_place_in_all() -> None:
    things = torch.zeros(3, 10, 8)
    things[0, :3, :3] = 1
    things[1, 7:, 5:] = 1
    rng = np.random.default_rng(0)
    counts, corners = np.zeros(3), set()
    for _ in range(300):
        only, rows = _choose_windows(things, 4, 6, rng)
        first = int(only[0])
        corners.add(first)
        assert only.tolist() == [first + 8 * y + x for y in range(4) for x in range(4)]
        assert first % 8 <= 4
        assert first // 8 <= 6
        counts += np.bincount(rows, minlength=3)
    assert len(corners) > 10
    assert counts.sum() == 1800
    assert counts[2] < 0.3 * counts[0]
    assert counts[2] < 0.3 * counts[1]


def test_a_picture_without_things_and_one_smaller_than_the_window_have_windows_too() -> None:
    only, rows = _choose_windows(torch.zeros(2, 3, 5), 4, 6, np.random.default_rng(0))
    assert len(only) == 12
    assert len(rows) == 6


def test_things_are_known_for_each_token() -> None:
    latents = torch.zeros(2, 16, 6, 4)
    latents[1, :, 2, 1] = 3
    things = Latents(latents, torch.zeros(2, 32), torch.ones(2)).things
    assert things.shape == (2, 3, 2)
    assert things.nonzero().tolist() == [[1, 1, 0]]


def test_windows_are_of_the_larger_sizes_as_often_as_the_part_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int | None]] = []

    def note(clean: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((clean.shape[2], None if rest[-1] is None else len(rest[-1])))
        return torch.zeros(())

    data = []
    for height, width in ((8, 6), (40, 36), (60, 52)):
        latents = torch.zeros(2, 16, height, width)
        latents[:, :, 4, 4] = 3
        ids = torch.zeros(2, 32, dtype=torch.int64)
        data.append(Latents(latents, ids, torch.full((2,), 5)))
    empty = data[0].ids[:1], data[0].lengths[:1]
    painter: Any = SimpleNamespace(loss=note, caption=lambda *_: None)
    for step in range(400):
        batch_loss(painter, data, empty, np.random.default_rng([1, step]), LARGE)
    assert {tokens for height, tokens in seen if height == 8} == {None}
    for height, window in ((40, 256), (60, 576)):
        tokens = [of for at, of in seen if at == height]
        assert set(tokens) == {None, window}
        assert tokens.count(window) / len(tokens) == pytest.approx(LARGE.windows, abs=0.1)


@pytest.mark.parametrize("sigma", FIRST_SIGMA[1:])
def test_noise_with_what_upscaling_makes_wrong_is_what_a_stage_begins_with(sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 16, 4, 3, generator=generator)
    clean, noise = torch.randn(2, 2, 16, 10, 6, generator=generator)
    with_error = noise + (1 / sigma - 1) * _upscaling_error(before, clean)
    begin = start_latent(resize(before, 10, 6, "nearest-exact"), noise, sigma)
    torch.testing.assert_close((1 - sigma) * clean + sigma * with_error, begin)


def test_stages_begin_with_the_noise_levels_of_the_workflow() -> None:
    levels = [stage_sigmas(stage)[0] for stage in DEFAULT_PLAN.stages]
    assert pytest.approx(levels, abs=1e-3) == FIRST_SIGMA
    assert all(level <= most for level, most in zip(levels, MOST_SIGMA))


def test_a_part_without_upscaling_draws_what_it_drew_without_it() -> None:
    latents = torch.randn(4, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(4, 32, dtype=torch.int64)
    plain = Latents(latents, ids, torch.full((4,), 5))
    upscaled = replace(plain, before=latents[..., ::2, ::2])
    noises = []

    def note(clean: torch.Tensor, sigmas: torch.Tensor, noise: torch.Tensor, *_: Any) -> Any:
        noises.append(noise)

    painter: Any = SimpleNamespace(loss=note, caption=lambda *_: None)
    empty = ids[:1], plain.lengths[:1]
    for part in (LARGE, PARTS[-1]):
        only_large = replace(part, shares=(0, 0, 1), windows=0.0)
        for data in (plain, upscaled):
            batch_loss(painter, [data] * 3, empty, np.random.default_rng(0), only_large)
    assert torch.equal(noises[0], noises[1])
    assert torch.equal(noises[0], noises[2])
    assert not torch.equal(noises[2], noises[3])


def test_moved_edges_are_seen_and_straight_ones_are_wanted() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, moved = torch.randn(2, 8, 16, 8, 6, generator=generator)
    ids = torch.zeros(8, 32, dtype=torch.int64)
    data = Latents(latents, ids, torch.full((8,), 5), ragged=moved)
    seen = []

    def note(*of: Any) -> None:
        seen.append(of)

    painter: Any = SimpleNamespace(loss=note, caption=lambda *_: None)
    part = Part("", 0, 1.0, 0.0, shares=(0, 1, 0), lasting=1.0)
    for ragged in (0.0, 1.0):
        rng = np.random.default_rng(0)
        batch_loss(painter, [data] * 3, (ids[:1], data.lengths[:1]), rng, Part.after(
            replace(part, ragged=ragged), 1.0
        ))  # fmt: skip
    (clean, _, noise, _, weight, _), (same, sigmas, with_error, _, lighter, _) = seen
    assert torch.equal(clean, same)
    mix = sigmas[:, None, None, None]
    is_high = mix > 0.2
    assert 0 < is_high.sum() < len(mix)
    rows = [int((clean_row - latents).abs().sum((1, 2, 3)).argmin()) for clean_row in clean]
    wanted = torch.where(is_high, (1 - mix) * moved[rows], (1 - mix) * clean) + mix * noise
    torch.testing.assert_close((1 - mix) * clean + mix * with_error, wanted)
    share = torch.where(is_high, 1 / mix - 1, 0)
    torch.testing.assert_close(lighter, weight / (1 + share.square()))


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


def test_small_things_can_count_as_much_as_large_ones() -> None:
    latents = torch.zeros(2, 16, 20, 16)
    latents[0, :, 4:14, 4:12] = 3  # 80 latents
    latents[1, :, 4:8, 4:12] = 3  # 32 latents
    ids = torch.zeros(2, 32, dtype=torch.int64)
    data = Latents(latents, ids, torch.full((2,), 5))
    weights: dict[bool, torch.Tensor] = {}
    for alike in (False, True):

        def note(clean: torch.Tensor, *rest: Any, alike: bool = alike) -> torch.Tensor:
            extra = (rest[-2] - 1).sum((1, 2, 3))
            large = (clean[:, 0] > 1).sum((1, 2)) == 80
            weights[alike] = torch.stack((extra[large].mean(), extra[~large].mean()))
            return torch.zeros(())

        painter: Any = SimpleNamespace(loss=note, caption=lambda *_: None)
        part = Part("", 0, 2.0, 0.0, shares=(1.0, 0.0, 0.0), alike=alike)
        empty = ids[:1], data.lengths[:1]
        batch_loss(painter, [data] * 3, empty, np.random.default_rng(0), part)
    assert weights[False].tolist() == pytest.approx([160, 64])
    large, small = weights[True].tolist()
    assert large == pytest.approx(small)


def test_high_noise_levels_of_the_larger_sizes_can_come_oftener() -> None:
    latents = torch.zeros(2, 16, 8, 6)
    ids = torch.zeros(2, 32, dtype=torch.int64)
    data = Latents(latents, ids, torch.full((2,), 5))
    found: dict[tuple[float, int], list[float]] = {}
    for lean in (1.0, 0.5):
        for size in (0, 2):

            def note(
                clean: torch.Tensor, sigmas: torch.Tensor, *_: Any, key: Any = (lean, size)
            ) -> torch.Tensor:
                found.setdefault(key, []).extend(sigmas.tolist())
                return torch.zeros(())

            painter: Any = SimpleNamespace(loss=note, caption=lambda *_: None)
            shares = (float(size == 0), 0.0, float(size == 2))
            part = Part("", 0, 0.0, 0.0, shares=shares, lean=lean)
            for step in range(60):
                rng = np.random.default_rng(step)
                batch_loss(painter, [data] * 3, (ids[:1], data.lengths[:1]), rng, part)
    assert found[1.0, 0] == found[0.5, 0]
    plain, leaning = (np.asarray(found[lean, 2]) / MOST_SIGMA[2] for lean in (1.0, 0.5))
    np.testing.assert_allclose(leaning, np.sqrt(plain), rtol=1e-5)
