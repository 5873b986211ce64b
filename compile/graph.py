"""CUDA graphs: recording a callable, replaying it, and the memory that recordings share.

Two facts about PyTorch's private pools shape this file. What a recording frees while it records
(its intermediate tensors) is reused by the next recording of the same pool, so graphs of one pool
must never run at the same time: they follow one another through `GraphPool.follow`. What is still
referenced (inputs and outputs) is never reused, so these are held strongly for as long as the graph
lives.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import CaptureError, InputError


class GraphPool:
    """Memory, side stream and running order that several graphs of one device share.

    One stream serves every warm-up and recording: cuBLAS keeps a workspace (32 MiB on Hopper) for
    each stream that it has seen. Making a pool touches no device.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while a capture that uses the pool is made or run."""
        self._device: torch.device | None = None
        self._handle: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None
        self._alive = 0

    def open(self, device: torch.device) -> tuple[Any, torch.cuda.Stream]:
        """The pool's handle and side stream, made on first use.

        Raises:
            InputError: The pool already belongs to another device.
        """
        if self._device not in (None, device):
            raise InputError(f"the graph pool is on {self._device}, the inputs are on {device}")
        self._device = device
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._handle, self._stream

    def renew(self) -> None:
        """Give later recordings memory and a stream of their own, after one that failed.

        Graphs that were recorded before keep theirs and stay usable.
        """
        self._handle = self._stream = None

    def keep(self) -> None:
        """A recording lives."""
        self._alive += 1

    def release(self) -> None:
        """A recording is gone; PyTorch forgets a pool with its last graph, if memory is held."""
        self._alive -= 1
        if self._alive == 0:
            self._handle = None

    def follow(self, device: torch.device) -> None:
        """Make the current stream wait for whatever the pool's last user enqueued."""
        current = torch.cuda.current_stream(device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current


def require_cuda(name: str, inputs: tuple[Tensor, ...]) -> torch.device:
    """The device to record on.

    Raises:
        CaptureError: This process has no CUDA device, or an input is not on one.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise CaptureError(f"{name}: another CUDA graph is being recorded on this stream")
    if not torch.cuda.is_available():
        raise CaptureError(
            f"{name}: this process has no CUDA device, which a CUDA graph needs; "
            f'ask for backend="replay" or "eager"'
        )
    devices = {tensor.device for tensor in inputs}
    if not devices:
        return torch.device("cuda", torch.cuda.current_device())
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        raise CaptureError(
            f"{name}: a CUDA graph needs all inputs on one CUDA device, they are on "
            f"{', '.join(sorted(map(str, devices)))}"
        )
    return next(iter(devices))


class Recording:
    """One recorded CUDA graph and the tensors at the addresses it reads and writes.

    Args:
        fn: Run `warmup` times on the pool's side stream, then recorded once.
        inputs: Its arguments, kept by the recording.
        device: A CUDA device.
        pool: Where its memory comes from.
        warmup: Runs before recording: they compile, tune and make cuBLAS workspaces, none of which
            may happen while recording.
        check: Called after the warm-up, before recording.
    """

    def __init__(
        self,
        fn: Callable[..., object],
        inputs: tuple[Tensor, ...],
        device: torch.device,
        pool: GraphPool,
        warmup: int,
        check: Callable[[], None],
    ) -> None:
        self.inputs = inputs
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()
        handle, stream = pool.open(device)
        pool.follow(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            # Leaving this block restores the caller's stream even where ending a spoiled recording
            # raises, which torch.cuda.graph alone does not.
            with torch.cuda.device(device), torch.cuda.stream(stream):
                for _ in range(warmup):
                    fn(*inputs)
                check()
                torch.cuda.synchronize(device)
                gc.collect()
                torch.cuda.empty_cache()
                before = torch.cuda.memory_reserved(device)
                # thread_local: other threads may allocate and copy while this one records.
                with torch.cuda.graph(
                    self._graph, pool=handle, stream=stream, capture_error_mode="thread_local"
                ):
                    self.result = fn(*inputs)
                self.pool_bytes = max(0, torch.cuda.memory_reserved(device) - before)
            torch.cuda.synchronize(device)
        except BaseException as error:
            self._abandon(error)
            raise
        self._is_open = True
        pool.keep()

    def _abandon(self, error: BaseException) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            # The frames that failed hold the tensors that filled the memory.
            traceback.clear_frames(error.__traceback__)
        self.result = None
        self._pool.renew()
        # A spoiled recording can make each of these raise; the first error is the one to show.
        for step in (self._graph.reset, gc.collect, torch.cuda.empty_cache):
            with contextlib.suppress(RuntimeError):
                step()

    def replay(self) -> None:
        self._graph.replay()

    def close(self) -> None:
        """Free the graph; its outputs live on while someone holds them."""
        torch.cuda.synchronize(self._device)
        self._graph.reset()
        if self._is_open:
            self._is_open = False
            self._pool.release()
        self.result = None
        self.inputs = ()
