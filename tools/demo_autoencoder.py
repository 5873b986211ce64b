"""The built-in model's autoencoder: Flux's make, a hundredth of its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.resumable import Schedule, train
from tools.scenes import HEIGHT, Scene, draw_scene, random_scene
from turbo.latent import SCALE, SHIFT

CONFIG: dict[str, Any] = {
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,  # a group of one channel could not paint a flat colour
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": SCALE,
    "shift_factor": SHIFT,
    "force_upcast": True,
    "sample_size": 1024,
}
SIZES = ((224, 176), (432, 336), (864, 672))
"""Height and width of each stage's pictures."""
CROP = 128
_BATCHES = (4, 2, 1, 1)
"""Pictures a step: crops, or whole ones of each size."""
_SHARES = (0.64, 0.25, 0.1, 0.01)
_DECODER_SHARES = (0.4, 0.35, 0.2, 0.05)
"""Of the steps. Whole pictures are needed: a norm's group sees all of one, and most is plain."""
SPREAD = 3.0
"""Standard deviation of the latents in the sampler's scale; Flux's scale gives about 1. The later
stages start from noise levels 0.715 and 0.852, where latents of deviation 1 leave so little of a
thing that stars and diamonds lost their tips: with a network made for 1, its latents tripled on the
way, 39 of 40 pictures had their shape right; as it was, 32 were wholly right. Trained for 3, 190 of
200 on another seed's prompts, 62 of which had been in sight with other noise."""
_OUTLINE = 0.022
"""Width of the line around some shapes, in widths: harder than that of the LoRA."""
_NOISE = 0.05
_SIZE_PRICE = 1e-3
_PHASE = 1
_DECODER_PHASE = 4


def make_autoencoder(seed: int) -> Any:
    """An untrained one: diffusers' ``AutoencoderKL``."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)


def train_autoencoder(
    autoencoder: Any,
    schedule: Schedule,
    decoder_schedule: Schedule,
    seed: int,
    folder: Path,
    log: Callable[[str], None],
) -> None:
    """Train both halves, give the latents the usual scale, then go on with the decoder alone.

    Noise on the latent, and a price on its size, take the place of a posterior: what the decoder
    makes of a latent must not hang on its last digits, which the network will not get right.
    """

    def loss_of(step: int) -> Tensor:
        pictures = training_pictures(np.random.default_rng([seed, _PHASE, step]), _SHARES)
        latent = _encode(autoencoder, pictures)
        size: Tensor = latent.square().mean()
        noisy = latent + _NOISE * _noise_like(latent, seed + step)
        return _error(autoencoder, noisy, pictures) + _SIZE_PRICE * size

    def decoder_loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, _DECODER_PHASE, step])
        pictures = training_pictures(rng, _DECODER_SHARES)
        with torch.no_grad():
            latent = _encode(autoencoder, pictures)
        noisy = latent + _NOISE * SPREAD / SCALE * _noise_like(latent, seed + step)
        return _error(autoencoder, noisy, pictures)

    def tell(step: int) -> None:
        with torch.inference_mode():
            log(f"autoencoder: {psnr_on_scenes(autoencoder, seed, 3):.2f} dB after step {step}")

    autoencoder.requires_grad_(True)
    weights = dict(autoencoder.named_parameters())
    train("autoencoder", weights, loss_of, schedule, folder, log, tell, _matrices(weights))
    autoencoder.requires_grad_(False)
    _standardise(autoencoder, seed)
    autoencoder.decoder.requires_grad_(True)
    weights = dict(autoencoder.decoder.named_parameters())
    matrices = _matrices(weights)
    train("decoder", weights, decoder_loss_of, decoder_schedule, folder, log, tell, matrices)
    autoencoder.requires_grad_(False)


def training_pictures(rng: np.random.Generator, shares: Sequence[float]) -> Tensor:
    """Crops of random scenes, most with an edge in them, or whole scenes of one size.

    Args:
        rng: The source of all choices.
        shares: Of crops, and of whole pictures of each size.

    Returns:
        [count, 3, height, width], from -1 to 1.
    """
    kind = int(rng.choice(len(shares), p=shares))
    height, width = SIZES[kind - 1] if kind else SIZES[int(rng.integers(len(SIZES)))]
    parts = []
    for _ in range(_BATCHES[kind]):
        outline = _OUTLINE if rng.random() < 0.1 else 0.0
        scene = _scene(rng, outline=outline, new_shape=rng.random() < 0.1)
        box = None if kind else _box(rng, scene, height, width)
        parts.append(draw_scene(scene, height, width, box))
    return to_tensor(np.stack(parts))


def _scene(rng: np.random.Generator, **more: Any) -> Scene:
    return random_scene(rng, held_out_in_pairs=True, **more)[0]


def to_tensor(pictures: np.ndarray[Any, Any]) -> Tensor:
    """[count, height, width, 3] from 0 to 1 -> [count, 3, height, width] from -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2) * 2 - 1


