"""Scales of float8 and int8 weights: which belongs to which, by each way in which files say so.

Known are ComfyUI's first form (``scale_weight`` beside the weight, ``scaled_fp8`` in the file), its
second (``weight_scale``, announced by ``comfy_quant`` tensors or by the file's metadata), and
``weight_scale`` alone, as other programs and ``turbo quantize`` write it. In all of them a weight
is its values times the scale, of the whole tensor or of each row. Quantised values without their
scales are wrong values: a file whose scales are incomplete, or mean something else, is refused.

``input_scale`` concerns arithmetic on narrow activations, not what a weight is, and is not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open

from turbo import gguf_file
from turbo.errors import CheckpointError
from turbo.header import Header, TensorEntry, one_line, shorten, some_names

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALED = (*FLOAT8, "I8")
"""The dtypes that scales are read for."""

_METADATA = "_quantization_metadata"
_MARKER = "scaled_fp8"
_WEIGHT_SCALES = ("scale_weight", "weight_scale")
_INPUT_SCALES = ("scale_input", "input_scale")
_SETTINGS = "comfy_quant"
_BESIDE = re.compile(rf"(.+)\.({'|'.join((*_WEIGHT_SCALES, *_INPUT_SCALES, _SETTINGS))})")
_REFUSED = re.compile(
    r".+\.(weight_scale_(2|inv)|weight_zero_point|weight_packed|weight_shape|weight_global_scale"
    r"|pre_quant_scale|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+"
    r"|qweight|qzeros|scales|g_idx|SCB)"
)
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_KNOWN_SETTINGS = {"format", "full_precision_matrix_mult"}
_SCALE_DTYPES = ("F32", "F16", "BF16", "F64")
_LARGEST_SETTINGS = 1 << 16


@dataclass(frozen=True, slots=True)
class Scaling:
    """A component's weights, apart from what stands beside them."""

    weights: dict[str, str]
    """File name -> name without prefix of what is no scale, setting or mark."""
    scales: dict[str, str]
    """File name of a float8 weight -> file name of its scale."""


def find_scales(
    headers: Sequence[Header], files: Mapping[str, int], inner: Mapping[str, str], prefix: str
) -> Scaling:
    """Tell weights and scales of a component apart.

    Args:
        headers: The component's files.
        files: File tensor name -> number of its header.
        inner: File tensor name -> name without prefix, of one component.
        prefix: What stands before the component's names.

    Raises:
        CheckpointError: A scale is missing, left over, of the wrong shape or dtype, or the weights
            are quantised in a way that is not read.
    """
    return _Finder(headers, files, inner, prefix).find()


