"""How many floating-point operations each part does: 2 for a multiplication and its addition.

Counted by PyTorch while the real modules run on the meta device, so shapes, paddings and numbers of
layers are those of the code. Only matrix products, convolutions and attention count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from turbo.autoencoder import Autoencoder, AutoencoderConfig
from turbo.text_encoder import TextEncoder, TextEncoderConfig
from turbo.transformer import PATCH, Transformer, TransformerConfig, padded_length

Shape = tuple[int, int, int]
"""Rows, columns and inner size of a matrix product: M, N, K."""


def network_call(
    config: TransformerConfig, latent_size: tuple[int, int], caption_tokens: int, batch: int = 1
) -> int:
    """One network call; the caption comes refined."""
    network = Transformer(config, "meta", torch.bfloat16)
    rows = 4 * (config.noise_refiners + config.layers) + 1
    inputs = (
        _meta(batch, config.channels, *latent_size),
        _meta(batch, caption_tokens, config.dim),
        _meta(rows, config.dim),
        network.rotary_table(*latent_size, caption_tokens),
    )
    return count(lambda: network(*inputs))


def caption_refiner(config: TransformerConfig, tokens: int) -> int:
    """Caption embedder and context refiner: once a prompt."""
    network = Transformer(config, "meta", torch.bfloat16)
    return count(lambda: network.refine_caption(_meta(1, tokens, config.caption_dim)))


def text_encoder(config: TextEncoderConfig, tokens: int) -> int:
    """A prompt's features."""
    encoder = TextEncoder(config, "meta", torch.bfloat16)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    return count(lambda: encoder(ids, encoder.rotary_table(tokens)))


def decoder(config: AutoencoderConfig, latent_size: tuple[int, int]) -> int:
    """A latent's picture."""
    autoencoder = Autoencoder(config, "meta", torch.bfloat16)
    return count(lambda: autoencoder.decode(_meta(1, config.latent_channels, *latent_size)))


def block_products(
    config: TransformerConfig, latent_size: tuple[int, int], caption_tokens: int, batch: int = 1
) -> dict[str, Shape]:
    """The four matrix products of a block, over the joint tokens and over the image's alone."""
    rows, columns = (-(-side // PATCH) for side in latent_size)
    image = padded_length(rows * columns)
    dim, inner = config.dim, -(-config.ffn_dim // 32) * 32
    weights = {
        "qkv": (3 * dim, dim),
        "out": (dim, dim),
        "w13": (2 * inner, dim),
        "w2": (dim, inner),
    }
    return {
        f"{tokens_of} {name}": (batch * tokens, *weight)
        for tokens_of, tokens in (("joint", caption_tokens + image), ("refiner", image))
        for name, weight in weights.items()
    }


def count(run: Callable[[], object]) -> int:
    """The operations of whatever `run` runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)
