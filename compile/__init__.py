"""Static-buffer capture and compilation for any callable; knows nothing of diffusion.

`capture` and `Captures` replay a callable over buffers that never move (a CUDA graph, or the same
contract without one), `compiled` hands one callable in one static shape to Inductor, and
`CompileCache` keeps what was compiled for the next process. Names are imported at first use, so
that listing or clearing a cache folder does not import PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import CacheEntry, CompileCache, clear, list_entries
    from .captured import BACKENDS, Captured, capture
    from .captures import CaptureCounters, CaptureReport, Captures, Wanted
    from .errors import (
        CacheError,
        CaptureError,
        CompileError,
        InputError,
        SignatureError,
        is_out_of_memory,
    )
    from .graph import GraphPool
    from .inductor import CompileCounts, Compiled, compile_counts, compiled

_HOMES = {
    "BACKENDS": "captured",
    "CacheEntry": "cache",
    "CacheError": "errors",
    "CaptureCounters": "captures",
    "CaptureError": "errors",
    "CaptureReport": "captures",
    "Captured": "captured",
    "Captures": "captures",
    "CompileCache": "cache",
    "CompileCounts": "inductor",
    "CompileError": "errors",
    "Compiled": "inductor",
    "GraphPool": "graph",
    "InputError": "errors",
    "SignatureError": "errors",
    "Wanted": "captures",
    "capture": "captured",
    "clear": "cache",
    "compile_counts": "inductor",
    "compiled": "inductor",
    "is_out_of_memory": "errors",
    "list_entries": "cache",
}

__all__ = [
    "BACKENDS",
    "CacheEntry",
    "CacheError",
    "CaptureCounters",
    "CaptureError",
    "CaptureReport",
    "Captured",
    "Captures",
    "CompileCache",
    "CompileCounts",
    "CompileError",
    "Compiled",
    "GraphPool",
    "InputError",
    "SignatureError",
    "Wanted",
    "capture",
    "clear",
    "compile_counts",
    "compiled",
    "is_out_of_memory",
    "list_entries",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
