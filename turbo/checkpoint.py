"""Model files, read tensor by tensor under native names whatever their layout is.

Safetensors files are memory-mapped. A touched page of a mapping counts as resident memory while the
mapping lives, so a file is mapped anew after every `_MAPPED_BYTES` that were read, and large
tensors are read in runs of rows: the peak is the weights' own size plus about that much. What is
quantised in a file is made into floats run by run on the way, in float32, or copied as it is.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from turbo import gguf_file
from turbo.errors import CheckpointError
from turbo.gguf_blocks import BLOCKS
from turbo.header import (
    Header,
    TensorEntry,
    check_stamp,
    file_stamp,
    one_line,
    read_header,
    shorten,
    some_names,
)
from turbo.names import (
    AUTOENCODER,
    COMPONENT_WORDS,
    NETWORK,
    TEXT_ENCODER,
    Place,
    find_prefix,
    is_pad_token,
    is_plain_matrix,
    native_places,
    select_names,
)
from turbo.quantize import METADATA_KEY, QUANTIZATIONS, QuantizedRows
from turbo.scales import find_scales
from turbo.stopping import Stop
from turbo.stored import EIGHT_BITS, PLAIN, StoredPart, StoredRows

_MAPPED_BYTES = 16 << 20
_CHUNK_BYTES = 8 << 20
_DECODED_BYTES = 2 << 20
"""As float32, of what is made into floats on the way: as much as caches hold takes a third of the
time (44 million values of Q8_0: 0.16 against 0.51 s on one AMD EPYC core)."""
_LARGEST_JSON = 64 << 20

_READABLE_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
NORM_GROUPS_KEY = "norm_num_groups"
COMFYUI_NORM_GROUPS = 32
"""Groups of an autoencoder's norms where nothing says how many."""
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")
"""In the metadata of an autoencoder's safetensors file: groups of its norms, if not 32."""
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_INTEGERS = {"I8": 1}
"""Read where there is a scale."""
_STORED_AS = {"fp8": "F8_E4M3", "int8": "I8", "int8-weight-only": "I8"}
"""Quantisation -> dtype in files whose values it takes as they are."""
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Source:
    """The file tensor that fills one run of rows of a native tensor."""

    file: int
    key: str
    entry: TensorEntry
    scale: _Source | None = None
    """What the values are to be multiplied with: one number, or one for each row."""


class WeightHolder(Protocol):
    """A module that `load_weights` can fill."""

    def native_tensors(self) -> Mapping[str, Tensor]:
        """Views into the module's storage by native name."""

    def ignored_keys(self, shapes: Mapping[str, Sequence[int]]) -> set[str]:
        """Native names that a complete file holds and the module never reads."""


@runtime_checkable
class QuantizedHolder(WeightHolder, Protocol):
    """A module some of whose weights may be quantised."""

    def quantized_rows(self) -> Mapping[str, QuantizedRows]:
        """Views into the module's storage by native name; none of these is a native tensor."""


@runtime_checkable
class StoredHolder(WeightHolder, Protocol):
    """A module some of whose weights may be kept as their files store them."""

    def stored_rows(self) -> Mapping[str, StoredRows]:
        """Views into the module's storage by native name; none of these is a native tensor."""


Weight = Tensor | QuantizedRows | StoredRows
"""Where a module has a weight: views into its storage."""


