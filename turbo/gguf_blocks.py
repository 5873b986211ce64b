"""Blocks of the GGUF quantisations made into floats, by PyTorch operations for every device.

Each function takes whole blocks as bytes, [blocks, bytes a block], and gives their values, [blocks,
values a block], in float32: the operations of the `gguf` package in its order, so to the same bits.
Only the quantisations that network and text encoder files usually have are here.

Source: `gguf.quants` of https://github.com/ggml-org/llama.cpp, and ``ggml-quants.c`` there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize_blocks(kind: str, blocks: Tensor) -> Tensor:
    """Make blocks into floats.

    Args:
        kind: A key of `BLOCKS`.
        blocks: [blocks, bytes a block], uint8.

    Returns:
        [blocks, values a block], float32.
    """
    return _BY_KIND[kind](blocks)


def _numbers(blocks: Tensor, start: int, stop: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Bytes as numbers of another type, [blocks, numbers], in float32."""
    return blocks[:, start:stop].contiguous().view(dtype).float()


def _cut(packed: Tensor, size: int) -> Tensor:
    """The bytes of each block in groups, [blocks, groups, size]."""
    return packed.view(len(packed), -1, size)


def _shifted(packed: Tensor, shifts: Sequence[int], mask: int) -> Tensor:
    """Bit fields of bytes: a new axis before the last has one row for each shift.

    Shifts by single numbers: by a tensor of them they take twice the time on a CPU.
    """
    return torch.stack([(packed >> shift) & mask for shift in shifts], dim=-2)


def _nibbles(packed: Tensor) -> Tensor:
    """The low halves of each group of bytes, then the high ones: [blocks, groups, bytes] in."""
    return _shifted(packed, (0, 4), 15).flatten(1)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """Bit 5 of the 32 values of a block, from 4 bytes: 0 or 16."""
    by = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return ((blocks[:, start : start + 4].unsqueeze(-1) >> by) & 1).flatten(1) << 4


def _signed(values: Tensor, offset: int) -> Tensor:
    return (values.to(torch.int8) - offset).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _numbers(blocks, 0, 2) * _signed(_nibbles(blocks[:, None, 2:]), 8)


def _q4_1(blocks: Tensor) -> Tensor:
    scaled = _numbers(blocks, 0, 2) * _nibbles(blocks[:, None, 4:]).float()
    return scaled + _numbers(blocks, 2, 4)


def _q5_0(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, None, 6:]) | _fifth_bits(blocks, 2)
    return _numbers(blocks, 0, 2) * _signed(values, 16)


def _q5_1(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, None, 8:]) | _fifth_bits(blocks, 4)
    return _numbers(blocks, 0, 2) * values.float() + _numbers(blocks, 2, 4)


def _q8_0(blocks: Tensor) -> Tensor:
    return _numbers(blocks, 2, 34, torch.int8) * _numbers(blocks, 0, 2)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    scale = _numbers(blocks, 80, 82) * (scales & 15).float()
    least = _numbers(blocks, 82, 84) * (scales >> 4).float()
    values = _shifted(_cut(blocks[:, 16:80], 32), (0, 2, 4, 6), 3)
    return _by_groups(scale, values, least)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _shifted(blocks[:, 96:104], (0, 4), 15).flatten(1)
    high = _shifted(blocks[:, 104:108], (0, 2, 4, 6), 3).flatten(1)
    scale = _numbers(blocks, 108, 110) * _signed(low | (high << 4), 32)
    two = _shifted(_cut(blocks[:, 32:96], 32), (0, 2, 4, 6), 3).flatten(1)
    third = _shifted(blocks[:, :32], range(8), 1).flatten(1) ^ 1  # set where nothing is taken off
    values = (two.to(torch.int8) - (third << 2).to(torch.int8)).float()
    return _by_groups(scale, values)


def _q4_k(blocks: Tensor) -> Tensor:
    scale, least = _six_bit_scales(blocks)
    return _by_groups(scale, _nibbles(_cut(blocks[:, 16:], 32)), least)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, least = _six_bit_scales(blocks)
    fifth = _shifted(blocks[:, 16:48], range(8), 1).flatten(1)
    values = _nibbles(_cut(blocks[:, 48:], 32)) | (fifth << 4)
    return _by_groups(scale, values, least)


def _q6_k(blocks: Tensor) -> Tensor:
    scale = _numbers(blocks, 208, 210) * _numbers(blocks, 192, 208, torch.int8)
    low = _nibbles(_cut(blocks[:, :128], 64))
    high = _shifted(_cut(blocks[:, 128:192], 32), (0, 2, 4, 6), 3).flatten(1)
    return _by_groups(scale, _signed(low | (high << 4), 32))


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _numbers(blocks, 0, 2) * _iq4_values(_nibbles(blocks[:, None, 2:]))


def _iq4_xs(blocks: Tensor) -> Tensor:
    by = torch.tensor((0, 4), dtype=torch.uint8, device=blocks.device)
    low = ((blocks[:, 4:8].unsqueeze(-1) >> by) & 15).flatten(1)
    by = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=blocks.device)
    high = ((blocks[:, 2:4].unsqueeze(-1) >> by) & 3).flatten(1)
    scale = _numbers(blocks, 0, 2) * _signed(low | (high << 4), 32)
    return _by_groups(scale, _iq4_values(_nibbles(_cut(blocks[:, 8:], 16))))


def _iq4_values(numbers: Tensor) -> Tensor:
    table = torch.tensor(_IQ4_VALUES, dtype=torch.float32, device=numbers.device)
    return table[numbers.int()]


def _six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and least value of each of the eight groups of a Q4_K or Q5_K block."""
    scales, leasts, rest = _cut(blocks[:, 4:16], 4).unbind(1)
    scale = torch.cat((scales & 63, (rest & 15) | ((scales >> 2) & 48)), dim=1)
    least = torch.cat((leasts & 63, (rest >> 4) | ((leasts >> 2) & 48)), dim=1)
    return _numbers(blocks, 0, 2) * scale.float(), _numbers(blocks, 2, 4) * least.float()


def _by_groups(scale: Tensor, values: Tensor, least: Tensor | None = None) -> Tensor:
    """Values times the scale of their group, [blocks, groups], less its least value."""
    groups = values.float().view(*scale.shape, -1)
    scaled = groups * scale.unsqueeze(-1)
    if least is not None:
        scaled -= least.unsqueeze(-1)
    return scaled.flatten(1)


_BY_KIND: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}

BLOCKS: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
"""Quantisation -> values and bytes of a block."""
