"""Distances between pictures and latents, and pictures kept beside results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.ndimage import gaussian_filter

from bench.pictures import (
    compare_latents,
    compare_pictures,
    load_picture,
    save_picture,
    summary_of_values,
)
from bench.results import ResultsFileError

PIXELS = arrays(np.uint8, (16, 12, 3))


def plain(value: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def noise(seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_a_picture_is_identical_to_itself():
    found = compare_pictures(noise(), noise())
    assert found["identical"] is True
    assert (found["largest"], found["equal_share"], found["psnr_db"]) == (0, 1.0, None)
    assert found["ssim"] == pytest.approx(1.0)
    assert "Infinity" not in json.dumps(found)


def test_a_constant_difference_gives_the_psnr_of_its_square():
    found = compare_pictures(plain(110), plain(100))
    assert (found["largest"], found["equal_share"], found["identical"]) == (10, 0.0, False)
    assert found["psnr_db"] == pytest.approx(20 * math.log10(255 / 10))  # 28.13 dB


def test_black_and_white_are_0_db_apart():
    assert compare_pictures(plain(0), plain(255))["psnr_db"] == pytest.approx(0.0)


def test_flat_pictures_have_the_ssim_of_their_means():
    # Without variance only the first factor is left: (2 a b + C1) / (a^2 + b^2 + C1).
    a, b, c1 = 100, 150, (0.01 * 255) ** 2
    expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
    assert compare_pictures(plain(a), plain(b))["ssim"] == pytest.approx(expected)


def ssim_as_published(x: Any, y: Any) -> float:
    """Wang et al. 2004, equation 13, with the Gaussian window; borders left out."""
    x, y = x.astype(float), y.astype(float)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def mean(values: Any) -> Any:
        return gaussian_filter(values, 1.5, truncate=3.5)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    found = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(found[5:-5, 5:-5].mean())


@pytest.mark.parametrize("theirs", ["inverted", "another", "shifted"])
def test_ssim_is_that_of_the_published_formula(theirs: str):
    x = np.asarray(noise(1))
    y = {"inverted": 255 - x, "another": np.asarray(noise(2)), "shifted": np.roll(x, 1, 0)}[theirs]
    found = compare_pictures(Image.fromarray(x), Image.fromarray(y))["ssim"]
    channels = [ssim_as_published(x[..., channel], y[..., channel]) for channel in range(3)]
    assert found == pytest.approx(np.mean(channels), abs=1e-9)
    assert (found < -0.5) == (theirs == "inverted")


@settings(deadline=None, max_examples=30)
@given(PIXELS, PIXELS)
def test_distances_are_symmetric_and_in_their_ranges(x: Any, y: Any):
    a, b = Image.fromarray(x), Image.fromarray(y)
    there, back = compare_pictures(a, b), compare_pictures(b, a)
    assert there["psnr_db"] == back["psnr_db"]
    assert there["ssim"] == pytest.approx(back["ssim"])
    assert -1 - 1e-9 <= there["ssim"] <= 1 + 1e-9
    assert there["identical"] == bool((x == y).all())
    if there["psnr_db"] is not None:  # the largest difference everywhere would be the least
        assert there["psnr_db"] >= 20 * math.log10(255 / there["largest"]) - 1e-9


def test_flip_is_there_where_it_is_installed():
    pytest.importorskip("flip_evaluator")
    assert compare_pictures(noise(), noise())["flip"] == pytest.approx(0.0, abs=1e-6)
    assert 0.5 < compare_pictures(plain(0), plain(255))["flip"] <= 1.0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((16, 16), (16, 32)), "got 16 x 16 and 16 x 32"),
        (((8, 16), (8, 16)), "needs 11 pixels a side at least, got 8 x 16"),
    ],
)
def test_pictures_of_other_sizes_are_refused(sizes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        compare_pictures(plain(1, sizes[0]), plain(1, sizes[1]))


def test_latents_are_compared_relative_to_the_second():
    theirs = torch.tensor([3.0, 4.0])  # of norm 5
    assert compare_latents(theirs + torch.tensor([0.0, 1.0]), theirs) == pytest.approx(0.2)
    assert compare_latents(theirs, theirs) == 0.0


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([1.0], [1.0, 2.0], "one shape"),
        ([math.nan], [1.0], "no relative distance"),
        ([1.0], [math.inf], "no relative distance"),
        ([1.0], [0.0], "no relative distance"),
    ],
)
def test_latents_without_a_distance_are_refused(ours: Any, theirs: Any, message: str):
    with pytest.raises(ValueError, match=message):
        compare_latents(torch.tensor(ours), torch.tensor(theirs))


def test_values_are_summed_up_by_median_and_spread():
    assert summary_of_values([50, 10, 20, 40, 30]) == {"median": 30, "p20": 18, "p80": 42}


def test_the_psnr_of_identical_pictures_is_above_every_other():
    assert summary_of_values([None, 30.0, 40.0]) == {"median": 40.0, "p20": 34.0, "p80": None}
    assert summary_of_values([None, 30.0]) == {"median": None, "p20": None, "p80": None}
    assert summary_of_values([None]) == {"median": None, "p20": None, "p80": None}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.integers(0, 5))
def test_infinite_values_count_as_infinite(values: list[float], identical: int):
    with_infinity = np.array([*values, *[1e300] * identical])
    found = summary_of_values([*values, *[None] * identical])
    for name, percent in {"median": 50, "p20": 20, "p80": 80}.items():
        expected = np.percentile(with_infinity, percent)
        if expected > 1e7:
            assert found[name] is None
        else:
            assert found[name] == pytest.approx(expected)


def test_no_values_have_no_summary():
    with pytest.raises(ValueError, match="a percentile needs values"):
        summary_of_values([])


def test_a_saved_picture_is_read_back_bit_for_bit(tmp_path: Path):
    entry = save_picture(noise(), tmp_path / "quality-pictures", "bfloat16 of round 1/2")
    assert entry["file"] == "quality-pictures/bfloat16-of-round-1-2.png"
    assert load_picture(tmp_path / "quality.json", entry).tobytes() == noise().tobytes()


def test_the_checksum_knows_pictures_of_the_same_bytes_in_another_shape(tmp_path: Path):
    wide, tall = plain(7, (16, 32)), plain(7, (32, 16))
    entries = [save_picture(image, tmp_path / "p", "same") for image in (wide, tall)]
    assert wide.tobytes() == tall.tobytes()
    assert entries[0]["sha256"] != entries[1]["sha256"]


def test_a_picture_that_was_changed_is_refused(tmp_path: Path):
    entry = save_picture(noise(1), tmp_path / "p", "one")
    save_picture(noise(2), tmp_path / "p", "one")
    with pytest.raises(ResultsFileError, match="not the one that was measured"):
        load_picture(tmp_path / "r.json", entry)


@pytest.mark.parametrize("file", ["../secret.png", "p/../../secret.png", "link/secret.png"])
def test_a_picture_outside_the_folder_is_refused(tmp_path: Path, file: str):
    entry = save_picture(noise(), tmp_path, "secret")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    for path in (file, str(tmp_path / "secret.png")):
        with pytest.raises(ResultsFileError, match="outside the folder"):
            load_picture(folder / "r.json", {**entry, "file": path})


@pytest.mark.parametrize("content", [None, b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture_is_refused_in_one_line(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ResultsFileError, match="cannot be read") as caught:
        load_picture(tmp_path / "r.json", {"file": "a.png", "sha256": "0"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", [{}, {"file": 3, "sha256": "0"}, {"file": "a\0", "sha256": "0"}])
def test_an_entry_that_names_no_picture_is_refused(tmp_path: Path, entry: dict[str, Any]):
    with pytest.raises(ResultsFileError, match=r"picture needs|no file name"):
        load_picture(tmp_path / "r.json", entry)


def test_a_picture_too_large_to_be_real_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = save_picture(noise(), tmp_path / "p", "bomb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ResultsFileError, match="cannot be read"):
        load_picture(tmp_path / "r.json", entry)
