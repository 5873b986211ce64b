"""EasyCache's decisions, worked out by hand on networks of one number.

All latents here have one value everywhere and the network doubles it (unless said otherwise), so
the rate of change is 2. With latents 4, 5, 6, 7, 8 and threshold 1/2:

| latent | moved since last run | sum                      | then       | output      |
| ------ | -------------------- | ------------------------ | ---------- | ----------- |
| 4      |                      |                          | run        | 8           |
| 5      | 1, rate (10 - 8) / 1 | (no rate before)         | run        | 10          |
| 6      | 1                    | 2 * 1 / 10 = 0.2         | skip       | 6 + 5 = 11  |
| 7      | 2                    | 0.2 + 2 * 2 / 10 = 0.6   | run, reset | 14          |
| 8      | 1                    | 2 * 1 / 14               | skip       | 8 + 7 = 15  |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from turbo.easycache import StepCache
from turbo.sigmas import as_float32

POSITIVE, NEGATIVE = "positive", "negative"


def call(
    cache: StepCache,
    values: Sequence[float],
    captions: Sequence[str] = (POSITIVE,),
    factors: Sequence[float] = (2,),
    sigma: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """One network call on latents of one value each; the value of each output."""
    latent = torch.tensor(values, dtype=dtype)[:, None, None, None].expand(-1, 2, 8, 8)
    factor = torch.tensor(factors, dtype=dtype)[:, None, None, None]
    output, _ = cache.call(lambda: factor * latent, latent, sigma, captions)
    assert output.dtype == dtype
    return output[:, 0, 0, 0].tolist()


def evaluate(cache: StepCache, value: float, sigma: float = 0.5) -> float:
    """One evaluation of one call with one caption."""
    cache.begin_evaluation()
    return call(cache, [value], sigma=sigma)[0]


def test_a_call_is_skipped_while_the_sum_of_changes_stays_below_the_threshold():
    cache = StepCache(threshold=0.5, start=1.0, end=0.0)
    cache.sums = []
    assert [evaluate(cache, x) for x in (4, 5, 6, 7, 8)] == [8, 10, 11, 14, 15]
    assert cache.skipped == [False, False, True, False, True]
    assert cache.sums[:2] == [None, None]
    assert cache.sums[2:] == pytest.approx([0.2, 0.6, 2 / 14])


def test_after_a_skip_the_latent_is_still_compared_with_that_of_the_last_run():
    # Steps of 1 add 0.2, 0.4, 0.6: growing, since each is measured from 5.
    cache = StepCache(threshold=10, start=1.0, end=0.0)
    cache.sums = []
    assert [evaluate(cache, x) for x in (4, 5, 6, 7, 8)] == [8, 10, 11, 12, 13]
    assert cache.sums[2:] == pytest.approx([0.2, 0.6, 1.2])


def test_a_sum_equal_to_the_threshold_runs():
    # 2 * 1 / 8 = 0.25 exactly: 3 -> 6, 4 -> 8, rate 2, norm 8
    cache = StepCache(threshold=0.25, start=1.0, end=0.0)
    assert [evaluate(cache, x) for x in (3, 4, 5)] == [6, 8, 10]
    assert not any(cache.skipped)


def test_threshold_0_skips_nothing():
    cache = StepCache(threshold=0, start=1.0, end=0.0)
    assert [evaluate(cache, x) for x in (4, 5, 5, 5, 6)] == [8, 10, 10, 10, 12]
    assert not any(cache.skipped)


def test_two_evaluations_run_after_the_start_before_one_is_skipped():
    cache = StepCache(threshold=100, start=0.5, end=0.0)
    for value, sigma in enumerate((0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2)):
        evaluate(cache, value, sigma)
    assert cache.skipped == [False] * 5 + [True] * 2


def test_the_end_runs_everything_from_its_own_sigma_on():
    cache = StepCache(threshold=100, start=1.0, end=0.25)
    for value, sigma in enumerate((1.0, 0.9, 0.5, 0.26, 0.25, 0.1)):
        evaluate(cache, value, sigma)
    assert cache.skipped == [False, False, True, True, False, False]


def test_a_run_after_the_end_is_not_remembered():
    cache = StepCache(threshold=0.5, start=1.0, end=0.25)
    values = [evaluate(cache, x, sigma) for x, sigma in ((4, 0.5), (5, 0.5), (100, 0.2), (6, 0.5))]
    assert values == [8, 10, 200, 11]  # the last one as if the third had not been


@pytest.mark.parametrize("edge", [0.1, 0.7])
def test_the_edges_of_the_window_are_compared_as_float32(edge: float):
    # The float32 next to 0.1 lies above it, that next to 0.7 below.
    sigma = as_float32(edge)
    starting, ending = StepCache(100, edge, 0.0), StepCache(100, 1.0, edge)
    for value in (4, 5, 6):
        evaluate(starting, value, sigma)
        evaluate(ending, value, sigma)
    assert starting.skipped == [False, False, True]
    assert ending.skipped == [False, False, False]


def test_two_calls_of_one_evaluation_are_skipped_together_by_the_first_ones_numbers():
    # The negative's outputs are 3 times the latent: 12, 15, then 6 + 10 and 7 * 3.
    cache = StepCache(threshold=0.5, start=1.0, end=0.0)
    cache.sums = []
    outputs = []
    for x in (4, 5, 6, 7):
        cache.begin_evaluation()
        outputs.append(call(cache, [x]) + call(cache, [x], [NEGATIVE], [3]))
    assert outputs == [[8, 12], [10, 15], [11, 16], [14, 21]]
    assert cache.skipped == [False, False, False, False, True, True, False, False]
    assert cache.sums[4:] == [pytest.approx(0.2), None, pytest.approx(0.6), None]


def test_two_captions_in_one_call_are_judged_by_the_first_ones_rows_and_the_whole_output():
    # Rows negative (times 3), positive (times 2). Rate (15 - 12) / 1 = 3, norm (15 + 10) / 2:
    # 3 * 1 / 12.5 = 0.24. Outputs then 6 + 10 and 6 + 5.
    cache = StepCache(threshold=0.25, start=1.0, end=0.0)
    cache.sums = []
    outputs = []
    for x in (4, 5, 6):
        cache.begin_evaluation()
        outputs.append(call(cache, [x, x], [NEGATIVE, POSITIVE], [3, 2]))
    assert outputs == [[12, 8], [15, 10], [16, 11]]
    assert cache.sums[2] == pytest.approx(0.24)


def test_captions_of_a_batch_keep_their_own_differences():
    # Two pictures a caption: rows negative, negative, positive, positive.
    cache = StepCache(threshold=100, start=1.0, end=0.0)
    for x in (4, 5, 6):
        cache.begin_evaluation()
        rows = [x, 10 * x, x, 10 * x]
        output = call(cache, rows, [NEGATIVE, POSITIVE], [3, 3, 2, 2])
    assert cache.skipped[-1]
    assert output == [6 + 10, 60 + 100, 6 + 5, 60 + 50]


def test_each_8th_row_and_column_is_looked_at():
    # Of 16 x 16 cells these are 4: one of them moving by 4 counts as 1, others count nothing.
    sums = []
    for row in (8, 7):
        cache = StepCache(threshold=0.5, start=1.0, end=0.0)
        cache.sums = []
        latents = [torch.full((1, 1, 16, 16), value) for value in (4.0, 5.0, 5.0)]
        latents[2][0, 0, row, 8] += 4
        for latent in latents:
            cache.begin_evaluation()
            cache.call(lambda latent=latent: 2 * latent, latent, 0.5, [POSITIVE])  # type: ignore[misc]
        sums.append(cache.sums[2])
    assert sums == [pytest.approx(0.2), 0.0]


def test_a_latent_that_does_not_move_gives_no_rate_and_so_no_skip():
    # 0 / 0: the sum is not a number, which is not below any threshold; then the rate is 2 again.
    cache = StepCache(threshold=100, start=1.0, end=0.0)
    cache.sums = []
    assert [evaluate(cache, x) for x in (4, 4, 5, 6)] == [8, 8, 10, 11]
    assert cache.sums[:2] == [None, None]
    assert math.isnan(cache.sums[2] or 0)
    assert cache.sums[3] == pytest.approx(0.2)


def test_in_bfloat16_the_sums_are_bfloat16_and_may_decide_otherwise():
    # 0.2 is 0.2001953125 there and 0.4 is 0.400390625; their sum, 0.6005859375, lies between
    # 153 / 256 and 154 / 256 and becomes the latter, as does the threshold.
    caches = {dtype: StepCache(0.6012, 1.0, 0.0) for dtype in (torch.bfloat16, torch.float32)}
    for dtype, cache in caches.items():
        cache.sums = []
        for x in (4, 5, 6, 7):
            cache.begin_evaluation()
            call(cache, [x], dtype=dtype)
    assert caches[torch.bfloat16].sums == [None, None, 0.2001953125, 154 / 256]
    assert caches[torch.bfloat16].skipped == [False, False, True, False]
    assert caches[torch.float32].skipped == [False, False, True, True]


def test_the_cache_keeps_no_hold_of_its_callers_memory():
    cache = StepCache(threshold=0.5, start=1.0, end=0.0)
    cache.sums = []
    latent, output = torch.empty(1, 1, 8, 8), torch.empty(1, 1, 8, 8)
    results: list[Tensor] = []
    for x in (4, 5, 6):
        cache.begin_evaluation()
        latent.fill_(x)
        results.append(cache.call(lambda: output.fill_(2 * x), latent, 0.5, [POSITIVE])[0].clone())  # noqa: B023
    assert [float(result.mean()) for result in results] == [8, 10, 11]
    assert cache.sums[2] == pytest.approx(0.2)


def test_a_skipped_call_does_not_run_the_network():
    cache = StepCache(threshold=0.5, start=1.0, end=0.0)
    evaluate(cache, 4)
    evaluate(cache, 5)
    cache.begin_evaluation()

    def network() -> Tensor:
        raise AssertionError("the network was run")

    _, skipped = cache.call(network, torch.full((1, 2, 8, 8), 6.0), 0.5, [POSITIVE])
    assert skipped
