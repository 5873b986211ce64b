"""What each tensor is called in the file layouts that are read, and how one becomes the other.

*Native* names are those of ComfyUI's single files. A diffusers folder calls the same tensors
differently: the network's q, k and v are three matrices there and one here, and the autoencoder
counts its decoder levels from the other end. GGUF files have llama.cpp's names for the text encoder
and native ones for the network. Text only: no tensor is touched and nothing heavy is imported.

Source: diffusers ``ZImageTransformer2DModel`` and ``AutoencoderKL`` (state dict keys), transformers
``Qwen3Model``, llama.cpp ``gguf-py/gguf/constants.py`` (``MODEL_ARCH.QWEN3``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

NETWORK = "network"
TEXT_ENCODER = "text_encoder"
AUTOENCODER = "autoencoder"

COMPONENTS = (NETWORK, TEXT_ENCODER, AUTOENCODER)
"""Keys of the three parts of a model, as used everywhere."""

COMPONENT_WORDS: Mapping[str, str] = {
    NETWORK: "Z-Image network",
    TEXT_ENCODER: "Qwen3 text encoder",
    AUTOENCODER: "16-channel autoencoder",
}
"""What messages call them."""

PREFIXES: Mapping[str, tuple[str, ...]] = {
    NETWORK: ("model.diffusion_model.", "diffusion_model.", ""),
    TEXT_ENCODER: ("text_encoders.qwen3_4b.transformer.", ""),
    AUTOENCODER: ("vae.", "first_stage_model.", ""),
}
"""What may stand before every name of a component in a single file; tried in this order."""

# Everything in an all-in-one checkpoint begins with one of these.
_COMPANIONS = ("model.diffusion_model.", "text_encoders.", "vae.", "first_stage_model.")

# Names that every file of a component has, whichever way it names the rest.
_MARKERS: Mapping[str, tuple[str, ...]] = {
    NETWORK: ("x_pad_token", "cap_embedder.1.weight", "layers.0.feed_forward.w1.weight"),
    TEXT_ENCODER: ("embed_tokens.weight", "layers.0.self_attn.q_norm.weight"),
    AUTOENCODER: ("decoder.conv_in.weight", "decoder.conv_out.weight"),
}

# The same of a text encoder in llama.cpp's words.
_LLAMA_MARKERS = {
    "embed_tokens.weight": "token_embd.weight",
    "layers.0.self_attn.q_norm.weight": "blk.0.attn_q_norm.weight",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file's tensor belongs: one of `parts` equal kinds of rows of a native tensor."""

    name: str
    """Native name."""
    part: int = 0
    """Position among the parts, from the top row down (q, k, v)."""
    parts: int = 1
    """Number of file tensors that make up the native one."""


def find_prefix(component: str, names: Iterable[str]) -> str | None:
    """Return what stands before a component's names in a file, or None if none of it is there.

    One known name is enough: an incomplete file is still that component's, and is reported later
    with the names it lacks.
    """
    present = set(names)
    for prefix in PREFIXES[component]:
        if any(_has(component, marker, prefix, present) for marker in _MARKERS[component]):
            return prefix
    return None


def find_components(names: Iterable[str]) -> dict[str, str]:
    """Tell which components a file holds from its tensor names: component -> prefix."""
    present = set(names)
    found: dict[str, str] = {}
    for component in COMPONENTS:
        prefix = find_prefix(component, present)
        if prefix is not None and all(
            _has(component, marker, prefix, present) for marker in _MARKERS[component]
        ):
            found[component] = prefix
    return found


def select_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Map the file names of one component to the names without `prefix`.

    Names of the other components of an all-in-one file are left out. A name that belongs to nobody
    stays as it is, so that it is reported as left over instead of being dropped silently.
    """
    return {
        name: name.removeprefix(prefix) if name.startswith(prefix) else name
        for name in names
        if (prefix and name.startswith(prefix)) or not name.startswith(_COMPANIONS)
    }


def native_places(component: str, names: Iterable[str]) -> dict[str, Place]:
    """Find the native place of every tensor of one component.

    Args:
        component: One of `COMPONENTS`.
        names: All tensor names of the component (diffusers, transformers, llama.cpp or native), no
            prefix.

    Returns:
        The place of each name, in the order given; unknown names keep their name.
    """
    listed = list(names)
    place = _placer(component, listed)
    return {name: place(name) for name in listed}


def diffusers_names(component: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Find what a diffusers folder calls native tensors: native name -> names, rows in order."""
    listed = list(names)
    if component == NETWORK:
        return {name: _network_to_diffusers(name) for name in listed}
    if component == AUTOENCODER:
        levels = _count_levels(listed, r"decoder\.up\.([0-9]{1,4})\.")
        return {name: (_autoencoder_to_diffusers(name, levels),) for name in listed}
    return {name: (name,) for name in listed}


def native_network_place(name: str) -> Place:
    """Native place of a network tensor named the native way or as in diffusers."""
    fused = re.fullmatch(r"(.*attention)\.to_([qkv])\.(.+)", name)
    if fused:
        block, letter, kind = fused.groups()
        return Place(f"{block}.qkv.{kind}", "qkv".index(letter), 3)
    return Place(_substitute(name, _NETWORK_RULES))


