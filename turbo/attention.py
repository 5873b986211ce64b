"""The network's attention by several kernels: the same formula, other roundings, other speed.

* ``sdpa``: PyTorch's own choice among its kernels, on any device.
* ``cudnn``, ``flash``, ``efficient``: that one of PyTorch's kernels and no other.
* ``xformers``: the package's choice among its kernels.
* ``flex``: compiled by Inductor from the formula, on a CPU too.

The choice is known before anything is compiled or captured, one for each number of tokens
(`AttentionChoice`); ``auto`` measures at warm-up which is fastest. All tokens see each other, so
there is no mask, which would rule out the fast kernels.

The text encoder (causal, in float32, several queries a key) and the autoencoder (one head of 512
channels) ask for what hardly any of these kernels has: they stay with ``sdpa``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbo.compile import CaptureError, CompileError, InputError, capture, compiled
from turbo.errors import AccelerationError, BadInputError
from turbo.messages import one_line
from turbo.plan import ATTENTION

AUTO, SDPA, FLEX, XFORMERS = "auto", "sdpa", "flex", "xformers"

CANDIDATES = (SDPA, "cudnn", "flash", "efficient", XFORMERS)
"""What ``auto`` compares: not ``flex``, which would compile for seconds at each shape."""

MARGIN = 0.05
"""Share of the time by which a candidate must be faster than those before it to be taken.

Otherwise noise would decide, and with it the last bits of a picture.
"""

_PYTORCH = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_HALVES = (torch.bfloat16, torch.float16)
_DTYPES: Mapping[str, tuple[torch.dtype, ...]] = {"cudnn": _HALVES, "flash": _HALVES}
"""Those that do not take every dtype."""
_TRIAL_TOKENS = 32
_LAUNCHES = 10
_RUNS = 7


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q @ k.T / sqrt(head_dim)) @ v`` for each head.

    Args:
        backend: One of `turbo.plan.ATTENTION` but ``auto``.
        q: [batch, tokens, heads, head_dim], any strides.
        k: As `q`.
        v: As `q`.

    Returns:
        Shape and dtype of `q`.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1.
    """
    if backend == SDPA:
        return _sdpa(q, k, v)
    if backend == FLEX:
        return _flex(q, k, v) if torch.compiler.is_compiling() else _compiled_flex(q, k, v)
    mixed: Tensor = _pinned(q, k, v, backend)
    return mixed


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed: Tensor = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )
    return mixed.transpose(1, 2)


