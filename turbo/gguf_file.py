"""GGUF files: the table of contents, checked before anything in it is believed, and the tensors.

The table is read here, not by the `gguf` package: its reader trusts the counts in a file, so that a
damaged one keeps it busy without end, and takes seconds for a tokenizer's vocabulary. What a number
for a quantisation means and what its blocks hold is the package's to say.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from turbo.errors import CheckpointError
from turbo.gguf_blocks import BLOCKS, dequantize_blocks
from turbo.header import Header, TensorEntry, file_stamp, is_possible, one_line, shorten
from turbo.names import NETWORK, TEXT_ENCODER

FORMAT = "gguf"

ARCHITECTURES: Mapping[str, str] = {NETWORK: "lumina2", TEXT_ENCODER: "qwen3"}
"""Component -> what its files call their architecture, if they do (stable-diffusion.cpp does not).

ComfyUI's converter puts Z-Image under the name of Lumina 2, whose blocks it has.
"""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ARCHITECTURE = "general.architecture"
_ALIGNMENT = "general.alignment"
_USUAL_ALIGNMENT = 32
_LARGEST_ALIGNMENT = 1 << 20
_LARGEST_HEADER = 256 << 20
_FIRST_READING = 1 << 16
_MOST_DIMENSIONS = 4
_SMALLEST_SETTING = 13  # bytes: length of the key, type, one byte of value
_SMALLEST_ENTRY = 24  # bytes: length of the name, dimensions, type, offset

# How the format numbers the types of its metadata.
_STRING, _ARRAY = 8, 9
_NUMBERS: Mapping[int, struct.Struct] = {
    kind: struct.Struct(f"<{letter}")
    for kind, letter in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_UINT32, _UINT64 = _NUMBERS[4], _NUMBERS[10]

# Read as they are; everything else becomes float32, by the package where not by `gguf_blocks`.
_PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def is_gguf(path: Path | str) -> bool:
    """Whether a file is a GGUF file, by its first bytes; false for what cannot be read."""
    try:
        if not os.path.isfile(path):  # a pipe would have to be waited for
            return False
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):
        return False


def read_gguf_header(path: Path | str) -> Header:
    """Read and check the table of contents of a GGUF file.

    Shapes come out as PyTorch has them, offsets as positions in the file. `Header.metadata` holds
    the numbers and strings, no arrays.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, one part of several, of another
            architecture, or the `gguf` package is not installed.
    """
    path = Path(path)
    _require_package(path)
    stamp = file_stamp(path)
    try:
        with path.open("rb") as file:
            metadata, tensors = _read_contents(_Cursor(file, stamp[0]))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is a truncated or damaged GGUF file ({one_line(error)}); get it again"
        ) from error
    _refuse_parts(path, metadata)
    _refuse_architectures(path, metadata)
    return Header(path, tensors, metadata, stamp, FORMAT)


def gguf_config(header: Header) -> dict[str, Any]:
    """What a text encoder's metadata says of it, by the keys of transformers' ``config.json``."""
    architecture = ARCHITECTURES[TEXT_ENCODER]
    if header.metadata.get(_ARCHITECTURE) != architecture:
        return {}
    settings = {
        key: header.metadata[f"{architecture}.{name}"]
        for key, name in _CONFIG_KEYS.items()
        if f"{architecture}.{name}" in header.metadata
    }
    if settings.get("rope_type") == "none":
        settings["rope_type"] = "default"
    return settings


_CONFIG_KEYS = {
    "num_hidden_layers": "block_count",
    "rope_theta": "rope.freq_base",
    "rope_type": "rope.scaling.type",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


@lru_cache(maxsize=64)
def is_readable(dtype: str) -> bool:
    """Whether values of a type, by its name in the `gguf` package, can be made into floats."""
    if dtype in _PLAIN_DTYPES or dtype in BLOCKS:
        return True
    _, size = _block_sizes()[dtype]
    try:
        _dequantise(bytes(size), dtype, 1)
    except NotImplementedError:
        return False
    return True


def read_rows(path: Path, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Read rows of a tensor: float32 if it is quantised, else of its own dtype.

    Args:
        path: The file.
        entry: The tensor; a scalar has one row.
        start: First row; of a quantised vector, a multiple of its block.
        stop: Row behind the last.

    Returns:
        [stop - start, ...] on the CPU.

    Raises:
        OSError: The file cannot be read or ends too soon.
    """
    inner = entry.shape[1:]
    data = _read_bytes(path, entry, start, stop)
    if entry.dtype in _PLAIN_DTYPES:
        values = torch.frombuffer(data, dtype=_PLAIN_DTYPES[entry.dtype])
    else:
        values = _dequantise(data, entry.dtype, stop - start if inner else 1)
    return values.reshape(stop - start, *inner)


