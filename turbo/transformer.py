"""The Z-Image diffusion transformer over static shapes: tensors in, tensors out, nothing read back.

What does not depend on the latent is computed apart and handed in, so that it is computed once:

* `Transformer.refine_caption`: caption embedder and context refiner, once a prompt;
* `Transformer.rotary_table`: once a (size, caption length);
* `Transformer.modulation_table`: once a schedule, all sigmas at a time.

`Transformer.forward` is what remains: embed the patches, refine them, run the joint layers.
Tokens are ordered [caption, image]; both parts are padded to multiples of 32 with learned tokens
that *are* attended, so a caption must never be padded further than to the next multiple.

Source: Z-Image (Tongyi-MAI, 2025), with the tensor names of ComfyUI's single file.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo.attention import SDPA, AttentionChoice, attend
from turbo.errors import CheckpointError
from turbo.quantize import QuantizedLinear, QuantizedRows
from turbo.stored import StoredLinear, StoredRows

PATCH = 2
PAD_MULTIPLE = 32
ROTARY_THETA = 256.0
ROTARY_SHARES = (32, 48, 48)
"""Parts of 128 that the (caption, row, column) axes take of each head."""
TIME_SCALE = 1000.0
TIME_FREQUENCIES = 256
NORM_EPS = 1e-5
QK_NORM_EPS = torch.finfo(torch.float32).eps
"""The q and k norms have no eps setting, so the reference uses float32's machine epsilon."""
FINAL_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Dimensions of a Z-Image network, all of them visible in its tensors' shapes."""

    dim: int
    """Width of the residual stream."""
    heads: int
    """Attention heads."""
    head_dim: int
    """Width of one head."""
    ffn_dim: int
    """Inner width of the feed-forward part."""
    layers: int
    """Joint blocks."""
    noise_refiners: int
    """Blocks over image tokens only."""
    context_refiners: int
    """Blocks over caption tokens only, without modulation."""
    caption_dim: int
    """Width of the text encoder's features."""
    time_dim: int
    """Width of the timestep vector that all modulations read."""
    time_hidden_dim: int
    """Inner width of the timestep embedder."""
    channels: int
    """Latent channels."""

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> TransformerConfig:
        """Infer the dimensions from native tensor names and shapes.

        Raises:
            CheckpointError: A tensor that decides a dimension is absent or does not fit the rest.
        """
        shape = _ShapeReader(shapes)
        dim, patch_values = shape.of("x_embedder.weight", 2)
        (head_dim,) = shape.of("layers.0.attention.q_norm.weight", 1)
        ffn_dim, _ = shape.of("layers.0.feed_forward.w1.weight", 2)
        _, caption_dim = shape.of("cap_embedder.1.weight", 2)
        time_dim, time_hidden_dim = shape.of("t_embedder.mlp.2.weight", 2)
        if dim % head_dim or head_dim % 16 or patch_values % PATCH**2:
            raise CheckpointError(
                f"not a Z-Image network: width {dim}, head size {head_dim} and {patch_values} "
                "values a patch do not fit together; give a Z-Image checkpoint"
            )
        return cls(
            dim=dim,
            heads=dim // head_dim,
            head_dim=head_dim,
            ffn_dim=ffn_dim,
            layers=_count_blocks(shapes, "layers"),
            noise_refiners=_count_blocks(shapes, "noise_refiner"),
            context_refiners=_count_blocks(shapes, "context_refiner"),
            caption_dim=caption_dim,
            time_dim=time_dim,
            time_hidden_dim=time_hidden_dim,
            channels=patch_values // PATCH**2,
        )

    @property
    def rotary_axes(self) -> tuple[int, ...]:
        """Channels of a head that each position axis rotates; even, summing to `head_dim`."""
        return tuple(share * self.head_dim // 128 for share in ROTARY_SHARES)


class _ShapeReader:
    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = shapes

    def of(self, name: str, dims: int) -> tuple[int, ...]:
        shape = tuple(self.shapes.get(name, ()))
        if len(shape) != dims:
            found = f"has shape {list(shape)}" if name in self.shapes else "is missing"
            raise CheckpointError(
                f"not a Z-Image network: tensor {name!r} {found}, expected {dims} dimension(s)"
            )
        return shape


def _count_blocks(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    """Blocks 0, 1, 2… without a gap; what lies behind a gap fits nowhere and is left over."""
    pattern = re.compile(rf"{prefix}\.(\d+)\.")
    present = {int(match[1]) for match in map(pattern.match, shapes) if match}
    return next(count for count in itertools.count() if count not in present)


def padded_length(tokens: int) -> int:
    """The next multiple of 32: how many tokens the network attends for `tokens` real ones."""
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def _weight(*shape: int, like: _Factory) -> nn.Parameter:
    return nn.Parameter(
        torch.empty(shape, device=like.device, dtype=like.dtype), requires_grad=False
    )


@dataclass(frozen=True)
class _Factory:
    device: torch.device | str | None
    dtype: torch.dtype | None
    quantize: str | None = None
    """How the matrices of blocks are kept; None: in `dtype`."""

    def matrix(self, inputs: int, outputs: int) -> Linear | QuantizedLinear:
        """A block's matrix."""
        if self.quantize is None:
            return Linear(inputs, outputs, self, bias=False)
        return QuantizedLinear(self.quantize, inputs, outputs, self.device)


class Linear(nn.Module):
    """``x @ weight.T + bias`` over the last axis; parameters are left uninitialised."""

    def __init__(self, inputs: int, outputs: int, make: _Factory, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = _weight(outputs, inputs, like=make)
        self.bias = _weight(outputs, like=make) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        # Casts are for weights kept narrower than the arithmetic; else they do nothing.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def rows(self) -> Tensor:
        """The weight, as `QuantizedLinear.rows` and `StoredLinear.rows` give theirs."""
        return self.weight.detach()

    def zero_(self) -> None:
        """Make the weight 0."""
        self.weight.zero_()

    if TYPE_CHECKING:
        __call__ = forward


Matrix = Linear | QuantizedLinear | StoredLinear
Weight = Tensor | QuantizedRows | StoredRows


class Attention(nn.Module):
    """Full attention over [batch, tokens, dim] with normed and rotated q and k."""

    def __init__(self, config: TransformerConfig, make: _Factory) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv: Matrix = make.matrix(config.dim, 3 * config.dim)
        self.out: Matrix = make.matrix(config.dim, config.dim)
        self.qk_norm = _weight(2, config.head_dim, like=make)

    def forward(self, x: Tensor, rotary: Tensor, backend: str = SDPA) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, -1, self.head_dim)
        qk = _rms_norm(qkv[:, :, :2], self.qk_norm.unsqueeze(1), QK_NORM_EPS)
        q, k = rotate(qk.flatten(2, 3), rotary).chunk(2, dim=2)
        return self.out(attend(backend, q, k, qkv[:, :, 2]).flatten(2))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its token's angle, in float32.

    Args:
        x: Queries or keys, [batch, tokens, heads, head_dim].
        rotary: Cosines and sines, [tokens, 2, 1, head_dim / 2], float32.

    Returns:
        Shape and dtype of `x`.
    """
    cos, sin = rotary.unbind(1)
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    if _is_eager_cpu(x):
        # One pass instead of five: 0.3 against 3 ms for 2336 tokens of 16 x 64 on two cores.
        turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    a, b = pairs.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def _rms_norm(x: Tensor, factor: Tensor, eps: float = NORM_EPS) -> Tensor:
    """RMS norm over the last axis times `factor`, which fits the last axes of `x`."""
    if _is_eager_cpu(x):
        # Half the passes of F.rms_norm on a CPU: 1.2 against 2.6 ms for 2336 tokens of 16 x 64.
        wide = x.float()
        square: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        return (wide * square.div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(factor).to(x.dtype)
    if factor.dim() == 1:
        return F.rms_norm(x, (x.shape[-1],), factor.to(x.dtype), eps)
    return F.rms_norm(x, (x.shape[-1],), None, eps) * factor


def _is_eager_cpu(x: Tensor) -> bool:
    """Whether operations run one by one on a CPU, where each pass over memory counts.

    Not in training: what is changed in place cannot be differentiated.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not x.requires_grad


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``, w1 and w3 stored as one matrix.

    The inner width is stored rounded up to a multiple of 32, the rest zeros, which adds exact zeros
    to the sums: rows of odd length halve the speed of a matrix product (55 against 34 ms for 1365
    and 1376 columns, 2336 x 512 rows, float32, two cores).
    """

    def __init__(self, config: TransformerConfig, make: _Factory) -> None:
        super().__init__()
        self.ffn_dim = config.ffn_dim
        stored = -(-config.ffn_dim // 32) * 32
        w13, w2 = make.matrix(config.dim, 2 * stored), make.matrix(stored, config.dim)
        if stored != config.ffn_dim:
            w13.zero_()
            w2.zero_()
        self.w13: Matrix = w13
        self.w2: Matrix = w2

    def native_weights(self) -> dict[str, Weight]:
        """Views of w1, w2 and w3 without the padding."""
        both, w2 = self.w13.rows(), self.w2.rows()
        return {
            "w1.weight": both.narrow(0, 0, self.ffn_dim),
            "w2.weight": w2.narrow(1, 0, self.ffn_dim),
            "w3.weight": both.narrow(0, both.shape[0] // 2, self.ffn_dim),
        }

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w13(x).chunk(2, dim=-1)
        # Compiled code in place would write all of w13's result again.
        if torch.compiler.is_compiling() or gate.requires_grad:
            return self.w2(clamp_float16(F.silu(gate) * value))
        # In place: fresh memory for a product this large costs more than filling it.
        return self.w2(clamp_float16(F.silu(gate, inplace=True).mul_(value)))


def clamp_float16(x: Tensor) -> Tensor:
    """Bring float16 overflows back to the largest finite value; other dtypes pass unchanged.

    Z-Image's activations pass 65504 in the feed-forward product and behind the attention.
    """
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    # The last clamp is for compiled code, in which a product is wider until it is stored.
    return torch.nan_to_num(x, nan=0.0, posinf=largest, neginf=-largest).clamp(-largest, largest)


class Block(nn.Module):
    """Attention and feed-forward, each normed before and after, scaled and gated from outside.

    The four factors stand for ``norm.weight * (1 + scale)`` and ``norm.weight * tanh(gate)``: with
    them multiplied beforehand, a norm and its modulation are one operation.
    """

    def __init__(self, config: TransformerConfig, make: _Factory, *, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(config, make)
        self.feed_forward = FeedForward(config, make)
        self.attention_norm1 = _weight(config.dim, like=make)
        self.attention_norm2 = _weight(config.dim, like=make)
        self.ffn_norm1 = _weight(config.dim, like=make)
        self.ffn_norm2 = _weight(config.dim, like=make)
        self.adaLN: Linear | StoredLinear | None = None
        if modulated:
            self.adaLN = Linear(config.time_dim, 4 * config.dim, make)

    def factors(self, time: Tensor | None) -> Tensor:
        """The four norm factors for each timestep vector.

        Args:
            time: Timestep vectors, [sigmas, time_dim]; None for a block without modulation.

        Returns:
            [sigmas or 1, 4, dim] in the weights' dtype.
        """
        weights = torch.stack(
            (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        )
        if self.adaLN is None or time is None:
            return weights.unsqueeze(0)
        scale_attn, gate_attn, scale_ffn, gate_ffn = self.adaLN(time).float().chunk(4, dim=-1)
        modulation = torch.stack(
            (1 + scale_attn, gate_attn.tanh(), 1 + scale_ffn, gate_ffn.tanh()), dim=1
        )
        return (weights.float() * modulation).to(weights.dtype)

    def forward(self, x: Tensor, factors: Tensor, rotary: Tensor, attention: str = SDPA) -> Tensor:
        """One block.

        Args:
            x: Residual stream, [batch, tokens, dim].
            factors: One row of `factors()`, [4, dim].
            rotary: [tokens, 2, 1, head_dim / 2], float32.
            attention: Its backend, see `turbo.attention.attend`.
        """
        scale_attn, gate_attn, scale_ffn, gate_ffn = factors.unbind()
        branch = clamp_float16(self.attention(_rms_norm(x, scale_attn), rotary, attention))
        x = x + _rms_norm(branch, gate_attn)
        branch = clamp_float16(self.feed_forward(_rms_norm(x, scale_ffn)))
        return x + _rms_norm(branch, gate_ffn)


RunBlock = Callable[[Block, Tensor, Tensor, Tensor, str], Tensor]
"""Runs a block on (residual stream, factors, rotary table, attention backend): `run_block` or a
faster stand-in."""


def run_block(
    block: Block, x: Tensor, factors: Tensor, rotary: Tensor, attention: str = SDPA
) -> Tensor:
    """Run a block as it is."""
    return cast(Tensor, block(x, factors, rotary, attention))


class Transformer(nn.Module):
    """The network: latent and sigma's row of factors in, noise minus clean out.

    Args:
        config: Dimensions.
        device: Where the (uninitialised) weights are made; "meta" makes none.
        dtype: Dtype of the weights, and of everything that goes in and comes out.
        compute_dtype: Dtype to calculate in, `dtype` by default; see `arithmetic_dtype`.
        quantize: How the matrices of noise refiners and layers are kept, one of
            `turbo.quantize.QUANTIZATIONS`; None: in `dtype`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        quantize: str | None = None,
    ) -> None:
        super().__init__()
        make = _Factory(device, dtype)
        self.config = config
        self.quantize = quantize
        patch_values = config.channels * PATCH**2
        self.x_embedder = Linear(patch_values, config.dim, make)
        self.x_pad_token = _weight(1, config.dim, like=make)
        self.cap_pad_token = _weight(1, config.dim, like=make)
        self.cap_norm = _weight(config.caption_dim, like=make)
        self.cap_embedder = Linear(config.caption_dim, config.dim, make)
        self.time_in = Linear(TIME_FREQUENCIES, config.time_hidden_dim, make)
        self.time_out = Linear(config.time_hidden_dim, config.time_dim, make)

        def blocks(count: int, make: _Factory, *, modulated: bool) -> nn.ModuleList:
            return nn.ModuleList(Block(config, make, modulated=modulated) for _ in range(count))

        hot = replace(make, quantize=quantize)
        self.context_refiner = blocks(config.context_refiners, make, modulated=False)
        self.noise_refiner = blocks(config.noise_refiners, hot, modulated=True)
        self.layers = blocks(config.layers, hot, modulated=True)
        self.final_adaLN = Linear(config.time_dim, config.dim, make)
        self.final_linear = Linear(config.dim, patch_values, make)
        self.compute_dtype = compute_dtype or self.dtype
        self.attention = AttentionChoice()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of everything that goes in and comes out."""
        return self.x_pad_token.dtype

    def native_tensors(self) -> dict[str, Tensor]:
        """Checkpoint names of ComfyUI's single file -> views into this module's storage.

        Those of 8 bits are among `quantized_rows`, those kept as in a file among `stored_rows`.
        """
        weights = self._native_weights().items()
        return {name: weight for name, weight in weights if isinstance(weight, Tensor)}

    def quantized_rows(self) -> dict[str, QuantizedRows]:
        """As `native_tensors`: the weights that are kept in 8 bits."""
        weights = self._native_weights().items()
        return {name: weight for name, weight in weights if isinstance(weight, QuantizedRows)}

    def stored_rows(self) -> dict[str, StoredRows]:
        """As `native_tensors`: the weights that are kept as their files store them."""
        weights = self._native_weights().items()
        return {name: weight for name, weight in weights if isinstance(weight, StoredRows)}

    def matrices(self) -> Iterator[tuple[nn.Module, str]]:
        """Owner and attribute of each matrix of floats; see `turbo.stored.Keeping`."""
        for owner in self.modules():
            for name, part in owner.named_children():
                if isinstance(part, Linear):
                    yield owner, name

    def _native_weights(self) -> dict[str, Weight]:
        weights: dict[str, Weight] = {
            "x_pad_token": self.x_pad_token,
            "cap_pad_token": self.cap_pad_token,
            "cap_embedder.0.weight": self.cap_norm,
        }
        for name, linear in (
            ("x_embedder", self.x_embedder),
            ("cap_embedder.1", self.cap_embedder),
            ("t_embedder.mlp.0", self.time_in),
            ("t_embedder.mlp.2", self.time_out),
            ("final_layer.adaLN_modulation.1", self.final_adaLN),
            ("final_layer.linear", self.final_linear),
        ):
            weights |= _linear_weights(name, linear)
        for group in ("context_refiner", "noise_refiner", "layers"):
            for index, block in enumerate(getattr(self, group)):
                weights |= _block_weights(f"{group}.{index}", block)
        return {
            name: weight.detach() if isinstance(weight, Tensor) else weight
            for name, weight in weights.items()
        }

    def ignored_keys(self, shapes: Mapping[str, Sequence[int]]) -> set[str]:
        """Names that some complete files hold and no implementation reads."""
        return {"norm_final.weight"} & shapes.keys()

    def refine_caption(
        self, features: Tensor, run: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Embed the text encoder's features, pad them and run the context refiner.

        Args:
            features: [batch, tokens, caption_dim], any float dtype.
            run: `refine_padded`, or a faster stand-in for it.

        Returns:
            [batch, `padded_length(tokens)`, dim] in the network's dtype.
        """
        tokens = features.shape[1]
        padded = F.pad(features, (0, 0, 0, padded_length(tokens) - tokens))
        length = torch.tensor(tokens, device=features.device)
        rotary = self.rotary_table(0, 0, padded.shape[1])
        return (run or self.refine_padded)(padded, length, rotary)

    def refine_padded(
        self, features: Tensor, length: Tensor, rotary: Tensor, *, run: RunBlock = run_block
    ) -> Tensor:
        """`refine_caption` with nothing but static shapes.

        Args:
            features: Padded, [batch, a multiple of 32, caption_dim]; finite values past the end.
            length: Real tokens, a scalar integer, or [batch, 1] integers.
            rotary: ``rotary_table(0, 0, features.shape[1])``.
            run: Runs each block.
        """
        embedded = self.cap_embedder(_rms_norm(features.to(self.compute_dtype), self.cap_norm))
        is_real = torch.arange(features.shape[1], device=features.device) < length
        caption = torch.where(
            is_real.unsqueeze(-1), embedded, self.cap_pad_token.to(embedded.dtype)
        )
        attention = self.attention.of(caption)
        for block in _blocks(self.context_refiner):
            caption = run(block, caption, block.factors(None)[0], rotary, attention)
        return caption.to(self.dtype)

    def rotary_table(self, height: int, width: int, caption_tokens: int) -> Tensor:
        """Cosines and sines for [caption, image] tokens.

        Args:
            height: Latent rows (0 for the caption alone).
            width: Latent columns.
            caption_tokens: Padded caption length.

        Returns:
            [tokens, 2, 1, head_dim / 2], float32, on the network's device. The first
            `caption_tokens` rows are the caption's, the rest the image's, pads included.
        """
        rows, columns = -(-height // PATCH), -(-width // PATCH)
        positions = torch.zeros(caption_tokens + padded_length(rows * columns), 3)
        positions[:caption_tokens, 0] = torch.arange(1, caption_tokens + 1)
        image = positions[caption_tokens : caption_tokens + rows * columns]
        image[:, 0] = caption_tokens + 1
        image[:, 1] = torch.arange(rows).repeat_interleave(columns)
        image[:, 2] = torch.arange(columns).repeat(rows)
        angles = [
            torch.outer(position, ROTARY_THETA ** -(torch.arange(0, m, 2, dtype=torch.float64) / m))
            for position, m in zip(positions.double().unbind(1), self.config.rotary_axes)
        ]
        angle = torch.cat(angles, dim=1).unsqueeze(1)
        return torch.stack((angle.cos(), angle.sin()), dim=1).float().to(self.x_pad_token.device)

    @staticmethod
    def token_counts(height: int, width: int, caption_tokens: Sequence[int]) -> tuple[int, ...]:
        """How many tokens see each other: in a noise refiner, then in a layer for each caption.

        Args:
            height: Latent rows.
            width: Latent columns.
            caption_tokens: Padded caption lengths.
        """
        image = padded_length(-(-height // PATCH) * -(-width // PATCH))
        return image, *(caption + image for caption in caption_tokens)

    def modulation_table(self, sigmas: Sequence[float]) -> Tensor:
        """All the factors that depend on sigma alone, for every network call of a schedule.

        Args:
            sigmas: Noise levels, 1 = pure noise.

        Returns:
            [sigmas, 4 * modulated blocks + 1, dim] in the network's dtype: four rows a block, noise
            refiners before layers, and last the final layer's scale.
        """
        time = self.embed_time(sigmas)
        blocks = [*_blocks(self.noise_refiner), *_blocks(self.layers)]
        final = 1 + self.final_adaLN(F.silu(time))
        table = torch.cat([*(block.factors(time) for block in blocks), final.unsqueeze(1)], dim=1)
        return table.to(self.dtype)

    def embed_time(self, sigmas: Sequence[float]) -> Tensor:
        """Timestep vectors, [sigmas, time_dim], of noise levels: the network is fed 1 - sigma."""
        device = self.x_pad_token.device
        time = TIME_SCALE * (1 - torch.tensor(sigmas, dtype=torch.float32))
        half = TIME_FREQUENCIES // 2
        frequencies = torch.exp(-torch.arange(half) / half * torch.tensor(10000.0).log())
        angle = torch.outer(time, frequencies)
        embedding = torch.cat((angle.cos(), angle.sin()), dim=-1).to(device, self.compute_dtype)
        return self.time_out(F.silu(self.time_in(embedding)))

    def forward(
        self,
        latent: Tensor,
        caption: Tensor,
        modulation: Tensor,
        rotary: Tensor,
        *,
        refine: RunBlock = run_block,
        join: RunBlock = run_block,
    ) -> Tensor:
        """Predict the velocity: denoised = latent - sigma * output.

        Args:
            latent: [batch, channels, height, width], network dtype; odd sides are allowed.
            caption: `refine_caption()`'s result, [batch, caption tokens, dim].
            modulation: One row of `modulation_table()`, [4 * modulated blocks + 1, dim]; where each
                latent of the batch has its own sigma, [4 * modulated blocks + 1, batch, 1, dim].
            rotary: `rotary_table(height, width, caption tokens)`.
            refine: Runs each noise refiner, on the image's tokens.
            join: Runs each layer, on all tokens.

        Returns:
            Shape and dtype of `latent`.
        """
        height, width = latent.shape[-2:]
        patches = patchify(latent).to(self.compute_dtype)
        image = _pad(self.x_embedder(patches), self.x_pad_token)
        factors = iter(modulation[:-1].reshape(-1, 4, *modulation.shape[1:]).unbind())
        image_rotary = rotary[caption.shape[1] :]
        attention = self.attention.of(image)
        for block in _blocks(self.noise_refiner):
            image = refine(block, image, next(factors), image_rotary, attention)
        x = torch.cat((caption.to(image.dtype), image), dim=1)
        attention = self.attention.of(x)
        for block in _blocks(self.layers):
            x = join(block, x, next(factors), rotary, attention)
        x = x[:, caption.shape[1] : caption.shape[1] + patches.shape[1]]
        return -unpatchify(self.finish(x, modulation[-1]), height, width).to(latent.dtype)

    def finish(self, x: Tensor, scale: Tensor) -> Tensor:
        """The final layer: weightless layer norm, scale, projection to patch values."""
        normed = F.layer_norm(x, (x.shape[-1],), None, None, FINAL_NORM_EPS)
        return self.final_linear(normed * scale)


def _blocks(modules: nn.ModuleList) -> Iterator[Block]:
    return cast("Iterator[Block]", iter(modules))


def patchify(latent: Tensor) -> Tensor:
    """Cut a latent into 2 x 2 patches, odd sides wrapped around to even first.

    Returns:
        [batch, patches in row-major order, 4 * channels], values ordered (row, column, channel).
    """
    height, width = latent.shape[-2:]
    if height % PATCH or width % PATCH:
        latent = F.pad(latent, (0, width % PATCH, 0, height % PATCH), mode="circular")
    batch, channels, rows, columns = latent.shape
    grid = latent.reshape(batch, channels, rows // PATCH, PATCH, columns // PATCH, PATCH)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, height: int, width: int) -> Tensor:
    """Undo `patchify` and cut to [batch, channels, height, width]."""
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    grid = patches.reshape(patches.shape[0], rows, columns, PATCH, PATCH, -1)
    latent = grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    return latent[..., :height, :width]


def _pad(tokens: Tensor, pad_token: Tensor) -> Tensor:
    missing = padded_length(tokens.shape[1]) - tokens.shape[1]
    if not missing:
        return tokens
    pads = pad_token.to(tokens.dtype).expand(tokens.shape[0], missing, -1)
    return torch.cat((tokens, pads), dim=1)


def _linear_weights(name: str, linear: Linear | StoredLinear) -> dict[str, Weight]:
    weights: dict[str, Weight] = {f"{name}.weight": linear.rows()}
    if linear.bias is not None:
        weights[f"{name}.bias"] = linear.bias
    return weights


def _block_weights(name: str, block: Block) -> dict[str, Weight]:
    weights: dict[str, Weight] = {
        "attention.qkv.weight": block.attention.qkv.rows(),
        "attention.out.weight": block.attention.out.rows(),
        "attention.q_norm.weight": block.attention.qk_norm[0],
        "attention.k_norm.weight": block.attention.qk_norm[1],
    }
    for key, weight in block.feed_forward.native_weights().items():
        weights[f"feed_forward.{key}"] = weight
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        weights[f"{norm}.weight"] = getattr(block, norm)
    if block.adaLN is not None:
        weights |= _linear_weights("adaLN_modulation.0", block.adaLN)
    return {f"{name}.{key}": weight for key, weight in weights.items()}
