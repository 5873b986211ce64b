"""``python -m bench quality``: each option that changes the picture against the exact run.

The exact run is the plan without EasyCache in plain PyTorch. It is made beside the options with
each prompt, and no figure is kept unless it gives the same picture bit for bit each time. Options
that need an engine of their own follow one after the other: two models are in memory at most. The
yardstick is the picture of another seed, seed + 1: "of another seed" is 0 for the exact picture and
100 % for one that lies as far from it as the other seed's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.arguments import Parser, without_folders
from bench.described import describe_model
from bench.endings import FAILED, OK, exit_code, require_writable
from bench.machine import describe_machine
from bench.picture_grid import MOST_ROWS, draw_grid
from bench.quality_study import (
    ANOTHER_SEED,
    EXACT,
    OPTIONS,
    FailedCheckError,
    Judge,
    Option,
    Study,
    dtype_name,
)
from bench.results import FORMAT, Found, Results, describe_error
from turbo.engine import Engine, pick_device, pick_dtype
from turbo.errors import BadInputError
from turbo.messages import reason
from turbo.noise import check_seed
from turbo.plan import DEFAULT_PLAN, ModelSettings, Plan, load_plan, plan_to_dict

PROMPTS = Path(__file__).with_name("prompts.txt")
SEED = 42
EXACT_RUN = "exact"
PICTURES = 8
"""Prompts, if none are asked for."""
MOST_JUDGED = 300
"""Prompts that the judge has."""


def choose_options(names: str | None, plan: Plan, dtype: str) -> list[Option]:
    """The options named, separated by commas; without names all that are not the exact run itself.

    Raises:
        BadInputError: There is no such option, or with this plan and dtype it is the exact run.
    """
    if names is None:
        return [option for option in OPTIONS if option.differs(plan, dtype)]
    known = {option.name: option for option in OPTIONS}
    chosen = list(dict.fromkeys(" ".join(name.split()) for name in names.split(",")))
    for name in chosen:
        if name not in known:
            raise BadInputError(f"--options: no option {name!r}; there are {', '.join(known)}")
        if not known[name].differs(plan, dtype):
            raise BadInputError(
                f"--options: {name} is the exact run itself: the plan has no EasyCache, or the "
                f"dtype is {dtype} already; leave it out, or give another --plan or --dtype"
            )
    return [known[name] for name in chosen]


def read_prompts(path: Path | None, count: int | None) -> list[str]:
    """The first `count` prompts of a file, or of the built-in ones.

    Args:
        path: A text file, one prompt a line; empty lines and those that begin with # do not count.
        count: None takes all of a file, and `PICTURES` of the built-in ones.

    Raises:
        BadInputError: The file cannot be read or holds fewer prompts, or the count is below 1.
    """
    if count is not None and count < 1:
        raise BadInputError(f"--prompts must be at least 1, got {count}")
    chosen = path or PROMPTS
    try:
        lines = [" ".join(line.split()) for line in chosen.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise BadInputError(f"{chosen}: is no UTF-8 text file with a prompt a line") from None
    except OSError as error:
        raise BadInputError(f"{chosen}: cannot be read: {reason(error)}") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise BadInputError(f"{chosen}: holds no prompt; write one a line")
    wanted = count or (PICTURES if path is None else len(prompts))
    if wanted > len(prompts):
        raise BadInputError(
            f"--prompts {wanted}: there are {len(prompts)} in {chosen.name}; ask for fewer, or "
            "give more in a --prompts-file"
        )
    return prompts[:wanted]


# What is shown.

LEGEND = (
    "Median [20th 80th percentile] over the prompts, same seed as the exact run. of another seed: "
    "distance of the latents as a share of the distance that another seed makes; skipped: network "
    "calls; time: all stages and the last decode, over the exact run's; that of another seed would "
    "be 1 on a machine that does nothing else."
)
HEADINGS = (
    f"{'option':15} {'stage':8} {'PSNR dB':>21} {'SSIM':>22} {'latent L2':>9} "
    f"{'of another seed':>15} {'skipped':>8} {'time':>16}"
)


def table(data: Found) -> Iterator[str]:
    """The figures, a line for each option and stage."""
    yield HEADINGS
    for name, option in data["options"].items():
        mark = "" if option["approximate"] else " (exact)"
        if "withheld" in option:
            yield f"{name:15} no figures: {option['withheld']}"
        elif "stages" in option:
            yield from _lines(f"{name}{mark}", option)
    if "stages" in data["another_seed"]:
        yield from _lines(ANOTHER_SEED, data["another_seed"])
    yield LEGEND
    yield from _verdicts(data)


def _verdicts(data: Found) -> Iterator[str]:
    entries = {EXACT_RUN: data["exact"], **data["options"], ANOTHER_SEED: data["another_seed"]}
    judged = {name: entry["judged"] for name, entry in entries.items() if "judged" in entry}
    if not judged:
        return
    parts = list(judged[EXACT_RUN])
    yield f"{'as the prompt says':18} " + " ".join(f"{part:>10}" for part in parts)
    for name, shares in judged.items():
        yield f"{name:18} " + " ".join(f"{shares[part]:10.1%}" for part in parts)


def _lines(name: str, entry: Found) -> Iterator[str]:
    stages = entry["stages"]
    for stage, found in stages.items():
        shares = found.get("of_another_seed")
        share = "" if shares is None else _percent(shares["latent_l2"]["median"])
        saved, wanted = entry.get("skips", {}).get(stage, (0, 0))
        skipped = f"{saved}/{wanted}" if wanted else ""
        is_last = stage == list(stages)[-1] and "time_ratio" in entry
        time = _spread(entry["time_ratio"], 2) if is_last else ""
        line = (
            f"{name:15} {stage:8} {_spread(found['psnr_db'], 1):>21} "
            f"{_spread(found['ssim'], 3):>22} {found['latent_l2']['median']:9.2g} "
            f"{share:>15} {skipped:>8} {time:>16}"
        )
        yield line.rstrip()
        name = ""


def _spread(summary: Found, digits: int) -> str:
    median, p20, p80 = (
        "same" if summary[name] is None else f"{summary[name]:.{digits}f}"
        for name in ("median", "p20", "p80")
    )
    return median if median == p20 == p80 else f"{median} [{p20} {p80}]"


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.2%}" if value < 0.1 else f"{value:.0%}"


def title(data: Found) -> str:
    """What was measured."""
    configuration = data["configuration"]
    model, count = configuration["model"], len(data["exact"]["pictures"])
    parameters = f"{sum(model['parameters'].values()):,} parameters"
    if "paints" in model:
        parameters += ", trained to paint simple scenes alone"
    elif model["built_in"]:  # in older files
        parameters += " of random weights"
    if model["built_in"] or "paints" in model:
        parameters += ", so nothing here is about Z-Image itself"
    return (
        f"Model: {model['name']}, {parameters}. Exact run: {configuration['dtype']} on "
        f"{configuration['device']}, no EasyCache. Seed {configuration['seed']}, prompts: {count}."
    )


# The command.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if at least one option has figures."""
    parser = _parser()
    options = parser.parse_args(arguments)
    given = list(sys.argv[2:] if arguments is None else arguments)
    return exit_code(lambda: _run(options, without_folders(given)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench quality", description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="default: the plan's, or the built-in one")
    parser.add_argument("--plan", metavar="FILE", type=Path, help="default: the workflow's plan")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto",
                        help="of the exact run: auto, float32, bfloat16, float16")  # fmt: skip
    parser.add_argument("--prompts", metavar="N", type=int,
                        help=f"how many (default: {PICTURES}, or all of the file); of the judge's "
                        "scenes, if it judges")  # fmt: skip
    parser.add_argument("--prompts-file", metavar="FILE", type=Path, help="one prompt a line")
    parser.add_argument("--judge", action=argparse.BooleanOptionalAction,
                        help="for a model of tools.train_demo_model: prompts it was never "
                        "trained on, and what share of the pictures is as they say (default: "
                        "for the built-in model without a prompts file)")  # fmt: skip
    parser.add_argument("--seed", metavar="S", type=int, default=SEED, help=f"default: {SEED}")
    parser.add_argument("--options", metavar="NAMES",
                        help="separated by commas, of: "
                        + ", ".join(option.name for option in OPTIONS))  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE.json", type=Path,
                        help="results, renewed after each prompt; pictures stand "
                        "beside them")  # fmt: skip
    parser.add_argument("--grid", metavar="FILE.png", type=Path,
                        help=f"the last stage of the first {MOST_ROWS} prompts, with "
                        "differences")  # fmt: skip
    return parser


