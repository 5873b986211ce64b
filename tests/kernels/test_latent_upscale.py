"""The resize that also renoises: against hand-worked values, then kernel against reference."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.conftest import INTERPRETED
from turbo import latent as turbo_latent

pytest.importorskip("triton", reason="the kernels need Triton")

from turbo.kernels.latent_upscale import (
    latent_upscale,
    latent_upscale_reference,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SAMPLER = {"scale": turbo_latent.SCALE, "shift": turbo_latent.SHIFT}
GROWN_FAR = [(2, 235), (2, 307), (4, 194), (6, 141), (8, 388), (10, 275), (18, 369)]
"""Sizes at which the rounding steps of the source's index can be told apart."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal bits, any NaN equal to any other."""
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_the_reference_resizes_scales_and_renoises():
    # Sources 0, 0, 1, 2, 2; (v - 1) * 2 = 0, 0, 2, 4, 4; 0.75 * 4 + 0.25 * that.
    latent = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    noise = torch.full((1, 1, 2, 5), 4.0)
    got = latent_upscale_reference(latent, noise, 0.75, 2, 5, scale=2.0, shift=1.0)
    assert got.tolist() == [[[[3, 3, 3.5, 4, 4]] * 2]]


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.8999999761581421, 1.0])
def test_the_reference_is_the_way_between_two_stages_bit_for_bit(sigma: float):
    latent, noise = drawn(1, 16, 28, 22), drawn(1, 16, 54, 42, seed=1)
    resized = turbo_latent.resize(latent, 54, 42, "nearest-exact")
    want = turbo_latent.start_latent(turbo_latent.to_sampler(resized), noise, sigma)
    assert_same(latent_upscale_reference(latent, noise, sigma, 54, 42, **SAMPLER), want)


def test_the_reference_hides_no_infinity_behind_a_factor_of_0():
    latent, noise = torch.full((1, 1, 1, 1), math.inf), torch.full((1, 1, 1, 1), 2.0)
    assert latent_upscale_reference(latent, noise, 1.0, 1, 1).isnan().all()
    assert latent_upscale_reference(noise, latent, 0.0, 1, 1).isnan().all()


def sizes() -> list[tuple[int, int]]:
    """Hundreds of (size, new size), growing and shrinking."""
    rng = random.Random(0)
    drawn_sizes = [(rng.randint(1, 300), rng.randint(1, 1000)) for _ in range(200)]
    workflow = [(28, 54), (22, 42), (54, 108), (42, 84)]
    return [*itertools.product(range(1, 9), range(1, 9)), *workflow, *GROWN_FAR, *drawn_sizes]


