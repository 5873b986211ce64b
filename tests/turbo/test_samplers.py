"""Samplers: single steps by hand, then what all of them have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from turbo import plan
from turbo.errors import BadInputError
from turbo.samplers import (
    SAMPLERS,
    SampleFunction,
    sample_deis,
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lcm,
    sample_res_multistep,
    sample_uni_pc,
    sampler_sigmas,
    trace_sampler,
)
from turbo.sigmas import as_float32, basic_sigmas, stage_sigmas

STOCHASTIC = sorted(name for name, sampler in SAMPLERS.items() if sampler.noise)
DETERMINISTIC = sorted(set(SAMPLERS) - set(STOCHASTIC))
SCHEDULE = basic_sigmas("simple", 6, 1.0, 3.0)


class Script:
    """Answers a sampler's questions from lists and remembers them: numbers instead of latents."""

    def __init__(self, answers: Sequence[float], noises: Sequence[float] = ()) -> None:
        self.answers = list(answers)
        self.noises = list(noises)
        self.seen: list[tuple[float, float]] = []
        self.asked: list[tuple[float, float]] = []

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        self.seen.append((float(x), sigma))
        return torch.tensor(self.answers.pop(0), dtype=torch.float64)

    def noise(self, sigma: float, sigma_next: float) -> Tensor:
        self.asked.append((sigma, sigma_next))
        return torch.tensor(self.noises.pop(0), dtype=torch.float64)

    def run(self, sample: SampleFunction, start: float, sigmas: Sequence[float]) -> list[float]:
        """The latents at each evaluation, then the last."""
        x = torch.tensor(start, dtype=torch.float64)
        final = sample(self.denoise, x, sigmas, self.noise)
        assert not self.answers
        assert not self.noises
        return [x for x, _ in self.seen] + [float(final)]


def no_noise(sigma: float, sigma_next: float) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def test_every_sampler_of_a_plan_is_there():
    assert tuple(SAMPLERS) == plan.SAMPLERS


def test_euler_follows_the_slope():
    # slope (8 - 4) / 1 = 4: 8 - 4 * 0.5 = 6; slope (6 - 3) / 0.5 = 6: 6 - 6 * 0.5 = 3
    assert Script([4, 3]).run(sample_euler, 8, (1.0, 0.5, 0.0)) == [8, 6, 3]


def test_ddim_is_euler():
    assert SAMPLERS["ddim"].sample is sample_euler


def test_euler_ancestral_steps_lower_and_adds_noise_back():
    # down = 0.4 * 0.4 / 0.8 = 0.2: x = 0.2 / 0.8 * 8 + (1 - 0.25) * 4 = 5
    # scale = (1 - 0.4) / (1 - 0.2) = 0.75, noise sqrt(0.4**2 - 0.2**2 * 0.75**2) = sqrt(0.1375)
    script = Script([4, 7], noises=[2])
    got = script.run(sample_euler_ancestral, 8, (0.8, 0.4, 0.0))
    assert got == pytest.approx([8, 0.75 * 5 + math.sqrt(0.1375) * 2, 7])
    assert script.asked == [(0.8, 0.4)]


def test_heun_averages_the_slopes_at_both_ends():
    # slope 4, ahead 4 - 4 * 0.5 = 2, slope there (2 - 1) / 0.5 = 2, mean 3: 4 - 3 * 0.5 = 2.5
    # the last step is Euler's: 2.5 - (2.5 - 2) / 0.5 * 0.5 = 2
    assert Script([0, 1, 2]).run(sample_heun, 4, (1.0, 0.5, 0.0)) == [4, 2, 2.5, 2]


def test_dpm_2_takes_the_slope_at_the_geometric_mean():
    # slope (8 - 4) / 0.8 = 5, middle sqrt(0.8 * 0.2) = 0.4: 8 - 5 * 0.4 = 6
    # slope (6 - 2) / 0.4 = 10: 8 - 10 * 0.6 = 2; last step Euler: 2 - (2 - 1) / 0.2 * 0.2 = 1
    script = Script([4, 2, 1])
    assert script.run(sample_dpm_2, 8, (0.8, 0.2, 0.0)) == pytest.approx([8, 6, 2, 1])
    assert [sigma for _, sigma in script.seen] == pytest.approx([0.8, 0.4, 0.2])


