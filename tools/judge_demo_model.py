"""``python -m tools.judge_demo_model``: what share of its pictures is what was asked for.

Prompts of combinations that the network was never trained on, each painted with the whole plan and
looked at by its pixels: colour of the background; colour, shape, place and size of the thing, and
whether it is the only one. Backgrounds are plain. The recipe was made with the pictures of seed 0
in sight; another seed asks for the same combinations, in other places and sizes, from other noise.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tools.judging import (
    LEAST_LINE,
    NONE,
    Verdict,
    background_of,
    has_proportion,
    judge_one,
    judge_two,
    outlined_share,
    things_of,
)
from tools.scenes import (
    COLORS,
    HEIGHT,
    NEW_SHAPE,
    OUTLINE,
    SHAPES,
    Scene,
    Thing,
    held_out_prompts,
    is_held_out,
    shape_caption,
    two_object_prompts,
    with_article,
)
from turbo._version import __version__
from turbo.builtin import builtin_model
from turbo.engine import Engine
from turbo.errors import BadInputError, TurboError
from turbo.info import collect_info
from turbo.plan import DEFAULT_PLAN, Plan, load_plan
from turbo.whole_file import require_writable_folder, write_whole

PARTS = ("background", "color", "shape", "place", "size", "count", "whole")
LORAS = {"outlined": 1.0, "zorp": 1.0}
"""Name -> the strength it is judged at."""
NEGATIVES = ("no negative prompt", "another colour avoided", "it avoided")
_NEGATIVE, _OUTLINED = 7, 1_000
"""Of their random numbers."""

MOST_SEED = 2**63

Paint = Callable[..., Any]
Report = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parse(arguments)
    try:
        problem = _problem(options)
        if problem:
            raise BadInputError(problem)
        plan = DEFAULT_PLAN if options.plan is None else load_plan(options.plan)
        last = plan.stages[-1]
        if not has_proportion(last.height, last.width):
            raise BadInputError(
                f"--plan ends in {last.width}x{last.height}, but places and sizes are judged in "
                f"pictures {HEIGHT} times as high as wide; give one such as the default"
            )
        if options.negative_prompts and not _guided_stages(plan):
            raise BadInputError("--plan has no stage with guidance; give --negative-prompts 0")
        engine = Engine.from_pretrained(options.model, device=options.device, plan=plan)
        if options.lora_prompts:
            engine.set_loras(list(LORAS))  # a folder without them is found out now
            engine.set_loras([])

        sizes = [f"{stage.width}x{stage.height}" for stage in plan.stages]
        about = {
            "command": _command(options),
            "weights": sum_of(options.model),
            "stages": sizes,
            "turbo": __version__,
            "torch": torch.__version__,
            "device": str(engine.models.device),
            "dtype": str(engine.models.dtype).removeprefix("torch."),
            "processor": next(one["name"] for one in collect_info()["devices"]),
        }
        if options.lora_prompts:
            about["lora weights"] = sum_of(options.model, loras=True)

        def keep(report: Report) -> None:
            if options.output is not None:
                text = json.dumps(about | report, indent=1) + "\n"
                write_whole(options.output, text.encode(), overwrite=True)
            if options.sheet is not None:
                _write_sheet(pictures, options.sheet)

        pictures: list[Any] = []
        counts = options.prompts, options.seed, options.lora_prompts, options.negative_prompts
        report = judge(engine, *counts, pictures, keep, plan)
        for line in lines_of(report):
            print(line)
    except TurboError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def sum_of(model: Path | None, *, loras: bool = False) -> str | None:
    """SHA-256 of a model's sums of its files, or of its LoRAs'; None if it has no list of them.

    Args:
        model: Its folder; None: the built-in model.
        loras: Those of the LoRAs alone. Otherwise of all others but the log.
    """
    path = (model or builtin_model()) / "SHA256SUMS"
    if not path.is_file():
        return None
    chosen = [
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.partition("  ")[2].startswith("loras/") is loras and "training.log" not in line
    ]
    return hashlib.sha256("".join(chosen).encode()).hexdigest()


def _command(options: argparse.Namespace) -> str:
    """What was asked for, without the folders of this machine."""
    command = "python -m tools.judge_demo_model"
    for name in ("prompts", "lora_prompts", "negative_prompts", "seed"):
        command += f" --{name.replace('_', '-')} {getattr(options, name)}"
    for name in ("model", "plan"):
        given = getattr(options, name)
        command += "" if given is None else f" --{name} {given.name}"
    return command


def _problem(options: argparse.Namespace) -> str | None:
    counts = options.prompts, options.lora_prompts, options.negative_prompts
    if min(counts) < 0 or not any(counts):
        given = "{}, {} and {}".format(*counts)
        return (
            "--prompts, --lora-prompts and --negative-prompts must be at least 0, and not all 0, "
            f"got {given}"
        )
    if options.sheet is not None and not options.prompts:
        return "--sheet shows pictures of --prompts, which is 0"
    if options.sheet is not None and options.sheet.suffix != ".png":
        return f"--sheet must end in .png, got {options.sheet}"
    if not 0 <= options.seed < MOST_SEED:
        return f"--seed must be from 0 to {MOST_SEED - 1}, got {options.seed}"
    for path in (options.sheet, options.output):
        if path is not None:
            require_writable_folder(path.absolute().parent)
    return None


def judge(
    engine: Any,
    count: int,
    seed: int,
    lora_count: int = 0,
    negative_count: int = 0,
    pictures: list[Any] | None = None,
    keep: Callable[[Report], None] = lambda report: None,
    plan: Plan = DEFAULT_PLAN,
) -> Report:
    """All that is measured, ready for JSON.

    Args:
        engine: Of the demo model.
        count: Prompts of one thing; a quarter as many of two; 0: none.
        seed: Of the prompts; picture i has seed + i.
        lora_count: Pictures for each way with a LoRA; 0: none.
        negative_count: Pictures without a negative prompt, and for each way with one; 0: none.
        pictures: Gets the first of one thing, [height, width, 3] of 8 bits each.
        keep: Called with the report so far after every 20 prompts and each part, and at the end.
        plan: That of the engine.
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
    if negative_count:
        add("negative prompt", _negative(paint, negative_count, seed, plan))
    if lora_count:
        add("loras", _loras(paint, lora_count, seed))
    report["partial"] = False
    keep(report)
    return report


