"""One callable in one static shape, compiled by Inductor.

What is done about the compiler's known traps:

* *Shared code.* Dynamo keeps its graphs with a function's code object, so one function entered with
  three token counts becomes one entry with dynamic shapes, tuned for the first. Here every
  `compiled` has a code object of its own, ``dynamic=False``, and refuses any other shape.
* *Recompile limit.* Past eight graphs of one code object Dynamo would run it uncompiled. The limit
  is raised while compiling, and ``fullgraph=True`` makes reaching it an error.
* *Silence.* A graph break and a compiler that is switched off (``TORCHDYNAMO_DISABLE``) are errors;
  a later recompilation is a line in the log and a count.
* *Graphs in graphs.* The modes that let Inductor record CUDA graphs are refused: `capture` records
  the whole callable, and regional graphs overwrite each other's results.
* *Settings.* Everything is passed for this one compilation; no setting of the process is left
  changed. (While something compiles, 2.11 shows the raised limit to other threads as well.)
* *Headers.* Building CPU kernels, Inductor first precompiles its headers into the system's
  temporary folder, and looks for them there with the C++ compiler at every start, kernels cached or
  not. With a `CompileCache` that is off: slower to build, but a second start runs no compiler at
  all. ``options={"cpp_cache_precompile_headers": True}`` turns it on.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

from .cache import COMPILE_LOCK, CompileCache
from .captured import ordinary_tensors
from .errors import CompileError, InputError, is_out_of_memory, reason
from .host_reads import runs_uncompiled
from .signature import Signature

logger = logging.getLogger(__name__)

MODES = ("default", "max-autotune-no-cudagraphs")
_RECOMPILE_LIMIT = 256


@dataclass(frozen=True, slots=True)
class CompileCounts:
    """What PyTorch's compiler has done in this process, for whomever."""

    graphs: int = 0
    """Functions traced by Dynamo: nothing at all is compiled while this stays the same."""
    generated: int = 0
    """Graphs for which Inductor generated code."""
    loaded: int = 0
    """Graphs whose code came from a cache."""

    def __sub__(self, earlier: CompileCounts) -> CompileCounts:
        return CompileCounts(
            self.graphs - earlier.graphs,
            self.generated - earlier.generated,
            self.loaded - earlier.loaded,
        )