def test_dpm_2_ancestral_takes_its_midpoint_step_to_the_lower_sigma():
    # down 0.2 as for euler_ancestral, so the step above; then 0.75 * 2 + sqrt(0.1375) * 2
    script = Script([4, 2, 1], noises=[2])
    got = script.run(sample_dpm_2_ancestral, 8, (0.8, 0.4, 0.0))
    assert got == pytest.approx([8, 6, 1.5 + math.sqrt(0.1375) * 2, 1])


def test_dpmpp_2m_extrapolates_from_the_last_two_estimates():
    # h = ln 2 twice. 4 / 2 + (1 - 1/2) * 1 = 2.5; estimate 1.5 * 2 - 0.5 * 1 = 2.5: 2.5
    got = Script([1, 2, 3]).run(sample_dpmpp_2m, 4, (0.8, 0.4, 0.2, 0.0))
    assert got == pytest.approx([4, 2.5, 2.5, 3])


def test_dpmpp_2m_weighs_by_the_ratio_of_its_steps():
    # h = ln 2, then ln 4: weight 2 / 2 = 1, estimate 2 * 2 - 1 = 3: 2.5 / 4 + (1 - 1/4) * 3
    got = Script([1, 2, 3]).run(sample_dpmpp_2m, 4, (0.8, 0.4, 0.1, 0.0))
    assert got == pytest.approx([4, 2.5, 2.875, 3])


def test_dpmpp_sde_goes_by_way_of_the_middle_of_lambda():
    # lambda = ln((1 - sigma) / sigma): -ln 4 and ln 4, middle 0, so sigma 1/2.
    # half: 4 -> 1, up = sqrt(1 - 1/16), down = 1/4, exp(-h) = 1/4 * 1/4 = 1/16
    half = 0.5 / 0.2 / 16 * 8 + 0.5 * 15 / 16 * 4 + 0.5 * math.sqrt(15 / 16) * 3
    # full: 4 -> 1/4, up**2 = (1/16) * (1 - 1/256), down = 1/64, exp(-h) = 1/64 * 1/4 = 1/256
    up = math.sqrt(255 / 256) / 4
    full = 0.8 / 0.2 / 256 * 8 + 0.8 * 255 / 256 * 2 + 0.8 * up * -1
    script = Script([4, 2, 7], noises=[3, -1])
    got = script.run(sample_dpmpp_sde, 8, (0.8, 0.2, 0.0))
    assert got == pytest.approx([8, half, full, 7], rel=1e-5)
    assert script.asked == [pytest.approx((0.8, 0.5)), (0.8, 0.2)]


# Lambda -ln 4, 0, ln 16, ln 64: h = ln 4, ln 16, ln 4, exp(-2h) = 1/16, 1/256, 1/16.
UNEVEN = (0.8, 0.5, 1 / 17, 1 / 65, 0.0)


def test_dpmpp_2m_sde_corrects_with_the_change_of_the_estimate():
    first = 0.5 / 0.8 / 4 * 8 + 0.5 * 15 / 16 * 4 + 0.5 * math.sqrt(15 / 16) * 3
    second = 1 / 17 / 0.5 / 16 * first + 16 / 17 * 255 / 256 * 2
    second += 0.5 * 16 / 17 * 255 / 256 * 2 * (2 - 4)  # ln 16 / ln 4 = 2
    second += 1 / 17 * math.sqrt(255 / 256) * -1
    script = Script([4, 2, 7], noises=[3, -1])
    got = script.run(sample_dpmpp_2m_sde, 8, (*UNEVEN[:3], 0.0))
    assert got == pytest.approx([8, first, second, 7])
    assert script.asked == [(0.8, 0.5), (0.5, 1 / 17)]


def test_dpmpp_3m_sde_corrects_with_first_and_second_differences():
    first = 0.5 / 0.8 / 4 * 8 + 0.5 * 15 / 16 * 4 + 0.5 * math.sqrt(15 / 16) * 3
    phi_2 = 1 - 255 / 256 / (2 * math.log(16))
    second = 1 / 17 / 0.5 / 16 * first + 16 / 17 * 255 / 256 * 2
    second += 16 / 17 * phi_2 * 2 * (2 - 4) + 1 / 17 * math.sqrt(255 / 256) * -1
    # Ratios ln 16 / ln 4 = 2 and 1: e0 = (7 - 2) / 2, e1 = (2 - 4) / 1, e0 - e1 = 4.5,
    # slope 2.5 + 4.5 * 2 / 3 = 5.5, curvature 4.5 / 3
    phi_2 = 1 - 15 / 16 / (2 * math.log(4))
    phi_3 = phi_2 / (2 * math.log(4)) - 1 / 2
    third = 17 / 65 / 4 * second + 64 / 65 * 15 / 16 * 7
    third += 64 / 65 * (phi_2 * 5.5 - phi_3 * 1.5) + 1 / 65 * math.sqrt(15 / 16) * 2
    got = Script([4, 2, 7, 9], noises=[3, -1, 2]).run(sample_dpmpp_3m_sde, 8, UNEVEN)
    assert got == pytest.approx([8, first, second, third, 9])


