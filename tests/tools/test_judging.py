"""The judge says of drawn scenes what they show, and of wrong ones that they are wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tools.judging import NONE, background_of, judge_one, judge_two, outlined_share, things_of
from tools.scenes import (
    NEW_SHAPE,
    OUTLINE,
    Scene,
    draw_scene,
    held_out_prompts,
    random_scene,
    two_object_prompts,
)

PROMPTS = held_out_prompts(40)


def picture(scene: Scene, height: int = 224, width: int = 176) -> Any:
    return (draw_scene(scene, height, width) * 255).round().astype(np.uint8)


def test_many_specks_are_not_nothing() -> None:
    _, scene = PROMPTS[0]
    pixels = picture(scene, 864, 672)
    color = [255, 255, 255] if scene.background != "white" else [0, 0, 0]
    rows, columns = ((0.08, 0.15), (0.9, 0.8, 0.7))
    for row in rows:
        for column in columns:
            top, left = round(row * 864), round(column * 672)
            pixels[top : top + 20, left : left + 20] = color
    assert judge_one(picture(scene, 864, 672), scene).count
    assert not judge_one(pixels, scene).count


def changed(scene: Scene, **changes: Any) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **changes),))


def test_nearly_every_drawn_scene_is_judged_right() -> None:
    verdicts = [judge_one(picture(scene), scene) for _, scene in PROMPTS]
    for part in ("background", "color", "shape", "place", "size", "count"):
        assert np.mean([getattr(verdict, part) for verdict in verdicts]) >= 0.97


def test_two_things_are_told_apart() -> None:
    verdicts = [judge_two(picture(scene), scene) for _, scene in two_object_prompts(30)]
    assert np.mean([verdict.whole for verdict in verdicts]) >= 0.9


def test_each_wrong_part_is_noticed_alone() -> None:
    scene = changed(PROMPTS[0][1], shape="circle", color="red", x=0.5, y=0.64, radius=0.2)
    scene = replace(scene, background="white")
    seen = picture(scene)
    assert judge_one(seen, scene).whole
    assert not judge_one(seen, changed(scene, shape="star")).shape
    assert not judge_one(seen, changed(scene, color="blue")).color
    assert not judge_one(seen, changed(scene, x=0.27)).place
    assert not judge_one(seen, replace(scene, background="green")).background
    assert not judge_one(seen, changed(scene, size="large")).size
    more = replace(scene.things[0], shape="star", color="green", x=0.2, y=0.2, radius=0.12)
    crowded = judge_one(picture(replace(scene, things=(*scene.things, more))), scene)
    assert not crowded.count
    assert not crowded.whole
    assert crowded.color


def test_no_other_shape_passes_for_a_circle() -> None:
    scene = changed(PROMPTS[0][1], shape="circle", color="red", x=0.5, y=0.64, radius=0.18)
    scene = replace(scene, background="white")
    assert not judge_one(picture(changed(scene, shape=NEW_SHAPE)), scene).shape
    blob = picture(scene, 432, 336)
    rng = np.random.default_rng(0)
    for y, x in rng.integers(-60, 60, (60, 2)):
        blob[216 + y : 226 + y, 168 + x : 178 + x] = 245  # eaten away
    assert judge_one(blob, scene).shape is False


def test_a_colour_is_that_of_nearly_all_pixels_and_near_enough() -> None:
    scene = changed(PROMPTS[0][1], shape="square", color="red", x=0.5, y=0.64, radius=0.26)
    scene = replace(scene, background="white")
    halved = picture(scene)
    halved[:, 88:] = picture(changed(scene, color="green"))[:, 88:]
    assert not judge_one(halved, scene).color
    grey = np.full((224, 176, 3), 100, np.uint8)
    assert background_of(grey) == NONE
    assert judge_one(picture(scene), scene).background
    assert not judge_one(picture(replace(scene, style="striped")), scene).background


def test_an_empty_picture_has_nothing_right_but_its_background() -> None:
    scene = PROMPTS[0][1]
    verdict = judge_one(picture(replace(scene, things=())), scene)
    assert verdict.background
    assert (verdict.color, verdict.shape, verdict.place) == (False, False, False)


def test_noise_does_not_hide_what_is_shown() -> None:
    rng = np.random.default_rng(0)
    verdicts = []
    for _, scene in PROMPTS:
        noisy = picture(scene, 432, 336) + rng.normal(0, 12, (432, 336, 3))
        verdicts.append(judge_one(noisy.clip(0, 255).astype(np.uint8), scene))
    assert np.mean([verdict.whole for verdict in verdicts]) >= 0.9


def test_rings_are_no_circles() -> None:
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, new_shape=True)[0] for _ in range(20)]
    plain = [replace(scene, style="plain") for scene in scenes]
    shapes = [things_of(picture(scene, 432, 336))[0].shape for scene in plain]
    assert shapes.count(NEW_SHAPE) >= 17
    assert all(background_of(picture(s)) == s.background for s in plain)


@pytest.mark.parametrize("outlined", [False, True])
def test_outlines_are_seen(outlined: bool) -> None:
    scenes = [
        replace(scene, outline=OUTLINE * outlined)
        for _, scene in PROMPTS
        if "black" not in (scene.background, scene.things[0].color)
    ]
    shares = [outlined_share(picture(scene, 432, 336)) > 0.5 for scene in scenes]
    assert np.mean(shares) >= 0.9 if outlined else np.mean(shares) <= 0.1


def test_a_line_is_no_part_of_what_it_is_around() -> None:
    scenes = [replace(scene, outline=OUTLINE) for _, scene in PROMPTS]
    visible = [s for s in scenes if {s.background, s.things[0].color} != {"black", "white"}]
    verdicts = [judge_one(picture(scene, 432, 336), scene) for scene in visible]
    for part in ("background", "color", "shape", "place"):
        assert np.mean([getattr(verdict, part) for verdict in verdicts]) >= 0.97, part
    filled = [replace(scene, outline=4 * OUTLINE) for scene in visible]
    colors = [judge_one(picture(f, 432, 336), scene).color for f, scene in zip(filled, visible)]
    assert np.mean(colors) <= 0.2
    assert outlined_share(np.zeros((4, 4, 3), np.uint8)) == 0