def test_a_cell_comes_from_where_interpolate_takes_it(device: str):
    for number, (size, new_size) in enumerate(sizes()):
        rows = number % 2 == 0
        old, new = ((size, 1), (new_size, 1)) if rows else ((1, size), (1, new_size))
        # Channels-last and more than 3: where a CPU finds the index as a CUDA device does.
        latent = torch.arange(1.0 * size, device=device).reshape(1, *old, 1).repeat(1, 1, 1, 4)
        latent = latent.permute(0, 3, 1, 2)
        want = F.interpolate(latent, new, mode="nearest-exact")[:, :1]
        got = latent_upscale(latent[:, :1], torch.zeros(1, 1, *new, device=device), 0.0, *new)
        assert torch.equal(got, want), (size, new_size)


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_kernel_equals_the_reference_in_every_dtype(
    device: str, dtype: torch.dtype, out: torch.dtype
):
    latent = drawn(2, 3, 5, 7, dtype=dtype).to(device)
    noise = drawn(2, 3, 11, 9, seed=1).to(device)
    arguments = (latent, noise, 0.9, 11, 9)  # 1 - 0.9 is another number in float32 than 0.1
    want = latent_upscale_reference(*arguments, **SAMPLER, dtype=out)
    assert_same(latent_upscale(*arguments, **SAMPLER, dtype=out), want)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1, 1, 1), (1, 1)),
        ((1, 16, 28, 22), (54, 42)),
        ((1, 2, 3, 5), (32, 32)),  # a plane is one block exactly
        ((2, 1, 40, 30), (25, 41)),  # one cell more than a block; rows shrink
        ((3, 5, 1, 64), (1, 2049)),
        ((1, 3, 64, 1), (2047, 1)),
    ],
)
def test_the_kernel_equals_the_reference_at_awkward_sizes(
    device: str, shape: tuple[int, int, int, int], size: tuple[int, int]
):
    latent, noise = drawn(*shape).to(device), drawn(*shape[:2], *size, seed=1).to(device)
    for sigma in (0.0, 0.6999999880790710, 1.0, 1.0000001192092896):
        want = latent_upscale_reference(latent, noise, sigma, *size, **SAMPLER)
        assert_same(latent_upscale(latent, noise, sigma, *size, **SAMPLER), want)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch inside": lambda x: x.movedim(0, 3).contiguous().movedim(3, 0),
    "every other column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "cut out": lambda x: F.pad(x, (3, 1, 2, 5), value=math.nan)[..., 2:-5, 3:-1],
    "expanded": lambda x: x[:, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_kernel_reads_a_latent_in_any_memory_layout(
    device: str, layout: Callable[[Tensor], Tensor]
):
    latent = layout(drawn(2, 3, 6, 5).to(device))
    assert not latent.is_contiguous()
    noise = drawn(2, 3, 13, 8, seed=1).to(device)
    want = latent_upscale_reference(latent, noise, 0.5, 13, 8, **SAMPLER)
    assert_same(latent_upscale(latent, noise, 0.5, 13, 8, **SAMPLER), want)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
def test_infinity_and_nan_come_through_as_the_reference_has_them(
    device: str, sigma: float, dtype: torch.dtype
):
    values = torch.tensor([0.0, -0.0, 1.0, -65504.0, 3e38, math.inf, -math.inf, math.nan])
    count = len(values)
    latent = values.to(device, dtype)[None, None, :, None].expand(1, 1, count, count)
    noise = values.to(device).expand(1, 1, count, count).contiguous()
    want = latent_upscale_reference(latent, noise, sigma, count, count, **SAMPLER)
    got = latent_upscale(latent, noise, sigma, count, count, **SAMPLER)
    assert want.isnan().any()
    assert_same(got, want)


def fitting() -> dict[str, object]:
    """Arguments that are right, on a device where no work is done."""
    return {
        "latent": torch.empty(1, 4, 3, 5, device="meta"),
        "noise": torch.empty(1, 4, 6, 10, device="meta"),
        "sigma": 0.5,
        "height": 6,
        "width": 10,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"latent": torch.empty(4, 3, 5, device="meta")},
            r"latent must be a tensor \[batch, channels, height, width\] of float32 or bfloat16 or "
            r"float16, got a tensor \[4, 3, 5\] of float32 on meta",
        ),
        ({"latent": torch.empty(1, 4, 0, 5, device="meta")}, r"latent .* got .*\[1, 4, 0, 5\]"),
        (
            {"latent": torch.empty(1, 4, 3, 5, device="meta", dtype=torch.float64)},
            "latent .* got .* of float64",
        ),
        (
            {"latent": torch.empty(1, 1, 2, 2, device="meta").expand(2**29, 2, 2, 2)},
            r"latent may hold at most 1073741824 values, got 4294967296: .* split the batch",
        ),
        (
            {"noise": torch.empty(1, 4, 10, 6, device="meta").transpose(2, 3)},
            r"noise must be a contiguous tensor \[1, 4, 6, 10\] of float32 on meta, got a "
            r"non-contiguous tensor \[1, 4, 6, 10\] of float32 on meta",
        ),
        ({"noise": torch.empty(1, 4, 6, 9, device="meta")}, r"noise .* got .* \[1, 4, 6, 9\]"),
        (
            {"noise": torch.empty(1, 4, 6, 10, device="meta", dtype=torch.bfloat16)},
            "noise .* got .* of bfloat16",
        ),
        ({"noise": torch.empty(1, 4, 6, 10)}, "noise .* on meta, got .* on cpu"),
        ({"sigma": -0.5}, "sigma must be 0 or more and finite, got -0.5"),
        ({"sigma": math.inf}, "sigma must be 0 or more and finite, got inf"),
        ({"sigma": math.nan}, "sigma must be 0 or more and finite, got nan"),
        ({"height": 0}, "height and width must be 1 or more cells, got 0 and 10"),
        (
            {"dtype": torch.int32},
            "dtype must be float32, bfloat16 or float16, got torch.int32",
        ),
    ],
)
def test_an_argument_that_does_not_fit_is_named(wrong: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        latent_upscale(**fitting() | wrong)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_a_cpu_is_refused_rather_than_served_by_something_else():
    arguments = {
        name: torch.zeros(value.shape) if isinstance(value, Tensor) else value
        for name, value in fitting().items()
    }
    with pytest.raises(ValueError, match="latent must be on a CUDA device, got cpu; use latent_up"):
        latent_upscale(**arguments)