def test_lcm_renoises_each_estimate():
    # 0.25 * 2 + 0.75 * 3 = 2.75
    assert Script([3, 5], noises=[2]).run(sample_lcm, 8, (1.0, 0.25, 0.0)) == [8, 2.75, 5]


def test_res_multistep_weighs_two_estimates_exponentially():
    # Euler first: 4 - (4 - 1) / 0.8 * 0.4 = 2.5. Then h = ln 2, c2 = -1,
    # phi_1 = (1/2 - 1) / -h, phi_2 = (phi_1 - 1) / -h: weights phi_1 + phi_2 and -phi_2
    h = math.log(2)
    phi_1 = 0.5 / h
    phi_2 = (1 - phi_1) / h
    second = 0.5 * 2.5 + h * ((phi_1 + phi_2) * 2 - phi_2 * 1)
    got = Script([1, 2, 3]).run(sample_res_multistep, 4, (0.8, 0.4, 0.2, 0.0))
    assert got == pytest.approx([4, 2.5, second, 3])


def test_deis_starts_and_ends_with_euler():
    assert Script([4, 3]).run(sample_deis, 8, (1.0, 0.5, 0.0)) == pytest.approx([8, 6, 3])


def test_deis_integrates_the_polynomial_through_its_last_three_slopes():
    # Beta-diffusion between sigma 0.002 and 80: tau(sigma) and the weight of a slope at tau.
    low, high = math.log(0.002**2 + 1), math.log(80**2 + 1)
    beta_d = 2 * (low / 0.001 - high) / (0.001 - 1)
    beta_0 = high - beta_d / 2
    sigmas = (0.9, 0.7, 0.4, 0.3)
    tau = [
        (math.sqrt(beta_0**2 + 2 * beta_d * math.log(s**2 + 1)) - beta_0) / beta_d for s in sigmas
    ]

    def weighted(t: float) -> float:
        alpha = math.exp(-(t**2) * beta_d / 2 - t * beta_0)
        a, b, c = ((t - p) * (t - q) for p, q in ((tau[1], tau[2]), (tau[0], tau[2]), tau[:2]))
        a /= (tau[0] - tau[1]) * (tau[0] - tau[2])
        b /= (tau[1] - tau[0]) * (tau[1] - tau[2])
        c /= (tau[2] - tau[0]) * (tau[2] - tau[1])
        slope = 5 * a + 3 * b + 8 * c
        return slope * (beta_0 + t * beta_d) / 2 / math.sqrt(alpha * (1 - alpha))

    script = Script([0, 0, 0])
    slopes = iter((5, 3, 8))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        script.denoise(x, sigma)
        return x - sigma * next(slopes)  # so that (x - denoised) / sigma is the slope

    final = float(sample_deis(denoise, torch.tensor(2.0).double(), sigmas, no_noise))
    before, _ = script.seen[-1]
    assert final - before == pytest.approx(quad(weighted, tau[2], tau[3])[0], rel=1e-3)


def test_uni_pc_ends_at_sigma_one_thousandth_and_is_divided_by_the_rest():
    # Two steps of order 1, h = ln 2, then ln 400: 4 / 2 + 1 / 2, corrected by h / 2 * (2 - 1);
    # then (0.001 / 0.4) of it and the rest of 2, over 1 - 0.001. The noise share is float32.
    last = ((2.5 + math.log(2) / 2) / 400 + 2 * 399 / 400) / 0.999
    got = Script([1, 2]).run(sample_uni_pc, 4, (0.8, 0.4, 0.0))
    assert got == pytest.approx([4, 2.5, last], rel=1e-4)


