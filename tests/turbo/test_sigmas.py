"""Noise schedules."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from turbo.errors import BadInputError
from turbo.plan import NODES, SCHEDULERS, Stage
from turbo.sigmas import (
    DROP_PENULTIMATE,
    SCHEDULES,
    as_float32,
    basic_sigmas,
    flowmatch_node_sigmas,
    full_sigmas,
    ksampler_sigmas,
    percent_to_sigma,
    shift_sigma,
    sigma_table,
    stage_sigmas,
)


def make_stage(scheduler: str, steps: int, **settings: object) -> Stage:
    return Stage(name="s", height=64, width=64, steps=steps, scheduler=scheduler, **settings)  # type: ignore[arg-type]


def can_be_made(scheduler: str, node: str, steps: int, denoise: float) -> bool:
    """Whether plans allow it and the whole schedule has no more steps than the table has rows."""
    if scheduler == "flowmatch_node" and node == "ksampler":
        return False
    return steps / denoise < (1000 if scheduler != "kl_optimal" or steps / denoise >= 2 else 0)


def test_shift_3_brings_one_half_to_three_quarters():
    # S(1/2) = 3 * 1/2 / (1 + 2 * 1/2) = 1.5 / 2
    assert shift_sigma(0.5, 3.0) == 0.75


@pytest.mark.parametrize("t", [0.001, 0.3, 1.0])
def test_shift_1_changes_nothing(t: float):
    assert shift_sigma(t, 1.0) == t


def test_shifts_multiply():
    # S is Moebius: odds t / (1 - t) times s, so shifting by 2 and by 3 is shifting by 6.
    assert shift_sigma(shift_sigma(0.4, 2.0), 3.0) == pytest.approx(shift_sigma(0.4, 6.0))


def test_a_percentage_of_the_schedule_is_shifted_from_its_other_end():
    # S(1 - 0.45) = 3 * 0.55 / (1 + 2 * 0.55) = 1.65 / 2.1
    assert percent_to_sigma(0.45, 3.0) == pytest.approx(1.65 / 2.1)


@pytest.mark.parametrize(("percent", "sigma"), [(0, 1.0), (-0.5, 1.0), (1, 0.0), (2, 0.0)])
def test_the_ends_of_the_schedule_are_exactly_1_and_0(percent: float, sigma: float):
    assert percent_to_sigma(percent, 3.0) == sigma


def test_as_float32_rounds_to_the_nearest_float32():
    assert as_float32(0.1) == 13421773 / 2**27
    assert as_float32(as_float32(0.7)) == as_float32(0.7)


def test_the_table_holds_1000_rising_sigmas_that_end_in_1():
    table = sigma_table(3.0)
    assert table.shape == (1000,)
    assert float(table[0]) == pytest.approx(0.003 / 1.002)  # S(0.001)
    assert float(table[-1]) == 1.0
    assert (table.diff() > 0).all()


# Worked out for shift 1, where the table is 0.001, 0.002 .. 1.
HAND_WORKED = {
    # table[999 - 0], [999 - 250], [999 - 500], [999 - 750]
    ("simple", 4): (1.0, 0.75, 0.5, 0.25, 0.0),
    # table[1 :: 250] = [1], [251], [501], [751], turned round
    ("ddim_uniform", 4): (0.752, 0.502, 0.252, 0.002, 0.0),
    # middle of 1 and 0.001
    ("normal", 3): (1.0, 0.5005, 0.001, 0.0),
    # 1, 0.5005, 0.001 without its last
    ("sgm_uniform", 2): (1.0, 0.5005, 0.0),
    # the 7th roots are in a line: 0.001 ** (1/7) = 0.372759
    ("karras", 3): (1.0, ((1 + 0.372759372) / 2) ** 7, 0.001, 0.0),
    # the logarithms are in a line: the middle is the geometric mean
    ("exponential", 3): (1.0, math.sqrt(0.001), 0.001, 0.0),
    # the median of a symmetric distribution is 1/2: index round(499.5) = 500
    ("beta", 2): (1.0, 0.501, 0.0),
    # L = 2, e = 2 - 0.1 = 1.9, A = 1.9 / 8, B = 0.0125 - 3.8 / 4:
    # 1 - 0, 1 - 0.0125, 1 - (4A + 2B + 4A) = 1 - 0.025, 1 - (9A + 3B + 4A) = 1 - 0.275
    ("linear_quadratic", 4): (1.0, 0.9875, 0.975, 0.725, 0.0),
    ("linear_quadratic", 1): (1.0, 0.0),
    # the arc tangents are in a line: atan 1 = pi / 4, atan 0.001 = 0.001 - 0.001**3 / 3
    ("kl_optimal", 3): (1.0, math.tan((math.pi / 4 + 0.001) / 2), 0.001, 0.0),
    ("FlowMatchEulerDiscreteScheduler", 3): (1.0, 0.5005, 0.001, 0.0),
}


@pytest.mark.parametrize(("scheduler", "steps"), HAND_WORKED)
def test_a_schedule_is_as_worked_out_by_hand(scheduler: str, steps: int):
    assert full_sigmas(scheduler, steps, 1.0) == pytest.approx(HAND_WORKED[scheduler, steps])


def test_every_schedule_was_worked_out_by_hand():
    assert {scheduler for scheduler, _ in HAND_WORKED} == set(SCHEDULES)
    assert {*SCHEDULES, "flowmatch_node"} == set(SCHEDULERS)


def test_normal_and_the_flowmatch_node_shift_the_smallest_sigma_twice():
    # S(S(0.001)), S(x) = 3x / (1 + 2x): 0.003 / 1.002 = 0.002994, then 0.0089820 / 1.0059880
    # middle: (1 + 0.002994) / 2 = 0.501497, then 1.504491 / 2.002994
    want = (1.0, 1.504491 / 2.002994, 0.0089820 / 1.0059880, 0.0)
    assert full_sigmas("normal", 3, 3.0) == pytest.approx(want, rel=1e-5)
    assert flowmatch_node_sigmas(3, 3.0) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("shift", [0.5, 3.0, 8.0])
def test_the_flowmatch_scheduler_of_a_ksampler_knows_no_shift(shift: float):
    name = "FlowMatchEulerDiscreteScheduler"
    assert full_sigmas(name, 9, shift) == full_sigmas(name, 9, 1.0)


def test_ddim_uniform_can_make_a_step_more_than_asked():
    # 1000 // 16 = 62; 1, 63 .. 993 are 17 indices below 1000, and a 0 follows
    sigmas = full_sigmas("ddim_uniform", 16, 1.0)
    assert len(sigmas) == 18
    assert sigmas[0] == pytest.approx(0.994)


def test_beta_drops_sigmas_that_fall_on_one_table_row():
    # Near the ends the quantiles of 500 steps lie closer together than the table's 1000 rows.
    sigmas = full_sigmas("beta", 500, 3.0)
    assert len(set(sigmas)) == len(sigmas) < 501


def test_a_partial_denoise_runs_the_end_of_a_longer_schedule():
    # 16 / 0.7 = 22.86, cut to 22 steps; their last 17 sigmas make 16 steps
    assert ksampler_sigmas("simple", 16, 0.7, 3.0) == full_sigmas("simple", 22, 3.0)[-17:]
    assert basic_sigmas("simple", 16, 0.7, 3.0) == full_sigmas("simple", 22, 3.0)[-17:]


def test_a_ksampler_takes_a_denoise_of_almost_1_for_1():
    # 2 / 0.99995 is 2 either way; 20000 / 0.99995 would be 20001
    assert ksampler_sigmas("normal", 20000, 0.99995, 3.0) == full_sigmas("normal", 20000, 3.0)
    assert ksampler_sigmas("normal", 20000, 0.9999, 3.0)[0] < 1


def test_a_ksampler_makes_one_step_more_for_some_samplers_and_drops_the_last_but_one():
    assert ksampler_sigmas("simple", 3, 1.0, 1.0, drop_penultimate=True) == (1.0, 0.75, 0.5, 0.0)
    half = ksampler_sigmas("simple", 2, 0.5, 1.0, drop_penultimate=True)
    assert half == (*full_sigmas("simple", 5, 1.0)[2:4], 0.0)  # of 1, .8, .6, .4, (.2), 0


@pytest.mark.parametrize("sampler", sorted(DROP_PENULTIMATE))
def test_only_the_ksampler_node_drops_a_sigma(sampler: str):
    ksampler = stage_sigmas(make_stage("simple", 3, sampler=sampler, node="ksampler", shift=1.0))
    custom = stage_sigmas(make_stage("simple", 3, sampler=sampler, node="custom", shift=1.0))
    assert ksampler == (1.0, 0.75, 0.5, 0.0)
    assert custom == full_sigmas("simple", 3, 1.0)


def test_only_the_sigmas_node_cuts_a_schedule_that_came_out_too_long():
    whole = full_sigmas("ddim_uniform", 16, 3.0)
    assert stage_sigmas(make_stage("ddim_uniform", 16, node="ksampler")) == whole
    assert stage_sigmas(make_stage("ddim_uniform", 16, node="custom")) == whole[-17:]


def test_a_partial_flowmatch_stage_runs_the_end_of_a_longer_schedule():
    stage = make_stage("flowmatch_node", 4, denoise=0.5)
    assert stage_sigmas(stage) == flowmatch_node_sigmas(8, 3.0)[-5:]


def test_kl_optimal_with_one_step_is_not_a_number_and_refused():
    assert math.isnan(basic_sigmas("kl_optimal", 1, 1.0, 3.0)[0])
    stage = make_stage("kl_optimal", 2)
    object.__setattr__(stage, "steps", 1)  # which Stage itself refuses
    with pytest.raises(
        BadInputError, match=r"'kl_optimal' has no falling schedule for the 1 step\(s\)"
    ):
        stage_sigmas(stage)


@given(
    scheduler=st.sampled_from(SCHEDULERS),
    node=st.sampled_from(NODES),
    sampler=st.sampled_from(["euler", "uni_pc"]),
    steps=st.integers(1, 300),
    denoise=st.sampled_from([1.0, 0.99995, 0.7, 0.35]),
    shift=st.floats(0.2, 20),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_schedule_falls_strictly_from_at_most_1_to_0(
    scheduler: str, node: str, sampler: str, steps: int, denoise: float, shift: float
):
    assume(can_be_made(scheduler, node, steps, denoise))
    stage = make_stage(scheduler, steps, node=node, sampler=sampler, denoise=denoise, shift=shift)
    sigmas = stage_sigmas(stage)
    assert all(sigma > sigma_next for sigma, sigma_next in pairwise(sigmas))
    assert sigmas[0] <= 1 + 2e-6  # float32: s / (1 + (s - 1)) is 1.0000001 for s = 0.2
    assert sigmas[-1] == 0


def test_every_schedule_has_the_steps_asked_for_and_starts_lower_for_less_denoise():
    odd = {"beta", "ddim_uniform"}  # which may have fewer, and more
    for scheduler, node, steps in product(sorted(set(SCHEDULERS) - odd), NODES, (2, 5, 16)):
        if not can_be_made(scheduler, node, steps, 1.0):
            continue
        starts = []
        for denoise in (1.0, 0.7, 0.4, 0.1):
            sigmas = stage_sigmas(make_stage(scheduler, steps, node=node, denoise=denoise))
            assert len(sigmas) == steps + 1, (scheduler, node, steps, denoise)
            starts.append(sigmas[0])
        assert starts == sorted(starts, reverse=True)


def test_every_sigma_is_an_exact_float32():
    for scheduler in SCHEDULES:
        sigmas = full_sigmas(scheduler, 7, 3.0)
        assert torch.tensor(sigmas, dtype=torch.float64).float().tolist() == list(sigmas)
    assert all(as_float32(sigma) == sigma for sigma in flowmatch_node_sigmas(7, 3.0))
