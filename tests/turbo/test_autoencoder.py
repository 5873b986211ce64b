"""The autoencoder against the recorded values, against diffusers, and its fast parts alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from turbo.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    _Factory,
    _Norm,
    convolve_enlarged,
    to_pixels,
    to_uint8,
)
from turbo.errors import BadInputError, CheckpointError

SMALL = AutoencoderConfig(
    level_channels=(16, 32, 48, 48), blocks=1, latent_channels=16, norm_num_groups=16
)
DEEP = AutoencoderConfig(
    level_channels=(8, 24, 24), blocks=2, latent_channels=4, image_channels=1, norm_num_groups=4
)


def filled(config: AutoencoderConfig, seed: int = 0) -> Autoencoder:
    module = Autoencoder(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, view in module.native_tensors().items():
        value = torch.randn(view.shape, generator=generator)
        if view.dim() == 4:
            view.copy_(value / view[0].numel() ** 0.5)
        else:
            view.copy_(value / 10 + ("norm" in name and name.endswith("weight")))
    return module


def official(module: Autoencoder):
    """diffusers' autoencoder with the same weights."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = module.config
    levels = len(config.level_channels)
    settings = {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.level_channels),
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    model = AutoencoderKL(**settings)
    model.load_state_dict(convert_ldm_vae_checkpoint(module.native_tensors(), settings))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Autoencoder:
    weights = load_file(shared / "golden/weights/vae_tiny.safetensors")
    config = AutoencoderConfig.from_shapes({k: tuple(v.shape) for k, v in weights.items()})
    module = Autoencoder(config, dtype=torch.float32)
    for name, view in module.native_tensors().items():
        view.copy_(weights[name])
    return module


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(shared / "golden/vae.safetensors")
    return tensors


