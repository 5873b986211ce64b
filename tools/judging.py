"""What a picture shows, found out by its pixels: background, shapes, their colours and places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tools.scenes import (
    COLORS,
    HEIGHT,
    NEW_SHAPE,
    OUTLINE,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    mask_of,
)

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

LEAST_AREA = 0.004
"""Of the picture, that a thing covers."""
MOST_STRAY = 0.002
"""Of the picture, that may be neither background nor a thing: specks, of which none is a thing."""
NEAR = 0.13
"""How far a thing may be from the place asked for, in widths."""
LEAST_LINE = 0.9
"""Share of a thing's rim from which it counts as outlined: a line with gaps has less."""
LEAST_MATCH = 0.7
"""Overlap with a template below which a thing has no shape; of drawn ones it is at least 0.8."""
FARTHEST = 60.0
"""From the nearest colour, in RGB, above which a pixel has none; no two colours are nearer than
that to each other."""
MOST = 0.8
"""Share of the pixels of a background or of a thing that must have its colour."""
NONE = "none"
_BORDER = 0.04
_RIM = 0.01
"""Width of what is left out of a thing for its colour, in widths."""
_UNIT = 200


@dataclass(frozen=True, slots=True)
class Found:
    """One thing that a picture shows."""

    shape: str
    """`NONE` if it is like no template."""
    color: str
    """`NONE` if it is of several, or of one that is no colour of the scenes."""
    x: float
    y: float
    """Middle of its box, in widths."""
    match: float
    """Overlap with the best template: intersection over union."""
    area: float
    """Share of the picture."""
    radius: float
    """Of the best template, in widths."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is right about a picture."""

    background: bool
    color: bool
    shape: bool
    place: bool
    size: bool
    count: bool
    """Whether there are as many things as were asked for, and no specks beside them."""

    @property
    def whole(self) -> bool:
        """Whether all of it is right."""
        return all(asdict(self).values())


def background_of(pixels: Pixels) -> str:
    """The colour of the border of [height, width, 3] pixels of 8 bits, or `NONE`."""
    return _told(_nearest(_border(pixels)))


def things_of(
    pixels: Pixels, shapes: Sequence[str] = (*SHAPES, NEW_SHAPE), *, outlined: bool = False
) -> list[Found]:
    """The things in front of the background, largest first.

    Args:
        pixels: [height, width, 3], 8 bits.
        shapes: The templates to compare with.
        outlined: Whether things have a line around them: half of it lies outside of their shape,
            none of it is of their colour.
    """
    return _things_and_stray(pixels, shapes, outlined)[0]


