"""How far two pictures or two latents lie apart, and pictures kept beside a results file.

With x and y the pictures' 8-bit values, red, green and blue together:

    PSNR = 10 log10(255^2 / mean((x - y)^2)), in dB; infinite, hence None, for identical pictures
    SSIM = Wang et al. 2004 with their Gaussian window of 11 x 11 and sigma 1.5, the colours' mean
    FLIP = Andersson et al. 2020, the mean of their map: 0 for identical pictures, 1 at the most
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageChops

from bench.results import ResultsFileError
from bench.timing import percentile
from turbo.messages import reason

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 11
"""Pixels a side of what SSIM looks at; smaller pictures have none."""


def compare_pictures(ours: Image.Image, theirs: Image.Image) -> dict[str, Any]:
    """Distances between two pictures of one size, ready for JSON.

    Returns:
        `identical`, `largest` (absolute difference of two values, of 255), `equal_share` (of the
        values), `psnr_db` (None if identical), `ssim` and, where flip-evaluator is installed,
        `flip`, for which `theirs` is the reference.

    Raises:
        ValueError: Their sizes differ, or they are smaller than SSIM's window.
    """
    if ours.size != theirs.size:
        raise ValueError(
            f"pictures of one size can be compared, got {_size(ours)} and {_size(theirs)}"
        )
    if min(ours.size) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} pixels a side at least, got {_size(ours)}")
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    x, y = (np.asarray(picture.convert("RGB")) for picture in (ours, theirs))
    difference = np.abs(x.astype(np.int16) - y.astype(np.int16))
    largest = int(difference.max())
    ssim = structural_similarity(
        x,
        y,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=-1,
        data_range=255,
    )
    found = {
        "identical": largest == 0,
        "largest": largest,
        "equal_share": float((difference == 0).mean()),
        "psnr_db": float(peak_signal_noise_ratio(y, x, data_range=255)) if largest else None,
        "ssim": float(ssim),
    }
    return found | ({"flip": _flip(x, y)} if find_spec("flip_evaluator") else {})


def _flip(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    import flip_evaluator

    ours, theirs = (np.ascontiguousarray(values, np.float32) / 255 for values in (x, y))
    _, mean, _ = flip_evaluator.evaluate(theirs, ours, "LDR", applyMagma=False)
    return float(mean)


def _size(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height}"


GAIN = 8
"""Shown differences are that many times as large: most would be black otherwise."""


def shown(picture: Image.Image, width: int) -> Image.Image:
    """A picture, RGB, so many pixels wide."""
    return picture.convert("RGB").resize(_size_shown(picture, width), Image.Resampling.LANCZOS)


def shown_difference(ours: Image.Image, theirs: Image.Image, width: int) -> Image.Image:
    """Absolute difference, averaged over what becomes one pixel, times `GAIN`; as wide as asked.

    Args:
        ours, theirs: Of one size.
        width: In pixels.
    """
    difference = ImageChops.difference(ours.convert("RGB"), theirs.convert("RGB"))
    small = difference.resize(_size_shown(ours, width), Image.Resampling.BOX)
    return small.point(lambda value: min(255, value * GAIN))


def _size_shown(picture: Image.Image, width: int) -> tuple[int, int]:
    return width, max(1, round(picture.height * width / picture.width))


def compare_latents(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance, ``|ours - theirs| / |theirs|``, summed in float64.

    Raises:
        ValueError: Their shapes differ, one is not finite, or `theirs` is zero everywhere.
    """
    if ours.shape != theirs.shape:
        raise ValueError(
            f"latents of one shape can be compared, got {list(ours.shape)}, {list(theirs.shape)}"
        )
    reference = theirs.double().cpu()
    distance, norm = (ours.double().cpu() - reference).norm().item(), reference.norm().item()
    if not math.isfinite(distance) or not math.isfinite(norm) or norm == 0:
        raise ValueError(f"no relative distance: the norms are {distance:g} over {norm:g}")
    return float(distance / norm)


def summary_of_values(values: Sequence[float | None]) -> dict[str, float | None]:
    """`median`, `p20` and `p80`; None counts as infinite, as the PSNR of identical pictures.

    Raises:
        ValueError: No values.
    """
    finite = [value for value in values if value is not None]
    padded = finite + [max(finite, default=0.0)] * (len(values) - len(finite))

    def at(percent: float) -> float | None:
        found = percentile(padded, percent)
        # Between a finite value and an infinite one everything is infinite.
        reaches = math.ceil((len(values) - 1) * percent / 100)
        return found if reaches < len(finite) else None

    return {"median": at(50), "p20": at(20), "p80": at(80)}


def save_picture(image: Image.Image, folder: Path, name: str) -> dict[str, str]:
    """Write a picture as PNG.

    Args:
        image: Is written in RGB.
        folder: Stands beside the results file; made if it is not there.
        name: Becomes the file's name, with hyphens for all but letters, digits, dots and
            underscores.

    Returns:
        `file`, relative to the results file, and `sha256`, of the size and the RGB values.
    """
    file = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") + ".png"
    image = image.convert("RGB")
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / file)
    return {"file": f"{folder.name}/{file}", "sha256": picture_sha256(image)}


def load_picture(results: Path, entry: Mapping[str, Any]) -> Image.Image:
    """Read a picture that `save_picture` wrote beside a results file, which may come from anyone.

    Args:
        results: The results file.
        entry: What `save_picture` returned.

    Raises:
        ResultsFileError: The picture lies outside the results' folder, is not there, is no PNG or
            is another one than was written.
    """
    file, expected = entry.get("file"), entry.get("sha256")
    if not isinstance(file, str) or not isinstance(expected, str):
        raise ResultsFileError(f"{results}: a picture needs file and sha256, got {dict(entry)!r}")
    folder = results.parent.resolve()
    try:
        path = (folder / file).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ResultsFileError(f"{results}: {file!r} is no file name ({error})") from error
    if not path.is_relative_to(folder):
        raise ResultsFileError(
            f"{results}: the picture {file!r} lies outside the folder of the results"
        )
    image = _read_png(path, results, file)
    if picture_sha256(image) != expected:
        raise ResultsFileError(f"{results}: the picture {file!r} is not the one that was measured")
    return image


def _read_png(path: Path, results: Path, file: str) -> Image.Image:
    try:
        return decode_picture(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ResultsFileError(
            f"{results}: the picture {file!r} cannot be read: {reason(error)}"
        ) from None


def decode_picture(data: bytes, formats: Sequence[str] = ("PNG",)) -> Image.Image:
    """The picture in a file's content, which may come from anyone; RGB.

    Raises:
        ValueError: It is no whole picture of these formats, or larger than Pillow allows.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=list(formats)) as picture:
                return picture.convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,  # Pillow's for a damaged PNG
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise ValueError(f"no whole {' or '.join(formats)} picture") from error


def picture_sha256(image: Image.Image) -> str:
    """What two pictures share only if their size and all their RGB values are the same."""
    header = f"{image.width}x{image.height}\n".encode()
    return hashlib.sha256(header + image.convert("RGB").tobytes()).hexdigest()
