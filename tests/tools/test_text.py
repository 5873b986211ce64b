"""What captions say, as the text encoder learns it."""

from __future__ import annotations

import numpy as np
import pytest

from tools.demo_text import WORDS, facts_of
from tools.scenes import random_scene


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("", {}),
        ("a large white circle", {"first size": "large", "first color": "white",
                                  "first shape": "circle"}),
        ("a blue shape on a yellow background", {"first color": "blue", "background": "yellow"}),
        (
            "a small star on the left on a striped black background",
            {"first size": "small", "first shape": "star", "place": "on the left",
             "style": "striped", "background": "black"},
        ),
        (
            "an orange cross left of a small red diamond on a shaded white background",
            {"first color": "orange", "first shape": "cross", "relation": "left of",
             "second size": "small", "second color": "red", "second shape": "diamond",
             "style": "shaded", "background": "white"},
        ),
    ],
)  # fmt: skip
def test_facts_are_those_that_are_said(caption: str, said: dict[str, str]) -> None:
    facts = facts_of(caption)
    assert facts.keys() == WORDS.keys()
    assert {name: word for name, word in facts.items() if word is not None} == said


def test_facts_agree_with_the_scenes_that_captions_are_of() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        scene, caption = random_scene(rng)
        facts = facts_of(caption)
        for which, thing in zip(("first", "second"), scene.things):
            assert facts[f"{which} shape"] in (None, thing.shape)
            assert facts[f"{which} color"] in (None, thing.color)
            assert (facts[f"{which} size"] or "") == thing.size
        assert facts["background"] in (None, scene.background)
        assert facts["style"] in (None, scene.style)
        assert (facts["relation"] is not None) == (len(scene.things) == 2)
        words = [word for words in WORDS.values() for word in words]
        assert all(fact is None or fact in words for fact in facts.values())