def _run(options: argparse.Namespace, command: Sequence[str]) -> int:
    require_writable(options.output)
    require_writable(options.grid, "--grid")
    seed = check_seed(options.seed)
    if options.grid is not None and options.grid.suffix.lower() != ".png":
        raise BadInputError(f"--grid must end in .png, got {options.grid.name!r}")
    plan = (DEFAULT_PLAN if options.plan is None else load_plan(options.plan)).resolved()
    built_in = not any((options.model, plan.model.path, plan.model.vae_path, plan.model.clip_path))
    prompts, judge = _prompts_and_judge(options, built_in and _is_of_scenes(plan))
    device = pick_device(plan.model.device if options.device == "auto" else options.device)
    dtype = dtype_name(pick_dtype(_dtype_of(options, plan), device))
    chosen = choose_options(options.options, plan, dtype)
    if not chosen:
        raise BadInputError("with this plan and dtype no option differs from the exact run")

    def make_engine(**changes: Any) -> Engine:
        arguments = {"plan": plan, "device": device, "dtype": dtype, **changes}
        return Engine.from_pretrained(options.model, **arguments)

    exact, path = make_engine(**EXACT), options.output
    header = {
        "format": FORMAT,
        "kind": "quality",
        "command": ["quality", *command],
        "machine": describe_machine(str(device)),
        "configuration": {
            "model": _describe_model(options.model, exact, built_in, judge is not None),
            "plan": plan_to_dict(replace(plan, model=ModelSettings())),  # no local paths
            "prompts": prompts,
            "negative_prompt": "",
            "seed": seed,
            "dtype": dtype,
            "device": device.type,
        },
    }
    results = Results(path, header)
    del results.data["parts"]
    results.write()
    folder = None if path is None else path.with_name(f"{path.stem}-pictures")
    study = Study(plan, chosen, prompts, seed, exact, make_engine, results, folder, judge=judge)
    code = _measure(study, results, options.grid)
    print(title(results.data))
    for line in table(results.data):
        print(line)
    return code