# Opaque to the compiler: what chooses a kernel for a block of code would keep PyTorch from finding
# the compiled code around it in its cache.
@torch.library.custom_op("turbo::attention", mutates_args=())
def _pinned(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    if backend == XFORMERS:
        ops = importlib.import_module("xformers.ops")
        mixed: Tensor = ops.memory_efficient_attention(q, k, v)
        return mixed.contiguous()
    with sdpa_kernel(_PYTORCH[backend]):
        return _sdpa(q, k, v).contiguous()


@_pinned.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return q.new_empty(q.shape)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():  # whoever looks for host reads steps around compiled code
        return _sdpa(q, k, v)
    from torch.nn.attention.flex_attention import flex_attention  # imports the compiler

    if q.device.type == "cpu":
        # Where a view is made in the same compiled code, PyTorch 2.13 forgets where in its tensor
        # it begins: queries were taken for the values that lie behind them.
        q, k, v = (part.contiguous() for part in (q, k, v))
    mixed = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert isinstance(mixed, Tensor)
    return mixed.transpose(1, 2)


def _compiled_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Where nothing around it is compiled: on its own, once for each kind of tensors."""
    layouts = tuple((tensor.shape, tensor.stride()) for tensor in (q, k, v))
    try:
        mixed: Tensor = _flex_for(layouts, q.dtype, q.device)(q, k, v)
    except CompileError as error:
        raise AccelerationError(str(error)) from error
    return mixed


@lru_cache(maxsize=64)
def _flex_for(layouts: object, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    run: Callable[..., Tensor] = compiled(_flex, name="flex attention")
    return run


class AttentionChoice:
    """Which backend each shape of a network's attention takes.

    A shape keeps what it had at its first use, so what is compiled or captured for it stays true.

    Args:
        asked: One of `turbo.plan.ATTENTION`; with ``auto``, shapes that nobody measures have sdpa.
    """

    def __init__(self, asked: str = SDPA) -> None:
        self.asked = asked
        self._fixed: dict[tuple[int, int], str] = {}

    def of(self, x: Tensor) -> str:
        """The backend for a residual stream, [batch, tokens, dim]."""
        usual = SDPA if self.asked == AUTO else self.asked
        return self._fixed.setdefault((x.shape[0], x.shape[1]), usual)

    def is_open(self, batch: int, tokens: int) -> bool:
        """Whether a shape is still to be measured."""
        return self.asked == AUTO and (batch, tokens) not in self._fixed

    def fix(self, batch: int, tokens: int, backend: str) -> None:
        """Give a shape its backend.

        Raises:
            ValueError: The shape has another one.
        """
        if self._fixed.setdefault((batch, tokens), backend) != backend:
            raise ValueError(f"{batch} x {tokens} tokens have had their attention before")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTimes:
    """What a shape was measured to take."""

    batch: int
    tokens: int
    chosen: str
    """The backend that this shape has from now on."""
    microseconds: dict[str, float]
    """Backend -> median time of one attention on the device; those that can run."""


class ChoiceMemory(Protocol):
    """Keeps choices for later processes, as `turbo.compile.CompileCache` does."""

    def recall(self, name: str) -> Any:
        """What was kept under a name; None if nothing."""

    def remember(self, name: str, value: Any) -> None:
        """Keep a value."""


def pick_attention(asked: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What to do about `asked`: itself, and sdpa for ``auto`` where there is nothing to choose.

    Args:
        asked: One of `turbo.plan.ATTENTION`.
        device: Where the network runs.
        dtype: What it calculates in.
        head_dim: Channels of a head.

    Raises:
        BadInputError: It is none of these, or cannot run here; says why, and what can.
    """
    if asked not in ATTENTION:
        raise BadInputError(f"attention must be one of {', '.join(ATTENTION)}, got {asked!r}")
    if asked == AUTO:
        return AUTO if device.type == "cuda" else SDPA
    problem = why_not(asked, device, dtype, head_dim)
    if problem is not None:
        can = usable_attention(device, dtype, head_dim)
        raise BadInputError(
            f"attention {asked!r} {problem}; on {device} use {' or '.join((AUTO, *can))}"
        )
    return asked


def usable_attention(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> tuple[str, ...]:
    """The backends that can run; ``flex`` is not tried out, which would compile it."""
    return tuple(
        name
        for name in ATTENTION
        if name != AUTO and why_not(name, device, dtype, head_dim, may_compile=False) is None
    )


def why_not(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    may_compile: bool = True,
) -> str | None:
    """Why a backend cannot run, to follow its name; None if it can.

    What no rule tells is found out by running it once on a few tokens.

    Args:
        backend: One of `turbo.plan.ATTENTION` but ``auto``.
        device: Where it should run.
        dtype: Of queries, keys and values.
        head_dim: Channels of a head.
        may_compile: Whether that may take the seconds that compiling takes.
    """
    if backend == SDPA:
        return None
    if backend == FLEX:
        missing = missing_compiler(device)
        if missing is not None or not may_compile:
            return missing
    elif device.type != "cuda":
        return f"needs a CUDA device, got {device}"
    allowed = _DTYPES.get(backend, (dtype,))
    if dtype not in allowed:
        return (
            f"takes {' and '.join(map(_name, allowed))}, the network calculates in {_name(dtype)}"
        )
    if backend == XFORMERS and importlib.util.find_spec("xformers") is None:
        return "needs the package xformers, which is not installed (pip install xformers)"
    return _failed_trial(backend, device, dtype, head_dim)


def missing_compiler(device: torch.device) -> str | None:
    """What compiling for a device needs and this machine lacks, as the end of a sentence."""
    if device.type == "cuda":
        has = importlib.util.find_spec("triton") is not None
        return None if has else "needs Triton, which is not installed (pip install triton)"
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    return None if found else f"needs a C++ compiler, and {name} is not found; install one"


@torch.inference_mode()
def _failed_trial(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")  # PyTorch says in them why a kernel does not want to
        try:
            with on_device:
                q, k, v = _random_qkv(1, _TRIAL_TOKENS, 1, head_dim, device, dtype)
                attend(backend, q, k, v).cpu()  # a failed launch shows when waited for
        except Exception as error:  # the package's own, the compiler's and the driver's
            says_why = backend in _PYTORCH
            return _refusal(error, [str(one.message) for one in told if says_why])
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refusal(error: Exception, told: Sequence[str]) -> str:
    """What the error says, or better what PyTorch's warnings said before it."""
    causes = [text for text in told if "not used because" not in text and "disabled" not in text]
    said = (causes or [str(error) or type(error).__name__])[0]
    return f"cannot run here: {one_line(said.partition(' (Triggered internally')[0]).rstrip('.')}"


def measure_attention(
    choice: AttentionChoice,
    shapes: Iterable[tuple[int, int]],
    *,
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    candidates: Sequence[str] = CANDIDATES,
    memory: ChoiceMemory | None = None,
) -> tuple[AttentionTimes, ...]:
    """Give each shape that is still open its fastest backend.

    Args:
        choice: The network's; changed in place.
        shapes: (batch, tokens).
        heads: Of the network.
        head_dim: Channels of a head.
        device: Where the network runs; the current device if it is a CUDA device.
        dtype: What it calculates in.
        candidates: What to compare; those that cannot run are left out.
        memory: What earlier processes chose, which is taken as it is, and where to keep the rest:
            compiled code is of one choice, and a second measurement may come out otherwise.

    Returns:
        What was measured, for shapes that were open.
    """
    open_shapes = [shape for shape in dict.fromkeys(shapes) if choice.is_open(*shape)]
    if not open_shapes:
        return ()
    can = [name for name in candidates if why_not(name, device, dtype, head_dim) is None]
    measured = []
    for batch, tokens in open_shapes:
        name = f"attention-{batch}x{tokens}"
        kept = None if memory is None else memory.recall(name)
        if kept in can:
            choice.fix(batch, tokens, kept)
            continue
        qkv = _random_qkv(batch, tokens, heads, head_dim, device, dtype)
        timed = {name: _time(name, qkv) for name in can}
        microseconds = {name: taken for name, taken in timed.items() if taken is not None}
        chosen = _fastest(microseconds)
        choice.fix(batch, tokens, chosen)
        if memory is not None:
            memory.remember(name, chosen)
        measured.append(
            AttentionTimes(batch=batch, tokens=tokens, chosen=chosen, microseconds=microseconds)
        )
    return tuple(measured)


def _random_qkv(
    batch: int, tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Views into one tensor, as the network has them; no random state is touched."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, tokens, 3, heads, head_dim)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).unbind(2)


def _fastest(microseconds: Mapping[str, float]) -> str:
    """The first in their order that none of the later is faster than by the margin."""
    best = next(iter(microseconds), SDPA)
    for name, taken in microseconds.items():
        if taken < (1 - MARGIN) * microseconds[best]:
            best = name
    return best


def _time(backend: str, qkv: tuple[Tensor, ...]) -> float | None:
    """Median microseconds of one attention on the device; None if it fails after all.

    In a CUDA graph, as the network runs: launching a small attention takes longer than itself.
    """

    def launches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(_LAUNCHES):
            mixed = attend(backend, q, k, v)
        return mixed

    device = qkv[0].device
    way = "cuda-graph" if device.type == "cuda" else "replay"
    try:
        captured = capture(launches, qkv, backend=way, name=f"{backend} attention")
    except (CaptureError, CompileError, InputError):
        return None
    times = [_milliseconds(captured.replay, device) for _ in range(_RUNS)]
    captured.close()
    return 1000 * statistics.median(times) / _LAUNCHES


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