def assert_golden(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 + 1e-5 * want.abs().max()


@pytest.mark.parametrize("case", ["dec0", "dec1"])
def test_pictures_equal_the_recorded_ones(tiny, golden, case: str):
    assert_golden(to_pixels(tiny.decode(golden[f"{case}/latent"])), golden[f"{case}/image"])


def test_latents_equal_the_recorded_ones(tiny, golden):
    assert_golden(tiny.encode(golden["enc0/image"]), golden["enc0/latent"])


@pytest.mark.parametrize("config", [SMALL, DEEP], ids=["small", "deep"])
@pytest.mark.parametrize("size", [(5, 7), (1, 3)], ids=str)
def test_decoding_and_encoding_equal_those_of_diffusers(config, size):
    module = filled(config)
    reference = official(module)
    latent = torch.randn(2, config.latent_channels, *size)
    want = reference.decode(latent).sample
    torch.testing.assert_close(module.decode(latent), want, atol=2e-5, rtol=1e-5)
    image = torch.rand(2, *(config.stride * side for side in size), config.image_channels)
    want = reference.encode(image.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean
    torch.testing.assert_close(module.encode(image), want, atol=2e-5, rtol=1e-5)


def test_pictures_are_cut_around_the_centre_before_encoding(tiny):
    image = torch.rand(1, 29, 23, 3)
    assert torch.equal(tiny.encode(image), tiny.encode(image[:, 2:26, 3:19]))


def test_convolving_an_enlarged_picture_equals_the_two_steps():
    x, weight, bias = torch.randn(2, 5, 6, 7), torch.randn(4, 5, 3, 3), torch.randn(4)
    want = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    torch.testing.assert_close(convolve_enlarged(x, weight, bias), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (300, 200)], ids=str)
def test_the_group_norm_is_exact_where_pytorchs_is_not(size):
    norm = _Norm(_Factory(4, None, torch.float32), 16)
    norm.weight.copy_(torch.rand(16) + 0.5)
    norm.bias.copy_(torch.randn(16))
    x = torch.randn(2, 16, *size) + 5 * torch.randn(16, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    want = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6).float()
    torch.testing.assert_close(norm(x), want, atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(norm(x, silu=True), F.silu(want), atol=5e-6, rtol=1e-6)
    in_place = x.clone()
    assert norm(in_place, silu=True, overwrite=True).data_ptr() == in_place.data_ptr()
    torch.testing.assert_close(in_place, F.silu(want), atol=5e-6, rtol=1e-6)


def test_decoding_leaves_the_latent_and_its_layout_is_of_no_matter():
    module, latent = filled(SMALL), torch.randn(3, 16, 6, 5)
    kept = latent.clone()
    want = module.decode(latent)
    assert torch.equal(latent, kept)
    assert torch.equal(module.decode(latent.contiguous(memory_format=torch.channels_last)), want)
    assert torch.equal(module.decode(latent.double()), want)


def test_slices_equal_pictures_decoded_alone_bit_for_bit():
    module, latent = filled(SMALL), torch.randn(3, 16, 6, 5)
    alone = [
        module.decode(part[None]) for part in latent.contiguous(memory_format=torch.channels_last)
    ]
    assert torch.equal(module.decode(latent, slicing=True), torch.cat(alone))
    torch.testing.assert_close(module.decode(latent), torch.cat(alone), atol=2e-5, rtol=1e-5)


def test_tiles_blend_into_nearly_the_whole_picture():
    module, latent = filled(SMALL), torch.randn(2, 16, 40, 27)
    whole = module.decode(latent)
    tiled = module.decode(latent, tile=24, slicing=True)
    assert tiled.shape == whole.shape
    assert (tiled - whole).square().mean() < 0.01 * whole.var()
    assert torch.equal(module.decode(latent, tile=40), whole)


def test_pixels_are_limited_and_truncated():
    raw = torch.tensor([-3.0, -1, 0, 0.999, 1, 2]).view(1, 1, 1, 6)
    pixels = to_pixels(raw)
    assert pixels.shape == (1, 1, 6, 1)
    assert to_uint8(pixels).flatten().tolist() == [0, 0, 127, 254, 255, 255]
    assert to_pixels(raw.bfloat16()).dtype == torch.float32


def test_bfloat16_errs_at_most_twice_as_far_as_plain_bfloat16():
    module, latent = filled(SMALL), torch.randn(1, 16, 12, 9).bfloat16()
    exact, reference = module.decode(latent), official(module).bfloat16()
    plain = reference.decode(latent).sample
    got = module.to(torch.bfloat16).decode(latent)
    assert got.dtype == torch.bfloat16
    error = (got.float() - exact).square().mean().sqrt()
    assert error <= 2 * (plain.float() - exact).square().mean().sqrt()


def test_every_tensor_of_the_full_size_file_has_its_place(shared: Path):
    manifest = json.loads((shared / "manifest/state_dict_shapes.json").read_text())
    shapes = {name: tuple(shape) for name, (shape, _) in manifest["ae.safetensors"].items()}
    config = AutoencoderConfig.from_shapes(shapes)
    assert config == AutoencoderConfig(
        level_channels=(128, 256, 512, 512), blocks=2, latent_channels=16
    )
    module = Autoencoder(config, device="meta")
    native = {name: tuple(view.shape) for name, view in module.native_tensors().items()}
    assert native == shapes
    assert module.ignored_keys(shapes) == set()
    # On "meta" the way of the accelerators is taken.
    assert module.decode(torch.empty(1, 16, 28, 22, device="meta")).shape == (1, 3, 224, 176)
    assert module.encode(torch.empty(1, 224, 176, 3, device="meta")).shape == (1, 16, 28, 22)


def test_native_tensors_are_the_modules_own():
    module, latent = filled(DEEP), torch.randn(1, 4, 3, 3)
    before = module.decode(latent)
    for view in module.native_tensors().values():
        view.mul_(1.5)
    assert not torch.allclose(module.decode(latent), before)
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.conv_in.weight": None}, "decoder.conv_in.weight is missing"),
        (
            {"decoder.up.0.block.0.conv1.weight": None},
            "decoder.up.0.block.0.conv1.weight is missing",
        ),
        ({"encoder.mid.attn_1.q.bias": None}, "encoder.mid.attn_1.q.bias .* it is missing"),
        (
            {"encoder.down.0.block.0.conv1.weight": None},
            "encoder.down.0.block.0.conv1.weight .* missing",
        ),
        ({"decoder.norm_out.weight": (16, 1)}, r"\[16\], got \[16, 1\]"),
        ({"decoder.conv_in.weight": (48, 16)}, r"has the shape \[48, 16\]"),
    ],
)
def test_other_shapes_are_refused_by_name(change, message: str):
    module = Autoencoder(SMALL, device="meta")
    shapes = {name: tuple(view.shape) for name, view in module.native_tensors().items()} | change
    with pytest.raises(CheckpointError, match=message):
        AutoencoderConfig.from_shapes({k: v for k, v in shapes.items() if v is not None}, 16)


def test_groups_that_do_not_fit_are_refused():
    module = Autoencoder(SMALL, device="meta")
    shapes = {name: tuple(view.shape) for name, view in module.native_tensors().items()}
    assert AutoencoderConfig.from_shapes(shapes, 8) == replace(SMALL, norm_num_groups=8)
    with pytest.raises(CheckpointError, match="norm_num_groups 32 does not divide"):
        AutoencoderConfig.from_shapes(shapes)


def test_inputs_of_another_shape_are_refused():
    module = Autoencoder(SMALL, device="meta")
    with pytest.raises(BadInputError, match=r"\[batch, 16, height, width\], got \[1, 4, 8, 8\]"):
        module.decode(torch.empty(1, 4, 8, 8))
    with pytest.raises(BadInputError, match="at least 16"):
        module.decode(torch.empty(1, 16, 8, 8), tile=8)
    for shape in [(1, 3, 16, 16), (1, 7, 16, 3), (16, 16, 3)]:
        with pytest.raises(BadInputError, match="sides of at least 8 pixels"):
            module.encode(torch.empty(shape))
