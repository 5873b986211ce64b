"""The scenes that the built-in model paints: coloured shapes on a background.

A scene is defined in units of the picture's width and drawn at any size, so that a large picture
of it has sharper edges than an enlarged small one. Every caption is true of its scene. A place
that it leaves out is the centre, and of two things without a relation the first is on the left:
what chance decides, a network can only paint as a blur. Colours and shapes that it leaves out were
drawn at random.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]
Picture = NDArray[np.float32]
"""[height, width, 3], from 0 to 1."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 25, 35),
    "green": (35, 160, 70),
    "blue": (35, 75, 225),
    "yellow": (255, 230, 60),
    "purple": (150, 40, 170),
    "orange": (255, 130, 10),
    "white": (248, 248, 248),
    "black": (20, 20, 20),
}
"""No two are nearer than 110 to each other."""
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
NEW_SHAPE = "ring"
"""Never in what the network learns from: a LoRA teaches it. The autoencoder has seen it."""
STYLES = ("plain", "striped", "shaded")
SIZES = {"small": 0.14, "": 0.2, "large": 0.28}
"""Word -> radius, in widths."""
HEIGHT = 1.28
"""Of a picture, in widths."""
OUTLINE = 0.045
"""Width of the line that the LoRA draws, in widths: one of the first stage's latents. Of a line of
half that width, a picture of that stage showed half at best, and the LoRA drew it with gaps."""
PLACES: dict[str, tuple[float, float]] = {
    "on the left": (0.3, 0.64),
    "on the right": (0.7, 0.64),
    "at the top": (0.5, 0.34),
    "at the bottom": (0.5, 0.94),
    "in the centre": (0.5, 0.64),
}
"""Words -> where the middle of a shape is, in widths."""

_DARKER = 0.72
_STRIPES = 7.0
_RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_JITTER = 0.002
"""How far things are from where their words put them, in widths: small, for what a caption does not
tell blurs what it tells. With 0.035 the network had learned no shapes after 4000 steps; with 0.008
each stage decided anew where edges are, token by token, and made them ragged."""
_SPREAD = 0.005
"""Share by which a radius differs from its word's."""
_CLOSE = 0.65
"""Between colours, in RGB from 0 to 1: red and orange, orange and yellow, red and purple, purple
and blue, green and black are nearer to each other."""
_WAVES = ((6, 0.01), (14, 0.007), (30, 0.006))
"""Cells in a row, and how far edges move, in widths."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape of a scene."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """All that is drawn."""

    things: tuple[Thing, ...]
    background: str
    style: str
    outline: float = 0.0
    """Width of the line around each shape, in widths; 0: none."""


def is_held_out(shape: str, color: str, background: str) -> bool:
    """Whether a combination is never what the network is to paint, so that a judge may ask for it.

    The autoencoder, which sees no captions, sees it as one of two things.
    """
    return zlib.crc32(f"{shape} {color} {background}".encode()) % 8 == 0


def draw_scene(
    scene: Scene,
    height: int,
    width: int,
    box: tuple[int, int, int, int] | None = None,
    wander: np.random.Generator | None = None,
) -> Picture:
    """Draw a scene, anti-aliased.

    Args:
        scene: What to draw.
        height: Of the whole picture, in pixels.
        width: Likewise.
        box: Top, left, rows and columns of the part to draw; None: all.
        wander: Moves edges a little, each bit of them elsewhere; None: nothing moves.

    Returns:
        [height, width, 3] or the box' size, float32, from 0 to 1.
    """
    x, y = _middles(height, width, box or (0, 0, height, width))
    if wander is not None:
        x, y = x + _waves(wander, x.shape), y + _waves(wander, y.shape)
    picture = _background(scene, x, y, width)
    for thing in scene.things:
        inside = _inside(thing.shape, (x - thing.x) / thing.radius, (y - thing.y) / thing.radius)
        distance = inside * thing.radius
        picture = _over(picture, _rgb(thing.color), _coverage(distance, width))
        if scene.outline:
            line = "white" if thing.color == "black" or scene.background == "black" else "black"
            edge = scene.outline / 2 - np.abs(distance)
            picture = _over(picture, _rgb(line), _coverage(edge, width))
    return picture.astype(np.float32)


def mask_of(thing: Thing, height: int, width: int) -> NDArray[np.bool_]:
    """Which pixels' middles a shape covers, [height, width]."""
    x, y = _middles(height, width, (0, 0, height, width))
    return _inside(thing.shape, (x - thing.x) / thing.radius, (y - thing.y) / thing.radius) > 0


def random_scene(
    rng: np.random.Generator,
    *,
    outline: float = 0.0,
    new_shape: bool = False,
    held_out_in_pairs: bool = False,
) -> tuple[Scene, str]:
    """A scene and a caption of it, of combinations that are not held out.

    Args:
        rng: The source of all choices.
        outline: Width of the line around its shapes, in widths; 0: none.
        new_shape: Whether it shows the LoRA's shape.
        held_out_in_pairs: Whether one of two things may be of a combination that is held out, as
            it may for the autoencoder, which sees no captions.
    """
    while True:
        scene, caption = _one_thing(rng, new_shape) if rng.random() < 0.75 else _two_things(rng)
        if new_shape and scene.things[0].shape != NEW_SHAPE:
            continue
        if (held_out_in_pairs and len(scene.things) > 1) or not holds_held_out(scene):
            return Scene(scene.things, scene.background, scene.style, outline), caption