def _write_sheet(pictures: Sequence[Any], path: Path) -> None:
    """Six in a row, at half their size; what is missing of the last row is black. Whole or not."""
    filled = [*pictures, *[np.zeros_like(pictures[0])] * (-len(pictures) % 6)]
    rows = [np.concatenate(filled[start : start + 6], 1) for start in range(0, len(filled), 6)]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(rows, 0)[::2, ::2]).save(file, "PNG")
    write_whole(path, file.getvalue(), overwrite=True)


def lines_of(report: Report) -> Iterator[str]:
    """The report as a table."""
    rows = {name: report[name] for name in ("one object", "two objects") if name in report}
    if rows:
        yield f"{'':12} {'pictures':>8} " + " ".join(f"{part:>10}" for part in PARTS)
    for name, row in rows.items():
        yield f"{name:12} {row['pictures']:8} " + " ".join(f"{row[p]:10.1%}" for p in PARTS)
    for name, row in report.get("loras", {}).items():
        cells = ", ".join(f"{row[cell]:.0%} {cell}" for cell in CELLS)
        yield (f"LoRA {name} seen in {cells}; with it {_shares(row['beside'])} right "
               f"({row['pictures']} pictures)")  # fmt: skip
    if "negative prompt" in report:
        row = report["negative prompt"]
        for way in NEGATIVES:
            cells = ", ".join(f"{part} in {number}" for part, number in row[way].items())
            yield f"{way}: {cells} of {row['pictures']} pictures"
    yield f"{report['seconds']} s"


def _shares(of: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {share:.0%}" for part, share in of.items())


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
        if _tell(number + 1, len(prompts)):
            shares = {part: float(np.mean([getattr(v, part) for v in verdicts])) for part in PARTS}
            yield {"pictures": len(verdicts), **shares, "wrong": list(wrong)}


def _tell(done: int, count: int, what: str = "", every: int = 20) -> bool:
    """Print how far it is, now and then and at the end; whether it was time to."""
    if done % every and done != count:
        return False
    print(f"{done} of {count} judged {what}".rstrip(), file=sys.stderr, flush=True)
    return True


def _negative(paint: Paint, count: int, seed: int, plan: Plan) -> Report:
    """How often a thing has a colour that no word asks for, and how often if it is to be avoided.

    Prompts tell no colour of the thing; the negative prompt is the same with one. Beside it, one
    that names another colour: what that changes is not obedience. Painted up to the last stage
    that has guidance, for the others do not look at it.

    Returns:
        Of each of `NEGATIVES`, in how many pictures the thing had the colour, and what else is
        right.
    """
    guided = _guided_stages(plan)
    begun = replace(plan, stages=plan.stages[:guided])
    rng = np.random.default_rng([seed, _NEGATIVE])
    parts = ("color", "background", "shape", "any color")
    found = {name: dict.fromkeys(parts, 0) for name in NEGATIVES}
    for number in range(count):
        shape = str(rng.choice(list(SHAPES)))
        color, other, background = map(str, rng.choice(list(COLORS), 3, replace=False))
        ground = f"{shape} on {with_article(background)} background"
        for name, avoided in zip(NEGATIVES, (None, other, color)):
            negative = f"{with_article(avoided)} {ground}" if avoided else ""
            pixels = paint(with_article(ground), number, negative_prompt=negative, plan=begun)
            things = things_of(pixels)
            _tell(3 * number + NEGATIVES.index(name) + 1, 3 * count, "with a negative prompt")
            found[name]["background"] += background_of(pixels) == background
            if things:
                found[name]["color"] += things[0].color == color
                found[name]["shape"] += things[0].shape == shape
                found[name]["any color"] += things[0].color != NONE
    return {"pictures": count, "stages": guided, **found}


def _guided_stages(plan: Plan) -> int:
    """How many stages there are up to the last that has guidance."""
    return max((n for n, stage in enumerate(plan.stages, 1) if stage.cfg != 1), default=0)


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
        (prompt, replace(scene, outline=OUTLINE))
        for prompt, scene in held_out_prompts(2 * count, seed + _OUTLINED)
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
            paint, "outlined", outlined, lambda pixels: outlined_share(pixels) >= LEAST_LINE,
            ("background", "color", "shape", "place", "size", "count"),
        ),
        "zorp": _effect(paint, "zorp", ring, _is_ring, ("background", "color", "place", "count")),
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
    report: Report = {"pictures": len(prompts), "strength": LORAS[name]}
    for at, (cell, (is_on, has_word)) in enumerate(CELLS.items(), start=1):
        loras = [(name, LORAS[name])] if is_on else []
        made = [
            (paint(f"{name}, {prompt}" if has_word else prompt, number, loras=loras), scene)
            for number, (prompt, scene) in enumerate(prompts)
        ]
        _tell(at * len(prompts), len(CELLS) * len(prompts), f"for {name}", every=1)
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
    parser.add_argument("--lora-prompts", type=int, default=24)
    parser.add_argument("--negative-prompts", type=int, default=56)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="a PNG of the first pictures")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
