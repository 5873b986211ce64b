"""Runs a callable over buffers that never move: copy in, run, read out.

Three backends keep one contract:

* ``cuda-graph``: recorded once, replayed with a single launch.
* ``replay``: any device; calls the callable on the same static buffers and copies its results into
  static outputs, so that whatever a graph would do to the caller (results overwritten by the next
  call, shapes frozen, no value read on the host) happens on a CPU too.
* ``eager``: calls the callable on the caller's own tensors; only the checks remain.

What the callable closes over (weights) is read where it lies, so values may change in place between
calls, addresses may not. It runs without gradients and outside inference mode, whatever the caller
is in: compiled code is specialised on both, and a buffer made in inference mode could not be
written outside it. The callable runs several times before the first call, so it must not count its
runs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .errors import CaptureError, CompileError, InputError, is_out_of_memory, reason
from .graph import GraphPool, Recording, require_cuda
from .host_reads import HostReadError, require_no_host_read
from .signature import Signature, TensorSpec

logger = logging.getLogger(__name__)

BACKENDS = ("cuda-graph", "replay", "eager")
"""In the order of stepping down."""
_WARMUP = {"cuda-graph": 3, "replay": 1, "eager": 1}

Result = TypeVar("Result", bound="Tensor | tuple[Tensor, ...]")


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Neither gradients nor inference mode: what is made here can be written anywhere."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def _results(name: str, value: object) -> tuple[Tensor, ...]:
    results = value if isinstance(value, tuple) else (value,)
    if not results or not all(isinstance(result, Tensor) for result in results):
        raise InputError(
            f"{name}: the callable must return a tensor or a tuple of tensors, "
            f"it returned {type(value).__name__}"
        )
    return results


class _Run(Protocol):
    """How a backend with buffers runs the callable."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    single: bool
    """Whether the callable returns a tensor, not a tuple."""
    pool_bytes: int

    def run(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Request:
    """What is to be captured, apart from the backend."""

    fn: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    signature: Signature
    pool: GraphPool
    warmup: int
    poison: bool
    allow_host_reads: bool

    def buffers(self) -> tuple[Tensor, ...]:
        return tuple(
            tensor if position in self.signature.addresses else self._buffer(position, tensor)
            for position, tensor in enumerate(self.inputs)
        )

    def _buffer(self, position: int, tensor: Tensor) -> Tensor:
        spec = TensorSpec.of(tensor)
        if any(size > 1 and stride == 0 for size, stride in zip(spec.shape, spec.strides)):
            raise InputError(
                f"{self.signature.name}: input {position} repeats its memory (strides "
                f"{spec.strides}) and cannot be a buffer; give a .contiguous() one"
            )
        return spec.empty().copy_(tensor)

    def look_for_host_reads(self, buffers: tuple[Tensor, ...]) -> None:
        if self.warmup == 0 or self.allow_host_reads:
            return
        try:
            require_no_host_read(self.fn, buffers)
        except HostReadError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # It has just run without the look, so it is the look that it cannot bear.
            logger.debug("%s: cannot look for host reads: %s", self.signature.name, error)


class _ReplayRun:
    """The static-buffer contract without a graph."""

    pool_bytes = 0

    def __init__(self, request: _Request) -> None:
        self._name, self._fn = request.signature.name, request.fn
        self._poison = request.poison
        self.inputs = request.buffers()
        for _ in range(request.warmup - 1):
            self._fn(*self.inputs)
        value = self._fn(*self.inputs)
        results = _results(self._name, value)
        request.look_for_host_reads(self.inputs)
        self.single = isinstance(value, Tensor)
        self._specs = tuple(TensorSpec.of(result) for result in results)
        self.outputs = tuple(torch.empty_like(result) for result in results)

    def run(self) -> None:
        results = _results(self._name, self._fn(*self.inputs))
        self._require_same_kinds(results)
        stale = self.outputs
        if self._poison:
            self.outputs = tuple(torch.empty_like(output) for output in stale)
        for output, result in zip(self.outputs, results):
            output.copy_(result)
        if self._poison:
            for output in stale:
                _fill_with_nonsense(output)

    def _require_same_kinds(self, results: tuple[Tensor, ...]) -> None:
        fits = [spec.fits(result) for spec, result in zip(self._specs, results)]
        if len(results) != len(self._specs) or not all(fits):
            raise CaptureError(
                f"{self._name}: the callable returned "
                f"({'; '.join(str(TensorSpec.of(result)) for result in results)}), but "
                f"({'; '.join(map(str, self._specs))}) when it was captured; a graph returns the "
                f"same kinds of tensors each time"
            )

    def close(self) -> None:
        self.inputs = self.outputs = ()


def _fill_with_nonsense(tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


class _GraphRun:
    """A recorded CUDA graph."""

    def __init__(self, request: _Request, device: torch.device) -> None:
        buffers = request.buffers()
        self._recording = Recording(
            request.fn,
            buffers,
            device,
            request.pool,
            request.warmup,
            lambda: request.look_for_host_reads(buffers),
        )
        self.inputs = buffers
        self.outputs = _results(request.signature.name, self._recording.result)
        self.single = isinstance(self._recording.result, Tensor)
        self.pool_bytes = self._recording.pool_bytes

    def run(self) -> None:
        self._recording.replay()

    def close(self) -> None:
        self._recording.close()
        self.inputs = self.outputs = ()


class Captured(Generic[Result]):
    """A callable bound to one kind of input; made by `capture`.

    Calling it copies the tensors in, runs, and returns the static outputs: **the next call
    overwrites them**, so `clone()` what must last, or call `fresh`. Calls from several threads
    run one after another; only `fresh` hands a thread results that no other thread can overwrite.
    """

    name: str
    backend: str
    """What really runs it: less than what was asked after stepping down."""
    signature: Signature
    seconds: float
    """Time that capturing took, warm-up and compilation included."""
    calls: int
    """Number of calls so far."""

    def __init__(
        self,
        request: _Request,
        backend: str,
        run: _Run | None,
        device: torch.device | None,
        seconds: float,
    ) -> None:
        self.name, self.signature = request.signature.name, request.signature
        self.backend, self.seconds, self.calls = backend, seconds, 0
        self._fn, self._pool = request.fn, request.pool
        self._run, self._device = run, device
        self._closed = False

    def __call__(self, *tensors: Tensor) -> Result:
        """Run on these tensors.

        Raises:
            SignatureError: They differ from the captured ones in number, shape, dtype, device or
                layout, or a static one has another address.
            CaptureError: The capture was closed.
        """
        self.signature.check(tensors)
        if self._run is None:
            return self._run_eagerly(tensors)
        with self._begin_call() as run, ordinary_tensors():
            for position, (buffer, tensor) in enumerate(zip(run.inputs, tensors)):
                if buffer is not tensor and position not in self.signature.addresses:
                    buffer.copy_(tensor)
            run.run()
            return self._returned(run.outputs)

    def fresh(self, *tensors: Tensor) -> Result:
        """Run on these tensors and return copies, which no later call overwrites."""
        with self._pool.lock:
            result = self(*tensors)
            if isinstance(result, Tensor):
                return cast(Result, result.clone())
            return cast(Result, tuple(output.clone() for output in result))

    def replay(self) -> Result:
        """Run on what the buffers in `inputs` hold now, for callers that write into them."""
        with self._begin_call() as run, ordinary_tensors():
            run.run()
            return self._returned(run.outputs)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The static input buffers, and the caller's own tensors where static; eager has none."""
        return self._run.inputs if self._run is not None else ()

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the static buffers, the caller's own tensors left out."""
        if self._run is None:
            return 0
        own = [
            buffer
            for position, buffer in enumerate(self._run.inputs)
            if position not in self.signature.addresses
        ]
        storages = [tensor.untyped_storage() for tensor in (*own, *self._run.outputs)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def pool_bytes(self) -> int:
        """Bytes by which recording made the shared pool grow; 0 without a graph."""
        return self._run.pool_bytes if self._run is not None else 0

    def close(self) -> None:
        """Let go of graph and buffers; results that someone still holds stay readable."""
        with self._pool.lock:
            if not self._closed and self._run is not None:
                self._run.close()
            self._closed = True

    @contextlib.contextmanager
    def _begin_call(self) -> Iterator[_Run]:
        with self._pool.lock:
            self._require_open()
            if self._run is None:
                raise CaptureError(f"{self.name}: the eager backend has no buffers to replay")
            if self._device is not None:
                self._pool.follow(self._device)
            self.calls += 1
            yield self._run

    def _returned(self, outputs: tuple[Tensor, ...]) -> Result:
        assert self._run is not None
        return cast(Result, outputs[0] if self._run.single else outputs)

    def _run_eagerly(self, tensors: tuple[Tensor, ...]) -> Result:
        with self._pool.lock:
            self._require_open()
            self.calls += 1
        with ordinary_tensors():
            return cast(Result, self._fn(*tensors))

    def _require_open(self) -> None:
        if self._closed:
            raise CaptureError(f"{self.name}: this capture was dropped; capture it again")


def capture(
    fn: Callable[..., Result],
    example_inputs: Sequence[Tensor],
    *,
    backend: str = "cuda-graph",
    pool: GraphPool | None = None,
    static: Iterable[int] = (),
    warmup: int | None = None,
    name: str = "",
    strict: bool = True,
    poison: bool = False,
    allow_host_reads: bool = False,
) -> Captured[Result]:
    """Bind a callable to static buffers shaped like the example inputs.

    Args:
        fn: Positional tensors in, one tensor or a tuple of tensors out, always of the same kinds.
            What it closes over is used in place.
        example_inputs: One call's tensors; their values are used for warming up.
        backend: "cuda-graph", "replay" or "eager".
        pool: Memory and lock to share with other captures of one owner; by default its own.
        static: Positions of inputs that keep their address: not copied, another address is refused.
        warmup: Runs before capturing (default: 3 for a graph, else 1).
        name: What messages call it.
        strict: Raise when the backend cannot be used. Otherwise one line is logged and the next of
            cuda-graph, replay, eager is tried.
        poison: For the replay backend: every call hands out new outputs and fills the previous ones
            with NaN (whole numbers: their largest value), which finds results kept without cloning.
        allow_host_reads: Do not look for values read on the host. The look costs one more run
            (without compiled code) and is taken after warming up, so not with ``warmup=0``.

    Returns:
        An object to call with tensors of exactly these kinds.

    Raises:
        InputError: An unknown backend, an impossible `static`, or results that are not tensors.
        CaptureError: The backend has no device here, memory ran out, or the callable failed.
        CompileError: The callable holds a part that could not be compiled.
    """
    require_backend(backend)
    name = name or getattr(fn, "__qualname__", type(fn).__name__)
    inputs = tuple(example_inputs)
    if not all(isinstance(tensor, Tensor) for tensor in inputs):
        raise InputError(f"{name}: example inputs must be tensors; close over anything else")
    if warmup is not None and warmup < 0:
        raise InputError(f"{name}: warmup must be 0 or more runs, got {warmup}")
    signature, pool = Signature(name, inputs, static=static), pool or GraphPool()

    candidates = BACKENDS[BACKENDS.index(backend) :]
    for candidate, lesser in zip(candidates, (*candidates[1:], None)):
        runs = _WARMUP[candidate] if warmup is None else warmup
        request = _Request(fn, inputs, signature, pool, runs, poison, allow_host_reads)
        try:
            return _capture(request, candidate)
        except CaptureError as error:
            if strict or lesser is None:
                raise
            logger.warning("%s; %s is used instead", error, lesser)
    raise AssertionError("the last candidate returns or raises")


def require_backend(backend: str) -> None:
    """Raise `InputError` unless a backend has this name."""
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def _capture(request: _Request, backend: str) -> Captured[Any]:
    name, begin = request.signature.name, time.perf_counter()
    device = require_cuda(name, request.inputs) if backend == "cuda-graph" else None
    try:
        with request.pool.lock, ordinary_tensors():
            run = _make_run(request, backend, device)
    except (CaptureError, CompileError, InputError):
        raise
    except HostReadError as error:
        raise CaptureError(f"{name}: {error}; a graph cannot do that") from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise CaptureError(f"{name}: cannot be captured: {reason(error)}") from error
        needed = sum(tensor.nbytes for tensor in request.inputs)
        raise CaptureError(
            f"{name}: memory ran out while capturing over {needed} bytes of inputs: "
            f"{reason(error)}",
            needed_bytes=needed,
        ) from error
    return Captured(request, backend, run, device, time.perf_counter() - begin)


def _make_run(request: _Request, backend: str, device: torch.device | None) -> _Run | None:
    if device is not None:
        return _GraphRun(request, device)
    if backend == "replay":
        return _ReplayRun(request)
    for _ in range(request.warmup):
        _results(request.signature.name, request.fn(*request.inputs))
    return None
