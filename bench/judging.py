"""Whether two sides made the same picture: what has to be shown before a time is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.pictures import compare_latents, compare_pictures
from bench.side import Round, Side, SideError

EXACT_PSNR_DB = 60.0
"""Of float32 sides that follow the same plan: a tenth of all values off by one of 255 gives 58."""
EXACT_LATENT = 1e-3
"""Relative distance of their last latents, L2, where both can be had."""
LEAST_MARGIN_DB = 12.0
"""In lower precision: a quarter as far as another seed's picture."""


def compare_rounds(ours: Round, theirs: Round) -> dict[str, Any]:
    """Pictures and, where both have them, latents of one request.

    Raises:
        SideError: The pictures' sizes differ.
    """
    try:
        found: dict[str, Any] = compare_pictures(ours.image, theirs.image)
    except ValueError as error:
        raise SideError(f"its picture cannot be compared: {error}") from error
    both = [stage for stage in ours.latents if stage in theirs.latents]
    if both:
        found["latent"] = {
            stage: compare_latents(ours.latents[stage], theirs.latents[stage]) for stage in both
        }
    return found


def require_alike(
    side: Side, leader: Side, found: Mapping[str, Any], far_db: float | None, *, strict: bool
) -> None:
    """Go on if two sides' pictures are the same up to what their settings allow.

    Args:
        side: Whose picture is judged.
        leader: Whose picture it is compared with.
        found: From `compare_rounds`.
        far_db: PSNR of another seed's picture; None: not even that differs.
        strict: Whether sides that are equally exact must agree to rounding.

    Raises:
        SideError: They are not.
    """
    exact = strict and side.approximate == leader.approximate
    least = EXACT_PSNR_DB if exact else (far_db or 0.0) + LEAST_MARGIN_DB
    psnr = found["psnr_db"]
    if psnr is not None and psnr < least:
        raise SideError(
            f"its picture has {psnr:.1f} dB to that of {leader.name}, {least:.1f} are needed for "
            "its times to be given: it is another picture"
        )
    for stage, distance in found.get("latent", {}).items() if exact else ():
        if not distance <= EXACT_LATENT:
            raise SideError(
                f"its latent of {stage} is {distance:.2g} from that of {leader.name}, allowed is "
                f"{EXACT_LATENT}"
            )
