"""``turbo quantize``: a model whose network is kept in 8 bits on disk, ready to be read as it is.

The network becomes one safetensors file under ComfyUI's names: int8 or float8 values with
``weight_scale``, one float32 number a row, beside each; all else in the dtype it had, in bfloat16
what was quantised otherwise. It is written tensor by tensor, so that no more than one of them is
ever in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from turbo.checkpoint import Checkpoint, norm_groups_metadata
from turbo.components import Components, component_dtypes
from turbo.errors import BadInputError, CheckpointError
from turbo.messages import reason
from turbo.model_files import COMFYUI_FOLDERS, DIFFUSERS_FOLDERS, PREFERRED_FILES, ModelFiles
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.quantize import METADATA_KEY, QUANTIZATIONS, VALUE_DTYPES, QuantizedRows
from turbo.tensor_file import Outline, write_streamed
from turbo.whole_file import whole_folder

_SCALE = "_scale"
_COPIED_BYTES = 8 << 20


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
    with whole_folder(out) as folder:
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
        comfyui = {part: names[0] for part, names in COMFYUI_FOLDERS.items()}
        places = DIFFUSERS_FOLDERS if self.is_diffusers else comfyui
        network = folder / places[NETWORK] / self._network_name(kind)
        network.parent.mkdir(parents=True)
        self._stream(NETWORK, network, {METADATA_KEY: kind}, kind, matrices)
        self._copy_config(network.parent)
        for component, path in (
            (TEXT_ENCODER, self.files.text_encoder),
            (AUTOENCODER, self.files.vae),
        ):
            self._keep(component, path, folder / places[component])
        if self.files.tokenizer is not None:
            copy_tokenizer(self.files.tokenizer, folder / "tokenizer")
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
        if path.is_dir() and self.is_diffusers:
            _copy_folder(path, place)
            return
        place.mkdir(parents=True)
        # Of an all-in-one file the other parts are not wanted, and ComfyUI has no folders of files.
        if path == self.files.network or path.is_dir():
            groups = norm_groups_metadata(self.checkpoints[component])
            self._stream(component, place / PREFERRED_FILES[component], groups)
        else:
            _copy_file(path, place / path.name)

    def _stream(
        self,
        component: str,
        path: Path,
        metadata: Mapping[str, str],
        kind: str | None = None,
        matrices: Set[str] = frozenset(),
    ) -> None:
        checkpoint = self.checkpoints[component]
        outline = _outline(checkpoint, kind, matrices)
        names = checkpoint.reading_order(checkpoint.shapes)

        def parts() -> Iterator[tuple[str, Tensor]]:
            for done, name in enumerate(names, start=1):
                yield from _parts(checkpoint, name, outline, kind)
                self.on_progress(component, done, len(names))

        write_streamed(path, outline, parts(), metadata)
        checkpoint.release()


def _outline(checkpoint: Checkpoint, kind: str | None, matrices: Set[str]) -> Outline:
    outline: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in checkpoint.shapes.items():
        if kind is not None and name in matrices:
            outline[name] = (VALUE_DTYPES[kind], shape)
            outline[f"{name}{_SCALE}"] = (torch.float32, (shape[0], 1))
        else:
            outline[name] = (checkpoint.float_dtype(name), shape)
    return outline


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


def copy_tokenizer(path: Path, folder: Path) -> None:
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
