"""A given picture as the start of a stage."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from turbo.autoencoder import Autoencoder
from turbo.errors import BadInputError
from turbo.plan import Stage
from turbo.precision import whole_float32


def require_picture(image: object) -> None:
    """Raise BadInputError unless `image` is a PIL image with pixels."""
    if not isinstance(image, Image.Image):
        raise BadInputError(f"image must be a PIL image, got {type(image).__name__}")
    if not all(image.size):
        raise BadInputError(f"image must have pixels, got {image.width} x {image.height}")


def latent_of_image(
    autoencoder: Autoencoder, image: Image.Image, stage: Stage, device: torch.device
) -> Tensor:
    """Fit a picture to a stage's size and encode it.

    Args:
        autoencoder: Encodes.
        image: Any mode, without its alpha channel, turned as its EXIF data say; cut around its
            centre to the stage's aspect, resized with Lanczos.
        stage: Gives the size.
        device: Where the autoencoder is.

    Returns:
        Outside latent, [1, channels, height / 8, width / 8], float32.

    Raises:
        BadInputError: `image` is no picture.
    """
    require_picture(image)
    upright = ImageOps.exif_transpose(image).convert("RGB")
    fitted = ImageOps.fit(upright, (stage.width, stage.height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255)[None]
    with whole_float32(device):
        return autoencoder.encode(pixels.to(device)).float()
