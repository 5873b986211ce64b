"""What the benchmark's commands are told, and how results show it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from turbo.comfyui_http import is_loopback
from turbo.messages import one_line

TEXTS = ("--prompt", "--negative")
"""Options whose values are no paths, whatever stands in them."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and end with code 2, and whose options have one name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message, limit=None)}; see {self.prog} --help\n")


def positive(text: str) -> float:
    """A finite number above 0, as an option's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def whole(low: int, high: int) -> Callable[[str], int]:
    """An option's `type`: whole numbers in a range, both ends included."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text[:20]) <= high):
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}, got {text!r}"
            )
        return int(text)

    return number


def without_folders(given: Sequence[str]) -> list[str]:
    """Arguments as others may read them: no folders of this machine, no names of others."""
    shown, option = [], ""
    for argument in given:
        name, value = _parted(argument)
        option = name.rstrip("=") or option  # a value alone belongs to the option before it
        shown.append(name + (value if option in TEXTS else _shortened(value)))
    return shown


def _parted(argument: str) -> tuple[str, str]:
    """``--name=value``, ``-nVALUE``, ``--name`` or a value: what names it, and its value."""
    if argument.startswith("--"):
        name, equals, value = argument.partition("=")
        return name + equals, value
    return (argument[:2], argument[2:]) if argument.startswith("-") else ("", argument)


def _shortened(value: str) -> str:
    """An address or path, or several paths, without what is nobody's business."""
    if "://" in value:
        return value if is_loopback(value) else "URL"
    if "/" in value:
        return " ".join(Path(word).name or word for word in value.split())
    return value