def _things_and_stray(
    pixels: Pixels, shapes: Sequence[str] = (*SHAPES, NEW_SHAPE), outlined: bool = False
) -> tuple[list[Found], float]:
    """As `things_of`, and the share of the picture that is neither of them nor background."""
    names = list(COLORS)
    height, width, _ = pixels.shape
    nearest = _nearest(pixels.reshape(-1, 3)).reshape(height, width)
    is_thing = nearest != names.index(_most_common(_nearest(_border(pixels))))
    # An edge has colours between its two: opening takes off lines of a pixel or two.
    is_thing = ndimage.binary_opening(is_thing, iterations=max(1, width // 200))
    parts, count = ndimage.label(is_thing)
    found, stray = [], 0.0
    for part in range(1, count + 1):
        mask: Mask = parts == part
        area = float(mask.mean())
        if area < LEAST_AREA or (outlined and _depth(mask).max() < 0.5):
            stray += area
            continue
        if outlined:
            core = _within_line(mask)
            mask = _depth(mask) >= 0.5  # the line's middle is the edge
        else:
            core = ndimage.binary_erosion(mask, iterations=max(1, round(_RIM * width)))
        color = _told(nearest[core if core.any() else mask])
        found.append(_found(mask, shapes, color, area))
    return sorted(found, key=lambda thing: -thing.area), stray


def judge_one(pixels: Pixels, scene: Scene) -> Verdict:
    """Hold [height, width, 3] pixels of 8 bits against a scene of one thing in a named place."""
    asked = scene.things[0]
    found, stray = _things_and_stray(pixels, outlined=scene.outline > 0)
    background = background_of(pixels) == scene.background
    if not found:
        return Verdict(background, False, False, False, False, False)
    thing = found[0]
    return Verdict(
        background=background,
        color=thing.color == asked.color,
        shape=thing.shape == asked.shape,
        place=_is_near(thing, asked),
        size=_size_of(thing) == asked.size,
        count=len(found) == 1 and stray <= MOST_STRAY,
    )


def judge_two(pixels: Pixels, scene: Scene) -> Verdict:
    """Hold [height, width, 3] pixels of 8 bits against two things: what they are, their order."""
    background = background_of(pixels) == scene.background
    things, stray = _things_and_stray(pixels)
    found = things[:2]
    if len(found) < 2:
        return Verdict(background, False, False, False, False, False)
    first, second = scene.things
    if found[0].color != first.color and found[1].color == first.color:
        found.reverse()
    asked = np.sign(_main_axis(first.x - second.x, first.y - second.y))
    is_there = np.sign(_main_axis(found[0].x - found[1].x, found[0].y - found[1].y))
    return Verdict(
        background=background,
        color=[thing.color for thing in found] == [first.color, second.color],
        shape=[thing.shape for thing in found] == [first.shape, second.shape],
        place=bool((asked == is_there).all()),
        size=[_size_of(thing) for thing in found] == [first.size, second.size],
        count=len(things) == 2 and stray <= MOST_STRAY,
    )


def outlined_share(pixels: Pixels) -> float:
    """Share of the largest thing's rim that is a black or white line; 0 without a thing.

    Args:
        pixels: [height, width, 3], 8 bits. A line of the background's colour, such as black
            around white on black, cannot be seen.
    """
    names = list(COLORS)
    height, width, _ = pixels.shape
    # A line is thin: at a small size most of it is mixed with its neighbours.
    nearest = _nearest(pixels.reshape(-1, 3), np.inf).reshape(height, width)
    is_thing = nearest != names.index(_most_common(_nearest(_border(pixels))))
    parts, count = ndimage.label(is_thing)
    if not count:
        return 0.0
    sizes = ndimage.sum_labels(is_thing, parts, range(1, count + 1))
    mask = ndimage.binary_fill_holes(parts == 1 + int(np.argmax(sizes)))
    depth = _depth(mask)
    # Without the line's edges, which are mixed with their neighbours. A line of half the width has
    # 0.6 of what is left.
    rim = (depth > 0.2) & (depth < 0.7)
    if not rim.any():
        return 0.0
    lines = {names.index("black"), names.index("white")} - {
        names.index(_most_common(nearest[_within_line(mask)]))
    }
    return float(np.isin(nearest[rim], list(lines)).mean())


def _depth(mask: Mask) -> NDArray[np.float64]:
    """How far each pixel is from the outside, in the widths of a line around a thing."""
    depth: NDArray[np.float64] = ndimage.distance_transform_edt(mask)
    depth /= OUTLINE * mask.shape[1]
    return depth


def _within_line(mask: Mask) -> Mask:
    """What a line around a thing leaves of it; its innermost pixels if there is little.

    It may be over half as wide again as a drawn one.
    """
    depth = _depth(mask)
    return np.asarray(depth >= min(1.6, 0.75 * depth.max()))


def has_proportion(height: int, width: int) -> bool:
    """Whether pictures of a size are about as high as those in which places are told."""
    return abs(height / width / HEIGHT - 1) < 0.1


def _main_axis(dx: float, dy: float) -> NDArray[np.float64]:
    return np.array([dx, 0.0]) if abs(dx) > abs(dy) else np.array([0.0, dy])


def _is_near(thing: Found, asked: Thing) -> bool:
    places = list(PLACES.values())
    away = [np.hypot(thing.x - x, thing.y - y) for x, y in places]
    wanted = np.hypot(thing.x - asked.x, thing.y - asked.y)
    return bool(wanted <= NEAR and wanted <= min(away) + 1e-9)


def _size_of(thing: Found) -> str:
    """The size whose radius is the nearest, by ratio."""
    return min(SIZES, key=lambda size: abs(np.log(thing.radius / SIZES[size])))


def _found(mask: Mask, shapes: Sequence[str], color: str, area: float) -> Found:
    """A thing, with the shape that overlaps most when it is given the same box."""
    height, width = mask.shape
    top, bottom, left, right = _box(mask)
    x, y = (left + right) / 2 / width, (top + bottom) / 2 / height * HEIGHT
    scores, radii = {}, {}
    for shape in shapes:
        wide, high, off_x, off_y = _unit_box(shape)
        radius = ((right - left) / width / wide + (bottom - top) / height * HEIGHT / high) / 2
        thing = Thing(shape, "", "", x - off_x * radius, y - off_y * radius, radius)
        template = mask_of(thing, height, width)
        scores[shape] = float((mask & template).sum() / (mask | template).sum())
        radii[shape] = float(radius)
    best = max(scores, key=lambda shape: scores[shape])
    told = best if scores[best] >= LEAST_MATCH else NONE
    return Found(told, color, float(x), float(y), scores[best], area, radii[best])


def _unit_box(shape: str) -> tuple[float, float, float, float]:
    """Width, height and middle of a shape of radius 1 around 0, in radii."""
    if shape not in _UNIT_BOXES:
        radius = 0.4
        height = round(_UNIT * HEIGHT)
        mask = mask_of(Thing(shape, "", "", 0.5, HEIGHT / 2, radius), height, _UNIT)
        top, bottom, left, right = (edge / _UNIT for edge in _box(mask))
        middle = (left + right) / 2 - 0.5, (top + bottom) / 2 - HEIGHT / 2
        _UNIT_BOXES[shape] = (
            (right - left) / radius,
            (bottom - top) / radius,
            middle[0] / radius,
            middle[1] / radius,
        )
    return _UNIT_BOXES[shape]


_UNIT_BOXES: dict[str, tuple[float, float, float, float]] = {}


def _box(mask: Mask) -> tuple[int, int, int, int]:
    """Top, bottom, left and right edge."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _border(pixels: Pixels) -> Pixels:
    height, width, _ = pixels.shape
    edge = max(1, round(_BORDER * width))
    inner = np.zeros((height, width), bool)
    inner[edge:-edge, edge:-edge] = True
    return pixels[~inner]


def _nearest(pixels: NDArray[Any], farthest: float = FARTHEST) -> NDArray[np.int64]:
    """Number of the nearest colour of each pixel of a list; one more than the last: none."""
    palette = np.asarray(list(COLORS.values()), np.float32)
    away = np.square(pixels[:, None].astype(np.float32) - palette).sum(2)
    return np.where(away.min(1) > farthest**2, len(palette), away.argmin(1)).astype(np.int64)


def _most_common(numbers: NDArray[np.int64]) -> str:
    """The colour of most pixels, of those that have one."""
    counts = np.bincount(numbers.reshape(-1), minlength=len(COLORS) + 1)
    return list(COLORS)[int(counts[:-1].argmax())]


def _told(numbers: NDArray[np.int64]) -> str:
    """The colour of nearly all pixels, or `NONE`."""
    color = _most_common(numbers)
    return color if np.mean(numbers == list(COLORS).index(color)) >= MOST else NONE
