"""EasyCache's numbers: against hand-worked values and the engine's own cache, then the kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import INTERPRETED
from turbo.easycache import StepCache

pytest.importorskip("triton", reason="the kernels need Triton")

from turbo.kernels import easycache
from turbo.kernels.easycache import (
    STATE_SIZE,
    Place,
    easycache_compare,
    easycache_compare_reference,
    easycache_observe,
    easycache_observe_reference,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Run:
    """A sampler run's buffers and one of the two implementations."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    reference: bool = False
    parity: bool = False
    row: int = 0
    batch: int | None = None
    """Rows of the compared caption; None for all."""
    started: bool = False
    skipped: list[bool] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        everything, channels, height, width = self.shape
        self.batch = self.batch or everything
        kept = (self.batch, channels, -(-height // 8), -(-width // 8))
        self.last_input = torch.empty(kept, dtype=self.dtype, device=self.device)
        self.last_output = torch.empty_like(self.last_input)
        self.difference = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.state = torch.zeros(STATE_SIZE, device=self.device)

    def compare(self, latent: Tensor, threshold: float) -> bool:
        compare = easycache_compare_reference if self.reference else easycache_compare
        assert self.batch is not None
        rows = latent[self.row : self.row + self.batch]
        compare(rows, self.last_input, self.state, threshold, parity=self.parity)
        self.sums.append(float(self.state[Place.COMPARED]))
        return bool(self.state[Place.SKIP])

    def observe(self, latent: Tensor, output: Tensor, *, measured: bool) -> None:
        observe = easycache_observe_reference if self.reference else easycache_observe
        kept = (self.last_input, self.last_output, self.difference)
        observe(latent, output, *kept, self.state, self.row, measured=measured, parity=self.parity)

    def call(self, network: Callable[[], Tensor], latent: Tensor, threshold: float) -> Tensor:
        """One network call, run or skipped."""
        measured, self.started = self.started, True
        skip = measured and self.compare(latent, threshold)
        self.skipped.append(skip)
        if skip:
            return latent + self.difference
        output = network()
        self.observe(latent, output, measured=measured)
        return output


def even(*values: float, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """A latent of one value a row."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None, None].expand(-1, 2, 9, 8)


def follow(run: Run, *values: float, threshold: float = 0.5) -> list[float]:
    """Calls of a network that doubles: the value of each output."""
    latents = [even(value, device=run.device, dtype=run.dtype) for value in values]
    outputs = [run.call(lambda x=x: 2 * x, x, threshold) for x in latents]  # type: ignore[misc]
    return [float(output[0, 0, 0, 0]) for output in outputs]


# Rate 2 and norm 10 after 4 and 5: then 2 * 1 / 10 = 0.2, 0.2 + 2 * 2 / 10 = 0.6, and after the
# run at 7, whose output is 14, 2 * 1 / 14.
HAND_WORKED = [math.nan, 0.2, 0.6, 2 / 14]


def test_the_reference_skips_while_the_sum_of_changes_stays_below_the_threshold():
    run = Run((1, 2, 9, 8), reference=True)
    assert follow(run, 4, 5, 6, 7, 8) == [8, 10, 11, 14, 15]
    assert run.skipped == [False, False, True, False, True]
    assert run.sums == pytest.approx(HAND_WORKED, nan_ok=True)


def test_the_kernels_skip_while_the_sum_of_changes_stays_below_the_threshold(device: str):
    run = Run((1, 2, 9, 8), device=device)
    assert follow(run, 4, 5, 6, 7, 8) == [8, 10, 11, 14, 15]
    assert run.skipped == [False, False, True, False, True]
    assert run.sums == pytest.approx(HAND_WORKED, nan_ok=True)
    assert run.state[
        [Place.SKIP, Place.SUM, Place.DISTANCE, Place.CHANGE, Place.RATE, Place.NORM]
    ].tolist() == pytest.approx([1, 2 / 14, 1, 4, 2, 14])


def implementations(device: str) -> Iterator[Run]:
    yield Run((1, 2, 9, 8), device=device)
    yield Run((1, 2, 9, 8), device=device, reference=True)


def test_a_latent_that_does_not_move_gives_no_rate_and_so_no_skip(device: str):
    for run in implementations(device):
        # 0 / 0 is below no threshold; the next run gives the rate again.
        assert follow(run, 4, 4, 5, 6, threshold=100) == [8, 8, 10, 11]
        assert run.sums == pytest.approx([math.nan, math.nan, 0.2], nan_ok=True)


def test_a_sum_equal_to_the_threshold_runs(device: str):
    for run in implementations(device):
        # 2 * 1 / 8 = 0.25 exactly
        assert follow(run, 3, 4, 5, threshold=0.25) == [6, 8, 10]
        assert (run.sums[-1], float(run.state[Place.SUM])) == (0.25, 0)


def test_a_state_of_zeros_is_a_fresh_run(device: str):
    for run in implementations(device):
        first = follow(run, 4, 5, 6, 7)
        run.state.zero_()
        run.started = False
        assert follow(run, 4, 5, 6, 7) == first


def test_a_run_without_a_distance_keeps_the_rate_and_renews_the_rest(device: str):
    for run in implementations(device):
        follow(run, 4, 5)
        latent = even(6, device=device)
        run.observe(latent, 5 * latent, measured=False)  # rate stays 2, norm becomes 30
        assert run.compare(even(9, device=device), threshold=1)
        assert run.sums[-1] == pytest.approx(2 * 3 / 30)


def test_one_captions_rows_are_compared_and_the_whole_output_is_the_norm(device: str):
    # Rows (one caption's, the compared one's): rate (10 - 8) / 1, norm (15 + 10) / 2.
    for reference in (True, False):
        run = Run((2, 2, 9, 8), device=device, reference=reference, row=1, batch=1)
        for value in (4, 5, 6):
            latent = even(10 * value, value, device=device)
            output = even(3 * value, 2 * value, device=device)
            run.call(lambda output=output: output, latent, 0.5)  # type: ignore[misc]
        assert run.sums[-1] == pytest.approx(2 * 1 / 12.5)
        assert run.skipped[-1]
        assert run.difference[:, 0, 0, 0].tolist() == [15 - 50, 10 - 5]


def test_each_8th_row_and_column_is_looked_at(device: str):
    # Of 9 x 8 cells these are 2: one of them moving by 4 counts as 2 channels * 2 cells: 1.
    for run in implementations(device):
        follow(run, 4)
        for row, distance in ((8, 1), (7, 0)):
            latent = even(4, device=device).clone()
            latent[0, 0, row, 0] += 4
            run.compare(latent, 0.5)
            assert run.state[Place.DISTANCE] == distance


def test_in_bfloat16_parity_the_sums_are_bfloat16_and_may_decide_otherwise(device: str):
    # 0.2 is 0.2001953125 there and 0.4 is 0.400390625; their sum, 0.6005859375, lies between
    # 153 / 256 and 154 / 256 and becomes the latter, as does the threshold.
    for parity, reference in itertools.product((True, False), repeat=2):
        run = Run((1, 2, 9, 8), torch.bfloat16, device, reference, parity)
        follow(run, 4, 5, 6, 7, threshold=0.6012)
        assert run.skipped == [False, False, True, not parity]
        if parity:
            assert run.sums[1:] == [0.2001953125, 154 / 256]


def test_in_parity_the_threshold_is_rounded_too(device: str):
    # To 0.2001953125, which the sum of 0.2 becomes as well.
    for parity, reference in itertools.product((True, False), repeat=2):
        run = Run((1, 2, 9, 8), torch.bfloat16, device, reference, parity)
        follow(run, 4, 5, 6, threshold=0.2003)
        assert run.skipped == [False, False, not parity]


def walk(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents on a smooth way and the outputs of a network that is never skipped."""
    generator = torch.Generator().manual_seed(0)
    start, drift, wind = torch.randn(3, *shape, generator=generator)
    for step in range(12):
        latent = start + 0.02 * step**1.5 * drift
        output = torch.tanh(latent) * (1 + 0.05 * step) + 0.1 * wind
        yield latent.to(device, dtype), output.to(device, dtype)


def allowed(dtype: torch.dtype, device: str) -> float:
    """How far numbers of a dtype may be apart that come from sums taken in other orders.

    In the interpreter, sums are not so far off that it shows after rounding to 16 bits.
    """
    if device == "cpu" and dtype != torch.float32:
        return 0.0
    return 8 * torch.finfo(dtype).eps


SHAPES = [
    (1, 16, 28, 22),
    (1, 1, 1, 1),
    (2, 3, 8, 8),
    (1, 5, 65, 9),
    (2, 8, 27, 43),  # several programs, the last one with part of a block
]


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_keep_what_the_reference_keeps(
    device: str, shape: tuple[int, int, int, int], dtype: torch.dtype, parity: bool
):
    runs = [
        Run(shape, dtype, device, reference=reference, parity=parity) for reference in (False, True)
    ]
    *calls, (last, _) = itertools.islice(walk(shape, dtype, device), 6)
    for run in runs:
        for latent, output in calls:
            run.call(lambda output=output: output, latent, 0.3)  # type: ignore[misc]
        run.compare(last, 0.3)
    kernels, reference = runs
    assert kernels.skipped == reference.skipped
    for name in ("last_input", "last_output", "difference"):
        assert torch.equal(getattr(kernels, name), getattr(reference, name)), name
    tolerance = allowed(dtype if parity else torch.float32, device)
    torch.testing.assert_close(
        kernels.state[: Place.COUNT],
        reference.state[: Place.COUNT],
        rtol=tolerance,
        atol=0,
        equal_nan=True,
    )


def test_a_program_takes_several_blocks_where_programs_are_fewer(
    device: str, monkeypatch: pytest.MonkeyPatch
):
    shape = (2, 3, 27, 43)
    runs = [Run(shape, device=device), Run(shape, device=device)]
    for run in runs:
        for latent, output in itertools.islice(walk(shape, torch.float32, device), 4):
            run.call(lambda output=output: output, latent, 0.3)  # type: ignore[misc]
        monkeypatch.setattr(easycache, "_COMPARE_BLOCK", 64)
        monkeypatch.setattr(easycache, "_OBSERVE_BLOCK", 64)
        monkeypatch.setattr(easycache, "MOST_PROGRAMS", 3)
    usual, few = runs
    assert torch.equal(few.difference, usual.difference)
    assert torch.equal(few.last_input, usual.last_input)
    assert torch.equal(few.last_output, usual.last_output)
    assert few.skipped == usual.skipped
    assert few.state[16 + 3 :].count_nonzero() == 3  # the shares of the change
    torch.testing.assert_close(few.sums, usual.sums, rtol=2e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_kernels_decide_as_the_engines_own_cache(device: str, dtype: torch.dtype):
    shape = (1, 16, 28, 22)
    run = Run(shape, dtype, device, parity=True)
    cache = StepCache(0.3, start=1.0, end=0.0)
    cache.sums = []
    for latent, output in walk(shape, dtype, device):
        cache.begin_evaluation()
        want, _ = cache.call(lambda output=output: output, latent, 0.5, ["positive"])  # type: ignore[misc]
        got = run.call(lambda output=output: output, latent, 0.3)  # type: ignore[misc]
        assert torch.equal(got, want)
    assert run.skipped == cache.skipped
    assert 2 < sum(run.skipped) < 9
    wanted = [math.nan, *(total for total in cache.sums if total is not None)]
    assert run.sums == pytest.approx(wanted, rel=allowed(dtype, device), abs=0, nan_ok=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other row": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "cut out": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1), value=math.nan)[..., 3:-1, 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_kernels_read_tensors_in_any_memory_layout(
    device: str, layout: Callable[[Tensor], Tensor]
):
    shape = (2, 3, 17, 11)
    plain, laid = (Run(shape, device=device, row=1, batch=1) for _ in range(2))
    for latent, output in itertools.islice(walk(shape, torch.float32, device), 3):
        assert not layout(latent).is_contiguous()
        plain.call(lambda output=output: output, latent, 0.3)  # type: ignore[misc]
        laid.call(lambda output=output: layout(output), layout(latent), 0.3)  # type: ignore[misc]
    torch.testing.assert_close(laid.state, plain.state, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(laid.last_output, plain.last_output)
    assert torch.equal(laid.difference, plain.difference)


def test_equal_inputs_give_equal_bits(device: str):
    shape = (1, 16, 40, 50)
    first, second = (Run(shape, torch.bfloat16, device) for _ in range(2))
    for latent, output in itertools.islice(walk(shape, torch.bfloat16, device), 3):
        for run in (first, second):
            run.call(lambda output=output: output, latent, 0.3)  # type: ignore[misc]
    assert torch.equal(first.state, second.state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_no_number_is_never_reused(device: str, value: float):
    for run in implementations(device):
        follow(run, 4, 5)
        latent = even(6, device=device)
        run.compare(latent, 0.0)
        run.observe(latent, torch.full_like(latent, value), measured=True)
        assert not run.compare(even(7, device=device), 1e30)
        assert run.state[Place.SUM] == 0


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor on a device where no work is done."""
    return torch.empty(shape, dtype=dtype, device="meta")


def fitting() -> dict[str, object]:
    """Arguments of `easycache_observe` that are right."""
    return {
        "latent": meta(2, 4, 9, 20),
        "output": meta(2, 4, 9, 20),
        "last_input": meta(1, 4, 2, 3),
        "last_output": meta(1, 4, 2, 3),
        "difference": meta(2, 4, 9, 20),
        "state": meta(STATE_SIZE, dtype=torch.float32),
        "row": 1,
        "measured": True,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latent": meta(4, 9, 20)}, r"latent must be a tensor \[rows, channels, height, width\]"),
        ({"latent": meta(1, 1, 1, 1, dtype=torch.int8)}, "latent .* got .* of int8"),
        ({"output": meta(2, 4, 9, 19)}, r"output must be a tensor \[2, 4, 9, 20\] of bfloat16 on"),
        ({"output": meta(2, 4, 9, 20, dtype=torch.float16)}, "output .* got .* of float16"),
        ({"last_input": meta(1, 4, 1, 3)}, r"last_input .* \[batch, 4, 2, 3\] .* \[1, 4, 1, 3\]"),
        ({"last_output": meta(2, 4, 2, 3)}, r"last_output .* \[1, 4, 2, 3\] .* \[2, 4, 2, 3\]"),
        ({"difference": meta(2, 4, 20, 9).mT}, "difference must be a contiguous .* non-contiguous"),
        ({"state": meta(8, dtype=torch.float32)}, rf"state .* \[{STATE_SIZE}\] .* got .* \[8\]"),
        ({"state": torch.zeros(STATE_SIZE)}, "state .* on meta, got .* on cpu"),
        ({"row": 2}, "row must be from 0 to 1, so that the 1 rows of last_input lie in the 2"),
        ({"row": -1}, "row must be from 0 to 1"),
    ],
)
def test_an_argument_of_observe_that_does_not_fit_is_named(wrong: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        easycache_observe(**fitting() | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latent": meta(1, 4, 9, 0)}, r"latent .* got .* \[1, 4, 9, 0\]"),
        ({"last_input": meta(1, 4, 9, 20)}, r"last_input .* \[1, 4, 2, 3\] .* \[1, 4, 9, 20\]"),
        ({"state": meta(STATE_SIZE)}, "state .* of float32 on meta, got .* of bfloat16 on meta"),
    ],
)
def test_an_argument_of_compare_that_does_not_fit_is_named(wrong: dict[str, object], message: str):
    right = {name: fitting()[name] for name in ("last_input", "state")}
    right |= {"latent": meta(1, 4, 9, 20), "threshold": 0.3}
    with pytest.raises(ValueError, match=message):
        easycache_compare(**right | wrong)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_a_cpu_is_refused_rather_than_served_by_something_else():
    run = Run((1, 2, 9, 8))
    with pytest.raises(ValueError, match="on a CUDA device, got cpu; use easycache_compare_ref"):
        run.compare(even(1), 0.5)
    with pytest.raises(ValueError, match="on a CUDA device, got cpu; use easycache_observe_ref"):
        run.observe(even(1), even(1), measured=False)
