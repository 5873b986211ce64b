"""Text that others wrote, as a message of one line shows it."""

from __future__ import annotations


def one_line(text: object, limit: int | None = 300) -> str:
    """Any text in one line, without what could steer a terminal (file and tensor names may).

    Args:
        text: Anything that has a text.
        limit: Most characters; what is longer ends in "...". None never cuts.
    """
    words = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
    return line if limit is None or len(line) <= limit else line[: limit - 3] + "..."


def reason(error: Exception) -> str:
    """Why something failed: the system's words alone, where it has some."""
    return getattr(error, "strerror", None) or str(error)
