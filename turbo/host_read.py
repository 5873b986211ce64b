"""A device's scalar on the host: copied to pinned memory, an event behind the copy awaited."""

from __future__ import annotations

import torch
from torch import Tensor


class HostRead:
    """Reads scalars one at a time, through memory and an event made at the first and reused.

    Only the first instance of a process pays for the memory: PyTorch keeps what is freed. A scalar
    on the CPU is read as it is.
    """

    def __init__(self) -> None:
        self._pinned: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def __call__(self, scalar: Tensor) -> float:
        """The value of a tensor of one element; all are of one dtype and device."""
        if not scalar.is_cuda:
            return float(scalar)
        if self._pinned is None or self._event is None:
            self._pinned = torch.empty(
                scalar.shape, dtype=scalar.dtype, device="cpu", pin_memory=True
            )
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pinned.copy_(scalar, non_blocking=True)
        self._event.record(torch.cuda.current_stream(scalar.device))
        self._event.synchronize()
        return float(self._pinned)