def compile_counts() -> CompileCounts:
    """Read PyTorch's own counters; take the difference of two readings."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return CompileCounts()
    stats, inductor = dynamo.counters["stats"], dynamo.counters["inductor"]
    return CompileCounts(
        graphs=stats["unique_graphs"],
        generated=inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"],
        loaded=inductor["fxgraph_cache_hit"],
    )


class Compiled:
    """A callable compiled at its first call; made by `compiled`."""

    name: str
    graphs: int
    """Times this callable was traced: 0 before the first call, then 1, more only if what it closes
    over changed."""
    generated: int
    """Graphs for which code was generated, not found in a cache."""
    seconds: float
    """Time of the first call, compilation included."""
    is_compiled: bool
    """False before the first call and after stepping down to uncompiled."""

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        settings: dict[str, Any],
        cache: CompileCache | None,
        strict: bool,
    ) -> None:
        self.name, self.graphs, self.generated, self.seconds = name, 0, 0, 0.0
        self.is_compiled = False
        self._fn, self._settings, self._cache, self._strict = fn, settings, cache, strict
        self._signature: Signature | None = None
        self._run: Callable[..., Any] = fn

    def __call__(self, *arguments: Any) -> Any:
        """Run, after compiling at the first call.

        Args:
            arguments: Tensors, modules and plain numbers or text; no containers. A number is
                compiled in, so give one that varies as a tensor.

        Raises:
            SignatureError: They differ from those of the first call.
            CompileError: They are the first, and compiling failed, or memory ran out meanwhile.
        """
        if runs_uncompiled():
            return self._fn(*arguments)
        signature = self._signature
        if signature is None:
            return self._first_call(arguments)
        signature.check(arguments)
        before = self.graphs
        with ordinary_tensors():
            result = self._run(*arguments)
        if self.graphs != before:
            logger.warning("%s was compiled again: what it closes over has changed", self.name)
        return result

    def _first_call(self, arguments: tuple[Any, ...]) -> Any:
        with COMPILE_LOCK:
            if self._signature is not None:  # another thread was first
                return self(*arguments)
            signature, begin = Signature(self.name, arguments), time.perf_counter()
            try:
                result = self._compile(arguments)
                self.is_compiled = True
            except CompileError as error:
                if self._strict or is_out_of_memory(error):
                    raise
                logger.warning("%s; it runs uncompiled", error)
                self._run = self._fn
                with ordinary_tensors():
                    result = self._fn(*arguments)
            self.seconds, self._signature = time.perf_counter() - begin, signature
            return result

    def _compile(self, arguments: tuple[Any, ...]) -> Any:
        try:
            return self._try_to_compile(arguments)
        except Exception as error:
            if self._cache is None or not self._cache.is_warm or not _blames_inductor(error):
                raise CompileError(self._explained(error)) from error
            why = reason(_root(error))
            logger.warning("%s: the cached code fails (%s); compiling", self.name, why)
        from torch._inductor.utils import clear_caches

        self._cache.forget()
        clear_caches()  # Inductor remembers the files that were just forgotten
        try:
            return self._try_to_compile(arguments)
        except Exception as error:
            raise CompileError(self._explained(error)) from error

    def _try_to_compile(self, arguments: tuple[Any, ...]) -> Any:
        import torch._dynamo

        limits = {
            "recompile_limit": _RECOMPILE_LIMIT,
            "accumulated_recompile_limit": 4 * _RECOMPILE_LIMIT,
            "suppress_errors": False,
        }
        active = self._cache.active() if self._cache else contextlib.nullcontext()
        graphs = self.graphs
        with COMPILE_LOCK, active, torch._dynamo.config.patch(limits), ordinary_tensors():
            self._run = torch.compile(
                _with_own_code(self._fn, self.name),
                backend=self._backend,
                dynamic=False,
                fullgraph=True,
            )
            result = self._run(*arguments)
        if self.graphs == graphs:
            raise RuntimeError("nothing was compiled: is TORCHDYNAMO_DISABLE or a stance set?")
        return result

    def _backend(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        before = compile_counts()
        code = compile_fx(graph, inputs, config_patches=self._settings)
        self.graphs += 1
        counts = compile_counts() - before
        # With Inductor's caches off it counts neither hits nor misses.
        self.generated += counts.generated or int(counts.loaded == 0)
        return code

    def _explained(self, error: Exception) -> str:
        cause = _root(error)
        if type(cause).__name__ == "InvalidCxxCompiler":
            return (
                f"{self.name}: no working C++ compiler was found ({reason(cause)}); install g++ or "
                f"name one in CXX, or run without compiling"
            )
        return f"{self.name}: cannot be compiled: {reason(cause)}"


def _root(error: BaseException) -> BaseException:
    """The error that the compiler's layers wrapped."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    return error


def _blames_inductor(error: Exception) -> bool:
    """Whether loading or generating code failed, rather than tracing the callable."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"BackendCompilerFailed", "InductorError", "OSError", "ImportError"})


def _with_own_code(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    def role(*arguments: Any) -> Any:
        return fn(*arguments)

    label = "compiled_" + re.sub(r"\W", "_", name)
    code = role.__code__.replace(co_name=label)
    return cast(
        Callable[..., Any], FunctionType(code, role.__globals__, label, None, role.__closure__)
    )


def compiled(
    fn: Callable[..., Any],
    *,
    name: str,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    cache: CompileCache | None = None,
    strict: bool = True,
) -> Compiled:
    """Compile a callable for the one kind of arguments that its first call brings.

    Make one for each role and shape; the same `fn` may be given to many. A callable that takes a
    module as an argument is compiled once for all modules of the same make.

    Args:
        fn: Any callable that Dynamo can trace in one piece. Runs without gradients.
        name: What messages call it.
        mode: None, "default" or "max-autotune-no-cudagraphs".
        options: Inductor settings for this compilation alone.
        cache: Where its code is kept for the next process.
        strict: Raise when it cannot be compiled; otherwise one line is logged and `fn` itself runs.

    Raises:
        InputError: The mode or an option does not exist, or would record CUDA graphs.
    """
    settings = _settings(name, mode, options or {})
    if cache is not None:
        settings.setdefault("cpp_cache_precompile_headers", False)
    return Compiled(fn, name, settings, cache, strict)


def _settings(name: str, mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    if mode is not None and mode not in MODES:
        raise InputError(f"{name}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    settings: dict[str, Any] = {}
    if mode is not None and mode != "default":
        from torch._inductor import list_mode_options

        settings.update(list_mode_options(mode))
    if options:
        from torch._inductor import config

        unknown = sorted(set(options) - set(config.get_config_copy()))
        if unknown:
            raise InputError(f"{name}: Inductor has no setting named {', '.join(unknown)}")
    settings.update(options)
    if settings.setdefault("triton.cudagraphs", False):
        raise InputError(f"{name}: let capture() record CUDA graphs, not Inductor")
    return settings
