"""A bounded collection of captured callables that share one memory pool."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .captured import Captured, Result, capture, require_backend
from .errors import CaptureError, InputError
from .graph import GraphPool
from .inductor import compile_counts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One callable to capture ahead of its first use."""

    key: Hashable
    fn: Callable[..., Any]
    inputs: Sequence[Tensor]
    static: tuple[int, ...] = ()

    @property
    def input_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs)


@dataclass(frozen=True, slots=True)
class CaptureCounters:
    """What a collection has done so far; equal before and after a warm request but for replays."""

    captures: int = 0
    """Callables captured."""
    replays: int = 0
    """Calls of captured callables."""
    misses: int = 0
    """Keys asked for that were not there."""
    evictions: int = 0
    """Captures dropped because the collection was full."""
    failures: int = 0
    """Captures that raised."""
    compilations: int = 0
    """Graphs that PyTorch's compiler traced in this process since the collection was made."""


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """One captured callable."""

    key: Hashable
    backend: str
    seconds: float
    """Time that capturing took."""
    calls: int
    buffer_bytes: int
    """Static inputs and outputs."""
    pool_bytes: int
    """What recording added to the shared pool (CUDA graphs only)."""


class Captures:
    """Captured callables by key, the least recently used dropped when there are too many.

    Give every callable and every kind of input (shape, batch, bucket) a key of its own: a key that
    is there stands for what it was made with. Any thread may use it; work runs one piece at a time,
    because the captures share memory.

    Args:
        backend: "cuda-graph", "replay" or "eager" for all of them.
        limit: Captures kept at a time. Dropping one gives its memory to later captures of this
            collection, not back to the device.
        strict: False lets a capture step down to a lesser backend, with a line in the log.
        warmup, poison, allow_host_reads: As in `capture`.
    """

    def __init__(
        self,
        *,
        backend: str = "cuda-graph",
        limit: int = 16,
        strict: bool = True,
        warmup: int | None = None,
        poison: bool = False,
        allow_host_reads: bool = False,
    ) -> None:
        require_backend(backend)
        if limit < 1:
            raise InputError(f"limit must be at least 1 capture, got {limit}")
        self.backend, self.limit, self.strict = backend, limit, strict
        self.warmup, self.poison, self.allow_host_reads = warmup, poison, allow_host_reads
        self._pool = GraphPool()
        self._entries: OrderedDict[Hashable, Captured[Any]] = OrderedDict()
        self._captures = self._misses = self._evictions = self._failures = 0
        self._calls_of_dropped = 0
        self._graphs_before = compile_counts().graphs

    def call(
        self, key: Hashable, fn: Callable[..., Result], *tensors: Tensor, static: Iterable[int] = ()
    ) -> Result:
        """Run what `key` stands for, after capturing `fn` for these tensors if it is not there.

        Returns:
            The static outputs, overwritten by the key's next call.

        Raises:
            SignatureError: The key was captured for another kind of input.
            CaptureError: The capture failed; other keys stay usable.
        """
        with self._pool.lock:
            return self.capture(key, fn, tensors, static=static)(*tensors)

    def capture(
        self,
        key: Hashable,
        fn: Callable[..., Result],
        example_inputs: Sequence[Tensor],
        *,
        static: Iterable[int] = (),
    ) -> Captured[Result]:
        """The capture kept under `key`, made from `fn` if it is not there."""
        with self._pool.lock:
            captured = self.get(key)
            if captured is None:
                self._misses += 1
                captured = self._capture(key, fn, example_inputs, static)
                self._make_room()
                self._entries[key] = captured
                self._captures += 1
            return captured

    def get(self, key: Hashable) -> Captured[Any] | None:
        """The capture kept under `key`, now the most recently used one."""
        with self._pool.lock:
            captured = self._entries.get(key)
            if captured is not None:
                self._entries.move_to_end(key)
            return captured

    def warm_up(
        self,
        wanted: Iterable[Wanted],
        on_progress: Callable[[Hashable, int, int], None] | None = None,
    ) -> tuple[CaptureReport, ...]:
        """Capture many keys, the largest inputs first: smaller ones then fit into its memory.

        Args:
            wanted: What to capture; keys that are there already are left alone. Other keys make
                room where there is none, the least recently used first.
            on_progress: Called with (key, done, total) before each capture.

        Raises:
            InputError: More keys than the collection keeps.
            CaptureError: One of them failed; those captured before it stay.
        """
        ordered = sorted(wanted, key=lambda each: each.input_bytes, reverse=True)
        keys = {each.key for each in ordered}
        if len(keys) > self.limit:
            raise InputError(f"{len(keys)} captures wanted, but limit is {self.limit}; raise it")
        for key in reversed([each.key for each in ordered]):
            self.get(key)  # the last to go now
        for done, each in enumerate(ordered):
            if on_progress:
                on_progress(each.key, done, len(ordered))
            if each.key not in self:
                self.capture(each.key, each.fn, each.inputs, static=each.static)
        return self.report()

    def discard(self, key: Hashable) -> None:
        """Drop a capture if it is there."""
        with self._pool.lock:
            captured = self._entries.pop(key, None)
            if captured is not None:
                self._drop(captured)

    def clear(self) -> None:
        """Drop all captures."""
        for key in tuple(self):
            self.discard(key)

    @property
    def counters(self) -> CaptureCounters:
        with self._pool.lock:
            calls = sum(captured.calls for captured in self._entries.values())
            return CaptureCounters(
                captures=self._captures,
                replays=self._calls_of_dropped + calls,
                misses=self._misses,
                evictions=self._evictions,
                failures=self._failures,
                compilations=compile_counts().graphs - self._graphs_before,
            )

    def report(self) -> tuple[CaptureReport, ...]:
        """One line a capture, the most recently used last."""
        with self._pool.lock:
            return tuple(
                CaptureReport(
                    key=key,
                    backend=captured.backend,
                    seconds=captured.seconds,
                    calls=captured.calls,
                    buffer_bytes=captured.buffer_bytes,
                    pool_bytes=captured.pool_bytes,
                )
                for key, captured in self._entries.items()
            )

    def __iter__(self) -> Iterator[Hashable]:
        """Keys, the least recently used first."""
        with self._pool.lock:
            return iter(tuple(self._entries))

    def __contains__(self, key: Hashable) -> bool:
        with self._pool.lock:
            return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _capture(
        self,
        key: Hashable,
        fn: Callable[..., Result],
        example_inputs: Sequence[Tensor],
        static: Iterable[int],
    ) -> Captured[Result]:
        try:
            return capture(
                fn,
                example_inputs,
                backend=self.backend,
                pool=self._pool,
                static=static,
                warmup=self.warmup,
                name=str(key),
                strict=self.strict,
                poison=self.poison,
                allow_host_reads=self.allow_host_reads,
            )
        except CaptureError as error:
            self._failures += 1
            held = sum(each.buffer_bytes + each.pool_bytes for each in self._entries.values())
            raise CaptureError(
                f"{error} ({len(self)} other captures hold {held} bytes and stay usable)",
                key=key,
                needed_bytes=error.needed_bytes,
            ) from error
        except Exception:
            self._failures += 1
            raise

    def _make_room(self) -> None:
        while len(self._entries) >= self.limit:
            key, oldest = self._entries.popitem(last=False)
            logger.info("dropping the capture of %s: more than %d are in use", key, self.limit)
            self._evictions += 1
            self._drop(oldest)

    def _drop(self, captured: Captured[Any]) -> None:
        captured.close()
        self._calls_of_dropped += captured.calls