def _is_of_scenes(plan: Plan) -> bool:
    """Whether pictures have about the proportion in which places and sizes are judged."""
    from tools.judging import has_proportion

    return has_proportion(plan.stages[-1].height, plan.stages[-1].width)


def _prompts_and_judge(
    options: argparse.Namespace, by_default: bool
) -> tuple[list[str], Judge | None]:
    has_file = options.prompts_file is not None
    wanted = options.judge if options.judge is not None else by_default and not has_file
    if not wanted:
        return read_prompts(options.prompts_file, options.prompts), None
    if has_file:
        raise BadInputError("--judge has prompts of its own; leave --prompts-file out")
    count = PICTURES if options.prompts is None else options.prompts
    if count < 1:
        raise BadInputError(f"--prompts must be at least 1, got {count}")
    if count > MOST_JUDGED:
        raise BadInputError(f"--prompts {count}: the judge has {MOST_JUDGED}; ask for fewer")
    from tools.judging import judge_one
    from tools.scenes import held_out_prompts

    asked = held_out_prompts(count)

    def judge(number: int, picture: Image.Image) -> dict[str, bool]:
        verdict = judge_one(np.asarray(picture), asked[number][1])
        return asdict(verdict) | {"whole": verdict.whole}

    return [prompt for prompt, _ in asked], judge


def _dtype_of(options: argparse.Namespace, plan: Plan) -> str:
    return str(plan.model.torch_dtype if options.dtype == "auto" else options.dtype)


def _describe_model(given: str | None, engine: Engine, built_in: bool, judged: bool) -> Found:
    name = Path(given or engine.plan.model.path or engine.files.network).name
    described = describe_model(engine.models, "built-in" if built_in else name)
    paints = {"paints": "scenes"} if built_in or judged else {}
    return {**described, "built_in": built_in, **paints}


def _measure(study: Study, results: Results, grid: Path | None) -> int:
    data = results.data
    try:
        for _ in study.run():
            if grid is not None:
                draw_grid(title(data), study.columns, study.rows).save(grid)
    except BaseException as error:  # Ctrl-C too: what was found is kept
        if isinstance(error, FailedCheckError):
            study.withhold(str(error))
        data["error"] = describe_error(error)
        results.write()
        raise
    data["partial"] = False
    results.write()
    return OK if any("stages" in option for option in data["options"].values()) else FAILED