def is_plain_matrix(name: str) -> bool:
    """Whether diffusers keeps this native autoencoder weight [C, C, 1, 1] as a matrix [C, C]."""
    return (
        re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight", name) is not None
    )


def is_pad_token(name: str) -> bool:
    """Whether a name, with or without prefix, is of a network tensor [1, C].

    GGUF files may keep these as vectors [C]: the programs that write them drop outer dimensions of
    one.
    """
    return name.rpartition(".")[2] in ("x_pad_token", "cap_pad_token")


def _has(component: str, marker: str, prefix: str, present: set[str]) -> bool:
    if prefix + marker in present:
        return True
    if component != TEXT_ENCODER:
        return False
    return f"{prefix}model.{marker}" in present or prefix + _LLAMA_MARKERS[marker] in present


def _placer(component: str, names: list[str]) -> Callable[[str], Place]:
    if component == NETWORK:
        return native_network_place
    if component == AUTOENCODER:
        levels = _count_levels(names, r"decoder\.up_blocks\.([0-9]{1,4})\.")
        return lambda name: Place(_autoencoder_to_native(name, levels))
    return lambda name: Place(_text_encoder_to_native(name))


_NETWORK_RULES = (
    (r"attention\.to_out\.0\.", "attention.out."),
    (r"attention\.norm_q\.", "attention.q_norm."),
    (r"attention\.norm_k\.", "attention.k_norm."),
    (r"^all_x_embedder\.2-1\.", "x_embedder."),
    (r"^all_final_layer\.2-1\.", "final_layer."),
)

_NETWORK_RULES_BACK = (
    (r"attention\.out\.", "attention.to_out.0."),
    (r"attention\.q_norm\.", "attention.norm_q."),
    (r"attention\.k_norm\.", "attention.norm_k."),
    (r"^x_embedder\.", "all_x_embedder.2-1."),
    (r"^final_layer\.", "all_final_layer.2-1."),
)

# `query`, `key`, `value` and `proj_attn` are diffusers' names before version 0.18.
_AUTOENCODER_RULES = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.(?:to_q|query)\.", ".mid.attn_1.q."),
    (r"\.mid_block\.attentions\.0\.(?:to_k|key)\.", ".mid.attn_1.k."),
    (r"\.mid_block\.attentions\.0\.(?:to_v|value)\.", ".mid.attn_1.v."),
    (r"\.mid_block\.attentions\.0\.(?:to_out\.0|proj_attn)\.", ".mid.attn_1.proj_out."),
    (r"^encoder\.down_blocks\.([0-9]{1,4})\.resnets\.", r"encoder.down.\1.block."),
    (r"^encoder\.down_blocks\.([0-9]{1,4})\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.up_blocks\.([0-9]{1,4})\.resnets\.", r"decoder.up.\1.block."),
    (r"^decoder\.up_blocks\.([0-9]{1,4})\.upsamplers\.0\.", r"decoder.up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)

_AUTOENCODER_RULES_BACK = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"^encoder\.down\.([0-9]{1,4})\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.([0-9]{1,4})\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.([0-9]{1,4})\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.([0-9]{1,4})\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def _substitute(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _network_to_diffusers(name: str) -> tuple[str, ...]:
    fused = re.fullmatch(r"(.*attention)\.qkv\.(.+)", name)
    if fused:
        block, kind = fused.groups()
        return tuple(f"{block}.to_{letter}.{kind}" for letter in "qkv")
    return (_substitute(name, _NETWORK_RULES_BACK),)


def _autoencoder_to_native(name: str, levels: int) -> str:
    """Decoder levels count from the smallest picture in diffusers, from the largest here."""
    is_diffusers = ".up_blocks." in name
    name = _substitute(name, _AUTOENCODER_RULES)
    return (
        _reverse_level(name, r"(decoder\.up\.)([0-9]{1,4})(\..*)", levels) if is_diffusers else name
    )


def _autoencoder_to_diffusers(name: str, levels: int) -> str:
    name = _substitute(name, _AUTOENCODER_RULES_BACK)
    return _reverse_level(name, r"(decoder\.up_blocks\.)([0-9]{1,4})(\..*)", levels)


def _reverse_level(name: str, pattern: str, levels: int) -> str:
    matched = re.fullmatch(pattern, name)
    if not matched:
        return name
    before, level, after = matched.groups()
    return f"{before}{levels - 1 - int(level)}{after}"


def _count_levels(names: Iterable[str], pattern: str) -> int:
    return 1 + max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)


# Rows of q and k stay as they are: llama.cpp reorders them for Llama, not for Qwen.
_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def _text_encoder_to_native(name: str) -> str:
    if name in _LLAMA_TOP:
        return _LLAMA_TOP[name]
    layer = re.fullmatch(r"blk\.([0-9]{1,9})\.([a-z_]+)\.weight", name)
    if layer and layer[2] in _LLAMA_LAYER:
        return f"model.layers.{layer[1]}.{_LLAMA_LAYER[layer[2]]}.weight"
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