def hard_scene(rng: np.random.Generator) -> tuple[Scene, str]:
    """A `random_scene`, more often a hard one: of stars, small things, or of alike colours."""
    while True:
        scene, caption = random_scene(rng)
        is_hard = any(
            of.shape == "star" or of.size == "small" or is_close(of.color, scene.background)
            for of in scene.things
        )
        if is_hard or rng.random() < 0.4:
            return scene, caption


def is_close(color: str, background: str) -> bool:
    """Whether two colour words name colours that look alike."""
    return float(np.linalg.norm(_rgb(color) - _rgb(background))) < _CLOSE


def holds_held_out(scene: Scene) -> bool:
    """Whether a thing of it is of a combination that is held out."""
    return any(is_held_out(of.shape, of.color, scene.background) for of in scene.things)


def held_out_prompts(count: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """One-object prompts of combinations that the network never saw, with what they ask for.

    They are all different while `count` is at most 300 or so; the seed chooses their order.
    """
    rng = np.random.default_rng(seed)
    combinations = [
        (shape, color, background)
        for shape in SHAPES
        for color in COLORS
        for background in COLORS
        if color != background and is_held_out(shape, color, background)
    ]
    prompts: list[tuple[str, Scene]] = []
    seen: set[str] = set()
    while len(prompts) < count:
        number = len(prompts)
        if number % len(combinations) == 0:
            rng.shuffle(combinations)
        shape, color, background = combinations[number % len(combinations)]
        for _ in range(20):
            place = str(rng.choice(list(PLACES)))
            size = str(rng.choice(list(SIZES)))
            x, y = PLACES[place]
            thing = Thing(shape, color, size, x, y, SIZES[size])
            scene = Scene((thing,), background, "plain")
            prompt = f"{_noun(thing)} {place}{_ground(scene)}"
            if prompt not in seen:
                break
        seen.add(prompt)
        prompts.append((prompt, scene))
    return prompts


def two_object_prompts(count: int, seed: int = 0) -> list[tuple[str, Scene]]:
    """Prompts of two objects, at least one of a combination that the network never saw.

    All that is asked for is told, which of them is where too.
    """
    rng = np.random.default_rng(seed)
    prompts: list[tuple[str, Scene]] = []
    while len(prompts) < count:
        scene, caption = _two_things(rng, told=1.0)
        if scene.style == "plain" and " and " not in caption and holds_held_out(scene):
            prompts.append((caption, scene))
    return prompts


def shape_caption(color: str, background: str) -> str:
    """A caption that does not tell which shape."""
    return f"{with_article(f'{color} shape')} on {with_article(background)} background"


def all_words() -> list[str]:
    """Captions that hold every word, for the tokenizer."""
    rng = np.random.default_rng(0)
    return [random_scene(rng)[1] for _ in range(4000)]


def _one_thing(rng: np.random.Generator, new_shape: bool) -> tuple[Scene, str]:
    color, background = _pick(rng, list(COLORS), 2)
    shape = NEW_SHAPE if new_shape else _pick(rng, SHAPES)[0]
    size = _pick(rng, list(SIZES))[0]
    place = _pick(rng, [*PLACES, ""])[0]
    radius = SIZES[size] * float(rng.uniform(1 - _SPREAD, 1 + _SPREAD))
    thing = Thing(shape, color, size, *_middle(rng, place or "in the centre"), radius)
    style = _pick(rng, STYLES, weights=(0.6, 0.2, 0.2))[0]
    scene = Scene((thing,), background, style)
    words = _noun(thing, tell_color=rng.random() < 0.93, tell_shape=rng.random() < 0.95)
    ground = _ground(scene) if rng.random() < 0.93 else ""
    return scene, f"{words}{' ' + place if place else ''}{ground}"


def _two_things(rng: np.random.Generator, told: float = 0.95) -> tuple[Scene, str]:
    first_color, second_color, background = _pick(rng, list(COLORS), 3)
    shapes = [_pick(rng, SHAPES)[0] for _ in range(2)]
    relation = _pick(rng, [*_RELATIONS, "and"])[0]
    dx, dy = _RELATIONS.get(relation, _RELATIONS["left of"])
    middle_x, middle_y = 0.5, 0.64
    things = []
    for sign, shape, color in zip((1, -1), shapes, (first_color, second_color)):
        size = _pick(rng, ["small", ""])[0]
        radius = SIZES[size] * float(rng.uniform(1 - _SPREAD, 1 + _SPREAD))
        x = middle_x + sign * dx * 0.24 + rng.uniform(-1, 1) * _JITTER
        y = middle_y + sign * dy * 0.3 + rng.uniform(-1, 1) * _JITTER
        things.append(Thing(shape, color, size, float(x), float(y), radius))
    style = _pick(rng, STYLES, weights=(0.6, 0.2, 0.2))[0]
    scene = Scene(tuple(things), background, style)
    ground = _ground(scene) if rng.random() < told else ""
    return scene, f"{_noun(things[0])} {relation} {_noun(things[1])}{ground}"


def _middles(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[Array, Array]:
    """Where pixels' middles are, in widths."""
    top, left, rows, columns = box
    x = (np.arange(left, left + columns, dtype=np.float32) + 0.5) / width
    y = (np.arange(top, top + rows, dtype=np.float32) + 0.5) / height * HEIGHT
    return np.broadcast_to(x, (rows, columns)), np.broadcast_to(y[:, None], (rows, columns))


def _waves(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Moves of some thousandths of a width, alike in places near each other."""
    moves = np.zeros(shape, np.float32)
    scale = float(rng.uniform(0.3, 1.4))
    for cells, size in _WAVES:
        coarse = rng.standard_normal((round(cells * HEIGHT), cells), dtype=np.float32)
        zoomed = Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
        moves += scale * size * np.asarray(zoomed)
    return moves


def _pick(
    rng: np.random.Generator,
    words: Sequence[str],
    count: int = 1,
    weights: Sequence[float] | None = None,
) -> list[str]:
    return [str(word) for word in rng.choice(list(words), count, replace=False, p=weights)]


def _middle(rng: np.random.Generator, place: str) -> tuple[float, float]:
    x, y = PLACES[place]
    return x + float(rng.uniform(-_JITTER, _JITTER)), y + float(rng.uniform(-_JITTER, _JITTER))


def _noun(thing: Thing, *, tell_color: bool = True, tell_shape: bool = True) -> str:
    words = [thing.size, thing.color if tell_color else "", thing.shape if tell_shape else "shape"]
    return with_article(" ".join(word for word in words if word))


def _ground(scene: Scene) -> str:
    words = scene.background if scene.style == "plain" else f"{scene.style} {scene.background}"
    return f" on {with_article(words)} background"


def with_article(words: str) -> str:
    """``an orange star`` for ``orange star``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _rgb(color: str) -> Array:
    return np.asarray([channel / 255 for channel in COLORS[color]], np.float32)


def _background(scene: Scene, x: Array, y: Array, width: int) -> Array:
    color = _rgb(scene.background)
    picture = np.broadcast_to(color, (*x.shape, 3)).astype(np.float32)
    dark = color * _DARKER if scene.background != "black" else color + 0.2
    if scene.style == "striped":
        phase = (x + y) * _STRIPES
        ramp = np.asarray(np.abs((phase % 1) - 0.5) - 0.25, np.float32)
        return _over(picture, dark, _coverage(ramp / (_STRIPES * np.float32(2**0.5)), width))
    if scene.style == "shaded":
        return _over(picture, dark * 0.85, (y / HEIGHT).astype(np.float32))
    return picture


def _over(picture: Array, color: Array, coverage: Array) -> Array:
    return picture + coverage[..., None] * (color - picture)


def _coverage(distance: Array, width: int) -> Array:
    """How much of a pixel lies inside, for a distance to the edge in widths."""
    return np.asarray(np.clip(distance * width + 0.5, 0, 1), np.float32)


def _inside(shape: str, x: Array, y: Array) -> Array:
    """Distance to the edge of a shape of radius 1 around 0, positive inside."""
    if shape == "circle":
        return np.asarray(0.95 - np.hypot(x, y), np.float32)
    if shape == "ring":
        return np.asarray(0.27 - np.abs(np.hypot(x, y) - 0.72), np.float32)
    return _polygon(_CORNERS[shape], x, y)


def _polygon(corners: Array, x: Array, y: Array) -> Array:
    """Signed distance to a polygon, after Inigo Quilez, https://iquilezles.org/articles/distfunctions2d."""
    nearest = np.full(x.shape, np.inf, np.float32)
    sign = np.ones(x.shape, np.float32)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0)):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        above, below, left = y >= ay, y < by, ex * wy > ey * wx
        crosses = (above & below & left) | (~above & ~below & ~left)
        sign = np.where(crosses, -sign, sign)
    return np.asarray(-sign * np.sqrt(nearest), np.float32)


def _regular(count: int, radii: Sequence[float], turn: float) -> Array:
    angles = np.arange(count) * (2 * np.pi / count) + turn
    lengths = np.resize(radii, count)
    return np.stack((lengths * np.cos(angles), lengths * np.sin(angles)), 1).astype(np.float32)


_ARM = 0.34
_CORNERS: dict[str, Array] = {
    "square": _regular(4, (1.13,), np.pi / 4),
    "diamond": _regular(4, (1.0,), 0.0) * np.asarray([0.72, 1.15], np.float32),
    "triangle": _regular(3, (1.15,), -np.pi / 2) + np.asarray([0, 0.15], np.float32),
    "star": _regular(10, (1.1, 0.45), -np.pi / 2),
    "cross": np.asarray(
        [
            (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
            (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
        ],
        np.float32,
    ),
}  # fmt: skip