def read_blocks(path: Path, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Read rows of a quantised matrix as the file holds them.

    Args:
        path: The file.
        entry: The matrix.
        start: First row.
        stop: Row behind the last.

    Returns:
        [stop - start, bytes of a row], uint8, on the CPU.

    Raises:
        OSError: The file cannot be read or ends too soon.
    """
    data = _read_bytes(path, entry, start, stop)
    return torch.frombuffer(data, dtype=torch.uint8).view(stop - start, -1)


def _read_bytes(path: Path, entry: TensorEntry, start: int, stop: int) -> bytearray:
    rows = entry.shape[0] if entry.shape else 1
    total = _tensor_bytes(entry)
    first, last = total * start // rows, total * stop // rows
    data = bytearray(last - first)
    with path.open("rb", buffering=0) as file:
        file.seek(entry.offset + first)
        view, done = memoryview(data), 0
        while done < len(data):
            count = file.readinto(view[done:])
            if not count:
                raise OSError("the file ends within this tensor")
            done += count
    return data


def _dequantise(data: bytes | bytearray, dtype: str, rows: int) -> Tensor:
    if dtype in BLOCKS:
        stored = torch.frombuffer(data, dtype=torch.uint8).view(-1, BLOCKS[dtype][1])
        return dequantize_blocks(dtype, stored).view(rows, -1)
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = np.frombuffer(data, dtype=np.uint8).reshape(rows, -1)
    with np.errstate(all="ignore"):  # a damaged scale may be infinite
        values = dequantize(blocks, GGMLQuantizationType[dtype])
    return torch.from_numpy(values)


def _require_package(path: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{path}: is a GGUF file; to read it, install the gguf package: "
            "pip install 'turbo[gguf]'"
        ) from error


@lru_cache(maxsize=1)
def _block_sizes() -> dict[str, tuple[int, int]]:
    """Type name -> values and bytes of one of its blocks."""
    from gguf.constants import GGML_QUANT_SIZES

    return {kind.name: sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _type_name(number: int) -> str:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        kind = None
    if kind not in GGML_QUANT_SIZES:
        raise ValueError(f"the type {number} is not known to the installed gguf package")
    return str(kind.name)


def _tensor_bytes(entry: TensorEntry) -> int:
    values, size = _block_sizes()[entry.dtype]
    return math.prod(entry.shape) // values * size


class _Cursor:
    """Walks through a file's header; whatever it lacks is a ValueError that names the section."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.section = "header"
        self.position = 0
        self._file, self.size = file, size
        self._bytes = bytearray()

    def number(self, kind: struct.Struct) -> Any:
        """The next number."""
        start = self._advance(kind.size)
        return kind.unpack_from(self._bytes, start)[0]

    def text(self, errors: str = "strict") -> str:
        """The next string."""
        length = self.number(_UINT64)
        start = self._advance(length)
        return self._bytes[start : start + length].decode("utf-8", errors)

    def count(self, smallest: int) -> int:
        """The next count of things, each at least so many bytes large."""
        count: int = self.number(_UINT64)
        if count * smallest > self.size - self.position:
            raise ValueError(f"it claims {count} entries in its {self.section}, more than it holds")
        return count

    def skip_array(self) -> None:
        """Pass over an array's type, length and values."""
        kind = self.number(_UINT32)
        if kind in _NUMBERS:
            self._advance(self.count(_NUMBERS[kind].size) * _NUMBERS[kind].size)
        elif kind == _STRING:
            self._skip_strings(self.count(_UINT64.size))
        else:
            raise ValueError(f"an array of its {self.section} is of the unknown type {kind}")

    def _skip_strings(self, count: int) -> None:
        """A vocabulary has 300 000: hence no call for each."""
        position = self.position
        for _ in range(count):
            if position + _UINT64.size > len(self._bytes):
                self._fill(position + _UINT64.size)
            position += _UINT64.size + _UINT64.unpack_from(self._bytes, position)[0]
        self._fill(position)
        self.position = position

    def _advance(self, count: int) -> int:
        start = self.position
        self._fill(start + count)
        self.position = start + count
        return start

    def _fill(self, end: int) -> None:
        """Have the bytes up to `end` in memory."""
        if end > self.size:
            raise ValueError(f"it ends within its {self.section}")
        if end > _LARGEST_HEADER:
            raise ValueError(f"its {self.section} goes on for more than {_LARGEST_HEADER} bytes")
        while len(self._bytes) < end:
            piece = self._file.read(max(_FIRST_READING, len(self._bytes)))
            if not piece:
                raise ValueError(f"it ends within its {self.section}")
            self._bytes += piece


def _read_contents(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    magic, version = cursor.number(_UINT32), cursor.number(_UINT32)
    if magic != int.from_bytes(_MAGIC, "little"):
        raise ValueError("it does not begin with GGUF")
    if version not in _VERSIONS:
        what = "is big-endian" if version in (v << 24 for v in _VERSIONS) else f"is {version}"
        raise ValueError(f"its version {what}, readable are {_VERSIONS[0]} and {_VERSIONS[1]}")
    tensor_count, setting_count = cursor.count(_SMALLEST_ENTRY), cursor.count(_SMALLEST_SETTING)
    cursor.section = "metadata"
    metadata = _read_metadata(cursor, setting_count)
    cursor.section = "list of tensors"
    tensors = _read_entries(cursor, tensor_count)
    return metadata, _place(cursor, tensors, _alignment(metadata))


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    seen: set[str] = set()
    for _ in range(count):
        key, kind = cursor.text(), cursor.number(_UINT32)
        if key in seen:
            raise ValueError(f"{shorten(key)} comes twice in its metadata")
        seen.add(key)
        if kind == _ARRAY:
            cursor.skip_array()
        elif kind == _STRING:
            metadata[key] = cursor.text("replace")
        elif kind in _NUMBERS:
            metadata[key] = cursor.number(_NUMBERS[kind])
        else:
            raise ValueError(f"{shorten(key)} of its metadata is of the unknown type {kind}")
    return metadata


def _read_entries(cursor: _Cursor, count: int) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for _ in range(count):
        name = cursor.text()
        if name in tensors:
            raise ValueError(f"a tensor comes twice ({shorten(name)})")
        try:
            tensors[name] = _read_entry(cursor)
        except ValueError as error:
            raise ValueError(f"{shorten(name)}: {error}") from error
    return tensors


def _read_entry(cursor: _Cursor) -> TensorEntry:
    dimensions = cursor.number(_UINT32)
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"{dimensions} dimensions, {_MOST_DIMENSIONS} are the most")
    sizes = [cursor.number(_UINT64) for _ in range(dimensions)]
    shape = tuple(reversed(sizes))  # the file has the innermost one first
    dtype, offset = _type_name(cursor.number(_UINT32)), cursor.number(_UINT64)
    if not is_possible(shape):
        raise ValueError(f"the shape {shorten(str(list(shape)))} is impossible")
    block, _ = _block_sizes()[dtype]
    if (shape[-1] if shape else 1) % block:
        raise ValueError(f"rows of {shape[-1:]} values are not made of {dtype} blocks of {block}")
    return TensorEntry(dtype, shape, offset)


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get(_ALIGNMENT, _USUAL_ALIGNMENT)
    is_power = isinstance(alignment, int) and alignment > 0 and not alignment & (alignment - 1)
    if not is_power or alignment > _LARGEST_ALIGNMENT:
        raise ValueError(f"{_ALIGNMENT} is {alignment!r}, must be a power of two")
    return int(alignment)


def _place(
    cursor: _Cursor, tensors: Mapping[str, TensorEntry], alignment: int
) -> dict[str, TensorEntry]:
    """Turn offsets into positions in the file, where each tensor needs a place of its own."""
    base = -(-cursor.position // alignment) * alignment
    placed: dict[str, TensorEntry] = {}
    end, before = base, ""
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
        start = base + entry.offset
        if entry.offset % alignment:
            raise ValueError(f"the offset {entry.offset} of {shorten(name)} is not aligned")
        if start < end:
            raise ValueError(f"{shorten(name)} overlaps {shorten(before)}")
        end, before = start + _tensor_bytes(entry), name
        placed[name] = TensorEntry(entry.dtype, entry.shape, start)
        if end > cursor.size:
            raise ValueError(f"it ends within or before {shorten(name)}")
    return {name: placed[name] for name in tensors}


def _refuse_parts(path: Path, metadata: Mapping[str, Any]) -> None:
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointError(
            f"{path}: is one of {shorten(str(parts))} parts of a GGUF file; join them with "
            "llama-gguf-split --merge"
        )


def _refuse_architectures(path: Path, metadata: Mapping[str, Any]) -> None:
    given = metadata.get(_ARCHITECTURE)
    if given is not None and given not in ARCHITECTURES.values():
        raise CheckpointError(
            f"{path}: is a GGUF file of the architecture {shorten(str(given))}; readable are "
            f"{ARCHITECTURES[NETWORK]} (Z-Image network) and "
            f"{ARCHITECTURES[TEXT_ENCODER]} (Qwen3 text encoder)"
        )
