"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from turbo.comfyui_http import is_loopback
from turbo.messages import one_line


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and end with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message, limit=None)}; see {self.prog} --help\n")


def without_folders(given: Sequence[str]) -> list[str]:
    """Arguments as others may read them: no folders of this machine, no names of others."""
    shown = []
    for argument in given:
        option, equals, value = (
            argument.rpartition("=") if argument[0:1] == "-" else ("", "", argument)
        )
        if "://" in value:
            value = value if is_loopback(value) else "URL"
        elif "/" in value:
            value = " ".join(Path(word).name or word for word in value.split())
        shown.append(option + equals + value)
    return shown