class _Finder:
    """The steps of `find_scales`, with what they share."""

    def __init__(
        self,
        headers: Sequence[Header],
        files: Mapping[str, int],
        inner: Mapping[str, str],
        prefix: str,
    ) -> None:
        self.headers, self.files, self.inner, self.prefix = headers, files, inner, prefix

    def find(self) -> Scaling:
        beside = {key: match for key in self.inner if (match := _BESIDE.fullmatch(key))}
        marks = {key for key in self.inner if self._is_mark(key)}
        self._refuse_others()
        weights = {
            key: name for key, name in self.inner.items() if key not in beside and key not in marks
        }
        scales: dict[str, str] = {}
        for key, match in beside.items():
            weight = f"{match[1]}.weight"
            if weight not in weights:
                raise self._error(key, f"stands beside no weight ({shorten(weight)} is not there)")
            if match[2] in _WEIGHT_SCALES:
                if weight in scales:
                    raise self._error(key, f"and {shorten(scales[weight])} scale the same weight")
                self._check_scale(weight, key)
                scales[weight] = key
        announced = self._announced(beside)
        is_scaled = bool(scales or announced or marks or self._is_marked_outside())
        self._require_scales([key for key in weights if self._wants_scale(key, is_scaled)], scales)
        return Scaling(weights, scales)

    def _require_scales(self, weights: Iterable[str], scales: Mapping[str, str]) -> None:
        missing = sorted(key for key in weights if key not in scales)
        if missing:
            raise CheckpointError(
                f"{self.headers[self.files[missing[0]]].path}: is quantised with scales, but "
                f"{len(missing)} quantised tensors have none ({some_names(missing)}); the file is "
                "incomplete, get it again"
            )

    def _check_scale(self, weight: str, key: str) -> None:
        entry, scale = self._entry(weight), self._entry(key)
        if entry.dtype not in SCALED:
            raise self._error(
                key,
                f"belongs to {shorten(weight)} of dtype {entry.dtype}; scales are read for "
                f"{', '.join(SCALED)}",
            )
        if scale.dtype not in _SCALE_DTYPES:
            raise self._error(key, f"has dtype {scale.dtype}, must be {', '.join(_SCALE_DTYPES)}")
        rows = entry.shape[:1]
        if scale.shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
            raise self._error(
                key,
                f"has the shape {list(scale.shape)}, must be [] or {[*rows, 1]} for "
                f"{shorten(weight)} of shape {list(entry.shape)}",
            )

    def _announced(self, beside: Mapping[str, re.Match[str]]) -> bool:
        """Check what files say of their layers; whether they call any of this component quantised.

        Layers of which they say so and that have no scale are found among the float8 ones later.
        """
        layers = {
            match[1]: self._read_settings(key)
            for key, match in beside.items()
            if match[2] == _SETTINGS
        }
        for header in self.headers:
            for name, settings in self._read_metadata(header).items():
                names = [key for key in (name, self.prefix + name) if f"{key}.weight" in self.inner]
                if names:
                    layers[names[0]] = settings
                elif f"{name}.weight" not in self.files:
                    raise CheckpointError(
                        f"{header.path}: {_METADATA} names {shorten(name)}, which is not there"
                    )
        for name, settings in layers.items():
            self._check_settings(f"{name}.weight", settings)
        return bool(layers)

    def _check_settings(self, weight: str, settings: object) -> None:
        if not isinstance(settings, dict):
            raise self._error(weight, "has quantisation settings that are no JSON object")
        given = settings.get("format")
        if not isinstance(given, str) or given not in _FORMATS:
            raise self._error(
                weight,
                f"is quantised as {shorten(repr(given))}; readable are {' and '.join(_FORMATS)}",
            )
        unknown = sorted(str(key) for key in settings if key not in _KNOWN_SETTINGS)
        if unknown:
            raise self._error(weight, f"has unknown quantisation settings: {some_names(unknown)}")
        dtype = self._entry(weight).dtype
        if dtype != _FORMATS[given]:
            raise self._error(weight, f"has dtype {dtype}, but its settings say {given}")

    def _read_settings(self, key: str) -> Any:
        header, entry = self.headers[self.files[key]], self._entry(key)
        if entry.dtype != "U8" or len(entry.shape) != 1 or entry.shape[0] > _LARGEST_SETTINGS:
            raise self._error(key, f"is {entry.dtype} {list(entry.shape)}, must hold JSON as bytes")
        try:
            with safe_open(str(header.path), framework="np") as file:
                return json.loads(file.get_tensor(key).tobytes())
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise self._error(key, f"is not readable as JSON: {one_line(error)}") from error

    def _read_metadata(self, header: Header) -> dict[str, Any]:
        text = header.metadata.get(_METADATA)
        try:
            content = {"layers": {}} if text is None else json.loads(text)
        except (ValueError, RecursionError, TypeError) as error:
            raise CheckpointError(
                f"{header.path}: {_METADATA} is not readable as JSON: {one_line(error)}"
            ) from error
        layers = content.get("layers") if isinstance(content, dict) else None
        if not isinstance(layers, dict):
            raise CheckpointError(f"{header.path}: {_METADATA} has no object of layers")
        return layers

    def _refuse_others(self) -> None:
        others = sorted(key for key in self.inner if _REFUSED.fullmatch(key))
        if others:
            raise CheckpointError(
                f"{self.headers[self.files[others[0]]].path}: is quantised in a way that is not "
                f"read ({some_names(others)}); give a bfloat16, float16, float32, float8 or GGUF "
                "file"
            )

    def _is_mark(self, key: str) -> bool:
        return key.removeprefix(self.prefix) == _MARKER

    def _is_marked_outside(self) -> bool:
        """All-in-one files have the mark of a text encoder one level above its tensors."""
        return any(
            key.endswith(_MARKER) and self.prefix.startswith(key.removesuffix(_MARKER))
            for header in self.headers
            for key in header.tensors
        )

    def _wants_scale(self, key: str, is_scaled: bool) -> bool:
        """Float8 alone may be plain values; integers never are a weight's."""
        dtype = self._entry(key).dtype
        if self.headers[self.files[key]].format == gguf_file.FORMAT:
            return False  # whose integers are refused as they are
        return dtype == "I8" or (is_scaled and dtype in FLOAT8)

    def _entry(self, key: str) -> TensorEntry:
        return self.headers[self.files[key]].tensors[key]

    def _error(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.headers[self.files[key]].path}: {shorten(key)} {what}")