def test_uni_pc_of_one_step_only_scales_its_start():
    # Like the reference: x / sqrt(1 + 0.75**2) * sqrt(1 + 0.001**2) / (1 - 0.001)
    got = Script([2]).run(sample_uni_pc, 3, (0.75, 0.0))
    assert got == pytest.approx([3, 3 / 1.25 / 0.999], rel=1e-5)


def test_uni_pc_predicts_from_two_estimates_and_corrects_with_the_new_one():
    # Three steps, order 2, in x itself: h = ln 2 twice, exp(-h) = 1/2.
    h = math.log(2)
    predicted_1 = 4 / 2 + 1 / 2
    corrected_1 = predicted_1 + h / 2 * (2 - 1)
    base = corrected_1 / 2 + 2 / 2
    predicted_2 = base + h / 2 * (2 - 1)
    # Corrector: w0 + w1 = b1, w1 - w0 = b2 (the older estimate lies one step back), where
    # phi_1 = (1/2 - 1) / -h - 1, b1 = phi_1 / -h, phi_2 = b1 - 1/2, b2 = 2 * phi_2 / -h
    b1 = (0.5 / h - 1) / -h
    b2 = 2 * (b1 - 0.5) / -h
    corrected_2 = base + h * ((b1 - b2) / 2 * (2 - 1) + (b1 + b2) / 2 * (3 - 2))
    last = (corrected_2 / 200 + 3 * 199 / 200) / 0.999  # order 1 again, from 0.2 to 0.001
    got = Script([1, 2, 3]).run(sample_uni_pc, 4, (0.8, 0.4, 0.2, 0.0))
    assert got == pytest.approx([4, predicted_1, predicted_2, last], rel=1e-4)


@pytest.mark.parametrize("denoise", [1.0, 0.6])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_denoiser_leads_every_sampler_to_its_image(name: str, denoise: float):
    clean, noise = torch.randn(2, 1, 16, 4, 6, generator=torch.Generator().manual_seed(0)).unbind()
    sigmas = sampler_sigmas(name, basic_sigmas("simple", 6, denoise, 3.0), 3.0)
    final = SAMPLERS[name].sample(lambda x, sigma: clean, noise, sigmas, lambda a, b: noise)
    if name == "uni_pc":  # at sigma 0.001, and brighter by 1 / 0.999
        torch.testing.assert_close(final, clean, atol=0.01, rtol=0)
    else:
        torch.testing.assert_close(final, clean)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_with_a_perfect_denoiser_a_deterministic_sampler_stays_on_the_straight_line(name: str):
    clean, noise = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).unbind()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        torch.testing.assert_close(x, (1 - sigma) * clean + sigma * noise, atol=2e-4, rtol=0)
        return clean

    SAMPLERS[name].sample(denoise, noise, SCHEDULE, no_noise)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_sampler_keeps_as_much_noise_as_each_sigma_says(name: str):
    # A perfect denoiser: x should be (1 - sigma) * clean + sigma * unit noise at each evaluation.
    clean, count = 3.0, 20_000
    generator = torch.Generator().manual_seed(0)
    sigmas = sampler_sigmas(name, SCHEDULE, 3.0)
    start = torch.randn(count, generator=generator)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        assert float(x.mean()) == pytest.approx((1 - sigma) * clean, abs=0.03)
        assert float(x.std()) == pytest.approx(sigma, rel=0.03)
        return torch.full_like(x, clean)

    SAMPLERS[name].sample(
        denoise, start, sigmas, lambda a, b: torch.randn(count, generator=generator)
    )


