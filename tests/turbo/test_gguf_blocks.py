"""Blocks become floats by PyTorch's operations as by the `gguf` package's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from tests.turbo.gguf_model import random_blocks
from turbo.gguf_blocks import BLOCKS, dequantize_blocks


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_become_the_bits_that_the_package_makes_of_them(kind: str):
    assert BLOCKS[kind] == gguf.GGML_QUANT_SIZES[Kind[kind]]
    blocks = random_blocks(Kind[kind], 50, 3)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, Kind[kind]))
    values = dequantize_blocks(kind, torch.from_numpy(blocks).view(-1, BLOCKS[kind][1]))
    assert values.dtype == torch.float32
    assert torch.equal(values.view(50, -1).view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_any_bytes_become_what_the_package_makes_of_them(kind: str):
    """Damaged scales are infinite or NaN there too."""
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (200, BLOCKS[kind][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(blocks, Kind[kind]))
    values = dequantize_blocks(kind, torch.from_numpy(blocks))
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
