"""The judge's command, with an engine that draws what it is asked for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tools import judge_demo_model
from tools.judge_demo_model import CELLS, NEGATIVES, judge, lines_of, main, sum_of
from tools.scenes import (
    COLORS,
    NEW_SHAPE,
    OUTLINE,
    SHAPES,
    Scene,
    Thing,
    draw_scene,
    held_out_prompts,
    is_held_out,
    two_object_prompts,
)
from turbo.plan import DEFAULT_PLAN, dump_plan

KNOWN = dict([*held_out_prompts(8), *held_out_prompts(16, 1000), *two_object_prompts(2)])


class Artist:
    """Draws prompts at once; `spoil` changes its scenes."""

    def __init__(self, spoil: Any = lambda scene: scene, heeds_negative: bool = True) -> None:
        self.spoil, self.heeds_negative = spoil, heeds_negative
        self.loras: list[str] = []

    models = SimpleNamespace(device="cpu", dtype=torch.float32)

    def set_loras(self, loras: list[str]) -> None:
        self.loras = loras

    def generate(
        self, prompt: str, seed: int, negative_prompt: str = "", loras: Any = (), plan: Any = None
    ) -> SimpleNamespace:
        word, _, rest = prompt.rpartition(", ")
        scene = self.spoil(KNOWN.get(rest) or self._guess(rest, seed, negative_prompt))
        on = [name for name, _ in loras] == [word] and bool(word)
        thing = scene.things[0]
        if on and word == "zorp":
            thing = Thing(NEW_SHAPE, thing.color, "", thing.x, thing.y, thing.radius)
        scene = Scene((thing, *scene.things[1:]), scene.background, "plain")
        if on and word != "zorp":
            scene = replace(scene, outline=OUTLINE)
        pixels = (draw_scene(scene, 432, 336) * 255).round().astype(np.uint8)
        return SimpleNamespace(image=Image.fromarray(pixels))

    def _guess(self, prompt: str, seed: int, negative: str) -> Scene:
        words = prompt.split()
        told = [word for word in words if word in COLORS]
        background = told[-1]
        others = [color for color in COLORS if color != background]
        if self.heeds_negative:
            others = [color for color in others if color not in negative.split()]
        color = told[0] if len(told) > 1 else others[seed % len(others)]
        shape = next((word for word in words if word in SHAPES), "square")
        return Scene((Thing(shape, color, "", 0.5, 0.64, 0.18),), background, "plain")


def test_an_artist_who_does_as_told_has_everything_right() -> None:
    kept: list[int] = []
    pictures: list[Any] = []
    report = judge(Artist(), 8, 0, 6, 28, pictures, lambda report: kept.append(len(report)))
    for name, count in (("one object", 8), ("two objects", 2)):
        assert report[name].pop("wrong") == []
        assert report[name].pop("pictures") == count
        assert set(report[name].values()) == {1.0}
    for lora in report["loras"].values():
        assert [lora[cell] for cell in CELLS] == [0, 0, 0, 1]
        assert set(lora["beside"].values()) == {1.0}
    negative = report["negative prompt"]
    assert (negative["pictures"], negative["stages"]) == (28, 1)
    without, control, avoided = (negative[name].pop("color") for name in NEGATIVES)
    assert without > avoided == 0
    assert control > 0
    assert all(set(negative[name].values()) == {28} for name in NEGATIVES)
    assert report["partial"] is False
    assert len(pictures) == 8
    assert kept == sorted(kept)
    assert len(kept) == 5
    assert len(list(lines_of(report | {
        name: report[name] | {"pictures": 1} for name in ("one object", "two objects")
    }))) == 9  # fmt: skip


def test_the_figures_so_far_are_kept_now_and_then() -> None:
    kept: list[int] = []
    judge(Artist(), 45, 0, keep=lambda report: kept.append(report["one object"]["pictures"]))
    assert kept == [20, 40, 45, 45, 45]


def test_what_is_wrong_is_counted() -> None:
    def spoil(scene: Scene) -> Scene:
        thing = scene.things[0]
        wrong = Thing(thing.shape, thing.color, thing.size, 0.5, 0.64, thing.radius)
        return Scene((wrong, *scene.things[1:]), scene.background, "plain")

    report = judge(Artist(spoil, heeds_negative=False), 8, 0, negative_count=28)
    asked = held_out_prompts(8)
    centred = sum("centre" in prompt for prompt, _ in asked) / 8
    assert report["one object"]["place"] == report["one object"]["whole"] == centred
    assert report["one object"]["color"] == 1
    negative = report["negative prompt"]
    without, control, avoided = (negative[name]["color"] for name in NEGATIVES)
    assert avoided == control == without > 0
    assert len(report["one object"]["wrong"]) == 8 - 8 * centred


def test_a_negative_prompt_that_spoils_the_picture_is_seen() -> None:
    class Blank(Artist):
        def generate(self, *of: Any, **more: Any) -> SimpleNamespace:
            made = super().generate(*of, **more)
            if more["negative_prompt"]:
                made.image = Image.new("RGB", made.image.size, "white")
            return made

    negative = judge(Blank(), 0, 0, negative_count=28)["negative prompt"]
    without, *others = (negative[name] for name in NEGATIVES)
    assert without["shape"] == without["any color"] == without["background"] == 28
    for other in others:
        assert other["shape"] == other["any color"] == 0
        assert other["background"] < 14


def test_a_ring_is_asked_for_in_combinations_that_no_ring_was_seen_in() -> None:
    asked: list[tuple[str, str]] = []

    class Listener(Artist):
        def generate(self, prompt: str, *of: Any, **more: Any) -> SimpleNamespace:
            if prompt.startswith("zorp, "):
                words = [word for word in prompt.split() if word in COLORS]
                asked.append((words[0], words[-1]))
            return super().generate(prompt, *of, **more)

    judge(Listener(), 1, 0, 6)
    assert len(set(asked)) == 6
    assert all(is_held_out(NEW_SHAPE, *pair) for pair in asked)


def test_the_command_writes_figures_and_a_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artist = SimpleNamespace(from_pretrained=lambda *_, **__: Artist())
    monkeypatch.setattr(judge_demo_model, "Engine", artist)
    sheet, output = tmp_path / "s.png", tmp_path / "r.json"
    command = ["--prompts", "8", "--lora-prompts", "0", "--negative-prompts", "0", "--seed", "0"]
    command += ["--sheet", str(sheet), "-o", str(output)]
    assert main(command) == 0
    written = json.loads(output.read_text())
    assert written["one object"]["whole"] == 1.0
    assert written["weights"] == sum_of(None)
    assert "lora weights" not in written
    assert written["partial"] is False
    assert written["torch"] == torch.__version__
    assert "100.0%" in capsys.readouterr().out
    with Image.open(sheet) as opened:
        assert opened.size == (6 * 168, 2 * 216)


def test_figures_name_the_files_they_depend_on(tmp_path: Path) -> None:
    assert sum_of(tmp_path) is None
    sums = ["a  loras/x.safetensors\n", "b  training.log\n", "c  vae/y.safetensors\n"]
    (tmp_path / "SHA256SUMS").write_text("".join(sums))
    told = {loras: sum_of(tmp_path, loras=loras) for loras in (False, True)}
    for loras, line in ((True, sums[0]), (False, sums[2])):
        assert told[loras] == hashlib.sha256(line.encode()).hexdigest()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--plan", "unguided.yaml"], "no stage with guidance; give --negative-prompts 0"),
        (["--prompts", "-1"], "must be at least 0, and not all 0, got -1, 24 and 56"),
        (["--prompts", "0", "--lora-prompts", "0", "--negative-prompts", "0"], "and not all 0"),
        (["--prompts", "0", "--sheet", "s.png"], "--sheet shows pictures of --prompts, which is 0"),
        (["--sheet", "s.txt"], "--sheet must end in .png"),
        (["-o", "nowhere/r.json"], "nowhere"),
    ],
)
def test_mistakes_are_found_before_any_picture(
    more: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    unguided = [replace(stage, cfg=1.0) for stage in DEFAULT_PLAN.stages]
    Path("unguided.yaml").write_text(dump_plan(replace(DEFAULT_PLAN, stages=tuple(unguided))))
    assert main(more) == 2
    assert says in capsys.readouterr().err
