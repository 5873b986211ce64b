"""Writes GGUF files with the `gguf` package, as llama.cpp's and ComfyUI's converters would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from torch import Tensor

Chooser = Callable[[str, Tensor], Kind]


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor | np.ndarray],
    architecture: str | None = "lumina2",
    kind: Kind | Chooser = Kind.F32,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write tensors, each quantised as `kind` says; an array is written as the blocks it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture or "none")
    if architecture is None:
        del writer.kv_data[0]["general.architecture"]
    for key, value in (settings or {}).items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            assert isinstance(kind, Kind)
            writer.add_tensor(name, tensor, raw_dtype=kind)
        else:
            chosen = kind if isinstance(kind, Kind) else kind(name, tensor)
            data = gguf.quants.quantize(tensor.float().numpy(), chosen)
            writer.add_tensor(name, data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def mostly(kind: Kind) -> Chooser:
    """As the converters do: matrices whose rows are whole blocks are quantised, the rest is not."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return lambda name, tensor: (
        kind if tensor.dim() > 1 and tensor.shape[-1] % block == 0 else Kind.F32
    )


def llama_names(names: Mapping[str, Tensor]) -> dict[str, str]:
    """Native text encoder name -> llama.cpp's, from the package's own table."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 99)
    llama = {name: table.get_name(name, try_suffixes=(".weight",)) for name in names}
    assert all(llama.values())
    return {name: str(other) for name, other in llama.items()}


def write_text_encoder(path: Path, source: Path, kind: Kind | Chooser, **settings: Any) -> Path:
    """Convert a safetensors text encoder as llama.cpp's converter does."""
    tensors = load_file(source)
    names = llama_names(tensors)
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    facts = {
        "qwen3.rope.freq_base": 1e6,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ü"],
        "tokenizer.ggml.token_type": [1, 1, 3],
    }
    return write_gguf(path, renamed, "qwen3", kind, facts | settings)


def write_network(path: Path, source: Path, kind: Kind | Chooser) -> Path:
    """Convert a safetensors network as stable-diffusion.cpp does: pad tokens become vectors."""
    tensors = load_file(source)
    flat = {n: t[0] if n.endswith("pad_token") else t for n, t in tensors.items()}
    return write_gguf(path, flat, "lumina2", kind)


def convert(models: Path, kind: Kind | Chooser) -> Path:
    """Replace network and text encoder of a ComfyUI ``models`` folder by GGUF files."""
    network = models / "diffusion_models" / "z_image_turbo_bf16.safetensors"
    write_network(models / "unet" / "z_image_turbo.gguf", network, kind)
    text_encoder = models / "text_encoders" / "qwen_3_4b.safetensors"
    write_text_encoder(models / "clip" / "qwen3.gguf", text_encoder, kind)
    network.unlink()
    text_encoder.unlink()
    return models


def random_blocks(kind: Kind, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Rows of quantised blocks with random contents and scales that are finite."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    data[:, 1::2] &= 0x3F  # odd bytes: exponents of the float16 scales
    assert torch.from_numpy(gguf.quants.dequantize(data, kind)).isfinite().all()
    return data
