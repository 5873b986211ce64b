"""Scales and sizes of latents."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from turbo.latent import from_sampler, resize, start_latent, target_size, to_sampler
from turbo.plan import UPSCALE_METHODS


def rows(*values: list[float]) -> Tensor:
    """A latent of one channel from its rows."""
    return torch.tensor(values, dtype=torch.float32)[None, None]


def vectors(*columns: tuple[float, float]) -> Tensor:
    """A latent of two channels and one row from its channel vectors."""
    return torch.tensor(columns, dtype=torch.float32).T[None, :, None]


def test_the_samplers_scale_is_shifted_then_stretched():
    # (2.1159 - 0.1159) * 0.3611 = 0.7222
    latent = torch.tensor([2.1159, 0.1159])
    torch.testing.assert_close(to_sampler(latent), torch.tensor([0.7222, 0.0]))


def test_the_two_scales_undo_each_other():
    latent = torch.linspace(-5, 5, 100)
    torch.testing.assert_close(from_sampler(to_sampler(latent)), latent)


def test_a_stage_starts_between_its_latent_and_the_noise():
    # 0.75 * 4 + 0.25 * 8 = 5
    noise, latent = torch.tensor([4.0]), torch.tensor([8.0])
    assert start_latent(latent, noise, 0.75).tolist() == [5.0]


def test_no_latent_starts_from_scaled_noise_alone():
    assert start_latent(None, torch.tensor([4.0]), 0.75).tolist() == [3.0]


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_sigma_0_keeps_the_latent_and_sigma_1_the_noise(sigma: float):
    noise, latent = torch.randn(2, 1, 16, 2, 2).unbind()
    assert torch.equal(start_latent(latent, noise, sigma), noise if sigma else latent)


def test_nearest_exact_takes_the_cell_under_the_middle_of_the_new_one():
    # floor((i + 0.5) * 3 / 5) = floor(0.3, 0.9, 1.5, 2.1, 2.7); floor((i + 0.5) / 2) = 0, 0
    got = resize(rows([1, 2, 3]), 2, 5, "nearest-exact")
    assert got[0, 0].tolist() == [[1, 1, 2, 3, 3]] * 2


def test_bilinear_counts_from_cell_centres():
    # (i + 0.5) / 2 - 0.5 = -0.25, 0.25, 0.75, 1.25, cut to 0 .. 1
    assert resize(rows([0, 8]), 1, 4, "bilinear")[0, 0].tolist() == [[0, 2, 6, 8]]


def test_area_averages_what_a_new_cell_covers():
    assert resize(rows([1, 3, 5, 7], [3, 5, 7, 9]), 1, 2, "area")[0, 0].tolist() == [[3, 7]]


def test_bicubic_overshoots_beside_an_edge():
    # a = -0.75, a quarter of the way from the second of four cells to the third: their weights are
    # -0.10546875, 0.87890625, 0.26171875, -0.03515625, and the same backwards at three quarters.
    got = resize(rows([0, 0, 0, 1, 1, 1]), 1, 12, "bicubic")[0, 0, 0]
    before = [-0.10546875, 0.26171875 - 0.03515625]
    assert got[4:6].tolist() == pytest.approx(before)
    assert got[6:8].tolist() == pytest.approx([1 - value for value in reversed(before)])


def test_bislerp_turns_and_stretches_channel_vectors_separately():
    # Positions 0, 1/4, 3/4 of a right angle, and the end; lengths 2, 2.5, 3.5, 4.
    got = resize(vectors((2, 0), (0, 4)), 1, 4, "bislerp")[0, :, 0].T
    eighth = math.pi / 8
    want = [
        [2, 0],
        [2.5 * math.cos(eighth), 2.5 * math.sin(eighth)],
        [3.5 * math.sin(eighth), 3.5 * math.cos(eighth)],
        [0, 4],
    ]
    torch.testing.assert_close(got, torch.tensor(want))


def test_bislerp_mixes_opposite_vectors_linearly():
    # No great circle is shortest: 2 -> -4 at 1/4 and 3/4 is 0.5 and -2.5.
    got = resize(vectors((2, 0), (-4, 0)), 1, 4, "bislerp")[0, 0, 0]
    torch.testing.assert_close(got, torch.tensor([2, 0.5, -2.5, -4]))


def test_bislerp_keeps_the_first_of_two_parallel_vectors():
    got = resize(vectors((2, 0), (4, 0)), 1, 4, "bislerp")[0, 0, 0]
    torch.testing.assert_close(got, torch.tensor([2.0, 2, 2, 4]))


def test_bislerp_counts_a_zero_vector_as_a_right_angle_without_direction():
    # At 1/4: sin(pi / 8) of the other's direction, length 1/4 * 4.
    got = resize(vectors((0, 0), (4, 0)), 1, 4, "bislerp")[0, 0, 0]
    want = torch.tensor([0, math.sin(math.pi / 8), 3 * math.cos(math.pi / 8), 4])
    torch.testing.assert_close(got, want)


def test_bislerp_treats_rows_as_it_treats_columns():
    latent = torch.randn(2, 4, 3, 1, generator=torch.Generator().manual_seed(0))
    tall = resize(latent, 7, 1, "bislerp")
    wide = resize(latent.transpose(2, 3), 1, 7, "bislerp")
    torch.testing.assert_close(tall, wide.transpose(2, 3))


@pytest.mark.parametrize("method", UPSCALE_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_keeps_an_even_latent_even(method: str, dtype: torch.dtype):
    latent = torch.tensor([1.0, -2.0, 3.0], dtype=dtype)[None, :, None, None].expand(2, 3, 4, 6)
    got = resize(latent, 7, 9, method)
    assert (got.shape, got.dtype) == ((2, 3, 7, 9), dtype)
    torch.testing.assert_close(got, latent[:, :, :1, :1].expand(2, 3, 7, 9))


@pytest.mark.parametrize("method", UPSCALE_METHODS)
def test_every_method_treats_the_pictures_of_a_batch_alone(method: str):
    latent = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize(latent, 6, 8, method)[1:], resize(latent[1:], 6, 8, method))


def test_the_centre_crop_cuts_what_sticks_out_of_the_new_aspect():
    # 4 columns to a square of 2 rows: (4 - 2) / 2 = 1 off each side; and the same for rows.
    wide = rows([0, 1, 2, 3], [4, 5, 6, 7])
    assert resize(wide, 2, 2, "nearest-exact", "center")[0, 0].tolist() == [[1, 2], [5, 6]]
    tall = wide.transpose(2, 3)
    assert resize(tall, 2, 2, "nearest-exact", "center")[0, 0].tolist() == [[1, 5], [2, 6]]


@pytest.mark.parametrize(
    ("height", "width", "want"),
    [
        (432, 336, (54, 42)),
        (100, 31, (12, 8)),  # 100 // 8; a side below 64 pixels becomes 64
        (0, 0, (20, 30)),
        (160, 0, (20, 30)),  # 30 * 160 / 20 = 240 pixels
        (0, 120, (10, 15)),  # 20 * 120 / 30 = 80 pixels
        (0, 66, (8, 8)),  # 20 * 66 / 30 = 44 pixels become 64
        (40, 0, (8, 12)),  # 64, and 30 * 64 / 20 = 96 pixels
    ],
)
def test_a_size_in_pixels_becomes_rows_and_columns(height: int, width: int, want: tuple[int, int]):
    assert target_size(torch.zeros(1, 16, 20, 30), height, width) == want


@pytest.mark.parametrize(("height", "width"), [(0, 64), (64, 0)])
def test_a_side_that_follows_from_the_other_is_64_pixels_at_least(height: int, width: int):
    # 64 * 2 / 10 = 12.8 pixels become 64.
    shape = (10, 2) if height else (2, 10)
    assert target_size(torch.zeros(1, 16, *shape), height, width) == (8, 8)
