"""``python -m tools.judge_demo_model``: what share of its pictures is what was asked for.

Prompts of combinations that the model was never trained on, each painted with the whole plan and
looked at by its pixels: colour of the background, colour, shape and place of the thing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.judging import Verdict, judge_one, judge_two, outlined_share, things_of
from tools.scenes import NEW_SHAPE, Scene, held_out_prompts, two_object_prompts
from turbo.engine import Engine
from turbo.errors import TurboError

NEGATIVE_PROMPT = "a circle on a blue background"
NEGATIVE_COLOR = "red"
PARTS = ("background", "color", "shape", "place", "whole")

Paint = Callable[..., Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parse(arguments)
    if options.prompts < 1 or options.lora_prompts < 0:
        print("error: --prompts must be at least 1, --lora-prompts at least 0", file=sys.stderr)
        return 2
    for path in (options.sheet, options.output):
        if path is not None and not path.absolute().parent.is_dir():
            print(f"error: {path} is in no folder that exists; make it first", file=sys.stderr)
            return 2
    try:
        engine = Engine.from_pretrained(options.model, device=options.device, plan=options.plan)
        report = judge(engine, options.prompts, options.seed, options.lora_prompts, options.sheet)
    except TurboError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in lines_of(report):
        print(line)
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def judge(
    engine: Engine, count: int, seed: int, lora_count: int = 0, sheet: Path | None = None
) -> dict[str, Any]:
    """All that is measured, ready for JSON.

    Args:
        engine: Of the demo model.
        count: Prompts of one thing; a quarter as many of two.
        seed: Of the prompts; picture i has seed + i.
        lora_count: Pictures for each LoRA and for the negative prompt; 0: none are made.
        sheet: Where to put the first pictures.
    """
    begin = time.perf_counter()

    def paint(prompt: str, number: int, **more: Any) -> Any:
        return np.asarray(engine.generate(prompt, seed=seed + number, **more).image)

    pictures: list[Any] = []
    report: dict[str, Any] = {
        "one object": _share(held_out_prompts(count, seed), judge_one, paint, pictures)
    }
    if count >= 4:
        report["two objects"] = _share(two_object_prompts(count // 4, seed), judge_two, paint, [])
    if lora_count:
        report["negative prompt"] = _negative(paint, lora_count)
        report["loras"] = _loras(paint, lora_count, seed)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    if sheet is not None:
        _write_sheet(pictures, sheet)
    return report


def _write_sheet(pictures: Sequence[Any], path: Path) -> None:
    """Six in a row, at half their size; what is missing of the last row is black."""
    filled = [*pictures, *[np.zeros_like(pictures[0])] * (-len(pictures) % 6)]
    rows = [np.concatenate(filled[start : start + 6], 1) for start in range(0, len(filled), 6)]
    Image.fromarray(np.concatenate(rows, 0)[::2, ::2]).save(path)


def lines_of(report: dict[str, Any]) -> Iterator[str]:
    """The report as a table."""
    yield f"{'':12} {'pictures':>8} " + " ".join(f"{part:>10}" for part in PARTS)
    for name in ("one object", "two objects"):
        if name in report:
            row = report[name]
            yield f"{name:12} {row['pictures']:8} " + " ".join(f"{row[p]:10.1%}" for p in PARTS)
    for name, row in report.get("loras", {}).items():
        yield f"LoRA {name}: {row['without']:.1%} without, {row['with']:.1%} with"
    if "negative prompt" in report:
        row = report["negative prompt"]
        yield (
            f"negative prompt {NEGATIVE_COLOR!r}: {row['without']:.1%} of the things are "
            f"{NEGATIVE_COLOR} without, {row['with']:.1%} with"
        )
    yield f"{report['seconds']} s"


def _share(
    prompts: Sequence[tuple[str, Scene]],
    judge_picture: Callable[[Any, Scene], Verdict],
    paint: Paint,
    pictures: list[Any],
) -> dict[str, Any]:
    verdicts, wrong = [], []
    for number, (prompt, scene) in enumerate(prompts):
        pixels = paint(prompt, number)
        verdict = judge_picture(pixels, scene)
        verdicts.append(verdict)
        if len(pictures) < 18:
            pictures.append(pixels)
        if not verdict.whole:
            wrong.append(prompt)
    shares = {part: float(np.mean([getattr(v, part) for v in verdicts])) for part in PARTS}
    return {"pictures": len(verdicts), **shares, "wrong": wrong}


def _negative(paint: Paint, count: int) -> dict[str, float]:
    def share(**more: str) -> float:
        things = [things_of(paint(NEGATIVE_PROMPT, number, **more)) for number in range(count)]
        return float(
            np.mean([bool(found) and found[0].color == NEGATIVE_COLOR for found in things])
        )

    return {"without": share(), "with": share(negative_prompt=NEGATIVE_COLOR)}


def _loras(paint: Paint, count: int, seed: int) -> dict[str, dict[str, float]]:
    prompts = held_out_prompts(count, seed + 1)

    def outlined(**more: Any) -> float:
        shares = [outlined_share(paint(text, n, **more)) for n, (text, _) in enumerate(prompts)]
        return float(np.mean([share > 0.5 for share in shares]))

    def ring(**more: Any) -> float:
        things = [
            things_of(paint(f"a {scene.things[0].color} shape on a {scene.background} background",
                            number, **more))
            for number, (_, scene) in enumerate(prompts)
        ]  # fmt: skip
        return float(np.mean([bool(found) and found[0].shape == NEW_SHAPE for found in things]))

    return {
        "outlined": {
            "without": outlined(),
            "with": outlined(loras=[("outlined", 1.0)], trigger_word="outlined"),
        },
        "zorp": {"without": ring(), "with": ring(loras=[("zorp", 1.0)], trigger_word="zorp")},
    }


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