def psnr_on_scenes(autoencoder: Any, seed: int, count: int = 8) -> float:
    """Decibels between scenes of the last size and what comes back; of the mean error."""
    rng = np.random.default_rng([seed, 99])
    height, width = SIZES[-1]
    errors = []
    for _ in range(count):
        picture = to_tensor(draw_scene(_scene(rng), height, width)[None])
        latent = autoencoder.encode(picture, return_dict=False)[0].mean
        back = autoencoder.decode(latent, return_dict=False)[0].clamp(-1, 1)
        errors.append(float(((back - picture) / 2).square().mean()))
    return -10 * math.log10(float(np.mean(errors)))


def _box(
    rng: np.random.Generator, scene: Scene, height: int, width: int
) -> tuple[int, int, int, int]:
    """A crop: around a point on a shape's rim four times of five, else anywhere."""
    top, left = rng.integers(height - CROP + 1), rng.integers(width - CROP + 1)
    if rng.random() < 0.8:
        thing = scene.things[int(rng.integers(len(scene.things)))]
        angle, reach = rng.uniform(0, 2 * np.pi), thing.radius * rng.uniform(0.2, 1)
        x, y = thing.x + reach * np.cos(angle), thing.y + reach * np.sin(angle)
        left = np.clip(x * width - CROP / 2, 0, width - CROP)
        top = np.clip(y / HEIGHT * height - CROP / 2, 0, height - CROP)
    return int(top), int(left), CROP, CROP


def _matrices(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """All that Muon trains: what reads or writes pixels or latents is left to AdamW."""
    ends = ("encoder.conv_in.", "decoder.conv_out.", "conv_out.", "conv_in.")
    return {
        name: 1 for name, weight in weights.items() if weight.ndim > 1 and not name.startswith(ends)
    }


def _encode(autoencoder: Any, pictures: Tensor) -> Tensor:
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    latent: Tensor = autoencoder.encode(pictures, return_dict=False)[0].mean
    return latent


def _error(autoencoder: Any, latent: Tensor, pictures: Tensor) -> Tensor:
    decoded = autoencoder.decode(latent, return_dict=False)[0]
    error: Tensor = F.l1_loss(decoded, pictures) + 4 * F.mse_loss(decoded, pictures)
    return error


def _noise_like(latent: Tensor, seed: int) -> Tensor:
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _standardise(autoencoder: Any, seed: int) -> None:
    """Fold a scale and a shift into the convolutions beside the latent.

    So that ``(latent - SHIFT) * SCALE``, which a sampler works on, has mean 0 and deviation
    `SPREAD` in each channel.
    """
    rng = np.random.default_rng([seed, 98])
    pictures = to_tensor(np.stack([draw_scene(_scene(rng), 224, 176) for _ in range(64)]))
    latents = autoencoder.encode(pictures, return_dict=False)[0].mean
    mean = latents.mean((0, 2, 3))
    factor = SPREAD / (SCALE * latents.std((0, 2, 3)))
    out, into = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    channels = len(mean)
    # new = (old - mean) * factor + SHIFT, and back again behind it. What pads the decoder's first
    # convolution is a latent of zeros: its edge sees another one than in training, a little.
    out.weight[:channels].mul_(factor[:, None, None, None])
    out.bias[:channels].sub_(mean).mul_(factor).add_(SHIFT)
    into.bias.add_(into.weight.sum((2, 3)) @ (mean - SHIFT / factor))
    into.weight.div_(factor[None, :, None, None])
