"""A picture of many pictures: a row for each prompt, a column for each way to make it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFont

WIDTH = 192
"""Pixels of a shown picture."""
GAIN = 4
"""Differences are shown that many times as large: most would be black otherwise."""
MOST_ROWS = 12
_GAP, _LINE, _TEXT = 8, 16, 13
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (225, 225, 225)


@dataclass(frozen=True, slots=True)
class Cell:
    """One shown picture."""

    picture: Image.Image | None
    """None where there is none; the note says why."""
    difference: Image.Image | None = None
    """From `shown_difference`."""
    note: str = ""
    """One line below it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and its pictures, in the order of the columns."""

    title: str
    cells: Sequence[Cell]


def shown(picture: Image.Image) -> Image.Image:
    """A picture as small as the grid shows it."""
    return picture.convert("RGB").resize(_small(picture), Image.Resampling.LANCZOS)


def shown_difference(ours: Image.Image, theirs: Image.Image) -> Image.Image:
    """Absolute difference, averaged over what becomes one pixel, times `GAIN`."""
    difference = ImageChops.difference(ours.convert("RGB"), theirs.convert("RGB"))
    small = difference.resize(_small(ours), Image.Resampling.BOX)
    return small.point(lambda value: min(255, value * GAIN))


def draw_grid(title: str, columns: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """Draw the first `MOST_ROWS` rows; below each picture stands its difference to the exact one.

    Args:
        title: What it shows.
        columns: Their headings.
        rows: Each with one cell a column.
    """
    columns, rows = list(columns), list(rows)[:MOST_ROWS]
    width = _GAP + len(columns) * (WIDTH + _GAP)
    title_lines = textwrap.wrap(title, max(20, width // 8))
    top = _GAP + _LINE * (len(title_lines) + 1) + _GAP
    heights = [_height(row) for row in rows]
    grid = Image.new("RGB", (width, top + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=_TEXT)
    for number, line in enumerate(title_lines):
        draw.text((_GAP, _GAP + number * _LINE), line, _INK, font)
    for number, column in enumerate(columns):
        draw.text((_left(number), top - _GAP - _LINE), column, _INK, font)
    for row, height in zip(rows, heights):
        _draw_row(grid, draw, font, row, top)
        top += height
    return grid


def _draw_row(
    grid: Image.Image,
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    row: Row,
    top: int,
) -> None:
    limit = max(20, grid.width // 8)
    draw.text((_GAP, top), textwrap.shorten(row.title, limit, placeholder=" ..."), _INK, font)
    height = _picture_height(row)
    for number, cell in enumerate(row.cells):
        left, below = _left(number), top + _LINE
        for picture in (cell.picture, cell.difference):
            if picture is not None:
                grid.paste(picture, (left, below))
            elif picture is cell.picture:
                draw.rectangle((left, below, left + WIDTH - 1, below + height - 1), _FAINT)
            below += height + 2
        for line in textwrap.wrap(cell.note, WIDTH // 7)[:2]:
            draw.text((left, below), line, _INK, font)
            below += _LINE


def _left(column: int) -> int:
    return _GAP + column * (WIDTH + _GAP)


def _height(row: Row) -> int:
    return _LINE + 2 * (_picture_height(row) + 2) + 2 * _LINE + _GAP


def _picture_height(row: Row) -> int:
    return max((cell.picture.height for cell in row.cells if cell.picture), default=WIDTH)


def _small(picture: Image.Image) -> tuple[int, int]:
    return WIDTH, max(1, round(picture.height * WIDTH / picture.width))
