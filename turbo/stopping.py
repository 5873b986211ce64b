"""One thread tells others that what they do is no longer wanted."""

from __future__ import annotations

import threading


class StoppedError(Exception):
    """Work ended because another thread asked for it; nobody needs to hear of it."""


class Stop:
    """Asked for by one thread, found by the others where they check."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self) -> None:
        """Have those end who check from now on."""
        self._asked.set()

    def check(self) -> None:
        """Raise StoppedError if somebody asked."""
        if self._asked.is_set():
            raise StoppedError("another thread asked for this to end")
