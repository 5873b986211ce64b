"""Scenes: the same at every size, told truly, and some never trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tools.scenes import (
    COLORS,
    HEIGHT,
    NEW_SHAPE,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw_scene,
    hard_scene,
    held_out_prompts,
    holds_held_out,
    is_close,
    is_held_out,
    mask_of,
    random_scene,
    two_object_prompts,
)


def scene_of(shape: str, **changes: float) -> Scene:
    thing = Thing(shape, "red", "", changes.get("x", 0.5), changes.get("y", 0.64), 0.2)
    return Scene((thing,), "blue", "plain")


@pytest.mark.parametrize("shape", [*SHAPES, NEW_SHAPE])
def test_a_shape_has_its_colour_inside_and_the_backgrounds_outside(shape: str) -> None:
    scene = scene_of(shape)
    picture, mask = draw_scene(scene, 224, 176), mask_of(scene.things[0], 224, 176)
    red, blue = (np.asarray(COLORS[name]) / 255 for name in ("red", "blue"))
    assert 400 < mask.sum() < 6000
    assert np.median(np.abs(picture[mask] - red).max(1)) == pytest.approx(0, abs=1e-6)
    assert np.median(np.abs(picture[~mask] - blue).max(1)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [*SHAPES, NEW_SHAPE])
def test_a_small_drawing_is_a_large_one_averaged(shape: str) -> None:
    large = draw_scene(scene_of(shape), 896, 704)
    averaged = large.reshape(224, 4, 176, 4, 3).mean((1, 3))
    difference = np.abs(draw_scene(scene_of(shape), 224, 176) - averaged)
    assert difference.mean() < 0.002
    assert difference.max() < 0.35


def test_a_box_is_a_part_of_the_whole() -> None:
    scene, _ = random_scene(np.random.default_rng(0))
    whole = draw_scene(scene, 224, 176)
    np.testing.assert_array_equal(
        draw_scene(scene, 224, 176, (30, 20, 64, 48)), whole[30:94, 20:68]
    )


def test_captions_tell_what_the_scene_shows() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene, caption = random_scene(rng)
        words = caption.replace(",", "").split()
        things = {thing.shape for thing in scene.things} | {"shape"}
        assert {word for word in words if word in SHAPES or word == "shape"} <= things
        shown = {thing.color for thing in scene.things} | {scene.background}
        assert {word for word in words if word in COLORS} <= shown


def test_what_a_caption_leaves_out_of_places_is_always_the_same() -> None:
    rng = np.random.default_rng(3)
    made = [random_scene(rng) for _ in range(500)]
    placeless = [
        scene.things[0]
        for scene, caption in made
        if len(scene.things) == 1 and not any(place in caption for place in PLACES)
    ]
    joined = [scene.things for scene, caption in made if " and " in caption]
    assert len(placeless) > 20
    assert len(joined) > 10
    assert all((of.x, of.y) == pytest.approx((0.5, 0.64), abs=0.01) for of in placeless)
    assert all(first.x < second.x - 0.4 for first, second in joined)


def test_held_out_combinations_never_come_by_chance() -> None:
    rng = np.random.default_rng(2)
    scenes = [random_scene(rng)[0] for _ in range(1000)]
    assert not any(holds_held_out(scene) for scene in scenes)
    assert any(len(scene.things) > 1 for scene in scenes)


def test_only_pairs_for_the_autoencoder_hold_what_is_held_out() -> None:
    rng = np.random.default_rng(2)
    scenes = [random_scene(rng, held_out_in_pairs=True)[0] for _ in range(1000)]
    assert {len(scene.things) for scene in scenes if holds_held_out(scene)} == {2}


def test_prompts_to_judge_by_are_held_out_and_repeatable() -> None:
    prompts = held_out_prompts(200)
    assert prompts == held_out_prompts(200)
    assert all(
        is_held_out(scene.things[0].shape, scene.things[0].color, scene.background)
        for _, scene in prompts
    )
    assert {scene.things[0].shape for _, scene in prompts} == set(SHAPES)
    assert len({prompt for prompt, _ in prompts}) == 200


def test_two_objects_are_told_in_full_and_held_out() -> None:
    for caption, scene in two_object_prompts(20):
        assert " and " not in caption
        assert holds_held_out(scene)
        assert all(thing.color in caption and thing.shape in caption for thing in scene.things)
        assert scene.background in caption


def test_hard_scenes_show_what_is_hard_oftener_and_the_rest_too() -> None:
    kinds: list[Callable[[Scene], bool]] = [
        lambda scene: any(of.shape == "star" for of in scene.things),
        lambda scene: any(of.size == "small" for of in scene.things),
        lambda scene: any(is_close(of.color, scene.background) for of in scene.things),
    ]
    rng = np.random.default_rng(3)
    usual = [random_scene(rng)[0] for _ in range(1000)]
    hard = [hard_scene(rng)[0] for _ in range(1000)]
    assert not any(holds_held_out(scene) for scene in hard)
    for kind in kinds:
        assert sum(map(kind, hard)) > 1.15 * sum(map(kind, usual))
    assert not all(any(kind(scene) for kind in kinds) for scene in hard)


def test_colours_hard_to_tell_from_each_other_are_few() -> None:
    assert is_close("red", "orange")
    assert is_close("orange", "red")
    assert not is_close("green", "purple")
    pairs = [(one, other) for one in COLORS for other in COLORS if one != other]
    assert sum(is_close(*pair) for pair in pairs) < len(pairs) / 4


def test_a_caption_decides_where_edges_are() -> None:
    rng = np.random.default_rng(6)
    scenes = [random_scene(rng) for _ in range(300)]
    alone = [(scene.things[0], text) for scene, text in scenes if len(scene.things) == 1]
    assert len(alone) > 200
    for thing, caption in alone:
        place = next((words for words in PLACES if words in caption), "in the centre")
        x, y = PLACES[place]
        assert max(abs(thing.x - x), abs(thing.y - y)) <= 1.5 / 672  # a pixel or so
        assert thing.radius == pytest.approx(SIZES[thing.size], rel=0.005)


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_that_wander_stay_near_where_they_were(shape: str) -> None:
    scene = scene_of(shape)
    straight = draw_scene(scene, 432, 336)
    ragged = [draw_scene(scene, 432, 336, wander=np.random.default_rng(seed)) for seed in range(4)]
    again = draw_scene(scene, 432, 336, wander=np.random.default_rng(0))
    assert np.array_equal(ragged[0], again)
    assert not np.array_equal(ragged[0], ragged[1])
    x = (np.arange(336) + 0.5) / 336
    y = (np.arange(432) + 0.5) / 432 * HEIGHT
    is_far = np.hypot(x[None] - 0.5, y[:, None] - 0.64) > 0.2 * 1.2 + 0.08
    thing = mask_of(scene.things[0], 432, 336)
    for one in ragged:
        assert np.array_equal(one[is_far], straight[is_far])
        changed = np.abs(one - straight).max(2) > 0.3
        assert 0.005 < changed.sum() / thing.sum() < 0.35
