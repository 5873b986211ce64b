"""diffusers' and transformers' own modules around the weights that turbo has loaded.

The tensors are shared, not copied: both programs run the very same weights, and memory holds them
once. (A weight that turbo keeps padded is copied, because diffusers wants it in one piece.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.side import SideError
from turbo.autoencoder import Autoencoder
from turbo.diffusers_folder import autoencoder_config, network_config, to_diffusers
from turbo.names import AUTOENCODER, NETWORK
from turbo.text_encoder import TextEncoder
from turbo.transformer import Transformer

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Qwen3's for one user message; ComfyUI's copy of the tokenizer comes with another model's."""


def diffusers_network(transformer: Transformer) -> Any:
    """A ``ZImageTransformer2DModel`` over the same weights.

    Raises:
        SideError: Its feed-forward width is not the one that diffusers always has.
    """
    from diffusers import ZImageTransformer2DModel
    from diffusers.models.transformers.transformer_z_image import TimestepEmbedder

    config = transformer.config
    if config.ffn_dim != int(config.dim / 3 * 8):
        raise SideError(
            f"diffusers has no network of width {config.dim} with feed-forward width "
            f"{config.ffn_dim}, only with {int(config.dim / 3 * 8)}"
        )
    made = network_config(config)

    def build(**options: Any) -> nn.Module:
        network: nn.Module = ZImageTransformer2DModel(**options)
        # diffusers always has 1024 here, ComfyUI no more than the network's width.
        network.t_embedder = TimestepEmbedder(config.time_dim, mid_size=config.time_hidden_dim)
        return network

    return _filled(build, made, NETWORK, transformer.native_tensors())


def diffusers_autoencoder(autoencoder: Autoencoder) -> Any:
    """An ``AutoencoderKL`` over the same weights."""
    from diffusers import AutoencoderKL

    config = autoencoder.config
    made = autoencoder_config(config)
    return _filled(AutoencoderKL, made, AUTOENCODER, autoencoder.native_tensors())


def transformers_text_encoder(encoder: TextEncoder) -> Any:
    """A ``Qwen3Model`` over the same weights.

    Its last layer, which it runs and whose output nobody reads, has zeros for weights: turbo does
    not read them from the file.
    """
    from transformers import Qwen3Config, Qwen3Model

    config = encoder.config
    made = Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=40960,
    )
    own = encoder.native_tensors()
    example = next(iter(own.values()))
    module = Qwen3Model(made).to(example.device, example.dtype).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in own.items()}
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    last = f"layers.{config.num_layers - 1}."
    if unexpected or any(not name.startswith((last, "norm.")) for name in missing):
        raise SideError(f"transformers' Qwen3Model wants other tensors: {missing + unexpected}")
    return module


def transformers_tokenizer(path: Path) -> Any:
    """Qwen's tokenizer as transformers has it, from the folder that turbo uses."""
    from transformers import AutoTokenizer

    folder = path if path.is_dir() else path.parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _filled(
    build: Callable[..., nn.Module], config: dict[str, Any], component: str, own: dict[str, Tensor]
) -> nn.Module:
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        module = build(**options)
    state = {name: tensor.contiguous() for name, tensor in to_diffusers(component, own).items()}
    module.load_state_dict(state, assign=True)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise SideError(f"diffusers' {type(module).__name__} has an unfilled buffer {name}")
    return module.eval().requires_grad_(False)
