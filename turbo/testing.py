"""Small complete models with random weights, in the exact file layouts of the real one.

They are what tests and some measurements run on. Values depend on seed, tensor name
and shape alone, so two layouts of one seed hold bit-equal weights.
"""

from __future__ import annotations

import math
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from turbo.converted_files import LAYOUTS
from turbo.diffusers_folder import (
    DIFFUSERS_FILES,
    diffusers_configs,
    to_diffusers,
    write_json,
    write_pipeline,
)
from turbo.errors import BadInputError, SaveError
from turbo.model_files import COMFYUI_FOLDERS, PREFERRED_FILES
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER

Shapes = dict[str, tuple[int, ...]]

TINY_NETWORK: Mapping[str, Any] = {
    "dim": 192,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 6,
    "cap_feat_dim": 64,
    "ffn_hidden": 512,  # diffusers fixes it at 8/3 of the width
    "time_hidden": 1024,  # and this one too
}
TINY_TEXT_ENCODER: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_AUTOENCODER: Mapping[str, Any] = {
    "ch": 32,
    "ch_mult": (1, 2, 2, 2),
    "num_res_blocks": 1,
    "z_channels": 16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The dimensions of a complete model, each part's under its checkpoint's names."""

    network: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    autoencoder: Mapping[str, Any]


TINY = ModelSize(network=TINY_NETWORK, text_encoder=TINY_TEXT_ENCODER, autoencoder=TINY_AUTOENCODER)
"""Some 10 MB in bfloat16."""

_ADALN_WIDTH = 256
_TIME_FREQUENCIES = 256
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MERGES = ("Ġ t", "Ġ a", "h e", "i n", "o n", "e r", "Ġt he", "Ġa n", "in g", "Ġan d")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_model(
    folder: Path | str, layout: str = "comfyui", seed: int = 0, dtype: str = "bfloat16"
) -> Path:
    """Write a complete small model, some 10 MB; see `make_model`."""
    return make_model(folder, TINY, layout, seed, dtype)


def make_model(
    folder: Path | str,
    size: ModelSize,
    layout: str = "comfyui",
    seed: int = 0,
    dtype: str = "bfloat16",
) -> Path:
    """Write a complete model: network, text encoder, autoencoder and a small tokenizer.

    Args:
        folder: Made if it is not there; must be empty if it is. Appears whole or not at all.
        size: The dimensions.
        layout: ``comfyui`` (single files under ``models/``) or ``diffusers`` (component folders
            that diffusers' and transformers' own classes load too).
        seed: Same seed, same weights, whatever the layout.
        dtype: ``bfloat16``, ``float16`` or ``float32``; the values are bfloat16's in any case.

    Returns:
        `folder`, ready for ``Engine.from_pretrained``.

    Raises:
        BadInputError: Unknown layout or dtype, or the folder holds something.
        SaveError: The folder cannot be written.
    """
    folder = Path(folder)
    if layout not in LAYOUTS:
        raise BadInputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if dtype not in _DTYPES:
        raise BadInputError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInputError(f"{folder}: is there already and not an empty folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            unfinished = Path(temporary, "model")
            _write_model(unfinished, size, layout, seed, _DTYPES[dtype])
            os.replace(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{folder}: cannot write the model: {error}") from error
    return folder


def initialise(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Draw the values of tensors from their names: float32 that bfloat16 can hold.

    Args:
        shapes: Native name -> shape.
        seed: Any integer from 0 up.

    Returns:
        Native name -> float32 tensor. Each depends on `seed`, its name and shape alone.
    """
    return {name: _draw(name, tuple(shape), seed) for name, shape in shapes.items()}


def zimage_shapes(config: Mapping[str, Any]) -> Shapes:
    """Native names and shapes of a network.

    Args:
        config: ``dim``, ``n_layers``, ``n_refiner_layers``, ``n_heads``, ``cap_feat_dim``,
            ``ffn_hidden``; also read: ``in_channels`` (16), ``patch_size`` (2), ``time_hidden``
            (1024, or the width if that is less).
    """
    dim, head = config["dim"], config["dim"] // config["n_heads"]
    patch = config.get("in_channels", 16) * config.get("patch_size", 2) ** 2
    time, hidden = min(dim, _ADALN_WIDTH), config.get("time_hidden", min(dim, 1024))
    shapes: Shapes = {"x_pad_token": (1, dim), "cap_pad_token": (1, dim)}
    shapes |= _linear("x_embedder", dim, patch)
    shapes |= {"cap_embedder.0.weight": (config["cap_feat_dim"],)}
    shapes |= _linear("cap_embedder.1", dim, config["cap_feat_dim"])
    shapes |= _linear("t_embedder.mlp.0", hidden, _TIME_FREQUENCIES)
    shapes |= _linear("t_embedder.mlp.2", time, hidden)
    for kind, count in (
        ("noise_refiner", config["n_refiner_layers"]),
        ("context_refiner", config["n_refiner_layers"]),
        ("layers", config["n_layers"]),
    ):
        for index in range(count):
            block = f"{kind}.{index}"
            shapes |= _block_shapes(block, dim, head, config["ffn_hidden"])
            if kind != "context_refiner":
                shapes |= _linear(f"{block}.adaLN_modulation.0", 4 * dim, time)
    shapes |= _linear("final_layer.linear", patch, dim)
    return shapes | _linear("final_layer.adaLN_modulation.1", dim, time)


def qwen3_shapes(config: Mapping[str, Any]) -> Shapes:
    """Native names and shapes of a text encoder.

    Args:
        config: The keys of a transformers ``Qwen3Config``: ``vocab_size``, ``hidden_size``,
            ``intermediate_size``, ``num_hidden_layers``, ``num_attention_heads``,
            ``num_key_value_heads``, ``head_dim``.
    """
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (queries, width),
            f"{layer}.self_attn.k_proj.weight": (keys, width),
            f"{layer}.self_attn.v_proj.weight": (keys, width),
            f"{layer}.self_attn.o_proj.weight": (width, queries),
            f"{layer}.self_attn.q_norm.weight": (head,),
            f"{layer}.self_attn.k_norm.weight": (head,),
            f"{layer}.mlp.gate_proj.weight": (inner, width),
            f"{layer}.mlp.up_proj.weight": (inner, width),
            f"{layer}.mlp.down_proj.weight": (width, inner),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    return shapes | {"model.norm.weight": (width,)}


def autoencoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """Native names and shapes of an autoencoder, encoder included.

    Args:
        config: ``ch``, ``ch_mult``, ``num_res_blocks``, ``z_channels``; also read: ``in_channels``
            and ``out_ch`` (3).
    """
    channels = [config["ch"] * factor for factor in config["ch_mult"]]
    blocks, latent = config["num_res_blocks"], config["z_channels"]
    return _encoder_shapes(channels, blocks, latent, config.get("in_channels", 3)) | (
        _decoder_shapes(channels, blocks, latent, config.get("out_ch", 3))
    )


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _convolution(name: str, outputs: int, inputs: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _block_shapes(block: str, dim: int, head: int, ffn: int) -> Shapes:
    norms = ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")
    return {
        f"{block}.attention.qkv.weight": (3 * dim, dim),
        f"{block}.attention.out.weight": (dim, dim),
        f"{block}.attention.q_norm.weight": (head,),
        f"{block}.attention.k_norm.weight": (head,),
        f"{block}.feed_forward.w1.weight": (ffn, dim),
        f"{block}.feed_forward.w2.weight": (dim, ffn),
        f"{block}.feed_forward.w3.weight": (ffn, dim),
        **{f"{block}.{norm}.weight": (dim,) for norm in norms},
    }


def _encoder_shapes(channels: Sequence[int], blocks: int, latent: int, image: int) -> Shapes:
    shapes = _convolution("encoder.conv_in", channels[0], image)
    current = channels[0]
    for level, width in enumerate(channels):
        for index in range(blocks):
            shapes |= _residual(f"encoder.down.{level}.block.{index}", width, current)
            current = width
        if level != len(channels) - 1:
            shapes |= _convolution(f"encoder.down.{level}.downsample.conv", width, width)
    shapes |= _middle("encoder", current) | _norm("encoder.norm_out", current)
    return shapes | _convolution("encoder.conv_out", 2 * latent, current)


def _decoder_shapes(channels: Sequence[int], blocks: int, latent: int, image: int) -> Shapes:
    current = channels[-1]
    shapes = _convolution("decoder.conv_in", current, latent) | _middle("decoder", current)
    for level, width in reversed(list(enumerate(channels))):
        for index in range(blocks + 1):
            shapes |= _residual(f"decoder.up.{level}.block.{index}", width, current)
            current = width
        if level:
            shapes |= _convolution(f"decoder.up.{level}.upsample.conv", width, width)
    shapes |= _norm("decoder.norm_out", current)
    return shapes | _convolution("decoder.conv_out", image, current)


def _residual(name: str, outputs: int, inputs: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", inputs) | _convolution(f"{name}.conv1", outputs, inputs)
    shapes |= _norm(f"{name}.norm2", outputs) | _convolution(f"{name}.conv2", outputs, outputs)
    if outputs != inputs:
        shapes |= _convolution(f"{name}.nin_shortcut", outputs, inputs, 1)
    return shapes


def _middle(name: str, channels: int) -> Shapes:
    shapes = _norm(f"{name}.mid.attn_1.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _convolution(f"{name}.mid.attn_1.{part}", channels, channels, 1)
    shapes |= _residual(f"{name}.mid.block_1", channels, channels)
    return shapes | _residual(f"{name}.mid.block_2", channels, channels)


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    key = zlib.crc32(name.encode())
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, key])))
    mean, deviation = distribution(name, shape)
    normal = generator.standard_normal(shape, dtype=np.float32)
    values = np.float32(mean) + np.float32(deviation) * normal
    return torch.from_numpy(values).bfloat16().float()


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep the activations of a deep network near one."""
    module, _, kind = name.rpartition(".")
    if name.endswith("pad_token") or name == "model.embed_tokens.weight":
        return 0.0, 1.0
    if "norm" in module.rpartition(".")[2] or name == "cap_embedder.0.weight":
        return (1.0 if kind == "weight" else 0.0), 0.1
    if kind == "bias":
        return 0.0, _bias_deviation(module)
    return 0.0, _gain(module) / math.sqrt(math.prod(shape[1:]))


def _bias_deviation(module: str) -> float:
    if module.endswith("adaLN_modulation.0"):
        return 0.3
    if module == "final_layer.linear":
        return 0.8
    return 0.05 if module.startswith(("encoder.", "decoder.")) else 0.1


def _gain(module: str) -> float:
    if module == "final_layer.linear":
        return 0.15
    return 0.5 if "adaLN_modulation" in module or module == "decoder.conv_out" else 1.0


def _write_model(folder: Path, size: ModelSize, layout: str, seed: int, dtype: torch.dtype) -> None:
    weights = {
        NETWORK: initialise(zimage_shapes(size.network), seed),
        TEXT_ENCODER: initialise(qwen3_shapes(size.text_encoder), seed),
        AUTOENCODER: initialise(autoencoder_shapes(size.autoencoder), seed),
    }
    if layout == "comfyui":
        _write_comfyui(folder, weights, dtype)
    else:
        _write_diffusers(folder, weights, dtype, size)


def _write_comfyui(
    folder: Path, weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype
) -> None:
    models = folder / "models"
    (models / "loras").mkdir(parents=True)
    for component, (place, *_) in COMFYUI_FOLDERS.items():
        _save(weights[component], models / place / PREFERRED_FILES[component], dtype)
    write_tokenizer(models / "tokenizer")


def _write_diffusers(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    dtype: torch.dtype,
    size: ModelSize,
) -> None:
    configs = diffusers_configs(
        {
            NETWORK: zimage_shapes(size.network),
            TEXT_ENCODER: qwen3_shapes(size.text_encoder),
            AUTOENCODER: autoencoder_shapes(size.autoencoder),
        },
        dtype,
        _control_token_id("<|im_end|>"),
        size.autoencoder.get("norm_num_groups", 32),
    )
    for component, place in DIFFUSERS_FILES.items():
        _save(to_diffusers(component, weights[component]), folder / place, dtype)
        write_json((folder / place).with_name("config.json"), configs[component])
    write_tokenizer(folder / "tokenizer")
    write_pipeline(folder)


def write_tokenizer(folder: Path, merges: Sequence[str] = _MERGES) -> int:
    """Write byte-level BPE over the 256 bytes and merges, with Qwen's control tokens after them.

    Args:
        folder: Gets ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``.
        merges: In order; each two tokens with a blank between.

    Returns:
        How many ids there are.
    """
    tokens = [*_byte_characters(), *(merge.replace(" ", "") for merge in merges)]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ("#version: 0.2", *merges)
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    added = {
        str(_control_token_id(token, merges)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in _CONTROL_TOKENS
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)
    return len(tokens) + len(_CONTROL_TOKENS)


def _control_token_id(token: str, merges: Sequence[str] = _MERGES) -> int:
    return 256 + len(merges) + _CONTROL_TOKENS.index(token)


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte, in the order of its ids.

    Source: GPT-2 (https://github.com/openai/gpt-2, encoder.py): printable Latin-1 stands for
    itself and comes first, the other bytes follow as the characters from U+0100 on.
    """
    latin = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in latin] + [chr(0x100 + i) for i in range(256 - len(latin))]


def _save(weights: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: values.to(dtype).contiguous() for name, values in weights.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library leaves them readable to their owner alone
