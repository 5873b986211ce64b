"""Finds the places where a callable reads a tensor's value on the host.

A CUDA graph cannot hold such a read: the value that Python saw while recording would stay forever,
so CUDA refuses it and spoils the recording (PyTorch 2.11 then even leaves its allocator in a state
that later ends the process). Running the callable once under a dispatch mode finds the reads before
anything is recorded, and finds them on a CPU too. The mode sees what goes through the dispatcher,
so neither ``tolist`` and ``numpy`` of a CPU tensor nor the copy in ``torch.tensor(x, device=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_uncompiled: ContextVar[bool] = ContextVar("uncompiled", default=False)

# Their result's size, or the result itself, is a value that only the device knows.
_READS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_MASKS = (torch.bool, torch.uint8)


class HostReadError(RuntimeError):
    """A callable reads a value on the host."""


def runs_uncompiled() -> bool:
    """Whether this thread is looking for host reads, and compiled callables should step aside."""
    return _uncompiled.get()


class _HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles in here, and the guard against it imports all of Dynamo

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if found := _host_read(func, args, kwargs):
            raise HostReadError(found)
        return func(*args, **kwargs)


def _host_read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    name = func.name().partition(".")[0]
    if name in _READS:
        return f"{name} needs a value of the device on the host"
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size needs the counts on the host"
    if name == "aten::index" and _any_mask(args[1]):
        return "indexing with a boolean mask needs the mask on the host; use torch.where"
    # With one value to write it is a masked fill, which needs no count.
    if name.startswith("aten::index_put") and _any_mask(args[1]) and args[2].numel() != 1:
        return "writing through a boolean mask needs the mask on the host; use torch.where"
    if name in ("aten::copy_", "aten::_to_copy"):
        return _blocking_copy(name, args, kwargs)
    return None


def _any_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in _MASKS for index in indices)


def _blocking_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if name == "aten::copy_":
        target, source = args[0].device, args[1].device
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        source = args[0].device
        target = torch.device(kwargs.get("device") or source)
        waits = not kwargs.get("non_blocking", False)
    if source.type == target.type or not waits:
        return None
    return f"a copy from {source} to {target} waits for the device"


@contextmanager
def _uncompiled_here() -> Iterator[None]:
    token = _uncompiled.set(True)
    try:
        yield
    finally:
        _uncompiled.reset(token)


def require_no_host_read(fn: Callable[..., object], arguments: tuple[Tensor, ...]) -> None:
    """Run `fn` once and raise `HostReadError` if it reads a value on the host."""
    mode = _HostReads()  # type: ignore[no-untyped-call]
    with _uncompiled_here(), mode:
        fn(*arguments)
