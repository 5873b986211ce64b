"""Text that others wrote, in messages."""

from __future__ import annotations

import errno
import os

from turbo.messages import one_line, reason


def test_messages_cannot_steer_a_terminal():
    assert one_line("a\n\tb \x1b]0;x\x07 \x9b \u202e é 灯 \udcff") == (
        "a b \\x1b]0;x\\x07 \\x9b \\u202e é 灯 \\udcff"
    )


def test_long_text_is_cut_unless_told_not_to():
    assert one_line("x" * 300) == "x" * 300
    assert one_line("x" * 301) == "x" * 297 + "..."
    assert one_line(ValueError("long " * 10), 12) == "long long..."
    assert len(one_line("x" * 1000, limit=None)) == 1000


def test_a_reason_has_no_path_and_no_number():
    error = OSError(errno.ENOENT, os.strerror(errno.ENOENT), "/home/somebody/a")
    assert reason(error) == "No such file or directory"
    assert reason(ValueError("embedded null byte")) == "embedded null byte"
