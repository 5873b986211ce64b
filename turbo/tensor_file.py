"""Safetensors files written tensor by tensor, so that no more than one is ever in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from turbo.whole_file import write_out

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
}

Outline = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape of a tensor that a file is to hold."""


def write_streamed(
    path: Path,
    outline: Outline,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new file.

    Args:
        path: It must not exist; its folder must.
        outline: All that the file is to hold. Wide values go first, so that all are aligned.
        tensors: Each of them, in any order, on the CPU; of as many values as its shape has.
        metadata: Beside the format's own.

    Raises:
        OSError: It cannot be written; what was written of it stays.
        ValueError: `tensors` are not those of `outline`, or of a type that no file holds.
    """
    arranged = dict(sorted(outline.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
    with path.open("xb") as file:
        offsets = _write_header(file, arranged, metadata or {})
        missing = set(outline)
        for name, tensor in tensors:
            dtype, shape = outline.get(name, (None, ()))
            if (tensor.dtype, tensor.numel()) != (dtype, math.prod(shape)):
                raise ValueError(
                    f"{path}: {name} is {tensor.dtype} of {list(tensor.shape)}, and what was "
                    f"announced is {dtype} of {list(shape)}"
                )
            file.seek(offsets[name])
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            missing.discard(name)
        if missing:
            raise ValueError(f"{path}: {len(missing)} tensors never came, such as {min(missing)}")
        write_out(file)


def _write_header(file: BinaryIO, outline: Outline, metadata: Mapping[str, str]) -> dict[str, int]:
    """Write the table of contents; returns where in the file each tensor goes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    begin, places = 0, {}
    for name, (dtype, shape) in outline.items():
        if dtype not in _CODES:
            raise ValueError(f"{name}: no file holds {dtype}")
        end = begin + math.prod(shape) * dtype.itemsize
        table[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        places[name], begin = begin, end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    start = file.tell()
    return {name: start + place for name, place in places.items()}
