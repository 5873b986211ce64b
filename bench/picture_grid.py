"""A picture of many pictures: a row for each prompt, a column for each way to make it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from bench.pictures import GAIN

WIDTH = 192
"""Pixels of a shown picture."""
MOST_ROWS = 12
_GAP, _LINE, _TEXT = 8, 16, 13
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (225, 225, 225)


@dataclass(frozen=True, slots=True)
class Cell:
    """One shown picture."""

    picture: Image.Image | None
    """`WIDTH` wide; None where there is none."""
    difference: Image.Image | None = None
    """From `shown_difference`, as wide; None for the exact picture."""
    note: str = ""
    """Figures, or why there is no picture."""


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and its pictures, in the order of the columns."""

    title: str
    cells: Sequence[Cell]


def draw_grid(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """Draw the first `MOST_ROWS` rows; below each picture stands its difference to the exact one.

    Args:
        title: What it shows.
        columns: Their headings.
        rows: Each with one cell a column.
    """
    rows = list(rows)[:MOST_ROWS]
    width = _GAP + len(columns) * (WIDTH + _GAP)
    lines = textwrap.wrap(title, width // 8)
    headings = _GAP + _LINE * len(lines) + _GAP
    top = headings + _LINE + _GAP
    grid = Image.new("RGB", (width, top + sum(_height(row) for row in rows)), _PAPER)
    pen = _Pen(grid)
    pen.write(_GAP, _GAP, lines)
    for number, column in enumerate(columns):
        pen.write(_left(number), headings, [column])
    for row in rows:
        pen.write(_GAP, top, [textwrap.shorten(row.title, width // 8, placeholder=" ...")])
        for number, cell in enumerate(row.cells):
            pen.draw(_left(number), top + _LINE, cell, _picture_height(row))
        top += _height(row)
    return grid


class _Pen:
    """Draws on a picture."""

    def __init__(self, grid: Image.Image) -> None:
        self._grid, self._draw = grid, ImageDraw.Draw(grid)
        self._font = ImageFont.load_default(size=_TEXT)

    def write(self, left: int, top: int, lines: Sequence[str]) -> None:
        for number, line in enumerate(lines):
            self._draw.text((left, top + number * _LINE), line, _INK, self._font)

    def draw(self, left: int, top: int, cell: Cell, height: int) -> None:
        below = top + height + 2
        if cell.picture is None:
            box = (left, top, left + WIDTH - 1, top + height - 1)
            self._draw.rectangle(box, _FAINT)
            lines = textwrap.wrap(cell.note, WIDTH // 8)
            self.write(left + 4, top + 4, lines[: height // _LINE])
            return
        self._grid.paste(cell.picture, (left, top))
        if cell.difference is None:
            self.write(left, below, ["differences to it,", f"shown {GAIN} times as large"])
            return
        self._grid.paste(cell.difference, (left, below))
        self.write(left, below + height, [cell.note])


def _left(column: int) -> int:
    return _GAP + column * (WIDTH + _GAP)


def _height(row: Row) -> int:
    return _LINE + 2 * (_picture_height(row) + 2) + _LINE + 2 * _GAP


def _picture_height(row: Row) -> int:
    return max((cell.picture.height for cell in row.cells if cell.picture), default=WIDTH)
