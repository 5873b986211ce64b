"""``python -m tools.judge_demo_model``: what share of its pictures is what was asked for.

Prompts of combinations that the network was never trained on, each painted with the whole plan and
looked at by its pixels: colour of the background; colour, shape, place and size of the thing, and
whether it is the only one. Backgrounds are plain. The recipe was made with the prompts of seed 0
in sight; those of another seed are a test of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tools.judging import NONE, Verdict, judge_one, judge_two, outlined_share, things_of
from tools.scenes import (
    COLORS,
    NEW_SHAPE,
    Scene,
    Thing,
    held_out_prompts,
    is_held_out,
    shape_caption,
    two_object_prompts,
    with_article,
)
from turbo.builtin import builtin_model
from turbo.engine import Engine
from turbo.errors import BadInputError, TurboError
from turbo.whole_file import require_writable_folder, write_whole

NEGATIVE_BACKGROUND = "blue"
PARTS = ("background", "color", "shape", "place", "size", "count", "whole")
LORAS = {"outlined": 1.4, "zorp": 1.0}
"""Name -> the strength it is judged at."""

Paint = Callable[..., Any]
Report = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parse(arguments)
    try:
        problem = _problem(options)
        if problem:
            raise BadInputError(problem)
        engine = Engine.from_pretrained(options.model, device=options.device, plan=options.plan)
        if options.lora_prompts:
            engine.set_loras(list(LORAS))  # a folder without them is found out now
            engine.set_loras([])

        about = {"weights": _sum_of(options.model), "torch": torch.__version__}

        def keep(report: Report) -> None:
            if options.output is not None:
                text = json.dumps(about | report, indent=1) + "\n"
                write_whole(options.output, text.encode(), overwrite=True)
            if options.sheet is not None:
                _write_sheet(pictures, options.sheet)

        pictures: list[Any] = []
        report = judge(engine, options.prompts, options.seed, options.lora_prompts, pictures, keep)
        for line in lines_of(report):
            print(line)
    except TurboError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _sum_of(model: Path | None) -> str | None:
    """SHA-256 of the model's list of sums, and so of all its files; None if it has no list."""
    path = (model or builtin_model()) / "SHA256SUMS"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _problem(options: argparse.Namespace) -> str | None:
    if options.prompts < 1 or options.lora_prompts < 0:
        return "--prompts must be at least 1, --lora-prompts at least 0"
    if options.sheet is not None and options.sheet.suffix != ".png":
        return f"--sheet must end in .png, got {options.sheet}"
    for path in (options.sheet, options.output):
        if path is not None:
            require_writable_folder(path.absolute().parent)
    return None


