"""The picture grid: each side's picture, and under it how far it lies from the first side's."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from PIL import Image

from bench.pictures import GAIN, load_picture, shown, shown_difference
from bench.reporting.files import ResultsFile
from bench.reporting.markup import NOTHING, TIMES, figure, join, note, number, section, tag
from bench.results import ResultsFileError

WIDEST = 480
"""Pixels of an embedded picture's width at the most."""
MOST_ROWS = 3
"""Rounds or prompts that are shown of a file."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A side's picture of a round, or the reason why there is none."""

    name: str
    image: Image.Image | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Pictures of one request; the first is what the others are compared with."""

    title: str
    tiles: list[Tile]
    distances: list[Mapping[str, Any]]
    """What the file has on each tile's distance from the first."""


def gallery(files: Sequence[ResultsFile]) -> Markup:
    """All pictures."""
    shown = [
        figure(f"{row.title}: {file.title}", _grid(row))
        for file in files
        for row in [*_rounds(file), *_prompts(file)][:MOST_ROWS]
    ]
    return section("Pictures", [
        note(
            "The first picture of each row is what the others are compared with. Under each "
            f"other one is its absolute difference from it, amplified {TIMES}{GAIN}: black "
            f"is equal, and what differs by {255 // GAIN + 1} of 255 or more is full. PSNR "
            f"and SSIM are those of the results file. Shown at most {WIDEST} pixels wide, and of "
            f"each file {MOST_ROWS} rows at most."
        ),
        shown,
    ]) if shown else Markup("")  # fmt: skip


def _rounds(file: ResultsFile) -> Iterator[Row]:
    """A row for each round of a run or comparison; round 0 came before the timed ones."""
    sides = {side.name: side.data.get("pictures", []) for side in file.sides if not side.withheld}
    numbers = {entry.get("round", 0) for entries in sides.values() for entry in entries}
    for number_ in sorted(numbers, key=lambda one: (one == 0, one)):
        chosen = [
            (name, entry)
            for name, entries in sides.items()
            for entry in entries
            if entry.get("round", 0) == number_
        ]
        first = chosen[0][0]
        yield Row(
            f"Round {number_}" if number_ else "The checked pictures, before the rounds",
            [_tile(file, name, entry) for name, entry in chosen],
            [_distance(file, name, first, number_) for name, _ in chosen],
        )


def _distance(file: ResultsFile, name: str, first: str, number_: int) -> Mapping[str, Any]:
    """What the file has of two sides' pictures; both measures are the same both ways."""
    pairs: Mapping[str, Any] = file.data.get("pictures", {})
    entries = pairs.get(f"{name} / {first}") or pairs.get(f"{first} / {name}") or []
    return next((entry for entry in entries if entry.get("round", 0) == number_), {})


def _prompts(file: ResultsFile) -> Iterator[Row]:
    """A row for each prompt of a quality file, the exact picture in front."""
    columns = {"exact": file.data.get("exact", {})} | file.data.get("options", {})
    columns["another seed"] = file.data.get("another_seed", {})
    pictures = {name: column.get("pictures", []) for name, column in columns.items()}
    numbers = sorted({entry.get("prompt", 0) for entries in pictures.values() for entry in entries})
    for number_ in numbers if file.kind == "quality" else []:
        chosen = [
            (name, entry)
            for name, entries in pictures.items()
            for entry in entries
            if entry.get("prompt", 0) == number_ and "file" in entry
        ]
        if chosen and chosen[0][0] == "exact":
            yield Row(
                f"Prompt {number_ + 1}",
                [_tile(file, name, entry) for name, entry in chosen],
                [_last_stage(entry) for _, entry in chosen],
            )


def _last_stage(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    stages = [*entry.get("stages", {}).values()]
    return stages[-1] if stages else {}


def _tile(file: ResultsFile, name: str, entry: Mapping[str, Any]) -> Tile:
    try:
        return Tile(name, load_picture(file.path, entry))
    except ResultsFileError as error:
        return Tile(name, None, str(error).partition(": ")[2])


def _grid(row: Row) -> Markup:
    first = row.tiles[0]
    shown = [_figure(first.image, first.name, first.name, first.reason)]
    for tile, distance in zip(row.tiles[1:], row.distances[1:]):
        caption = join(tile.name, tag("br"), _level(distance))
        shown.append(_figure(tile.image, tile.name, caption, tile.reason, _difference(first, tile)))
    return tag("div", shown, class_="pictures")


def _level(distance: Mapping[str, Any]) -> Markup | str:
    if distance.get("identical"):
        return "identical"
    if "psnr_db" not in distance and "ssim" not in distance:
        return tag("span", "no distance recorded", class_="note")
    ssim = distance.get("ssim")
    shown = NOTHING if ssim is None else f"{ssim:.4f}"
    return f"PSNR {number(distance.get('psnr_db'))} dB, SSIM {shown}"


def _figure(
    image: Image.Image | None,
    name: str,
    caption: Markup | str,
    reason: str,
    difference: Image.Image | str | None = None,
) -> Markup:
    picture = _embedded(image, name) if image else tag("div", f"no picture: {reason}",
                                                       class_="missing")  # fmt: skip
    below: Markup | None = None
    if isinstance(difference, Image.Image):
        below = _embedded(difference, f"{name}: difference from the first, {TIMES}{GAIN}")
    elif difference:
        below = tag("div", difference, class_="missing")
    return tag("figure", picture, tag("figcaption", caption), below)


def _difference(first: Tile, other: Tile) -> Image.Image | str:
    if first.image is None or other.image is None:
        return "no difference: one of the two pictures is missing"
    if first.image.size != other.image.size:
        return "no difference: the pictures' sizes differ"
    return shown_difference(other.image, first.image, min(WIDEST, first.image.width))


def _embedded(image: Image.Image, described: str) -> Markup:
    """The picture within the page."""
    image = shown(image, min(WIDEST, image.width))
    written = io.BytesIO()
    image.save(written, "WEBP", quality=88)
    source = f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}"
    return tag("img", src=source, alt=described, width=image.width, height=image.height)
