"""Random numbers: bits that depend on seed and shape alone."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
import torchsde

from turbo.errors import BadInputError
from turbo.noise import (
    MAX_SEED,
    BrownianNoise,
    ancestral_noise,
    check_seed,
    indexed_noise,
    start_noise,
)
from turbo.sigmas import basic_sigmas

SHAPE = (1, 2, 4, 6)
SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)


@pytest.mark.parametrize("seed", [0, 42, MAX_SEED])
def test_a_seed_from_0_to_64_bits_is_taken_as_it_is(seed: int):
    assert check_seed(seed) == seed


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "7", True, None])
def test_anything_else_is_no_seed(seed: object):
    message = f"seed must be an integer from 0 to 18446744073709551615, got {seed!r}"
    with pytest.raises(BadInputError, match=re.escape(message)):
        check_seed(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [7, 2**63, MAX_SEED])
def test_start_noise_is_one_draw_of_the_whole_latent(seed: int):
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(start_noise(SHAPE, seed), torch.randn(SHAPE, generator=generator))


def test_noise_is_standard_normal_float32_on_the_cpu():
    noise = start_noise((1, 16, 64, 64), 3)
    assert (noise.dtype, noise.device.type) == (torch.float32, "cpu")
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)


def test_noise_depends_neither_on_what_was_drawn_before_nor_on_the_global_generator():
    first, state = start_noise(SHAPE, 1), torch.get_rng_state()
    start_noise(SHAPE, 2)
    ancestral_noise(SHAPE, 3, 2)
    BrownianNoise(SHAPE, 4, SIGMAS)(1.0, 0.5)
    assert torch.equal(start_noise(SHAPE, 1), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_of_indexed_noise_is_the_draw_of_its_number():
    rows = indexed_noise((3, *SHAPE[1:]), 5, [2, 0, 2])
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(SHAPE, generator=generator) for _ in range(3)]
    assert torch.equal(rows, torch.cat([draws[2], draws[0], draws[2]]))
    assert torch.equal(rows[1:2], start_noise(SHAPE, 5))


def test_ancestral_noise_of_the_cpu_is_that_of_the_next_seed():
    steps = ancestral_noise(SHAPE, 7, 3)
    generator = torch.Generator().manual_seed(8)
    assert len(steps) == 3
    for step in steps:
        assert torch.equal(step, torch.randn(SHAPE, generator=generator))


def test_more_ancestral_steps_begin_with_the_same_numbers():
    few, many = ancestral_noise(SHAPE, 7, 2), ancestral_noise(SHAPE, 7, 5)
    assert all(torch.equal(a, b) for a, b in zip(few, many))


def test_the_largest_seed_has_noise_of_every_kind():
    # Its ancestral noise is that of seed 2**64, which torch takes for 0.
    assert start_noise(SHAPE, MAX_SEED).isfinite().all()
    assert torch.equal(ancestral_noise(SHAPE, MAX_SEED, 1)[0], start_noise(SHAPE, 0))
    assert BrownianNoise(SHAPE, MAX_SEED, SIGMAS)(1.0, 0.5).isfinite().all()


@pytest.mark.parametrize("seed", [2**63 - 1, 2**63, MAX_SEED])
def test_seeds_of_64_bits_are_told_apart(seed: int):
    assert not torch.equal(start_noise(SHAPE, seed), start_noise(SHAPE, seed - 1))
    one, other = (BrownianNoise(SHAPE, value, SIGMAS) for value in (seed, seed - 1))
    assert not torch.equal(one(1.0, 0.5), other(1.0, 0.5))


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_brownian_noise_is_torchsdes_negated_increment_over_the_root_of_its_length(shift: float):
    # At the path's ends, too, which torchsde rounds inwards and then warns about.
    sigmas = basic_sigmas("normal", 5, 0.6, shift)[:-1]
    upper, lower = torch.tensor(sigmas[:-1]), torch.tensor(sigmas[1:])
    path = torchsde.BrownianTree(t0=lower[-1], w0=torch.zeros(SHAPE), t1=upper[0], entropy=11)
    noise = BrownianNoise(SHAPE, 11, (*sigmas, 0.0))
    for a, b in zip(upper, lower):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            want = -path(b, a) / (a - b).sqrt()
        assert torch.equal(noise(float(a), float(b)), want)


def test_brownian_increments_add_up():
    # N(a, b) * sqrt(a - b) is the path's increment over [b, a].
    noise = BrownianNoise(SHAPE, 11, SIGMAS)
    parts = noise(1.0, 0.7) * math.sqrt(0.3) + noise(0.7, 0.3) * math.sqrt(0.4)
    torch.testing.assert_close(parts, noise(1.0, 0.3) * math.sqrt(0.7), atol=1e-5, rtol=1e-5)


def test_brownian_noise_does_not_depend_on_the_order_of_the_questions():
    questions = [(1.0, 0.9), (1.0, 0.75), (0.75, 0.6), (0.75, 0.5), (0.5, 0.25)]
    forward, backward = (BrownianNoise(SHAPE, 11, SIGMAS) for _ in range(2))
    answers = {question: forward(*question) for question in questions}
    for question in reversed(questions):
        assert torch.equal(backward(*question), answers[question])


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.75), (0.6, 0.59), (0.5, 0.25)])
def test_brownian_noise_has_unit_variance_over_any_interval(sigma: float, sigma_next: float):
    noise = BrownianNoise((1, 4, 50, 50), 1, SIGMAS)(sigma, sigma_next)
    assert noise.dtype == torch.float32
    assert float(noise.mean()) == pytest.approx(0, abs=0.04)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)


def test_brownian_noise_of_separate_intervals_is_independent():
    noise = BrownianNoise((1, 4, 50, 50), 1, SIGMAS)
    pair = torch.stack((noise(1.0, 0.75).flatten(), noise(0.75, 0.5).flatten()))
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.05


def test_the_path_is_pinned_to_the_schedules_ends():
    # The same seed between other ends is another path.
    whole, part = (BrownianNoise(SHAPE, 1, sigmas) for sigmas in (SIGMAS, SIGMAS[1:]))
    assert not torch.equal(whole(0.75, 0.5), part(0.75, 0.5))
    again = BrownianNoise(SHAPE, 1, (1.0, 0.4, 0.25, 0.0))  # what lies between does not matter
    assert torch.equal(whole(0.75, 0.5), again(0.75, 0.5))