class Checkpoint:
    """One component's tensors under native names, whatever file layout they come from.

    Stays readable as long as the files do not change, so that weights can be restored bit for bit
    after a LoRA was fused into them.
    """

    component: str
    """``network``, ``text_encoder`` or ``autoencoder``."""
    files: tuple[Path, ...]
    """The files that are read."""
    config: dict[str, Any]
    """``config.json`` of a diffusers folder, or as much as a GGUF text encoder says, else empty."""
    shapes: dict[str, tuple[int, ...]]
    """Native name -> shape of everything the files hold for this component."""
    quantization: str | None
    """As what `turbo quantize` wrote the files, one of `QUANTIZATIONS`; None: it did not."""

    def __init__(
        self,
        component: str,
        headers: Sequence[Header],
        *,
        prefix: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Arrange the tensors of `headers` under native names; nothing else is read yet.

        Raises:
            CheckpointError: A tensor is there twice, cannot be read, or lacks a part or its scale.
        """
        self.component = component
        self.files = tuple(header.path for header in headers)
        self.config = dict(config or {})
        self._stamps = tuple(header.stamp for header in headers)
        self._formats = tuple(header.format for header in headers)
        self._sources = _collect_sources(component, headers, prefix)
        self.shapes = {
            name: self._native_shape(name, sources) for name, sources in self._sources.items()
        }
        self.quantization = _quantization_of(headers[0]) if component == NETWORK else None
        self._reader: _Reader | None = None
        self.stop: Stop | None = None
        """Ends what reads here when another thread asks, within a run of rows; None: nothing."""

    def copy_into(self, name: str, out: Tensor) -> None:
        """Copy one tensor into `out`, cast once from the file's dtype to that of `out`.

        Quantised values are made into float32 first, and that is cast.

        Args:
            name: Native name, a key of `shapes`.
            out: Tensor of that shape, any floating dtype, any device; written in place.

        Raises:
            CheckpointError: The file holds no such tensor, or has changed or become unreadable.
        """
        self._require_shape(name, out.shape)
        row = 0
        for source in self._sources[name]:
            rows = source.entry.shape[0] if source.entry.shape else 0
            target = out.narrow(0, row, rows) if source.entry.shape else out
            self._copy_source(source, target)
            row += rows

    def quantize_into(self, name: str, out: QuantizedRows) -> None:
        """Copy one matrix into 8 bits: as it stands where the file has it so, else quantised.

        Args:
            name: Native name, a key of `shapes`.
            out: Of that shape; written in place.

        Raises:
            CheckpointError: The file holds no such tensor, or has changed or become unreadable.
        """
        self._require_shape(name, out.shape)
        row = 0
        for source in self._sources[name]:
            rows = source.entry.shape[0]
            self._quantize_source(source, out.narrow(0, row, rows))
            row += rows

    def stored(self, name: str) -> tuple[StoredPart, ...] | None:
        """How the files hold a matrix that `store_into` can copy as it stands there.

        Args:
            name: Native name, a key of `shapes`.

        Returns:
            A part for each of the file's tensors, in row order; None for what is no matrix, is in
            floats already, or in a quantisation that is made into floats at loading alone.
        """
        sources = self._sources[name]
        if any(len(source.entry.shape) != 2 for source in sources):
            return None
        parts = tuple(_stored_part(source) for source in sources)
        return parts if any(part.kind != PLAIN for part in parts) else None

    def store_into(self, name: str, out: StoredRows) -> None:
        """Copy one matrix as the files hold it.

        Args:
            name: Native name, for which `stored` gives parts.
            out: Made for these parts; written in place.

        Raises:
            CheckpointError: The file holds no such tensor, or has changed or become unreadable.
        """
        self._require_shape(name, out.shape)
        for source, piece in zip(self._sources[name], out.pieces, strict=True):
            if piece.part.kind == PLAIN:
                self._copy_source(source, piece.values)
            else:
                self._store_source(source, piece.values, piece.scales)

    def _require_shape(self, name: str, shape: Sequence[int]) -> None:
        if name not in self.shapes:
            raise CheckpointError(f"{self.label} holds no tensor {name}")
        if tuple(shape) != self.shapes[name]:
            raise ValueError(f"{name} has shape {self.shapes[name]}, got {tuple(shape)}")

    def float_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the files; bfloat16 for what is quantised there."""
        sources = self._sources[name]
        dtypes = {_FLOATS.get(source.entry.dtype) for source in sources if source.scale is None}
        found = dtypes.pop() if len(dtypes) == 1 else None
        return torch.bfloat16 if found is None else found

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file's size or time of change is not as at opening."""
        for path, stamp in zip(self.files, self._stamps, strict=True):
            check_stamp(path, stamp)

    def release(self) -> None:
        """Drop the current mapping and the memory it holds; the next read makes a new one."""
        self._reader = None

    def reading_order(self, names: Iterable[str]) -> list[str]:
        """Sort native names by their place on disk, so that files are read from front to back."""

        def place(name: str) -> tuple[int, int]:
            first = self._sources[name][0]
            return first.file, first.entry.offset

        return sorted(names, key=place)

    @property
    def label(self) -> str:
        """The file, or the folder of several, for messages."""
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    def _native_shape(self, name: str, sources: Sequence[_Source]) -> tuple[int, ...]:
        shapes = [source.entry.shape for source in sources]
        if self.component == AUTOENCODER and is_plain_matrix(name) and len(shapes[0]) == 2:
            return (*shapes[0], 1, 1)
        if len(shapes) == 1:
            return shapes[0]
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            given = ", ".join(f"{source.key} {list(source.entry.shape)}" for source in sources)
            raise CheckpointError(f"{self.label}: the parts of {name} do not fit: {given}")
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @torch.no_grad()
    def _copy_source(self, source: _Source, target: Tensor) -> None:
        scale = None if source.scale is None else self._read_scale(source.scale)
        for start, stop in _row_chunks(source):
            run = target.narrow(0, start, stop - start) if source.entry.shape else target
            self._copy_rows(source, scale, start, stop, run)

    def _copy_rows(
        self, source: _Source, scale: Tensor | None, start: int, stop: int, run: Tensor
    ) -> None:
        values = self._read(source, start, stop)
        if scale is not None:
            factor = scale if len(scale) == 1 else scale[start:stop]
            values = values.float().reshape(stop - start, -1) * factor
        run.copy_(values.reshape(run.shape))

    @torch.no_grad()
    def _quantize_source(self, source: _Source, target: QuantizedRows) -> None:
        scale = None if source.scale is None else self._read_scale(source.scale)
        is_stored = source.entry.dtype == _STORED_AS[target.kind]
        if is_stored:
            factor = torch.ones(1, 1) if scale is None else scale
            target.scales.copy_(factor.expand(target.scales.shape))
        for start, stop in _row_chunks(source):
            run = target.narrow(0, start, stop - start)
            if is_stored:
                run.values.copy_(self._read(source, start, stop).reshape(run.shape))
            else:
                wide = torch.empty(run.shape)
                self._copy_rows(source, scale, start, stop, wide)
                run.quantize(wide)

    @torch.no_grad()
    def _store_source(self, source: _Source, values: Tensor, scales: Tensor | None) -> None:
        if scales is not None:
            scale = torch.ones(1, 1) if source.scale is None else self._read_scale(source.scale)
            scales.copy_(scale)
        for start, stop in _row_chunks(source):
            rows = self._read(source, start, stop, as_stored=True)
            values[start:stop].copy_(rows)

    def _read_scale(self, source: _Source) -> Tensor:
        """A weight's scale as a float32 column, of one row or as many as the weight has."""
        scale = self._read(source, 0, source.entry.shape[0] if source.entry.shape else 1)
        scale = scale.float().reshape(-1, 1).clone()
        if not scale.isfinite().all():
            path = self.files[source.file]
            raise CheckpointError(
                f"{path}: {shorten(source.key)} holds NaN or infinity; the file is damaged, get it "
                "again"
            )
        return scale

    def _read(self, source: _Source, start: int, stop: int, *, as_stored: bool = False) -> Tensor:
        """Read rows of a file tensor, dequantised unless as stored, but not scaled."""
        if self.stop is not None:
            self.stop.check()
        try:
            reader = self._reader_for(source.file)
            return (reader.read_stored if as_stored else reader.read)(source, start, stop)
        except (SafetensorError, OSError) as error:
            path = self.files[source.file]
            raise CheckpointError(
                f"{path}: cannot read {shorten(source.key)}: {one_line(error)}"
            ) from error

    def _reader_for(self, file: int) -> _Reader:
        reader = self._reader
        if reader is None or reader.file != file or reader.touched >= _MAPPED_BYTES:
            self._reader = None  # the old mapping goes before the new one comes
            check_stamp(self.files[file], self._stamps[file])
            reader = self._reader = _READERS[self._formats[file]](file, self.files[file])
        return reader


class _Reader(Protocol):
    """Reads one file for a while."""

    file: int
    """Its number."""
    touched: int
    """How many bytes were read."""

    def read(self, source: _Source, start: int, stop: int) -> Tensor:
        """Rows start..stop of a file tensor."""

    def read_stored(self, source: _Source, start: int, stop: int) -> Tensor:
        """The same as the file holds them: in 8 bits, or as bytes of blocks."""


class _SafetensorsReader:
    """One mapping of one file, and how much of it was touched."""

    def __init__(self, file: int, path: Path) -> None:
        self.file = file
        self.touched = 0
        self._handle: Any = safe_open(str(path), framework="pt", device="cpu")

    def read(self, source: _Source, start: int, stop: int) -> Tensor:
        if source.entry.shape:
            values: Tensor = self._handle.get_slice(source.key)[start:stop]
        else:
            values = self._handle.get_tensor(source.key)
        self.touched += values.numel() * values.element_size()
        return values

    read_stored = read


class _GgufReader:
    """One file that is opened for each run of rows, so that nothing stays open or mapped."""

    def __init__(self, file: int, path: Path) -> None:
        self.file = file
        self.touched = 0
        self._path = path

    def read(self, source: _Source, start: int, stop: int) -> Tensor:
        values = gguf_file.read_rows(self._path, source.entry, start, stop)
        self.touched += values.numel() * values.element_size()
        return values if source.entry.shape else values[0]

    def read_stored(self, source: _Source, start: int, stop: int) -> Tensor:
        blocks = gguf_file.read_blocks(self._path, source.entry, start, stop)
        self.touched += blocks.numel()
        return blocks


_READERS: Mapping[str, Callable[[int, Path], _Reader]] = {
    "safetensors": _SafetensorsReader,
    gguf_file.FORMAT: _GgufReader,
}


def open_header(path: Path | str) -> Header:
    """Read the table of contents of a model file, of the format that its content shows.

    Raises:
        CheckpointError: It is missing, damaged or of another format.
    """
    return gguf_file.read_gguf_header(path) if gguf_file.is_gguf(path) else read_header(path)


def open_file(component: str, *paths: Path | str) -> Checkpoint:
    """Open a component of a single file (or of several that belong together).

    Args:
        component: One of `turbo.names.COMPONENTS`.
        paths: Safetensors or GGUF files; the prefix of the names is found out, so that an
            all-in-one checkpoint serves for each of its components.

    Raises:
        CheckpointError: A file is missing, damaged, of another format or of another model.
    """
    for path in paths:
        _require_no_lone_shard(Path(path), len(paths))
    headers = [open_header(path) for path in paths]
    config = gguf_file.gguf_config(headers[0]) if component == TEXT_ENCODER else {}
    groups = headers[0].metadata.get(NORM_GROUPS_KEY)
    if component == AUTOENCODER and groups is not None:
        text = str(groups)
        config[NORM_GROUPS_KEY] = int(text) if text.isdecimal() and len(text) < 9 else text
    checkpoint = _arrange(component, headers, ", ".join(str(path) for path in paths), config)
    _check_config(checkpoint, headers[0].path)
    return checkpoint


def norm_groups(autoencoder: Checkpoint) -> int:
    """Groups of an autoencoder's norms."""
    return int(autoencoder.config.get(NORM_GROUPS_KEY, COMFYUI_NORM_GROUPS))


def norm_groups_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What a component's single file has to say in its metadata, which has no other place."""
    groups = norm_groups(checkpoint) if checkpoint.component == AUTOENCODER else COMFYUI_NORM_GROUPS
    return {} if groups == COMFYUI_NORM_GROUPS else {NORM_GROUPS_KEY: str(groups)}


def _require_no_lone_shard(path: Path, given: int) -> None:
    """Refuse one of several files: what it holds may look like a whole smaller model."""
    found = _SHARD.search(path.name)
    if found is not None and int(found[1]) > given:
        raise CheckpointError(
            f"{path}: is one of {int(found[1])} files of a component; give the folder that holds "
            "them all, with its config.json"
        )


def open_folder(component: str, folder: Path | str) -> Checkpoint:
    """Open a component folder of the diffusers layout, sharded or not, or with one GGUF file.

    Raises:
        CheckpointError: A file is missing, damaged or of another model, or ``config.json``
            contradicts what the component is built for.
    """
    folder = Path(folder)
    try:
        headers = _folder_headers(folder)
        config_file = folder / "config.json"
        config = gguf_file.gguf_config(headers[0]) if component == TEXT_ENCODER else {}
        if config_file.exists():
            config |= _read_json(config_file)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {one_line(error)}") from error
    checkpoint = _arrange(component, headers, str(folder), config)
    _check_config(checkpoint, config_file)
    return checkpoint


def _arrange(
    component: str, headers: Sequence[Header], label: str, config: Mapping[str, Any]
) -> Checkpoint:
    names = [name for header in headers for name in header.tensors]
    prefix = find_prefix(component, names)
    if prefix is None:
        raise CheckpointError(
            f"{label}: holds no {COMPONENT_WORDS[component]} "
            f"(its first tensors: {some_names(sorted(names))})"
        )
    return Checkpoint(component, headers, prefix=prefix, config=config)


def open_checkpoint(component: str, path: Path | str) -> Checkpoint:
    """Open a component from a single file or from a diffusers component folder."""
    return (open_folder if os.path.isdir(path) else open_file)(component, path)


def load_weights(
    module: WeightHolder,
    checkpoint: Checkpoint,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill `module` from `checkpoint`, tensor by tensor, straight to its device and dtype.

    Args:
        module: Its tensors may be uninitialised; nothing is written if the names do not fit.
        checkpoint: The files of the same component.
        on_progress: Called with (tensors read, tensors in all) after each tensor.

    Raises:
        CheckpointError: Tensors are missing, left over or of another shape; names the first few.
    """
    check_fit(module, checkpoint)
    checkpoint.check_unchanged()
    weights = native_weights(module)
    for done, name in enumerate(checkpoint.reading_order(weights), start=1):
        load_weight(checkpoint, name, weights[name])
        if on_progress is not None:
            on_progress(done, len(weights))
    checkpoint.release()


def native_weights(module: WeightHolder) -> dict[str, Weight]:
    """All of a module's weights by native name, those that are no floats among them."""
    quantized = module.quantized_rows() if isinstance(module, QuantizedHolder) else {}
    stored = module.stored_rows() if isinstance(module, StoredHolder) else {}
    return {**module.native_tensors(), **quantized, **stored}


def load_weight(checkpoint: Checkpoint, name: str, out: Weight) -> None:
    """Copy one weight into a module's storage, as floats, in 8 bits or as it is in the file.

    See `Checkpoint.copy_into`, `quantize_into` and `store_into`.
    """
    if isinstance(out, StoredRows):
        checkpoint.store_into(name, out)
    elif isinstance(out, QuantizedRows):
        checkpoint.quantize_into(name, out)
    else:
        checkpoint.copy_into(name, out)


def check_fit(module: WeightHolder, checkpoint: Checkpoint) -> None:
    """Compare names and shapes without reading a value; `module` may be on the meta device.

    Raises:
        CheckpointError: Tensors are missing, left over or of another shape; names the first few.
    """
    wanted = {name: tuple(weight.shape) for name, weight in native_weights(module).items()}
    misfit = describe_misfit(wanted, checkpoint.shapes, module.ignored_keys(checkpoint.shapes))
    if misfit:
        word = COMPONENT_WORDS[checkpoint.component]
        raise CheckpointError(f"{checkpoint.label}: does not fit the {word}: {misfit}")


def describe_misfit(
    wanted: Mapping[str, Sequence[int]],
    shapes: Mapping[str, Sequence[int]],
    ignored: Iterable[str] = (),
) -> str:
    """Say how files differ from what a module needs; empty if they fit.

    Args:
        wanted: Native name -> shape of every tensor that must be filled.
        shapes: Native name -> shape of every tensor that is there.
        ignored: Names that may be there without being wanted.
    """
    missing = sorted(set(wanted) - set(shapes))
    left_over = sorted(set(shapes) - set(wanted) - set(ignored))
    misshapen = [
        f"{name} is {list(shapes[name])} instead of {list(wanted[name])}"
        for name in sorted(set(wanted) & set(shapes))
        if tuple(wanted[name]) != tuple(shapes[name])
    ]
    groups = (("missing", missing), ("left over", left_over), ("of the wrong shape", misshapen))
    return "; ".join(
        f"{len(names)} {what} ({some_names(names)})" for what, names in groups if names
    )


def _collect_sources(
    component: str, headers: Sequence[Header], prefix: str
) -> dict[str, list[_Source]]:
    """Group the file tensors of a component by native name, parts in row order."""
    files = _index_names(headers)
    inner = select_names(files, prefix)
    _refuse_gaps(headers[0].path, inner.values())
    scaling = find_scales(headers, files, inner, prefix)

    def source(key: str) -> _Source:
        scale = scaling.scales.get(key)
        entry = _readable(headers[files[key]], key)
        return _Source(files[key], key, entry, None if scale is None else source(scale))

    places = native_places(component, scaling.weights.values())
    parts: dict[Place, _Source] = {}
    for key, name in scaling.weights.items():
        if places[name] in parts:
            other = shorten(parts[places[name]].key)
            raise CheckpointError(
                f"{headers[files[key]].path}: {shorten(key)} and {other} are the same tensor under "
                "two names"
            )
        parts[places[name]] = source(key)
    grouped: dict[str, list[Place]] = {}
    for place in sorted(parts, key=lambda place: place.part):
        grouped.setdefault(place.name, []).append(place)
    for together in grouped.values():
        _check_parts(headers[0].path, together, parts)
    return {name: [parts[place] for place in together] for name, together in grouped.items()}


def _index_names(headers: Sequence[Header]) -> dict[str, int]:
    """File tensor name -> number of the file that holds it."""
    files: dict[str, int] = {}
    for index, header in enumerate(headers):
        for name in header.tensors:
            if name in files:
                other = headers[files[name]].path.name
                raise CheckpointError(f"{header.path}: {shorten(name)} is also in {other}")
            files[name] = index
    return files


def _check_parts(path: Path, together: Sequence[Place], parts: Mapping[Place, _Source]) -> None:
    """A fused tensor is whole when each of its parts is there once and it is not there itself."""
    there = some_names([parts[place].key for place in together])
    name = shorten(together[0].name)
    if len({place.parts for place in together}) > 1:
        raise CheckpointError(f"{path}: {name} is there both whole and in parts ({there})")
    if len(together) != together[0].parts:
        raise CheckpointError(
            f"{path}: {name} is made of {together[0].parts} tensors, only {there} is there"
        )


def _refuse_gaps(path: Path, names: Iterable[str]) -> None:
    """Stop a damaged name such as ``layers.99999999.`` before somebody builds that many layers."""
    listed = list(names)
    for name in listed:
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        if any(len(number) > 9 or int(number) >= len(listed) for number in numbers):
            raise CheckpointError(
                f"{path}: {shorten(name)} has a number beyond all that a file of {len(listed)} "
                f"tensors can have"
            )


def _quantization_of(header: Header) -> str | None:
    kind = header.metadata.get(METADATA_KEY)
    if kind is not None and kind not in QUANTIZATIONS:
        raise CheckpointError(
            f"{header.path}: was quantised as {shorten(repr(kind))}, known are "
            f"{', '.join(QUANTIZATIONS)}; it is of a newer version"
        )
    return kind


def _readable(header: Header, key: str) -> TensorEntry:
    entry = header.tensors[key]
    if header.format == gguf_file.FORMAT:
        is_readable, allowed = gguf_file.is_readable(entry.dtype), "floats and their quantisations"
    else:  # integers without a scale were refused with the scales
        readable = {**_READABLE_DTYPES, **_INTEGERS}
        is_readable, allowed = entry.dtype in readable, ", ".join(_READABLE_DTYPES)
    if not is_readable:
        raise CheckpointError(
            f"{header.path}: {shorten(key)} has dtype {entry.dtype}, which is not read; allowed "
            f"are {allowed}"
        )
    if 0 in entry.shape:
        raise CheckpointError(
            f"{header.path}: {shorten(key)} of shape {list(entry.shape)} has no values; the file "
            "is damaged, get it again"
        )
    if header.format == gguf_file.FORMAT and is_pad_token(key) and len(entry.shape) == 1:
        return replace(entry, shape=(1, *entry.shape))
    return entry


def _stored_part(source: _Source) -> StoredPart:
    rows, columns = source.entry.shape
    kind = source.entry.dtype
    if kind in EIGHT_BITS:
        count = 1 if source.scale is None else math.prod(source.scale.entry.shape)
        return StoredPart(kind, rows, columns, scales=count)
    return StoredPart(kind if kind in BLOCKS else PLAIN, rows, columns)


def _row_chunks(source: _Source) -> list[tuple[int, int]]:
    """Cut a tensor into runs of rows of about `_CHUNK_BYTES`, or `_DECODED_BYTES` in float32.

    So no mapping grows large, and no copy. A vector's runs are whole blocks of every quantisation.
    """
    entry = source.entry
    if not entry.shape:
        return [(0, 1)]
    is_decoded = source.scale is not None or entry.dtype not in _READABLE_DTYPES
    width = _FLOAT32_BYTES if is_decoded else _READABLE_DTYPES[entry.dtype]
    chunk = _DECODED_BYTES if is_decoded else _CHUNK_BYTES
    step = max(1, chunk // max(1, math.prod(entry.shape[1:]) * width))
    return [(row, min(row + step, entry.shape[0])) for row in range(0, entry.shape[0], step)]


def _folder_headers(folder: Path) -> list[Header]:
    """Headers of a component folder: of its one file, or of the shards; last comes a GGUF file."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    found = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    for usual in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if usual in found:
            return [read_header(found[usual])]
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    if len(indexes) == 1:
        return _shard_headers(indexes[0])
    if not found:
        return [_only_gguf_header(folder)]
    if indexes or not (_is_whole_set(found) or len(found) == 1):
        several = [path.name for path in indexes] or list(found)
        raise CheckpointError(
            f"{folder}: holds several sets of weights ({some_names(several)}); keep one"
        )
    return [read_header(path) for path in found.values()]


def _only_gguf_header(folder: Path) -> Header:
    there = sorted(path.name for path in folder.iterdir())
    found = [name for name in there if name.endswith(".gguf")]
    if not found:
        raise CheckpointError(
            f"{folder}: holds no .safetensors or .gguf file (there: {some_names(there)})"
        )
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds several GGUF files ({some_names(found)}); keep one")
    return open_header(folder / found[0])


def _shard_headers(index: Path) -> list[Header]:
    """Headers of the files that an index names; they lie beside it, or are links from there."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0:]", file):
            raise CheckpointError(
                f"{index}: must name files of its own folder, got {shorten(repr(file))}"
            )
        files.setdefault(file, set()).add(name)
    return [_shard_header(index, file, names) for file, names in sorted(files.items())]


def _shard_header(index: Path, file: str, names: set[str]) -> Header:
    path = index.parent / file
    if not path.exists():
        raise CheckpointError(f"{index}: the shard {shorten(file)} is missing")
    header = read_header(path)
    lost = sorted(names - header.tensors.keys())
    if lost:
        raise CheckpointError(
            f"{path}: lacks {len(lost)} tensors of its index ({some_names(lost)})"
        )
    return header


def _is_whole_set(found: Mapping[str, Path]) -> bool:
    """Whether files are named ``...-00001-of-00003`` and so on; a gap among them is an error."""
    numbered = [re.fullmatch(r"(.*)-[0-9]{5}-of-([0-9]{5})\.safetensors", name) for name in found]
    sets = {match and (match[1], match[2]) for match in numbered}
    whole = sets.pop()
    if sets or whole is None:
        return False
    stem, total = whole
    for number in range(1, int(total) + 1):
        name = f"{stem}-{number:05}-of-{total}.safetensors"
        if name not in found:
            folder = next(iter(found.values())).parent
            raise CheckpointError(f"{folder}: the shard {name} is missing")
    return True


def _read_json(path: Path) -> dict[str, Any]:
    size, _ = file_stamp(path)
    try:
        content = json.loads(path.read_bytes()) if size <= _LARGEST_JSON else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not readable as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold one JSON object")
    return content


def _check_config(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse a config that says something which no shape tells and the modules take for granted."""
    config = checkpoint.config | _rotary_settings(checkpoint.config)
    for key, value in _FACTS[checkpoint.component].items():
        if key in config and not _agrees(config[key], value):
            given = shorten(repr(config[key]))
            raise CheckpointError(f"{path}: {key} is {given}, must be {value}")
    groups = config.get("norm_num_groups", 1)
    if not isinstance(groups, int) or groups < 1:
        given = shorten(repr(groups))
        raise CheckpointError(f"{path}: norm_num_groups is {given}, must be a positive integer")
    if checkpoint.component == TEXT_ENCODER and "num_hidden_layers" in config:
        layers = sum(name.endswith("self_attn.q_proj.weight") for name in checkpoint.shapes)
        if config["num_hidden_layers"] != layers:
            given = shorten(repr(config["num_hidden_layers"]))
            raise CheckpointError(
                f"{path}: num_hidden_layers is {given}, but {checkpoint.label} holds {layers} "
                "layers; a file is missing, get the component again"
            )
    head = checkpoint.shapes.get("layers.0.attention.q_norm.weight")
    if checkpoint.component == NETWORK and head and "axes_dims" in config:
        axes = [head[0] * share / 128 for share in (32, 48, 48)]
        if config["axes_dims"] != axes:
            given = shorten(repr(config["axes_dims"]))
            wanted = [int(size) for size in axes]
            raise CheckpointError(
                f"{path}: axes_dims is {given}, must be {wanted} for heads of {head[0]} channels"
            )


def _rotary_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that transformers keeps in a dictionary of their own, by their plain keys."""
    settings: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        group = config.get(key)
        if isinstance(group, dict):
            settings |= {f"rope_{name.removeprefix('rope_')}": group[name] for name in group}
    return settings


_FACTS: Mapping[str, Mapping[str, float | str]] = {
    NETWORK: {"rope_theta": 256.0, "t_scale": 1000.0, "norm_eps": 1e-5},
    TEXT_ENCODER: {
        "rope_theta": 1e6,
        "rope_type": "default",
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    },
    AUTOENCODER: {"scaling_factor": 0.3611, "shift_factor": 0.1159, "act_fn": "silu"},
}
"""What the modules take for granted, by the key of ``config.json`` that tells it."""


def _agrees(given: object, wanted: float | str) -> bool:
    if isinstance(wanted, str):
        return given == wanted
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        return False
    return abs(given - wanted) <= 1e-6 * wanted if abs(given) < 1e12 else False
