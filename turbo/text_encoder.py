"""Text encoder: Qwen3 up to the hidden state before its last layer, which is Z-Image's caption.

The last layer, the final norm and the language head are never allocated. Storage is fused where one
matrix product serves several weights (q, k and v; gate and up); `TextEncoder.native_tensors` gives
the checkpoint's names back as views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo.errors import BadInputError, CheckpointError
from turbo.stored import StoredLinear, StoredRows

_LAYER_SHAPES = {
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("key", "hidden"),
    "self_attn.v_proj.weight": ("key", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "self_attn.q_norm.weight": ("head",),
    "self_attn.k_norm.weight": ("head",),
    "mlp.gate_proj.weight": ("intermediate", "hidden"),
    "mlp.up_proj.weight": ("intermediate", "hidden"),
    "mlp.down_proj.weight": ("hidden", "intermediate"),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
}
_MATRICES = ("qkv", "out", "gate_up", "down")
_EMBEDDING = "model.embed_tokens.weight"
_FIRST_TABLE_LENGTH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """Dimensions of a Qwen3 text encoder."""

    vocab_size: int
    """Rows of the embedding table; ids must be below it."""
    hidden_size: int
    """Features of a token."""
    intermediate_size: int
    """Features inside the feed-forward part."""
    num_layers: int
    """Layers of the whole model; all but the last exist here."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Features of a head."""
    norm_eps: float = 1e-6
    """Epsilon of every RMS norm."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> TextEncoderConfig:
        """Infer every dimension from native tensor names and shapes.

        Raises:
            CheckpointError: The shapes are not those of a Qwen3 model; names what is missing.
        """
        layers = 0
        while f"model.layers.{layers}.self_attn.q_proj.weight" in shapes:
            layers += 1
        if layers < 2:
            raise CheckpointError(
                f"not a Qwen3 text encoder: {layers} layers named model.layers.N.self_attn.q_proj."
                "weight, at least 2 are needed"
            )
        sizes: dict[str, int] = {}
        for name, axes in _native_axes(layers).items():
            if name not in shapes:
                raise CheckpointError(f"not a whole Qwen3 text encoder: {name} is missing")
            _note_sizes(sizes, name, axes, shapes[name])
        heads, rest = divmod(sizes["query"], sizes["head"])
        kv_heads, kv_rest = divmod(sizes["key"], sizes["head"])
        if rest or kv_rest or heads % kv_heads or sizes["head"] % 2:
            raise CheckpointError(
                f"not a Qwen3 text encoder: {sizes['query']} query and {sizes['key']} key features "
                f"do not form heads of {sizes['head']}"
            )
        return cls(
            vocab_size=sizes["vocabulary"],
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["intermediate"],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=sizes["head"],
        )


Matrix = nn.Parameter | StoredLinear


class Layer(nn.Module):
    """One Qwen3 layer: causal grouped-query attention, then a gated feed-forward part."""

    def __init__(
        self,
        config: TextEncoderConfig,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.config = config
        hidden, inner = config.hidden_size, config.intermediate_size
        query = config.num_heads * config.head_dim
        key = config.num_kv_heads * config.head_dim
        self.norm_attention = _weight(hidden, device=device, dtype=dtype)
        self.qkv: Matrix = _weight(query + 2 * key, hidden, device=device, dtype=dtype)
        self.norm_query = _weight(config.head_dim, device=device, dtype=dtype)
        self.norm_key = _weight(config.head_dim, device=device, dtype=dtype)
        self.out: Matrix = _weight(hidden, query, device=device, dtype=dtype)
        self.norm_feed_forward = _weight(hidden, device=device, dtype=dtype)
        self.gate_up: Matrix = _weight(2 * inner, hidden, device=device, dtype=dtype)
        self.down: Matrix = _weight(hidden, inner, device=device, dtype=dtype)

    def forward(self, hidden: Tensor, rotary: Tensor, visible: Tensor | None) -> Tensor:
        normed = self._norm(hidden, self.norm_attention).to(hidden.dtype)
        hidden = hidden + self._attention(normed, rotary, visible)
        normed = self._norm(hidden, self.norm_feed_forward).to(hidden.dtype)
        gate, up = _linear(normed, self.gate_up).chunk(2, dim=-1)
        return hidden + _linear(F.silu(gate) * up, self.down)

    def _attention(self, normed: Tensor, rotary: Tensor, visible: Tensor | None) -> Tensor:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = _linear(normed, self.qkv).view(*normed.shape[:2], heads + 2 * kv_heads, -1)
        query, key, value = torch.split(qkv.transpose(1, 2), [heads, kv_heads, kv_heads], dim=1)
        query = _rotate(self._norm(query, self.norm_query), rotary).to(normed.dtype)
        key = _rotate(self._norm(key, self.norm_key), rotary).to(normed.dtype)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=visible is None, enable_gqa=True
        )
        return _linear(mixed.transpose(1, 2).flatten(2), self.out)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.config.norm_eps)

    def native_weights(self) -> dict[str, Tensor | StoredRows]:
        query = self.config.num_heads * self.config.head_dim
        key = self.config.num_kv_heads * self.config.head_dim
        inner = self.config.intermediate_size
        qkv, gate_up = _rows(self.qkv), _rows(self.gate_up)
        return {
            "self_attn.q_proj.weight": qkv.narrow(0, 0, query),
            "self_attn.k_proj.weight": qkv.narrow(0, query, key),
            "self_attn.v_proj.weight": qkv.narrow(0, query + key, key),
            "self_attn.o_proj.weight": _rows(self.out),
            "self_attn.q_norm.weight": self.norm_query.data,
            "self_attn.k_norm.weight": self.norm_key.data,
            "mlp.gate_proj.weight": gate_up.narrow(0, 0, inner),
            "mlp.up_proj.weight": gate_up.narrow(0, inner, inner),
            "mlp.down_proj.weight": _rows(self.down),
            "input_layernorm.weight": self.norm_attention.data,
            "post_attention_layernorm.weight": self.norm_feed_forward.data,
        }


RunLayer = Callable[[Layer, Tensor, Tensor, "Tensor | None"], Tensor]
"""Runs a layer on (hidden, rotary table, visible keys): `run_layer` or a faster stand-in."""


def run_layer(layer: Layer, hidden: Tensor, rotary: Tensor, visible: Tensor | None) -> Tensor:
    """Run a layer as it is."""
    return cast(Tensor, layer(hidden, rotary, visible))


class TextEncoder(nn.Module):
    """Turns token ids into caption features: the input of Qwen3's last layer.

    Attributes:
        config: Its dimensions.
        layers: The layers that exist, in order; each maps (hidden, rotary, mask) to hidden.
        compute_dtype: Dtype to calculate and answer in. float32 is the reference's, whatever dtype
            the weights have: features in bfloat16 make another picture.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate the weights without filling them; `device` may be "meta"."""
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens: Matrix = _weight(*shape, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            Layer(config, device, dtype) for _ in range(config.num_layers - 1)
        )
        # No buffer: a cast of the module must leave it float32.
        self._rotary = torch.empty(2, 0, config.head_dim)

    def rotary_table(self, tokens: int) -> Tensor:
        """Cosines and sines, [2, tokens, head_dim], float32, on the weights' device."""
        device = self.embed_tokens.device
        if self._rotary.shape[1] < tokens or self._rotary.device != device:
            self._rotary = _rotary_table(self.config, max(tokens, _FIRST_TABLE_LENGTH), device)
        return self._rotary[:, :tokens]

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Check the ids and run `forward`; ids and mask may be on any device.

        Raises:
            BadInputError: There is no token, or an id is outside the vocabulary.
        """
        self.check_ids(ids)
        device = self.embed_tokens.device
        mask = None if mask is None else mask.to(device)
        return cast(Tensor, self(ids.to(device), self.rotary_table(ids.shape[1]), mask))

    def check_ids(self, ids: Tensor) -> None:
        """Raise BadInputError unless `ids` is [batch, tokens] with ids of this vocabulary."""
        if ids.dim() != 2 or ids.numel() == 0:
            raise BadInputError(
                f"ids must be [batch, tokens] with at least one token, got {list(ids.shape)}"
            )
        least, most = (int(bound) for bound in ids.aminmax())
        if least < 0 or most >= self.config.vocab_size:
            raise BadInputError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}, the text encoder's "
                f"vocabulary, got {least if least < 0 else most}; the tokenizer is of another model"
            )

    def forward(
        self,
        ids: Tensor,
        rotary: Tensor,
        mask: Tensor | None = None,
        *,
        run: RunLayer = run_layer,
    ) -> Tensor:
        """Caption features of token ids.

        Reads nothing back from the device and branches on shapes only. No token sees a later one,
        so ids may be padded at the end without a mask.

        Args:
            ids: [batch, tokens] int64, each inside the vocabulary (`check_ids`).
            rotary: ``rotary_table(tokens)``.
            mask: [batch, tokens]; 0 hides a token from all others, for prompts that hold the pad
                token. Its own row is still computed. None: all are visible.
            run: Runs each layer.

        Returns:
            [batch, tokens, hidden_size], `compute_dtype`.

        Source: Qwen3 technical report (arXiv:2505.09388), section 2.
        """
        visible = None if mask is None else _causal(mask)
        hidden = _embedding(ids, self.embed_tokens).to(self.compute_dtype)
        for layer in self.layers:
            hidden = run(cast(Layer, layer), hidden, rotary, visible)
        return hidden

    def native_tensors(self) -> dict[str, Tensor]:
        """Every weight under its checkpoint name, as a view: writing into it changes the module.

        Those that are kept as in a file are among `stored_rows`.
        """
        weights = self._native_weights().items()
        return {name: weight for name, weight in weights if isinstance(weight, Tensor)}

    def stored_rows(self) -> dict[str, StoredRows]:
        """As `native_tensors`: the weights that are kept as their files store them."""
        weights = self._native_weights().items()
        return {name: weight for name, weight in weights if isinstance(weight, StoredRows)}

    def matrices(self) -> Iterator[tuple[nn.Module, str]]:
        """Owner and attribute of each matrix of floats; see `turbo.stored.Keeping`."""
        if isinstance(self.embed_tokens, nn.Parameter):
            yield self, "embed_tokens"
        for layer in self.layers:
            for name in _MATRICES:
                if isinstance(getattr(layer, name), nn.Parameter):
                    yield layer, name

    def _native_weights(self) -> dict[str, Tensor | StoredRows]:
        weights: dict[str, Tensor | StoredRows] = {_EMBEDDING: _rows(self.embed_tokens)}
        for index, layer in enumerate(self.layers):
            for name, weight in cast(Layer, layer).native_weights().items():
                weights[f"model.layers.{index}.{name}"] = weight
        return weights

    def ignored_keys(self, shapes: Mapping[str, Sequence[int]]) -> set[str]:
        """Names among `shapes` that a whole Qwen3 file holds and this module never reads."""
        last = self.config.num_layers - 1
        unread = {f"model.layers.{last}.{name}" for name in _LAYER_SHAPES}
        return (unread | {"model.norm.weight", "lm_head.weight"}) & set(shapes)


def _weight(
    *shape: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)


def _linear(x: Tensor, weight: Matrix) -> Tensor:
    return weight(x) if isinstance(weight, StoredLinear) else F.linear(x, weight.to(x.dtype))


def _embedding(ids: Tensor, weight: Matrix) -> Tensor:
    return weight.embedding(ids) if isinstance(weight, StoredLinear) else F.embedding(ids, weight)


def _rows(weight: Matrix) -> Tensor | StoredRows:
    return weight.rows() if isinstance(weight, StoredLinear) else weight.data


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn element i of a head with element i + head_dim / 2 by its position's angle."""
    cos, sin = rotary.unbind()
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _rotary_table(config: TextEncoderConfig, length: int, device: torch.device) -> Tensor:
    """cos and sin [2, length, head_dim], float32, the halves of a head alike.

    Angles are products of float32 numbers, as in the reference: the cosines of exact ones differ
    by 3e-5 at position 500. Made on the CPU, so that every device gets the same table.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin())).to(device)


def _causal(mask: Tensor) -> Tensor:
    """[batch, 1, tokens, tokens] bool: which keys (last axis) each query may see."""
    position = torch.arange(mask.shape[1], device=mask.device)
    before = position[None, :] <= position[:, None]
    return before & (mask != 0)[:, None, None, :]


def _native_axes(layers: int) -> dict[str, tuple[str, ...]]:
    axes: dict[str, tuple[str, ...]] = {_EMBEDDING: ("vocabulary", "hidden")}
    for index in range(layers - 1):
        axes |= {f"model.layers.{index}.{name}": names for name, names in _LAYER_SHAPES.items()}
    return axes


def _note_sizes(
    sizes: dict[str, int], name: str, axes: tuple[str, ...], shape: Sequence[int]
) -> None:
    """Remember the size of each axis, or check that it is the one seen before."""
    fits = len(shape) == len(axes) and all(
        size > 0 and sizes.setdefault(axis, size) == size
        for axis, size in zip(axes, shape, strict=True)
    )
    if not fits:
        wanted = [sizes.get(axis, axis) for axis in axes]
        raise CheckpointError(
            f"not a Qwen3 text encoder: {name} must have the shape {wanted}, got {list(shape)}"
        )