def judge(
    engine: Any,
    count: int,
    seed: int,
    lora_count: int = 0,
    pictures: list[Any] | None = None,
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """All that is measured, ready for JSON.

    Args:
        engine: Of the demo model.
        count: Prompts of one thing; a quarter as many of two.
        seed: Of the prompts; picture i has seed + i.
        lora_count: Pictures for each way with a LoRA and for the negative prompt; 0: none.
        pictures: Gets the first of one thing, [height, width, 3] of 8 bits each.
        keep: Called with the report so far after every 20 prompts and each part, and at the end.
    """
    begin = time.perf_counter()

    def paint(prompt: str, number: int, **more: Any) -> Any:
        return np.asarray(engine.generate(prompt, seed=seed + number, **more).image)

    report: Report = {"seed": seed, "partial": True}

    def add(name: str, part: Report) -> None:
        report[name] = part
        report["seconds"] = round(time.perf_counter() - begin, 1)
        keep(report)

    first: list[Any] = [] if pictures is None else pictures
    for part in _share(held_out_prompts(count, seed), judge_one, paint, first):
        add("one object", part)
    if count >= 4:
        for part in _share(two_object_prompts(count // 4, seed), judge_two, paint, []):
            add("two objects", part)
    if lora_count:
        add("negative prompt", _negative(paint, lora_count))
        add("loras", _loras(paint, lora_count, seed))
    report["partial"] = False
    keep(report)
    return report


def _write_sheet(pictures: Sequence[Any], path: Path) -> None:
    """Six in a row, at half their size; what is missing of the last row is black."""
    filled = [*pictures, *[np.zeros_like(pictures[0])] * (-len(pictures) % 6)]
    rows = [np.concatenate(filled[start : start + 6], 1) for start in range(0, len(filled), 6)]
    Image.fromarray(np.concatenate(rows, 0)[::2, ::2]).save(path)


def lines_of(report: Report) -> Iterator[str]:
    """The report as a table."""
    yield f"{'':12} {'pictures':>8} " + " ".join(f"{part:>10}" for part in PARTS)
    for name in ("one object", "two objects"):
        if name in report:
            row = report[name]
            yield f"{name:12} {row['pictures']:8} " + " ".join(f"{row[p]:10.1%}" for p in PARTS)
    for name, row in report.get("loras", {}).items():
        cells = ", ".join(f"{row[cell]:.0%} {cell}" for cell in CELLS)
        beside = ", ".join(f"{part} {row['beside'][part]:.0%}" for part in row["beside"])
        yield f"LoRA {name} seen in {cells}; with it {beside} right ({row['pictures']} pictures)"
    for name, row in report.get("negative prompt", {}).items():
        if isinstance(row, dict):
            cells = ", ".join(f"{count} {outcome}" for outcome, count in row.items())
            yield f"{name} as the negative prompt: {cells}"
    yield f"{report['seconds']} s"


def _share(
    prompts: Sequence[tuple[str, Scene]],
    judge_picture: Callable[[Any, Scene], Verdict],
    paint: Paint,
    pictures: list[Any],
) -> Iterator[Report]:
    """What is right in the pictures so far, after every 20 and at the end."""
    verdicts, wrong = [], []
    for number, (prompt, scene) in enumerate(prompts):
        pixels = paint(prompt, number)
        verdict = judge_picture(pixels, scene)
        verdicts.append(verdict)
        if len(pictures) < 18:
            pictures.append(pixels)
        if not verdict.whole:
            wrong.append(prompt)
        if (number + 1) % 20 == 0 or number + 1 == len(prompts):
            print(f"{number + 1} of {len(prompts)} judged", file=sys.stderr, flush=True)
            shares = {part: float(np.mean([getattr(v, part) for v in verdicts])) for part in PARTS}
            yield {"pictures": len(verdicts), **shares, "wrong": list(wrong)}


NEGATIVES = ("chosen colour", "another colour")
OUTCOMES = ("same colour", "other colour", "no colour", "no thing")


def _negative(paint: Paint, count: int) -> Report:
    """Name the colour that a seed gives a thing without one as the negative prompt.

    Without a negative prompt the same seed gives the same colour again. Beside it, a negative
    prompt that names another colour: what that changes is not obedience.

    Returns:
        How many pictures had a thing of one colour before, and of these, for each negative prompt,
        how many became what.
    """
    prompt = f"a circle on a {NEGATIVE_BACKGROUND} background"
    found: dict[str, dict[str, int]] = {name: dict.fromkeys(OUTCOMES, 0) for name in NEGATIVES}
    pictures = 0
    for number in range(count):
        before = things_of(paint(prompt, number))
        if not before or before[0].color == NONE:
            continue
        pictures += 1
        color = before[0].color
        others = [name for name in COLORS if name not in (color, NEGATIVE_BACKGROUND)]
        for name, named in zip(NEGATIVES, (color, others[number % len(others)])):
            negative = f"{with_article(named)} circle on a {NEGATIVE_BACKGROUND} background"
            after = things_of(paint(prompt, number, negative_prompt=negative))
            found[name][_outcome(color, after[0].color if after else None)] += 1
    return {"pictures": pictures, **found}


def _outcome(before: str, after: str | None) -> str:
    """Which of `OUTCOMES`; a thing that is not there has the colour None."""
    if after is None:
        return "no thing"
    if after == NONE:
        return "no colour"
    return "same colour" if after == before else "other colour"


CELLS = {
    "none": (False, False),
    "trigger alone": (False, True),
    "LoRA alone": (True, False),
    "both": (True, True),
}
"""Whether the LoRA is on, and whether the prompt has its word."""


def _loras(paint: Paint, count: int, seed: int) -> dict[str, Report]:
    """How often a LoRA's effect is seen, and what else is right with it and its word.

    The ring's prompts tell no shape. Neither was taught the combinations that it is asked for.
    """
    outlined = [
        (prompt, replace(scene, outlined=True))
        for prompt, scene in held_out_prompts(2 * count, seed + 1)
        if {scene.background, scene.things[0].color} != {"black", "white"}
    ][:count]
    pairs = [
        (color, background)
        for color in COLORS
        for background in COLORS
        if color != background and is_held_out(NEW_SHAPE, color, background)
    ]
    ring = [
        (
            shape_caption(*pair),
            Scene((Thing(NEW_SHAPE, pair[0], "", 0.5, 0.64, 0.2),), pair[1], "plain"),
        )
        for pair in (pairs[number % len(pairs)] for number in range(count))
    ]
    return {
        "outlined": _effect(
            paint, "outlined", outlined, lambda pixels: outlined_share(pixels) > 0.5,
            ("background", "color", "shape", "place"),
        ),
        "zorp": _effect(paint, "zorp", ring, _is_ring, ("background", "color")),
    }  # fmt: skip


def _is_ring(pixels: Any) -> bool:
    things = things_of(pixels)
    return bool(things) and things[0].shape == NEW_SHAPE


def _effect(
    paint: Paint,
    name: str,
    prompts: Sequence[tuple[str, Scene]],
    is_seen: Callable[[Any], bool],
    parts: Sequence[str],
) -> Report:
    report: Report = {"pictures": len(prompts)}
    for cell, (is_on, has_word) in CELLS.items():
        loras = [(name, LORAS[name])] if is_on else []
        made = [
            (paint(f"{name}, {prompt}" if has_word else prompt, number, loras=loras), scene)
            for number, (prompt, scene) in enumerate(prompts)
        ]
        report[cell] = float(np.mean([is_seen(pixels) for pixels, _ in made]))
    verdicts = [judge_one(pixels, scene) for pixels, scene in made]
    report["beside"] = {p: float(np.mean([getattr(v, p) for v in verdicts])) for p in parts}
    return report


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.judge_demo_model", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, help="default: the built-in model")
    parser.add_argument("--plan", type=Path, help="default: the workflow's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--lora-prompts", type=int, default=24, help="0: no LoRAs, no negative")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="a PNG of the first pictures")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
