"""Models of random weights made where they are needed: the full-size Z-Image in seconds on a GPU.

Speed does not depend on the weights' values as long as they are finite, and their distributions are
those of the small test models, which keep activations near one. What EasyCache skips does depend on
them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbo.autoencoder import Autoencoder, AutoencoderConfig
from turbo.components import Components, component_dtypes
from turbo.engine import Engine
from turbo.fusing import LoraFuser
from turbo.model_files import ModelFiles, find_model_files
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.pipeline import Models
from turbo.plan import DEFAULT_PLAN, Plan
from turbo.precision import arithmetic_dtype
from turbo.testing import (
    TINY_AUTOENCODER,
    TINY_NETWORK,
    TINY_TEXT_ENCODER,
    autoencoder_shapes,
    distribution,
    make_tiny_model,
    qwen3_shapes,
    zimage_shapes,
)
from turbo.text_encoder import TextEncoder, TextEncoderConfig
from turbo.tokenizer import Tokenizer
from turbo.transformer import Transformer, TransformerConfig

PROMPT_TOKENS = 64
"""Of each prompt and each negative prompt, the template's included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The dimensions of a model and the plan it is measured with."""

    network: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    autoencoder: Mapping[str, Any]
    plan: Plan

    @property
    def network_config(self) -> TransformerConfig:
        return TransformerConfig.from_shapes(zimage_shapes(self.network))

    @property
    def text_encoder_config(self) -> TextEncoderConfig:
        return TextEncoderConfig.from_shapes(qwen3_shapes(self.text_encoder))

    @property
    def autoencoder_config(self) -> AutoencoderConfig:
        return AutoencoderConfig.from_shapes(autoencoder_shapes(self.autoencoder))


FULL = Size(
    network={
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "cap_feat_dim": 2560,
        "ffn_hidden": 10240,
        "time_hidden": 1024,
    },
    text_encoder={
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    autoencoder={"ch": 128, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2, "z_channels": 16},
    plan=DEFAULT_PLAN,
)
"""Z-Image-Turbo with Qwen3-4B and FLUX's autoencoder: the tensors of the real files."""

_SMALL_SIDES = ((64, 48), (96, 80), (128, 96))
SMALL = Size(
    network=TINY_NETWORK,
    text_encoder=TINY_TEXT_ENCODER,
    autoencoder=TINY_AUTOENCODER,
    plan=replace(
        DEFAULT_PLAN,
        stages=tuple(
            replace(stage, height=height, width=width, steps=4)
            for stage, (height, width) in zip(DEFAULT_PLAN.stages, _SMALL_SIDES)
        ),
    ),
)
"""A tiny model's dimensions and small stages, to try the measurements out without a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    """A model without files of its own."""

    size: Size
    models: Models
    files: ModelFiles
    """Of a small model, whose tokenizer serves; its weights are not read."""

    def engine(self, models: Models | None = None, **options: Any) -> Engine:
        """An engine around it, or around a copy of its `Models`."""
        fuser = LoraFuser({}, {})
        return Engine(models or self.models, self.files, self.size.plan, fuser, **options)

    def prompt(self, letter: str) -> str:
        """A text of `PROMPT_TOKENS` tokens; every letter but those of English gives another."""
        count = len(self.models.tokenizer.encode_prompt(""))
        text = letter * (PROMPT_TOKENS - count)
        tokens = len(self.models.tokenizer.encode_prompt(text))
        assert tokens == PROMPT_TOKENS, f"{letter!r} makes {tokens} tokens"
        return text


@torch.inference_mode(False)
def make_random_model(size: Size, device: torch.device, seed: int = 0) -> RandomModel:
    """Make a model on `device`: bfloat16 on CUDA, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = component_dtypes(dtype, device)
    made = Components(
        network=Transformer(
            size.network_config,
            device,
            dtypes[NETWORK],
            compute_dtype=arithmetic_dtype(dtype, device),
        ),
        text_encoder=TextEncoder(size.text_encoder_config, device, dtypes[TEXT_ENCODER]),
        autoencoder=Autoencoder(size.autoencoder_config, device, dtypes[AUTOENCODER]),
    )
    generator = torch.Generator(device).manual_seed(seed)
    for module in made.by_name().values():
        _fill(module.native_tensors(), generator)
    with tempfile.TemporaryDirectory(prefix="turbo-bench-") as folder:
        files = find_model_files(make_tiny_model(Path(folder, "model")))
        words = Tokenizer.from_path(files.require_tokenizer())
    models = Models(words, made.text_encoder, made.network, made.autoencoder, made.network, device)
    return RandomModel(size=size, models=models, files=files)


def _fill(tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
    for name, tensor in tensors.items():
        mean, deviation = distribution(name, tuple(tensor.shape))
        tensor.normal_(mean, deviation, generator=generator)
