"""How many floating-point operations each part does: 2 for a multiplication and its addition.

Counted by PyTorch while the real modules run on the meta device, so shapes, paddings and numbers of
layers are those of the code. Only matrix products, convolutions and attention count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from turbo.autoencoder import Autoencoder, AutoencoderConfig
from turbo.denoiser import is_unguided
from turbo.latent import STRIDE
from turbo.pipeline import Models
from turbo.plan import Plan, Stage
from turbo.samplers import sampler_sigmas, trace_sampler
from turbo.sigmas import stage_sigmas
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


class PictureArithmetic:
    """The operations that a picture needs, part by part, whoever makes it.

    A program that does more than is needed, such as encoding padding, has a smaller share of the
    limit for it.

    Args:
        models: Their dimensions count.
        plan: The stages.
    """

    def __init__(self, models: Models, plan: Plan) -> None:
        self._models = models
        self._stages = plan.resolved().stages
        self._known: dict[tuple[object, ...], int] = {}

    def of(
        self, prompt: str, negative_prompt: str, skips: Mapping[str, tuple[int, int]]
    ) -> dict[str, float]:
        """Part -> operations: `prompt`, each stage, `decode`, `total`.

        Args:
            prompt: The text to follow.
            negative_prompt: The text to avoid, where a stage has guidance.
            skips: Stage -> (network calls skipped, calls wanted); of a stage that is not in it, no
                figure is given, and none of the total.
        """
        guided = any(not is_unguided(stage.cfg) for stage in self._stages)
        lengths = [self._tokens(text) for text in (prompt, *[negative_prompt] * guided)]
        found: dict[str, float] = {"prompt": float(sum(map(self._prompt, lengths)))}
        for stage in self._stages:
            if stage.name in skips:
                skipped, wanted = skips[stage.name]
                of_stage = lengths if not is_unguided(stage.cfg) else lengths[:1]
                evaluation = sum(self._call(stage, tokens) for tokens in of_stage)
                # One program calls the network once for both prompts, another once for each.
                found[stage.name] = self._evaluations(stage) * evaluation * (1 - skipped / wanted)
        last = self._stages[-1]
        size = (last.height // STRIDE, last.width // STRIDE)
        found["decode"] = self._once(
            ("decode", size), lambda: decoder(self._models.autoencoder.config, size)
        )
        if all(stage.name in found for stage in self._stages):
            found["total"] = sum(found.values())
        return found

    @staticmethod
    def _evaluations(stage: Stage) -> int:
        followed = sampler_sigmas(stage.sampler, stage_sigmas(stage), stage.shift)
        return len(trace_sampler(stage.sampler, followed).evaluations)

    def _tokens(self, text: str) -> int:
        return padded_length(len(self._models.tokenizer.encode_prompt(text)))

    def _prompt(self, tokens: int) -> int:
        models = self._models
        return self._once(
            ("prompt", tokens),
            lambda: (
                text_encoder(models.text_encoder.config, tokens)
                + caption_refiner(models.transformer.config, tokens)
            ),
        )

    def _call(self, stage: Stage, tokens: int) -> int:
        size = (stage.height // STRIDE, stage.width // STRIDE)
        config = self._models.transformer.config
        return self._once(("call", size, tokens), lambda: network_call(config, size, tokens))

    def _once(self, key: tuple[object, ...], counted: Callable[[], int]) -> int:
        if key not in self._known:
            self._known[key] = counted()
        return self._known[key]


def count(run: Callable[[], object]) -> int:
    """The operations of whatever `run` runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)
