"""Component folders as diffusers and transformers write them: names, ``config.json``, the index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbo.autoencoder import AutoencoderConfig
from turbo.latent import SCALE, SHIFT
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER, diffusers_names, is_plain_matrix
from turbo.text_encoder import TextEncoderConfig
from turbo.transformer import TransformerConfig

DIFFUSERS_FILES = {
    NETWORK: "transformer/diffusion_pytorch_model.safetensors",
    TEXT_ENCODER: "text_encoder/model.safetensors",
    AUTOENCODER: "vae/diffusion_pytorch_model.safetensors",
}
"""Component -> its file, below the model's folder."""


def write_pipeline(folder: Path) -> None:
    """Write what makes a folder of components one that diffusers knows: index and scheduler."""
    write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER_CONFIG)
    write_json(folder / "model_index.json", _MODEL_INDEX)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, and the folder it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def to_diffusers(component: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Native tensors under diffusers' names: fused rows apart, 1x1 convolutions as matrices."""
    renamed: dict[str, Tensor] = {}
    for name, names in diffusers_names(component, weights).items():
        values = weights[name]
        if component == AUTOENCODER and is_plain_matrix(name):
            values = values.flatten(1)
        renamed |= dict(zip(names, values.chunk(len(names)), strict=True))
    return renamed


def diffusers_configs(
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    dtype: torch.dtype,
    eos_token_id: int,
    norm_num_groups: int = 32,
) -> dict[str, dict[str, Any]]:
    """The ``config.json`` of each component.

    Args:
        shapes: Component -> native name -> shape.
        dtype: Of the text encoder's file.
        eos_token_id: Of ``<|im_end|>``.
        norm_num_groups: Of the autoencoder; shapes do not show it.

    Raises:
        CheckpointError: Shapes that are of no such component.
    """
    network = TransformerConfig.from_shapes(shapes[NETWORK])
    text_encoder = TextEncoderConfig.from_shapes(shapes[TEXT_ENCODER])
    autoencoder = AutoencoderConfig.from_shapes(shapes[AUTOENCODER], norm_num_groups)
    return {
        NETWORK: network_config(network),
        TEXT_ENCODER: text_encoder_config(text_encoder, dtype, eos_token_id),
        AUTOENCODER: autoencoder_config(autoencoder),
    }


def network_config(of: TransformerConfig) -> dict[str, Any]:
    """Of a ``ZImageTransformer2DModel``."""
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": of.channels,
        "dim": of.dim,
        "n_layers": of.layers,
        "n_refiner_layers": of.noise_refiners,
        "n_heads": of.heads,
        "n_kv_heads": of.heads,
        "norm_eps": 1e-05,
        "qk_norm": True,
        "cap_feat_dim": of.caption_dim,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": list(of.rotary_axes),
        "axes_lens": [1536, 512, 512],
    }


def text_encoder_config(
    of: TextEncoderConfig, dtype: torch.dtype, eos_token_id: int
) -> dict[str, Any]:
    """Of a ``Qwen3ForCausalLM`` whose file has `dtype`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": eos_token_id,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "rms_norm_eps": of.norm_eps,
        "rope_scaling": None,
        "rope_theta": int(of.rope_theta),
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": of.vocab_size,
        "hidden_size": of.hidden_size,
        "intermediate_size": of.intermediate_size,
        "num_hidden_layers": of.num_layers,
        "num_attention_heads": of.num_heads,
        "num_key_value_heads": of.num_kv_heads,
        "head_dim": of.head_dim,
    }


def autoencoder_config(of: AutoencoderConfig) -> dict[str, Any]:
    """Of an ``AutoencoderKL``."""
    levels = len(of.level_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(of.level_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": of.image_channels,
        "out_channels": of.image_channels,
        "latent_channels": of.latent_channels,
        "layers_per_block": of.blocks,
        "mid_block_add_attention": True,
        "norm_num_groups": of.norm_num_groups,
        "sample_size": 1024,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


_SCHEDULER_CONFIG = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": False,
}
_MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
