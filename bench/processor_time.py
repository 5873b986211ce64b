"""How busy other programs keep the processors while something is measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

LEAST_S = 0.5
"""The system counts in hundredths of a second, on each processor."""


@dataclass(frozen=True, slots=True)
class ProcessorTime:
    """Seconds since some moment: that passed, and that processors worked in them."""

    passed_s: float
    all_s: float
    """Of all programs."""
    ours_s: float
    """Of this process and of its children that have ended."""
    processors: int

    @classmethod
    def now(cls) -> ProcessorTime:
        """Read the clocks."""
        import psutil

        times = psutil.cpu_times()
        resting = times.idle + getattr(times, "iowait", 0.0)
        within = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user's too
        ours = os.times()
        return cls(
            passed_s=time.monotonic(),
            all_s=sum(times) - resting - within,
            ours_s=sum(ours[:4]),
            processors=os.cpu_count() or 1,
        )

    def others_share(self, before: ProcessorTime) -> float:
        """Share of the processors, 0 to 1, that other programs have used since.

        0 after less than `LEAST_S`, in which it cannot be told.
        """
        passed_s = self.passed_s - before.passed_s
        if passed_s < LEAST_S:
            return 0.0
        others_s = (self.all_s - before.all_s) - (self.ours_s - before.ours_s)
        return min(1.0, max(0.0, others_s / (passed_s * self.processors)))
