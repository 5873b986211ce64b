"""``turbo quantize``: a model whose network is kept in 8 bits on disk, ready to be read as it is.

The network becomes one safetensors file under ComfyUI's names: int8 or float8 values with
``weight_scale``, one float32 number a row, beside each; all else in the dtype it had, in bfloat16
what was quantised otherwise. It is written tensor by tensor, so that no more than one of them is
ever in memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

import torch
from torch import Tensor

from turbo.checkpoint import Checkpoint
from turbo.components import Components, component_dtypes
from turbo.errors import BadInputError, CheckpointError
from turbo.messages import reason
from turbo.model_files import PREFERRED_FILES, ModelFiles
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.quantize import METADATA_KEY, QUANTIZATIONS, VALUE_DTYPES, QuantizedRows
from turbo.whole_file import cannot_save

_FOLDERS = {NETWORK: "diffusion_models", TEXT_ENCODER: "text_encoders", AUTOENCODER: "vae"}
_DIFFUSERS = {NETWORK: "transformer", TEXT_ENCODER: "text_encoder", AUTOENCODER: "vae"}
_SCALE = "_scale"
_COPIED_BYTES = 8 << 20
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
}

Outline = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape of a tensor that a file is to hold, in the order of the file."""


def write_quantized(
    files: ModelFiles,
    out: Path,
    kind: str,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write a model with its network in 8 bits, in the layout that `files` have.

    Args:
        files: The model.
        out: Folder to make; it appears whole or not at all.
        kind: One of `turbo.quantize.QUANTIZATIONS`.
        on_progress: Called with (component, tensors written, tensors in all).

    Returns:
        `out`, for ``Engine.from_pretrained``, which keeps the network as it is there.

    Raises:
        BadInputError: `kind` is none of these, `out` exists, or the network is in 8 bits already.
        CheckpointError: The model is damaged or incomplete.
        SaveError: The folder cannot be written, or the disk is full.
    """
    if kind not in QUANTIZATIONS:
        raise BadInputError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {kind!r}")
    if os.path.lexists(out):
        raise BadInputError(f"{str(out)!r} exists; give the name of a new folder")
    checkpoints = files.open()
    stored = checkpoints[NETWORK].quantization
    if stored is not None:
        raise BadInputError(
            f"{files.network}: the network is in 8 bits already ({stored}); give the original"
        )
    outline = Components.outline(checkpoints, component_dtypes(torch.bfloat16), kind)
    matrices = set(outline.network.quantized_rows())
    writer = _Writer(files, checkpoints, on_progress or (lambda *_: None))
    with _whole_folder(out) as folder:
        writer.write(folder, kind, matrices)
    return out


class _Writer:
    """Writes the parts of one model."""

    def __init__(
        self,
        files: ModelFiles,
        checkpoints: Mapping[str, Checkpoint],
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self.files = files
        self.checkpoints = checkpoints
        self.on_progress = on_progress
        self.is_diffusers = files.layout == "diffusers"

    def write(self, folder: Path, kind: str, matrices: set[str]) -> None:
        places = _DIFFUSERS if self.is_diffusers else _FOLDERS
        network = folder / places[NETWORK] / self._network_name(kind)
        network.parent.mkdir(parents=True)
        self._stream(NETWORK, network, kind, matrices)
        self._copy_config(network.parent)
        for component, path in (
            (TEXT_ENCODER, self.files.text_encoder),
            (AUTOENCODER, self.files.vae),
        ):
            self._keep(component, path, folder / places[component])
        if self.files.tokenizer is not None:
            _copy(self.files.tokenizer, folder / "tokenizer")
        index = self.files.network.parent / "model_index.json"
        if self.is_diffusers and index.is_file():
            _copy_file(index, folder / index.name)

    def _network_name(self, kind: str) -> str:
        if self.is_diffusers:
            return "diffusion_pytorch_model.safetensors"
        return f"{self.files.network.stem}_{kind}.safetensors"

    def _copy_config(self, folder: Path) -> None:
        config = self.files.network / "config.json"
        if config.is_file():
            _copy_file(config, folder / config.name)

    def _keep(self, component: str, path: Path, place: Path) -> None:
        """Put a component that stays as it is at its place."""
        if path.is_dir():
            _copy_folder(path, place)
            return
        place.mkdir(parents=True)
        if path == self.files.network:  # an all-in-one file, whose other parts are not wanted
            self._stream(component, place / PREFERRED_FILES[component], None, set())
        else:
            _copy_file(path, place / path.name)

    def _stream(self, component: str, path: Path, kind: str | None, matrices: set[str]) -> None:
        checkpoint = self.checkpoints[component]
        outline = _outline(checkpoint, kind, matrices)
        names = checkpoint.reading_order(checkpoint.shapes)
        with path.open("xb") as file:
            offsets = _write_header(file, outline, {} if kind is None else {METADATA_KEY: kind})
            for done, name in enumerate(names, start=1):
                for part, tensor in _parts(checkpoint, name, outline, kind):
                    file.seek(offsets[part])
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                self.on_progress(component, done, len(names))
            file.flush()
            os.fsync(file.fileno())
        checkpoint.release()


def _outline(checkpoint: Checkpoint, kind: str | None, matrices: set[str]) -> Outline:
    """What a file is to hold; wide values first, so that all are aligned."""
    outline: Outline = {}
    for name, shape in checkpoint.shapes.items():
        if kind is not None and name in matrices:
            outline[name] = (VALUE_DTYPES[kind], shape)
            outline[f"{name}{_SCALE}"] = (torch.float32, (shape[0], 1))
        else:
            outline[name] = (checkpoint.float_dtype(name), shape)
    return dict(sorted(outline.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def _parts(
    checkpoint: Checkpoint, name: str, outline: Outline, kind: str | None
) -> Iterator[tuple[str, Tensor]]:
    dtype, shape = outline[name]
    scale = f"{name}{_SCALE}"
    if kind is None or scale not in outline:
        tensor = torch.empty(shape, dtype=dtype)
        checkpoint.copy_into(name, tensor)
        yield name, tensor
        return
    rows = QuantizedRows(kind, torch.empty(shape, dtype=dtype), torch.empty(shape[0], 1))
    checkpoint.quantize_into(name, rows)
    yield name, rows.values
    yield scale, rows.scales


def _write_header(file: BinaryIO, outline: Outline, metadata: dict[str, str]) -> dict[str, int]:
    """Write a safetensors table of contents; returns where in the file each tensor goes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    begin, places = 0, {}
    for name, (dtype, shape) in outline.items():
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


def _copy(path: Path, folder: Path) -> None:
    """Copy a tokenizer: a folder, or one file and what belongs to it."""
    folder.mkdir(parents=True)
    wanted = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
    found = [path / name for name in wanted if (path / name).is_file()] or [path]
    for file in found:
        _copy_file(file, folder / file.name)


def _copy_folder(source: Path, target: Path) -> None:
    with _reading(source):
        inside = sorted(source.iterdir())
    target.mkdir(parents=True)
    for path in inside:
        copy = _copy_folder if path.is_dir() else _copy_file
        copy(path, target / path.name)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file; an error of its own tells which of the two failed."""
    with _reading(source):
        given = source.open("rb", buffering=0)
    with given, target.open("xb", buffering=0) as made:
        while True:
            with _reading(source):
                run = given.read(_COPIED_BYTES)
            if not run:
                return
            left = memoryview(run)
            while left:
                left = left[made.write(left) :]


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Blame what is read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{source}: cannot be read: {reason(error)}; nothing was written"
        ) from error


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder under another name until the block has ended well."""
    temporary = out.parent / f".turbo-{token_hex(8)}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        os.rename(temporary, out)
    except OSError as error:
        raise cannot_save(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
