"""Autoencoder: pictures to latents and back, eight pixels to a latent position.

The convolutional autoencoder of latent diffusion (LDM) with its tensor names, as FLUX and Z-Image
use it: 16 latent channels, no quantisation convolutions. Latents here are the ones that go from
node to node in ComfyUI, without the scale and shift that a sampler applies (`turbo.latent`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo.errors import BadInputError, CheckpointError

NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderConfig:
    """Dimensions of an LDM autoencoder."""

    level_channels: tuple[int, ...]
    """Channels at each level, full resolution first; each level halves the size of the last."""
    blocks: int
    """Residual blocks of an encoder level; a decoder level has one more."""
    latent_channels: int
    """Channels of a latent."""
    image_channels: int = 3
    """Channels of a picture."""
    norm_num_groups: int = 32
    """Groups of every group norm; cannot be seen in the shapes."""

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Sequence[int]], norm_num_groups: int = 32
    ) -> AutoencoderConfig:
        """Infer every dimension from native tensor names and shapes.

        Raises:
            CheckpointError: The shapes are not those of such an autoencoder; names what is missing.
        """
        levels = _count(shapes, "decoder.up.{}.block.0.conv1.weight")
        config = cls(
            level_channels=tuple(
                _shape(shapes, f"decoder.up.{level}.block.0.conv1.weight")[0]
                for level in range(max(levels, 1))
            ),
            blocks=max(_count(shapes, "encoder.down.0.block.{}.conv1.weight"), 1),
            latent_channels=_shape(shapes, "decoder.conv_in.weight")[1],
            image_channels=_shape(shapes, "encoder.conv_in.weight")[1],
            norm_num_groups=norm_num_groups,
        )
        _require_shapes(config, shapes)
        return config

    @property
    def stride(self) -> int:
        """Pixels to a latent position, in each direction: 8 for four levels."""
        return int(2 ** (len(self.level_channels) - 1))


class Autoencoder(nn.Module):
    """Decodes latents to pictures and encodes pictures to latents."""

    def __init__(
        self,
        config: AutoencoderConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the weights without filling them; `device` may be "meta"."""
        super().__init__()
        self.config = config
        make = _Factory(config.norm_num_groups, device, dtype)
        self.encoder = _Encoder(config, make)
        self.decoder = _Decoder(config, make)

    def decode(self, latent: Tensor, *, slicing: bool = False, tile: int | None = None) -> Tensor:
        """Picture of a latent, not yet limited to its range; see `to_pixels`.

        Args:
            latent: [batch, latent_channels, height, width], any float dtype.
            slicing: Decode the pictures of a batch one after the other: less memory, and each comes
                out bit for bit as it does alone.
            tile: Decode in overlapping tiles of this many latent positions a side, blended where
                they overlap: less memory for large pictures, colours shift slightly. None: whole.

        Returns:
            [batch, image_channels, stride * height, stride * width] in about -1..1, the dtype of
            the weights.
        """
        channels = self.config.latent_channels
        if latent.dim() != 4 or latent.shape[1] != channels:
            raise BadInputError(
                f"a latent must be [batch, {channels}, height, width], got {list(latent.shape)}"
            )
        if tile is not None and tile < 16:
            raise BadInputError(f"tile must be at least 16 latent positions, got {tile}")
        whole = tile is None or max(latent.shape[2:]) <= tile
        pictures = [
            self.decoder(self._fitting(part))
            if whole
            else self._decode_tiles(part, cast(int, tile))
            for part in (torch.split(latent, 1) if slicing else (latent,))
        ]
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def _decode_tiles(self, latent: Tensor, tile: int) -> Tensor:
        """Where tiles overlap, their weights fall linearly towards their edges."""
        batch, _, height, width = latent.shape
        stride, like = self.config.stride, self.decoder.conv_in.weight
        size = (stride * height, stride * width)
        sums = torch.zeros(batch, self.config.image_channels, *size, device=like.device)
        weights = torch.zeros(size, device=like.device)
        for top, left in product(_tile_starts(height, tile), _tile_starts(width, tile)):
            part = self.decoder(self._fitting(latent[..., top : top + tile, left : left + tile]))
            weight = _tile_weight(part, stride * (tile // 4))
            rows = slice(stride * top, stride * top + part.shape[2])
            columns = slice(stride * left, stride * left + part.shape[3])
            sums[..., rows, columns] += part * weight
            weights[rows, columns] += weight
        return (sums / weights).to(like.dtype)

    def encode(self, image: Tensor) -> Tensor:
        """Latent of a picture: the mean of the encoder's distribution, nothing is drawn.

        Args:
            image: [batch, height, width, image_channels] in 0..1; cut to a multiple of the stride
                around the centre.

        Returns:
            [batch, latent_channels, height / stride, width / stride], the dtype of the weights.

        Raises:
            BadInputError: The shape does not fit, or a side is shorter than the stride.
        """
        image = _cut_to_multiple(image, self.config.stride, self.config.image_channels)
        moments: Tensor = self.encoder(self._fitting(image.permute(0, 3, 1, 2)).mul_(2).sub_(1))
        return moments[:, : self.config.latent_channels]

    def _fitting(self, x: Tensor) -> Tensor:
        """Device and dtype of the weights, and the memory layout that is fast on that device.

        On a CPU, channels last makes the convolutions 1.6 times faster (two threads, 32 to 64
        channels, 672 x 864 pixels). `clone` and not `contiguous`, which keeps the odd strides that
        an axis of size 1 may have; the convolution would then choose the other layout.
        """
        weight = self.decoder.conv_in.weight
        layout = torch.channels_last if weight.is_cpu else torch.contiguous_format
        return x.to(weight).clone(memory_format=layout)

    def native_tensors(self) -> dict[str, Tensor]:
        """Every weight under its checkpoint name: writing into it changes the module."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def ignored_keys(self, shapes: Mapping[str, Sequence[int]]) -> set[str]:
        """Names among `shapes` that a whole file holds and this module never reads: none."""
        return set()


def to_pixels(raw: Tensor) -> Tensor:
    """Decoded picture [batch, channels, height, width] to [batch, height, width, channels] float32
    in 0..1."""
    return ((raw.permute(0, 2, 3, 1).float() + 1) / 2).clamp(0, 1)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in 0..1 to 0..255, truncated and not rounded, as ComfyUI saves them."""
    return (pixels * 255).to(torch.uint8)


def convolve_enlarged(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Repeat every pixel 2x2, then convolve: in one go, without storing the enlarged picture.

    Neighbouring taps of the 3x3 kernel meet the same source pixel. Summed first they form a 4x4
    kernel, whose transposed convolution with stride 2 does the work of 36 products with 16: 2.1
    times faster on a CPU (two threads, 64 channels, 336 x 432). The kernel is made at each call: it
    is small, and the weights may change.

    Args:
        x: [batch, in_channels, height, width].
        weight: [out_channels, in_channels, 3, 3].
        bias: [out_channels].

    Returns:
        [batch, out_channels, 2 * height, 2 * width].
    """
    kernel = F.pad(weight.float().flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
    kernel = (kernel[..., 1:] + kernel[..., :-1]).to(weight.dtype)
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


@dataclass(frozen=True)
class _Factory:
    """Makes the layers: how many groups a norm has, where weights live and in which dtype."""

    groups: int
    device: torch.device | str | None
    dtype: torch.dtype | None

    def weight(self, *shape: int) -> nn.Parameter:
        empty = torch.empty(*shape, device=self.device, dtype=self.dtype)
        return nn.Parameter(empty, requires_grad=False)


class _Conv(nn.Module):
    """Convolution that keeps the size, unless told otherwise."""

    def __init__(self, make: _Factory, inputs: int, outputs: int, size: int = 3) -> None:
        super().__init__()
        self.weight = make.weight(outputs, inputs, size, size)
        self.bias = make.weight(outputs)

    def forward(self, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        padding = self.weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, self.weight, self.bias, stride=stride, padding=padding)


class _Norm(nn.Module):
    def __init__(self, make: _Factory, channels: int) -> None:
        super().__init__()
        self.groups = make.groups
        self.weight = make.weight(channels)
        self.bias = make.weight(channels)

    def forward(self, x: Tensor, *, silu: bool = False, overwrite: bool = False) -> Tensor:
        """Normalise, then SiLU if asked; `overwrite`: the result may take the input's place."""
        if x.is_cpu and x.dtype == torch.float32:
            return self._in_strips(x, silu, overwrite)
        out = F.group_norm(x, self.groups, self.weight, self.bias, NORM_EPS)
        return F.silu(out, inplace=True) if silu else out

    def _in_strips(self, x: Tensor, silu: bool, overwrite: bool) -> Tensor:
        """One strip of rows after the other, without temporaries of full size; for a CPU.

        PyTorch's own channels-last group norm adds the squares up naively: at 672 x 864 its result
        is wrong by 3e-4 to 3e-3. This one is right to 1e-6, and in place it takes half the time.
        """
        scale, shift = self._scale_and_shift(x)
        rows = x.permute(0, 2, 3, 1)
        out = rows if overwrite else torch.empty_like(rows)
        for strip, strip_out in zip(_strips(rows), _strips(out), strict=True):
            torch.addcmul(shift, strip, scale, out=strip_out)
            if silu:
                F.silu(strip_out, inplace=True)
        return out.permute(0, 3, 1, 2)

    def _scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, 1, 1, channels] each, such that x * scale + shift is the normalised x."""
        batch, channels, height, _ = x.shape
        means, variances = [], []
        for strip in _strips(x.permute(0, 2, 3, 1)):
            mean = strip.mean(2)
            centred = strip - mean[:, :, None]
            means.append(mean)
            variances.append(centred.mul_(centred).mean(2))
        grouped = (batch, height, self.groups, channels // self.groups)
        mean = torch.cat(means, 1).double().view(grouped)
        variance = torch.cat(variances, 1).double().view(grouped)
        total_mean = mean.mean((1, 3), keepdim=True)
        total_variance = (variance + (mean - total_mean).square()).mean((1, 3), keepdim=True)
        scale = self.weight.view(grouped[2:]) * (total_variance + NORM_EPS).rsqrt()
        shift = self.bias.view(grouped[2:]) - total_mean * scale
        shape = (batch, 1, 1, channels)
        return scale.float().view(shape), shift.float().view(shape)


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; overwrites its input if it can do without it."""

    def __init__(self, make: _Factory, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _Norm(make, inputs)
        self.conv1 = _Conv(make, inputs, outputs)
        self.norm2 = _Norm(make, outputs)
        self.conv2 = _Conv(make, outputs, outputs)
        self.nin_shortcut = _Conv(make, inputs, outputs, size=1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        branch = self.conv1(self.norm1(x, silu=True, overwrite=shortcut is not x))
        branch = self.conv2(self.norm2(branch, silu=True, overwrite=True))
        return cast(Tensor, branch.add_(shortcut))


class _Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, make: _Factory, channels: int) -> None:
        super().__init__()
        self.norm = _Norm(make, channels)
        self.q = _Conv(make, channels, channels, size=1)
        self.k = _Conv(make, channels, channels, size=1)
        self.v = _Conv(make, channels, channels, size=1)
        self.proj_out = _Conv(make, channels, channels, size=1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (_positions(conv(normed)) for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value)
        batch, channels, height, width = x.shape
        mixed = mixed.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return x + cast(Tensor, self.proj_out(mixed))


class _Middle(nn.Module):
    def __init__(self, make: _Factory, channels: int) -> None:
        super().__init__()
        self.block_1 = _ResidualBlock(make, channels, channels)
        self.attn_1 = _Attention(make, channels)
        self.block_2 = _ResidualBlock(make, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block_2(self.attn_1(self.block_1(x))))


class _Downsample(nn.Module):
    def __init__(self, make: _Factory, channels: int) -> None:
        super().__init__()
        self.conv = _Conv(make, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1)), stride=2, padding=0))


class _Upsample(nn.Module):
    def __init__(self, make: _Factory, channels: int) -> None:
        super().__init__()
        self.conv = _Conv(make, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu:
            return convolve_enlarged(x, self.conv.weight, self.conv.bias)
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class _Level(nn.Module):
    """Residual blocks at one resolution, and the way to the next one."""

    def __init__(self, make: _Factory, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _ResidualBlock(make, inputs if index == 0 else outputs, outputs)
            for index in range(blocks)
        )
        self.downsample: _Downsample | None = None
        self.upsample: _Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for resize in (self.downsample, self.upsample):
            x = x if resize is None else resize(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig, make: _Factory) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = _Conv(make, config.image_channels, channels[0])
        self.down = nn.ModuleList(
            _Level(make, inputs, outputs, config.blocks)
            for inputs, outputs in pairwise((channels[0], *channels))
        )
        for level, size in zip(list(self.down)[:-1], channels, strict=False):
            level.downsample = _Downsample(make, size)
        self.mid = _Middle(make, channels[-1])
        self.norm_out = _Norm(make, channels[-1])
        self.conv_out = _Conv(make, channels[-1], 2 * config.latent_channels)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        out = self.norm_out(self.mid(x), silu=True, overwrite=True)
        return cast(Tensor, self.conv_out(out))


class _Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig, make: _Factory) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = _Conv(make, config.latent_channels, channels[-1])
        self.mid = _Middle(make, channels[-1])
        self.up = nn.ModuleList(
            _Level(make, inputs, outputs, config.blocks + 1)
            for outputs, inputs in pairwise((*channels, channels[-1]))
        )
        for level, size in zip(list(self.up)[1:], channels[1:], strict=True):
            level.upsample = _Upsample(make, size)
        self.norm_out = _Norm(make, channels[0])
        self.conv_out = _Conv(make, channels[0], config.image_channels)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return cast(Tensor, self.conv_out(self.norm_out(x, silu=True, overwrite=True)))


def _strips(rows: Tensor) -> list[Tensor]:
    """[batch, height, width, channels] in pieces of some rows, 16 MiB of float32 each.

    Smaller ones are a few percent faster on an idle CPU, but all threads meet after each operation:
    on a busy one, quarter strips take half as long again.
    """
    _, _, width, channels = rows.shape
    height = max(1, 2**22 // (width * channels))
    return [rows[:, top : top + height] for top in range(0, rows.shape[1], height)]


def _positions(x: Tensor) -> Tensor:
    """[batch, channels, height, width] to [batch, 1, height * width, channels]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)


def _tile_starts(size: int, tile: int) -> list[int]:
    """Evenly spaced starts of tiles that cover `size`, overlapping by a quarter or more."""
    if size <= tile:
        return [0]
    overlap = tile // 4
    gaps = -(-(size - tile) // (tile - overlap))
    return [round(gap * (size - tile) / gaps) for gap in range(gaps + 1)]


def _tile_weight(part: Tensor, edge: int) -> Tensor:
    """[height, width] of a decoded tile: 1 inside, falling to almost 0 over `edge` pixels."""
    ramps = []
    for size in part.shape[2:]:
        position = torch.arange(size, device=part.device) + 0.5
        ramps.append((torch.minimum(position, size - position) / edge).clamp(max=1))
    return torch.outer(*ramps)


def _cut_to_multiple(image: Tensor, stride: int, channels: int) -> Tensor:
    if image.dim() != 4 or image.shape[3] != channels or min(image.shape[1:3]) < stride:
        raise BadInputError(
            f"a picture to encode must be [batch, height, width, {channels}] with sides of at "
            f"least {stride} pixels, got {list(image.shape)}"
        )
    for axis in (1, 2):
        size = image.shape[axis]
        image = image.narrow(axis, size % stride // 2, size // stride * stride)
    return image


def _count(shapes: Mapping[str, Sequence[int]], pattern: str) -> int:
    count = 0
    while pattern.format(count) in shapes:
        count += 1
    return count


def _shape(shapes: Mapping[str, Sequence[int]], name: str) -> Sequence[int]:
    """Shape of a convolution's weight."""
    shape = shapes.get(name, ())
    if len(shape) != 4:
        found = f"has the shape {list(shape)}" if name in shapes else "is missing"
        raise CheckpointError(f"not an LDM autoencoder: {name} {found}, a convolution was expected")
    return shape


def _require_shapes(config: AutoencoderConfig, shapes: Mapping[str, Sequence[int]]) -> None:
    groups = config.norm_num_groups
    if groups < 1 or any(channels < 1 or channels % groups for channels in config.level_channels):
        raise CheckpointError(
            f"norm_num_groups {groups} does not divide the autoencoder's channels "
            f"{list(config.level_channels)}"
        )
    for name, tensor in Autoencoder(config, device="meta").native_tensors().items():
        if tuple(shapes.get(name, ())) != tuple(tensor.shape):
            found = f"got {list(shapes[name])}" if name in shapes else "it is missing"
            raise CheckpointError(
                f"not a whole LDM autoencoder: {name} must have the shape {list(tensor.shape)}, "
                f"{found}"
            )
