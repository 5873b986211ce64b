"""Weights kept as their file stores them, and made into floats just before their product.

A matrix whose file holds it in GGUF blocks or in 8 bits takes a half to an eighth of the memory
as it stands there. Made into floats layer by layer it gives the same bits as when all of them are
made so at loading: by the same operations, through the dtype that the weights were asked for in.
Of an embedding only the rows that are looked up are made into floats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo.gguf_blocks import BLOCKS, dequantize_blocks

PLAIN = "plain"
"""Of rows that are kept in the dtype asked for, beside others in one matrix that are not."""
EIGHT_BITS: Mapping[str, torch.dtype] = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}
"""Values that are a weight's when multiplied by a scale; 1 where the file has none."""

_CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 22}
"""Made into floats at a time: on a CPU what its caches hold, on a GPU what keeps it busy; some ten
bytes for each of these are there meanwhile, beside the matrix."""


@dataclass(frozen=True, slots=True)
class StoredPart:
    """How a file holds some rows of a matrix."""

    kind: str
    """A key of `turbo.gguf_blocks.BLOCKS` or of `EIGHT_BITS`, or `PLAIN`."""
    rows: int
    columns: int
    scales: int = 0
    """How many scales there are in 8 bits: 1, or as many as rows."""

    def new_values(self, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        """Uninitialised memory for them.

        Args:
            dtype: Of plain values.
            device: Where it is made.
        """
        if self.kind in BLOCKS:
            values, size = BLOCKS[self.kind]
            shape = (self.rows, self.columns // values * size)
            return torch.empty(shape, dtype=torch.uint8, device=device)
        dtype = EIGHT_BITS.get(self.kind, dtype)
        return torch.empty(self.rows, self.columns, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where some rows of a matrix are kept."""

    row: int
    """The first one's place in the matrix."""
    part: StoredPart
    values: Tensor
    scales: Tensor | None


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a matrix that is kept as its file stores it: views into what products read."""

    shape: torch.Size
    """Of the matrix, in weights."""
    dtype: torch.dtype
    """That the weights were asked for in."""
    pieces: tuple[_Rows, ...]
    """In the order of the file's tensors, one each."""

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.pieces[0].values.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        both = [tensor for piece in self.pieces for tensor in (piece.values, piece.scales)]
        return tuple(tensor for tensor in both if tensor is not None)

    def narrow(self, dim: int, start: int, length: int) -> StoredRows:
        """Some of the rows (`dim` 0), all of a file's tensors, or the columns without padding."""
        if dim == 1:
            return replace(self, shape=torch.Size((self.shape[0], length)))
        inside = range(start, start + length)
        pieces = tuple(
            replace(piece, row=piece.row - start) for piece in self.pieces if piece.row in inside
        )
        return StoredRows(torch.Size((length, self.shape[1])), self.dtype, pieces)

    def dequantize(self) -> Tensor:
        """The matrix in floats of `dtype`."""
        weight: Tensor = _stored_weight(
            [piece.values for piece in self.pieces],
            [piece.scales for piece in self.pieces if piece.scales is not None],
            " ".join(piece.part.kind for piece in self.pieces),
            [piece.row for piece in self.pieces],
            self.shape,
            self.dtype,
            self.dtype,
        )
        return weight


# Opaque to the compiler, which would round elsewhere: so compiled code gives the bits of eager.
@torch.library.custom_op("turbo::stored_weight", mutates_args=())
def _stored_weight(
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    kinds: str,
    rows: Sequence[int],
    size: Sequence[int],
    through: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """The matrix of `StoredLinear`; `kinds` and `rows` have one entry for each of `values`."""
    filled = sum(len(v) * _columns(kind, v) for kind, v in zip(kinds.split(), values))
    new = torch.empty if filled == math.prod(size) else torch.zeros
    weight = new(tuple(size), dtype=dtype, device=values[0].device)
    next_scale = iter(scales)
    for kind, row, stored in zip(kinds.split(), rows, values, strict=True):
        scale = next(next_scale) if kind in EIGHT_BITS else None
        columns = _columns(kind, stored)
        step = max(1, _CHUNK_VALUES.get(weight.device.type, 1 << 19) // columns)
        for start in range(0, len(stored), step):
            chunk = stored[start : start + step]
            factor = scale if scale is None or len(scale) == 1 else scale[start : start + step]
            floats = _floats(kind, chunk, factor).to(through)
            weight[row + start : row + start + len(chunk), :columns].copy_(floats)
    return weight


@_stored_weight.register_fake
def _(
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    kinds: str,
    rows: Sequence[int],
    size: Sequence[int],
    through: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    return values[0].new_empty(size, dtype=dtype)


@torch.library.custom_op("turbo::stored_embedding", mutates_args=())
def _stored_embedding(
    ids: Tensor, values: Tensor, scale: Tensor | None, kind: str, dtype: torch.dtype
) -> Tensor:
    """What `StoredLinear.embedding` looks up, opaque to the compiler for the same reason.

    Values of one byte are looked up as bytes: not every device looks up float8.
    """
    flat = ids.flatten()
    chosen = values.view(torch.uint8).index_select(0, flat).view(values.dtype)
    factor = scale if scale is None or len(scale) == 1 else scale.index_select(0, flat)
    return _floats(kind, chosen, factor).to(dtype).view(*ids.shape, -1)


@_stored_embedding.register_fake
def _(ids: Tensor, values: Tensor, scale: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    return values.new_empty((*ids.shape, _columns(kind, values)), dtype=dtype)


def _columns(kind: str, stored: Tensor) -> int:
    values, size = BLOCKS.get(kind, (1, 1))
    return stored.shape[1] // size * values


def _floats(kind: str, stored: Tensor, scale: Tensor | None) -> Tensor:
    if kind in BLOCKS:
        blocks = stored.view(-1, BLOCKS[kind][1])
        return dequantize_blocks(kind, blocks).view(len(stored), -1)
    return stored if scale is None else stored.float() * scale


class StoredLinear(nn.Module):
    """``x @ weight.T + bias`` over the last axis with a weight as its file stores it.

    All of the weight is made into floats for each product, so one such layer at a time is there.
    It can be an embedding instead, of which only the rows that are looked up are.

    Args:
        inputs: Columns of the weight, what is beyond those of the parts is 0.
        outputs: Rows of the weight; those that no part holds are 0.
        parts: (first row, how the file holds it), which do not overlap.
        dtype: Dtype that the weights were asked for in; results are rounded to it.
        bias: A parameter to add, if any.
        device: Where it is made; values are uninitialised.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        parts: Sequence[tuple[int, StoredPart]],
        dtype: torch.dtype,
        *,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.size = (outputs, inputs)
        self.parts = tuple(parts)
        self.dtype = dtype
        self.values = nn.ParameterList(
            nn.Parameter(part.new_values(dtype, device), requires_grad=False) for _, part in parts
        )
        self.scales = nn.ParameterList(
            nn.Parameter(torch.empty(part.scales, 1, device=device), requires_grad=False)
            for _, part in parts
            if part.scales
        )
        self.bias = bias
        self._kinds = " ".join(part.kind for _, part in parts)
        self._rows = [row for row, _ in parts]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        device: torch.device = self.values[0].device
        return device

    def rows(self) -> StoredRows:
        """All of the weight."""
        next_scale = iter(self.scales)
        pieces = [
            _Rows(row, part, values.detach(), next(next_scale).detach() if part.scales else None)
            for (row, part), values in zip(self.parts, self.values, strict=True)
        ]
        return StoredRows(torch.Size(self.size), self.dtype, tuple(pieces))

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight as floats, [outputs, inputs], rounded to the dtype asked for."""
        weight: Tensor = _stored_weight(
            list(self.values),
            list(self.scales),
            self._kinds,
            self._rows,
            self.size,
            self.dtype,
            dtype,
        )
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """The product.

        Args:
            x: [..., inputs], any float dtype, in which it is computed.

        Returns:
            [..., outputs] in the dtype of `x`.
        """
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight_in(x.dtype), bias)

    def embedding(self, ids: Tensor) -> Tensor:
        """Some rows of the weight as floats, rounded to the dtype asked for: no others are made.

        Args:
            ids: Which rows, any shape, int64, each below `outputs`; one part must hold all rows.

        Returns:
            [*ids.shape, inputs] in the dtype asked for.
        """
        ((_, part),) = self.parts
        assert (part.rows, part.columns) == self.size
        scale = self.scales[0] if part.scales else None
        rows: Tensor = _stored_embedding(ids, self.values[0], scale, part.kind, self.dtype)
        return rows

    if TYPE_CHECKING:
        __call__ = forward


@runtime_checkable
class Keeper(Protocol):
    """A module whose matrices may be kept as their files store them."""

    def native_tensors(self) -> Mapping[str, Tensor]:
        """Views into the module's storage by native name; none of `stored_rows` is among them."""

    def stored_rows(self) -> Mapping[str, StoredRows]:
        """As `native_tensors`: the weights that are kept as their files store them."""

    def matrices(self) -> Iterator[tuple[nn.Module, str]]:
        """Owner and attribute of each matrix: a parameter, or a module with `weight` and `bias`."""


@dataclass(frozen=True, eq=False)
class _Swap:
    owner: nn.Module
    attribute: str
    plain: Any
    """The parameter, or the module that has it."""
    stored: StoredLinear
    names: frozenset[str]
    """Native names of the weights in it."""

    def put(self, wanted: nn.Parameter | nn.Module) -> None:
        if getattr(self.owner, self.attribute) is not wanted:
            delattr(self.owner, self.attribute)
            setattr(self.owner, self.attribute, wanted)


class Keeping:
    """Which of a module's matrices are kept as their file stores them: at first none.

    A matrix that a LoRA changes cannot be: as long as the LoRA is on, all of it is held in the
    dtype asked for, fused as ever, and afterwards read from the file again.

    Args:
        module: On the meta device, without any weight that is kept so.
        stored: Native name -> how files hold it, for each weight that can be kept.
    """

    def __init__(self, module: nn.Module, stored: Mapping[str, Sequence[StoredPart]]) -> None:
        self._module = module
        self._swaps = list(_swaps(module, stored)) if isinstance(module, Keeper) else []

    def __bool__(self) -> bool:
        """Whether any matrix can be kept."""
        return bool(self._swaps)

    def has(self, names: Collection[str]) -> bool:
        """Whether a weight of these native names is in a matrix that can be kept."""
        return not all(swap.names.isdisjoint(names) for swap in self._swaps)

    def use(self, loose: Collection[str] | None) -> None:
        """Keep all matrices that can be, but those of some weights.

        What is exchanged must be on the meta device, and what takes its place is.

        Args:
            loose: Native names of weights that are to be in the module's dtype; None: all.
        """
        for swap in self._swaps:
            is_loose = loose is None or not swap.names.isdisjoint(loose)
            swap.put(swap.plain if is_loose else swap.stored)

    def imitate(self, module: nn.Module) -> None:
        """Give a module of the same kind, but of fewer blocks, such matrices as can be kept here.

        A matrix of any block is kept there if that matrix can be in any block here.
        """
        assert isinstance(module, Keeper)
        kinds, others = _kinds_of(self._module), _kinds_of(module)
        stored = {(kinds[swap.owner], swap.attribute): swap.stored for swap in self._swaps}
        for owner, attribute in list(module.matrices()):
            if (others[owner], attribute) in stored:
                delattr(owner, attribute)
                setattr(owner, attribute, stored[others[owner], attribute])


def _kinds_of(module: nn.Module) -> dict[nn.Module, str]:
    """Module -> its name without the number of its block."""
    return {part: re.sub(r"\d+", "N", name) for name, part in module.named_modules()}


def _swaps(module: Any, stored: Mapping[str, Sequence[StoredPart]]) -> Iterator[_Swap]:
    views: dict[int, dict[str, Tensor]] = {}
    for name, view in module.native_tensors().items():
        views.setdefault(view.untyped_storage()._cdata, {})[name] = view
    for owner, attribute in module.matrices():
        plain = getattr(owner, attribute)
        weight = plain if isinstance(plain, Tensor) else plain.weight
        inside = views[weight.untyped_storage()._cdata]
        if stored.keys().isdisjoint(inside):
            continue
        parts = [
            place
            for name, view in inside.items()
            for place in _places(view, weight.shape[1], stored.get(name))
        ]
        outputs, inputs = weight.shape
        bias = None if isinstance(plain, Tensor) else plain.bias
        made = StoredLinear(inputs, outputs, parts, weight.dtype, bias=bias, device=weight.device)
        yield _Swap(owner, attribute, plain, made, frozenset(inside))


def _places(
    view: Tensor, width: int, parts: Sequence[StoredPart] | None
) -> Iterator[tuple[int, StoredPart]]:
    """(First row, part) of one weight, which is a view into a matrix of that width."""
    row = view.storage_offset() // width
    for part in parts or (StoredPart(PLAIN, *view.shape),):
        yield row, part
        row += part.rows
