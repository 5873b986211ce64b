"""Latents outside and inside a sampler, and their resizing between stages.

Between stages a latent is in the autoencoder's scale ("outside"). A sampler works on
``(outside - SHIFT) * SCALE``. Where the reference has a latent of zeros for "nothing there", which
it does not convert, we have None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 0.3611
SHIFT = 0.1159
STRIDE = 8
"""Pixels to a latent cell."""


def to_sampler(latent: Tensor) -> Tensor:
    """Bring an outside latent into the sampler's scale."""
    return (latent - SHIFT) * SCALE


def from_sampler(latent: Tensor) -> Tensor:
    """Bring a sampler's latent back to the autoencoder's scale."""
    return latent / SCALE + SHIFT


def start_latent(latent: Tensor | None, noise: Tensor, sigma: float) -> Tensor:
    """The noisy latent a stage starts from.

    Args:
        latent: In the sampler's scale, [batch, 16, height / 8, width / 8], or None for no picture.
        noise: Shape of the latent, float32.
        sigma: The stage's first noise level.
    """
    if latent is None:
        return sigma * noise
    return sigma * noise + (1 - sigma) * latent


def resize(latent: Tensor, height: int, width: int, method: str, crop: str = "disabled") -> Tensor:
    """Resize an outside latent.

    Args:
        latent: [batch, channels, height, width].
        height: New number of rows, in latent cells.
        width: New number of columns, in latent cells.
        method: "nearest-exact", "bilinear", "area", "bicubic" or "bislerp".
        crop: "center" cuts the source to the new aspect first; "disabled" stretches.

    Returns:
        [batch, channels, height, width], dtype of `latent`.
    """
    if crop == "center":
        latent = _crop_to_aspect(latent, width / height)
    if method == "bislerp":
        return _bislerp(_bislerp(latent, width).transpose(2, 3), height).transpose(2, 3)
    return F.interpolate(latent, size=(height, width), mode=method)


def target_size(latent: Tensor, height: int, width: int) -> tuple[int, int]:
    """Latent rows and columns of a picture size in pixels, as a LatentUpscale node takes it.

    A side below 64 pixels becomes 64. One side 0: it follows from the other and the latent's
    aspect. Both 0: the latent's own size.
    """
    rows, columns = latent.shape[-2:]
    if width == 0 and height == 0:
        return rows, columns
    if width == 0:
        height = max(64, height)
        width = max(64, round(columns * height / rows))
    elif height == 0:
        width = max(64, width)
        height = max(64, round(rows * width / columns))
    else:
        width, height = max(64, width), max(64, height)
    return height // STRIDE, width // STRIDE


def _crop_to_aspect(latent: Tensor, new_aspect: float) -> Tensor:
    rows, columns = latent.shape[-2:]
    aspect = columns / rows
    left = top = 0
    if aspect > new_aspect:
        left = round((columns - columns * (new_aspect / aspect)) / 2)
    elif aspect < new_aspect:
        top = round((rows - rows * (aspect / new_aspect)) / 2)
    return latent[..., top : rows - top, left : columns - left]


def _bislerp(latent: Tensor, width: int) -> Tensor:
    """Interpolate channel vectors along the sphere, lengths linearly, over the last axis."""
    columns = latent.shape[-1]
    left, right, ratio = _bislerp_neighbours(columns, width, latent.device)
    a, b = latent.float()[..., left], latent.float()[..., right]
    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    unit_a, unit_b = _unit(a, length_a), _unit(b, length_b)
    cosine = (unit_a * unit_b).sum(1, keepdim=True)
    omega = cosine.clamp(-1, 1).acos()
    arc = omega.sin()
    mixed = ((1 - ratio) * omega).sin() / arc * unit_a + (ratio * omega).sin() / arc * unit_b
    result = mixed * (length_a * (1 - ratio) + length_b * ratio)
    result = torch.where(cosine > 1 - 1e-5, a, result)
    result = torch.where(cosine < 1e-5 - 1, a * (1 - ratio) + b * ratio, result)
    return result.to(latent.dtype)


def _bislerp_neighbours(
    columns: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.arange(columns, dtype=torch.float32)[None, None, None]
    after = torch.cat((index[..., 1:], index[..., -1:]), dim=-1)

    def stretch(row: Tensor) -> Tensor:
        return F.interpolate(row, size=(1, width), mode="bilinear")[0, 0, 0]

    position = stretch(index)
    left, right = position.long(), stretch(after).long()
    return left.to(device), right.to(device), (position - left).to(device)


def _unit(vectors: Tensor, length: Tensor) -> Tensor:
    return torch.where(length == 0, torch.zeros_like(vectors), vectors / length)
