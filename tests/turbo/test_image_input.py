"""A given picture as a latent of a stage's size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from turbo.autoencoder import Autoencoder, AutoencoderConfig
from turbo.errors import BadInputError
from turbo.image_input import latent_of_image
from turbo.plan import Stage
from turbo.testing import TINY_AUTOENCODER, autoencoder_shapes, initialise

STAGE = Stage(name="stage", height=48, width=32, steps=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def autoencoder(request: pytest.FixtureRequest) -> Autoencoder:
    values = initialise(autoencoder_shapes(TINY_AUTOENCODER), 0)
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    autoencoder = Autoencoder(AutoencoderConfig.from_shapes(shapes), "cpu", request.param)
    for name, tensor in autoencoder.native_tensors().items():
        tensor.copy_(values[name])
    return autoencoder


def picture(height: int, width: int) -> Any:
    """Random bytes, [height, width, 3]."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def latent_of(autoencoder: Autoencoder, image: Any) -> Tensor:
    return latent_of_image(autoencoder, image, STAGE, CPU)


def test_a_picture_of_the_stages_size_is_encoded_as_it_is(autoencoder: Autoencoder):
    values = picture(48, 32)
    latent = latent_of(autoencoder, Image.fromarray(values))
    want = autoencoder.encode(torch.from_numpy(values)[None].float() / 255).float()
    assert (latent.shape, latent.dtype) == ((1, 16, 6, 4), torch.float32)
    assert torch.equal(latent, want)


def test_what_stands_out_is_cut_around_the_centre(autoencoder: Autoencoder):
    values = picture(48, 32)
    wide = np.concatenate([picture(48, 20), values, picture(48, 20)], axis=1)
    high = np.concatenate([picture(11, 32), values, picture(11, 32)], axis=0)
    want = latent_of(autoencoder, Image.fromarray(values))
    for image in (wide, high):
        assert torch.equal(latent_of(autoencoder, Image.fromarray(image)), want)


def test_other_sizes_are_resized_with_lanczos(autoencoder: Autoencoder):
    image = Image.fromarray(picture(96, 64))
    resized = image.resize((32, 48), Image.Resampling.LANCZOS)
    assert torch.equal(latent_of(autoencoder, image), latent_of(autoencoder, resized))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_any_mode_is_taken_as_rgb(autoencoder: Autoencoder, mode: str):
    image = Image.fromarray(picture(48, 32)).convert(mode)
    want = latent_of(autoencoder, image.convert("RGB"))
    assert torch.equal(latent_of(autoencoder, image), want)
    assert want.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (33, 47)])
def test_any_size_is_fitted(autoencoder: Autoencoder, size: tuple[int, int]):
    latent = latent_of(autoencoder, Image.new("RGB", size, "red"))
    assert torch.equal(latent, latent_of(autoencoder, Image.new("RGB", (32, 48), "red")))


def test_a_picture_is_turned_as_its_exif_data_say(autoencoder: Autoencoder):
    upright = Image.fromarray(picture(48, 32))
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees to the right
    assert torch.equal(latent_of(autoencoder, lying), latent_of(autoencoder, upright))


def test_the_callers_picture_is_left_alone(autoencoder: Autoencoder):
    image = Image.fromarray(picture(60, 60))
    before = image.tobytes()
    latent_of(autoencoder, image)
    assert (image.size, image.tobytes()) == ((60, 60), before)


@pytest.mark.parametrize(
    "image", ["a.png", b"\x89PNG", None, picture(48, 32), torch.zeros(3, 8, 8)]
)
def test_what_is_no_picture_is_refused_in_one_line(autoencoder: Autoencoder, image: Any):
    with pytest.raises(BadInputError, match=f"PIL image, got {type(image).__name__}$"):
        latent_of(autoencoder, image)
