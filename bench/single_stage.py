"""What the rivals that make a picture in one stage have in common."""

from __future__ import annotations

from PIL import Image

from bench.pictures import decode_picture
from bench.side import SideError
from turbo.plan import Plan, Stage


def only_stage(plan: Plan) -> Stage:
    """The stage that makes the whole picture, at the last stage's size."""
    [stage] = plan.resolved(progressive=False).stages
    return stage


def open_picture(data: bytes, stage: Stage, program: str) -> Image.Image:
    """A PNG file's picture, RGB.

    Raises:
        SideError: It is no whole PNG, or of another size than was asked for.
    """
    try:
        image = decode_picture(data)
    except ValueError as error:
        raise SideError(f"{program} gave {error}") from error
    if image.size != (stage.width, stage.height):
        raise SideError(
            f"{program} made a picture of {image.width}x{image.height} pixels where "
            f"{stage.width}x{stage.height} (width x height) was asked for"
        )
    return image
