"""What a call looks like: shapes, dtypes, devices and layouts of its arguments, compared in full.

A graph reads fixed addresses and compiled code is specialised, so a call either looks exactly like
the first one or is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError, SignatureError

CONTIGUOUS, STRIDED = "contiguous", "strided"
_MEMORY_FORMATS = {
    "channels_last": (4, torch.channels_last),
    "channels_last_3d": (5, torch.channels_last_3d),
}


def layout_of(tensor: Tensor) -> str:
    """The tensor's class of strides: contiguous, channels_last, channels_last_3d or strided."""
    if tensor.is_contiguous():
        return CONTIGUOUS
    for name, (dimensions, memory_format) in _MEMORY_FORMATS.items():
        if tensor.dim() == dimensions and tensor.is_contiguous(memory_format=memory_format):
            return name
    return STRIDED


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """All that must be equal between two calls, values and address aside."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: str
    strides: tuple[int, ...]
    """Compared only where `layout` is "strided": elsewhere a size of 1 leaves them open."""

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        layout = layout_of(tensor)
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device, layout, tensor.stride())

    def fits(self, tensor: object) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.shape == self.shape
            and tensor.dtype is self.dtype
            and tensor.device == self.device
            and self._laid_out_like(tensor)
        )

    def _laid_out_like(self, tensor: Tensor) -> bool:
        if self.layout == CONTIGUOUS:
            return tensor.is_contiguous()
        if self.layout == STRIDED:
            return tensor.stride() == self.strides
        return layout_of(tensor) == self.layout

    def empty(self) -> Tensor:
        """A tensor of this kind with undefined values."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{dtype}[{', '.join(map(str, self.shape))}] on {self.device}"
        if self.layout == STRIDED:
            return f"{text} with strides {self.strides}"
        return text if self.layout == CONTIGUOUS else f"{text}, {self.layout}"


_Constant = bool | int | float | str | None
_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class ConstantSpec:
    """A Python number, text or None: compiled code is specialised on its value."""

    value: _Constant

    def fits(self, argument: object) -> bool:
        return type(argument) is type(self.value) and argument == self.value

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """A module or another object that holds no argument of its own: only its type is compared."""

    type: type

    def fits(self, argument: object) -> bool:
        return type(argument) is self.type

    def __str__(self) -> str:
        return self.type.__name__


Spec = TensorSpec | ConstantSpec | ObjectSpec


def _spec_of(argument: object) -> Spec:
    if isinstance(argument, Tensor):
        return TensorSpec.of(argument)
    if isinstance(argument, _CONSTANTS):
        return ConstantSpec(argument)
    return ObjectSpec(type(argument))


class Signature:
    """The arguments of one call, to hold every later call against.

    Args:
        name: What the error messages call the callable.
        arguments: The arguments of the call that was captured or compiled.
        static: Positions of tensors that keep their address.

    Raises:
        InputError: An argument is a container, or `static` names a position without a tensor.
    """

    def __init__(
        self, name: str, arguments: Sequence[object], *, static: Iterable[int] = ()
    ) -> None:
        for position, argument in enumerate(arguments):
            if isinstance(argument, (list, tuple, dict, set)):
                raise InputError(
                    f"{name}: argument {position} is a {type(argument).__name__}; its tensors "
                    f"could not be checked, give each as an argument of its own"
                )
        self.name = name
        self.specs = tuple(_spec_of(argument) for argument in arguments)
        self.addresses: dict[int, int] = {}
        for position in static:
            argument = arguments[position] if 0 <= position < len(arguments) else None
            if not isinstance(argument, Tensor):
                raise InputError(
                    f"{name}: static names input {position}, but the {len(arguments)} inputs "
                    f"have no tensor there"
                )
            self.addresses[position] = argument.data_ptr()

    def check(self, arguments: Sequence[object]) -> None:
        """Raise `SignatureError` unless the arguments look like the first ones."""
        if len(arguments) != len(self.specs):
            raise SignatureError(
                f"{self.name}: made for {len(self.specs)} inputs {self}, "
                f"given {len(arguments)}: {_described(arguments)}"
            )
        for position, (spec, argument) in enumerate(zip(self.specs, arguments)):
            if not spec.fits(argument):
                raise self._mismatch(position, arguments)
        for position, address in self.addresses.items():
            given = arguments[position]
            if isinstance(given, Tensor) and given.data_ptr() != address:
                raise SignatureError(
                    f"{self.name}: input {position} ({self.specs[position]}) is static at address "
                    f"{address:#x}, given one at {given.data_ptr():#x}; copy_ the new values into "
                    f"the tensor that was captured"
                )

    def _mismatch(self, position: int, arguments: Sequence[object]) -> SignatureError:
        given = _spec_of(arguments[position])
        return SignatureError(
            f"{self.name}: input {position} is {given}, made for {self.specs[position]}; all "
            f"inputs it was made for: {self}; make another one for another kind of input"
        )

    def __str__(self) -> str:
        return "(" + "; ".join(map(str, self.specs)) + ")"


def _described(arguments: Sequence[object]) -> str:
    return "(" + "; ".join(str(_spec_of(argument)) for argument in arguments) + ")"
