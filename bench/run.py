"""``python -m bench run``: the workflow from prompt to PNG, and each of its parts.

Before anything is timed, a network call of each stage is checked against diffusers' network over
the same weights, and the first picture must come out twice the same. Prompts are new in each round,
so that no features are left from the round before; loading and the first picture are given apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.arguments import Parser
from bench.arithmetic import PictureArithmetic
from bench.measure import Comparison
from bench.options import Subject, add_model_options, add_round_options, run_command
from bench.results import Results, describe_error
from bench.setting import Setting
from bench.side import Side
from bench.table import lines_of
from bench.turbo_side import TurboSide
from turbo.acceleration import AUTO, SpeedUps
from turbo.plan import Plan

SWITCHES: dict[str, bool | str] = {"auto": AUTO, "on": True, "off": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(
        prog="python -m bench run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add_round_options(parser)
    parser.add_argument("--compile", choices=SWITCHES, default="auto", help="default: auto")
    parser.add_argument("--capture", default="auto", help="as turbo generate; default: auto")
    parser.add_argument("--kernels", choices=SWITCHES, default="auto", help="default: auto")
    given = sys.argv[2:] if arguments is None else list(arguments)
    options = parser.parse_args(given)

    def work() -> Results:
        subject = Subject.load(options)
        speed_ups = SpeedUps.choose(
            subject.models.device,
            compile=SWITCHES[options.compile],
            capture=options.capture,
            kernels=SWITCHES[options.kernels],
            strict=True,
        )
        side = turbo_side(subject, "turbo", subject.plan, speed_ups)
        plain = SpeedUps()
        reference = None
        if speed_ups != replace(plain, strict=True):
            reference = turbo_side(subject, "turbo, plain", subject.plan, plain)
        return measured(subject, "run", given, [side], reference=reference)

    return run_command(options, work, show)


def turbo_side(
    subject: Subject,
    name: str,
    plan: Plan,
    speed_ups: SpeedUps,
    *,
    best: bool = False,
    approximate: bool = False,
) -> TurboSide:
    """turbo on a subject's model; approximate also where its plan leaves network calls out."""
    return TurboSide(
        name,
        subject.loaded,
        plan,
        speed_ups,
        approximate=approximate or any(stage.easycache for stage in plan.resolved().stages),
        best=best,
        buckets=subject.buckets(),
    )


def measured(
    subject: Subject,
    kind: str,
    arguments: Sequence[str],
    sides: Sequence[Side],
    *,
    reference: Side | None = None,
    cold_start: Side | None = None,
) -> Results:
    """Measure sides on a subject and keep the results, also those of a run that ends early.

    Args:
        subject: Model, requests and the plan whose operations are counted.
        kind: Of the results file.
        arguments: Of the command.
        sides: The first is what the others are compared with.
        reference: As `Comparison` takes it.
        cold_start: As `Comparison` takes it.
    """
    options = subject.options
    results = Results(options.output, subject.header(kind, arguments))
    data = results.data
    del data["parts"]
    data["configuration"] |= {"rounds": options.rounds, "order": [side.name for side in sides]}
    in_8_bits = subject.models.transformer.quantize in ("fp8", "int8")
    if in_8_bits:
        data["limit"] = {"withheld": "it is measured of no 8-bit products"}
    counting = PictureArithmetic(subject.models, subject.plan)
    comparison = Comparison(
        sides,
        subject.request,
        results,
        reference=reference,
        cold_start=cold_start,
        arithmetic=lambda asked, made: counting.of(asked.prompt, asked.negative_prompt, made.skips),
        limit=None if in_8_bits else lambda: limit_of(subject),
        strict=subject.strict,
        device=subject.models.device,
    )
    try:
        comparison.run(options.rounds)
        data["partial"] = not comparison.complete
    except BaseException as error:
        data["error"] = describe_error(error)
        if isinstance(error, KeyboardInterrupt):
            show(results)
        raise
    finally:
        results.write()
    return results


def limit_of(subject: Subject) -> dict[str, Any]:
    """The rate of a large matrix product here and now."""
    import torch

    with torch.inference_mode():
        found = Setting(subject.models.device, dtype=subject.product_dtype).limit
    return {**found, "dtype": str(subject.product_dtype).removeprefix("torch.")}


def show(results: Results) -> None:
    """Print the table."""
    for line in lines_of(results.data):
        print(line)
    if results.path is not None:
        print(f"kept in {results.path}")