ORDERS = {
    "euler": 1,
    "ddim": 1,
    "heun": 2,
    "dpm_2": 2,
    "dpmpp_2m": 2,
    "res_multistep": 2,
    "deis": 2,
    "uni_pc": 2,
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_an_error_shrinks_with_the_steps_as_the_order_promises(name: str):
    # Clean values of deviation v: the best estimate is linear in x, and x follows
    # sqrt((1 - sigma)**2 * v**2 + sigma**2) exactly.
    v, last = 0.5, 0.1

    def spread(sigma: float) -> float:
        return math.sqrt(((1 - sigma) * v) ** 2 + sigma**2)

    def error(steps: int) -> float:
        sigmas = tuple(0.9 * (last / 0.9) ** (k / steps) for k in range(steps + 1))
        final = SAMPLERS[name].sample(
            lambda x, sigma: (1 - sigma) * (v / spread(sigma)) ** 2 * x,
            torch.tensor(spread(0.9), dtype=torch.float64),
            sigmas,
            no_noise,
        )
        final = final * (1 - last) if name == "uni_pc" else final
        return abs(float(final) - spread(last))

    # Enough steps that the first of a multistep method, which are of lower order, weigh little.
    assert error(40) / error(80) > 2 ** (ORDERS[name] - 0.5)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_trace_lists_exactly_what_the_sampler_then_asks_for(name: str, steps: int):
    sigmas = sampler_sigmas(name, basic_sigmas("simple", steps, 1.0, 3.0), 3.0)
    evaluations: list[float] = []
    noises: list[tuple[float, float]] = []
    generator = torch.Generator().manual_seed(steps)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        evaluations.append(sigma)
        return torch.randn(x.shape, generator=generator)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        noises.append((sigma, sigma_next))
        return torch.randn(1, 2, 3, 3, generator=generator)

    SAMPLERS[name].sample(denoise, torch.randn(1, 2, 3, 3), sigmas, noise)
    trace = trace_sampler(name, sigmas)
    assert trace.evaluations == tuple(evaluations)
    assert trace.noises == tuple(noises)


def test_only_two_stage_samplers_evaluate_twice_a_step():
    calls = {name: len(trace_sampler(name, (0.9, 0.5, 0.2, 0.0)).evaluations) for name in SAMPLERS}
    twice = {"heun", "dpm_2", "dpm_2_ancestral", "dpmpp_sde"}
    assert calls == {name: 5 if name in twice else 3 for name in SAMPLERS}


def test_noise_is_asked_for_by_stochastic_samplers_alone():
    for name, sampler in SAMPLERS.items():
        noises = trace_sampler(name, (0.9, 0.5, 0.2, 0.0)).noises
        assert bool(noises) == (sampler.noise is not None), name


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_brownian_samplers_replace_a_first_sigma_of_1(name: str):
    # S(0.9999) = 3 * 0.9999 / (1 + 2 * 0.9999) = 2.9997 / 2.9998
    first = 2.9997 / 2.9998 if SAMPLERS[name].noise == "brownian" else 1.0
    assert sampler_sigmas(name, (1.0, 0.5, 0.0), 3.0) == (as_float32(first), 0.5, 0.0)
    assert sampler_sigmas(name, (0.9, 0.5, 0.0), 3.0) == (0.9, 0.5, 0.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_leaves_the_latent_it_was_given_alone_and_keeps_its_dtype(name: str):
    start = torch.ones(1, 2, 3, 3)
    sigmas = sampler_sigmas(name, SCHEDULE, 3.0)
    final = SAMPLERS[name].sample(lambda x, sigma: x / 2, start, sigmas, lambda a, b: start)
    assert (start == 1).all()
    assert (final.shape, final.dtype) == (start.shape, start.dtype)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_of_a_batch_is_sampled_as_if_alone(name: str):
    batch = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    sigmas = sampler_sigmas(name, SCHEDULE, 3.0)

    def run(rows: slice) -> Tensor:
        return SAMPLERS[name].sample(
            lambda x, sigma: (3 * x).sin(), batch[rows], sigmas, lambda a, b: batch[rows] * b
        )

    torch.testing.assert_close(run(slice(None))[1:2], run(slice(1, 2)))


def assert_finite_or_refused(**settings: Any) -> None:
    """Sample a stage of these settings, unless a BadInputError says that it cannot be."""
    try:
        stage = plan.Stage(name="stage", height=64, width=64, **settings)
        sigmas = sampler_sigmas(stage.sampler, stage_sigmas(stage), stage.shift)
        trace_sampler(stage.sampler, sigmas)
    except BadInputError:
        return
    sample, ones = SAMPLERS[stage.sampler].sample, torch.ones(2)
    final = sample(lambda x, sigma: x / 2, ones, sigmas, lambda a, b: ones)
    assert final.isfinite().all(), settings


@pytest.mark.parametrize("node", plan.NODES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_on_a_finite_latent_for_every_schedule_or_refuses_it(
    name: str, node: str
):
    for scheduler, steps in product(plan.SCHEDULERS, (2, 9)):
        assert_finite_or_refused(sampler=name, scheduler=scheduler, steps=steps, node=node)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_schedule_with_a_sigma_twice_ends_on_a_finite_latent_or_is_refused(name: str):
    # The last 9 of 1800 steps; the table of sigmas has 1000 rows.
    assert_finite_or_refused(sampler=name, scheduler="simple", steps=9, denoise=0.005)
