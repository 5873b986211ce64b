"""What the rivals that make a picture in one stage have in common."""

from __future__ import annotations

import warnings
from io import BytesIO

from PIL import Image

from bench.side import SideError
from turbo.messages import one_line
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
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=["PNG"]) as picture:
                image = picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
        raise SideError(f"{program} gave no whole PNG picture ({one_line(error)})") from error
    if image.size != (stage.width, stage.height):
        raise SideError(
            f"{program} made a picture of {image.width}x{image.height} pixels where "
            f"{stage.width}x{stage.height} (width x height) was asked for"
        )
    return image
