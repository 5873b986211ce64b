"""What counts more while the network learns."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tools.demo_autoencoder import SIZES, SPREAD
from tools.demo_network import (
    FADED,
    FIRST_SIGMA,
    MOST_SHARE,
    PARTS,
    WINDOWS,
    Latents,
    Painter,
    Part,
    _choose_tokens,
    _choose_windows,
    _upscaling_error,
    batch_loss,
    model_size,
    only_tokens,
    share_of_noise,
    where_things_are,
)
from tools.scenes import Scene, Thing, mask_of
from turbo.latent import resize, start_latent
from turbo.plan import DEFAULT_PLAN
from turbo.sigmas import stage_sigmas
from turbo.transformer import padded_length

LARGE = replace(PARTS[-1], upscaled=0.0, ragged=0.0)


def latents_of(latents: torch.Tensor, **more: torch.Tensor) -> Latents:
    """Things are where a latent is above 1."""
    count = len(latents)
    ids = torch.zeros(count, 32, dtype=torch.int64)
    inside = (latents > 1).any(1, keepdim=True)
    return Latents(latents, ids, torch.full((count,), 5), inside, **more)


def test_it_is_known_where_things_are() -> None:
    things = Thing("cross", "red", "", 0.5, 0.64, 0.2), Thing("star", "blue", "", 0.2, 0.2, 0.1)
    for height, width in SIZES:
        inside = where_things_are([Scene(things, "orange", "striped")], height, width)
        assert inside.shape == (1, 1, height // 8, width // 8)
        assert inside.dtype == torch.bool
        pixels = mask_of(things[0], height, width) | mask_of(things[1], height, width)
        covered = pixels.reshape(height // 8, 8, width // 8, 8).mean((1, 3))
        found = inside[0, 0].numpy()
        assert found[covered > 0.3].all()
        assert not found[covered == 0].any()


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
    things = latents_of(latents).things
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
        data.append(latents_of(latents))
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
    assert all(level <= most for level, most in zip(map(share_of_noise, levels), MOST_SHARE))


def test_the_network_sees_and_says_what_the_sampler_does() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 16, 8, 8, generator=generator)
    shares = torch.tensor([0.01, 0.5, 1.0])
    mix = shares[:, None, None, None]
    painter = Painter.make(model_size(300), 0)
    told: list[float] = []
    table = painter.network.modulation_table
    tall = SPREAD * clean
    only = torch.arange(0, 16, 2)

    def run(seen: torch.Tensor, *_: Any) -> torch.Tensor:
        sigma = torch.tensor(told)[:, None, None, None]
        full = (1 - sigma) * tall + sigma * noise
        wanted = noise - tall
        if seen.shape != full.shape:
            full, wanted = only_tokens(full, only), only_tokens(wanted, only)
        torch.testing.assert_close(seen, full)
        return cast(torch.Tensor, wanted)

    def note(sigmas: list[float]) -> torch.Tensor:
        told[:] = sigmas
        return table(sigmas)

    painter.network.modulation_table = note  # type: ignore[assignment]
    painter = replace(painter, run=run)
    caption = torch.zeros(3, 32, 192)
    noisy = (1 - mix) * clean + mix * noise
    velocity = painter.velocity(noisy, shares, caption)
    torch.testing.assert_close(velocity, noise - clean, atol=1e-4, rtol=1e-4)
    assert [share_of_noise(sigma) for sigma in told] == pytest.approx(shares.tolist())
    velocity = painter.velocity(noisy, shares, caption, only)
    wanted = only_tokens(noise - clean, only)
    torch.testing.assert_close(velocity, wanted, atol=1e-4, rtol=1e-4)


def test_a_part_without_upscaling_draws_what_it_drew_without_it() -> None:
    latents = torch.randn(4, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    plain = latents_of(latents)
    upscaled = replace(plain, before=latents[..., ::2, ::2])
    noises = []

    def note(clean: torch.Tensor, sigmas: torch.Tensor, noise: torch.Tensor, *_: Any) -> Any:
        noises.append(noise)

    painter: Any = SimpleNamespace(loss=note, caption=lambda *_: None)
    empty = plain.ids[:1], plain.lengths[:1]
    for part in (LARGE, replace(PARTS[-1])):
        only_large = replace(part, shares=(0, 0, 1), windows=0.0)
        for data in (plain, upscaled):
            batch_loss(painter, [data] * 3, empty, np.random.default_rng(0), only_large)
    assert torch.equal(noises[0], noises[1])
    assert torch.equal(noises[0], noises[2])
    assert not torch.equal(noises[2], noises[3])


def test_moved_edges_are_seen_and_straight_ones_are_wanted() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, moved = torch.randn(2, 8, 16, 8, 6, generator=generator)
    data = latents_of(latents, ragged=moved)
    seen: list[Any] = []

    def note(*of: Any) -> None:
        seen.append(of)

    painter: Any = SimpleNamespace(loss=note, caption=lambda *_: None)
    part = Part("", 0, 1.0, 0.0, shares=(0, 1, 0), lasting=1.0)
    for ragged in (0.0, 1.0):
        rng = np.random.default_rng(0)
        batch_loss(painter, [data] * 3, (data.ids[:1], data.lengths[:1]), rng, Part.after(
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


@pytest.mark.parametrize("contrast", [3.0, 1.5])
def test_small_and_pale_things_can_count_as_much_as_others(contrast: float) -> None:
    latents = torch.zeros(2, 16, 20, 16)
    latents[0, :, 4:14, 4:12] = 3  # 80 latents
    latents[1, :, 4:8, 4:12] = contrast  # 32 latents
    data = latents_of(latents)
    weights: dict[bool, torch.Tensor] = {}
    for alike in (False, True):

        def note(clean: torch.Tensor, *rest: Any, alike: bool = alike) -> torch.Tensor:
            extra = (rest[-2] - 1).sum((1, 2, 3)) * clean.amax((1, 2, 3)).square()
            large = (clean[:, 0] > 1).sum((1, 2)) == 80
            weights[alike] = torch.stack((extra[large].mean(), extra[~large].mean()))
            return torch.zeros(())

        painter: Any = SimpleNamespace(loss=note, caption=lambda *_: None)
        part = Part("", 0, 2.0, 0.0, shares=(1.0, 0.0, 0.0), alike=alike)
        empty = data.ids[:1], data.lengths[:1]
        batch_loss(painter, [data] * 3, empty, np.random.default_rng(0), part)
    assert weights[False].tolist() == pytest.approx([160 * 9, 64 * contrast**2])
    large, small = weights[True].tolist()
    assert large == pytest.approx(small)


def weights_of(data: Latents, part: Part) -> torch.Tensor:
    """How much each latent of a step counts."""
    seen: list[torch.Tensor] = []

    def note(*of: Any) -> torch.Tensor:
        seen.append(of[-2])
        return torch.zeros(())

    painter: Any = SimpleNamespace(loss=note, caption=lambda *_: None)
    empty = data.ids[:1], data.lengths[:1]
    batch_loss(painter, [data] * 3, empty, np.random.default_rng(0), part)
    return seen[0]


@pytest.mark.parametrize("around", [0, 1, 2])
def test_what_is_near_a_thing_counts_like_it(around: int) -> None:
    latents = torch.zeros(1, 16, 20, 16)
    latents[:, :, 8:12, 4:10] = 3
    data = latents_of(latents)
    wanted = torch.ones(1, 1, 20, 16)
    wanted[:, :, 8 - around : 12 + around, 4 - around : 10 + around] = 4
    part = Part("", 0, 3.0, 0.0, shares=(1.0, 0.0, 0.0), around=around)
    assert torch.equal(weights_of(data, part)[:1], wanted)


def test_things_of_one_picture_do_not_count_more_than_six_times_as_much() -> None:
    latents = torch.zeros(2, 16, 20, 16)
    latents[0, :, 4:14, 4:12] = 9
    latents[1, :, 4:6, 4:6] = 1.1
    data = latents_of(latents)
    part = Part("", 0, 1.0, 0.0, shares=(1.0, 0.0, 0.0), alike=True)
    assert weights_of(data, part).max() == 7


def test_high_noise_levels_of_the_larger_sizes_can_come_oftener() -> None:
    latents = torch.zeros(2, 16, 8, 6)
    data = latents_of(latents)
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
                batch_loss(painter, [data] * 3, (data.ids[:1], data.lengths[:1]), rng, part)
    assert found[1.0, 0] == found[0.5, 0]
    plain, leaning = (np.asarray(found[lean, 2]) / MOST_SHARE[2] for lean in (1.0, 0.5))
    np.testing.assert_allclose(leaning, np.sqrt(plain), rtol=1e-5)
