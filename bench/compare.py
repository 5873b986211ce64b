"""``python -m bench compare --baseline RIVAL``: turbo beside a rival, same weights, plan and seed.

Both sides run in this run, alternating, so that a busy machine slows both; a ratio is the median
of the rounds' own ratios. Sides marked *best* are each program's fastest setting. Pictures are
compared too: a side whose picture is another one gets no figures. All sides calculate in the same
dtype; with ``--best-dtype`` the fastest settings are measured in a lower one as well.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.arguments import Parser, positive
from bench.cold_start import ColdStart
from bench.options import Subject, add_model_options, add_round_options, run_command
from bench.results import Results
from bench.run import measured, show, turbo_side
from bench.servers import require_here
from bench.side import MissingRivalError, Side
from turbo.acceleration import SpeedUps
from turbo.errors import BadInputError
from turbo.plan import Plan
from turbo.samplers import SAMPLERS

SINGLE_STAGE = ("sdcpp", "sglang")
RIVALS = ("comfyui", "diffusers", *SINGLE_STAGE)
SECONDS_A_PICTURE = 3600.0
"""That a rival's may take unless told otherwise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = _parser()
    given = sys.argv[2:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    if options.baseline not in RIVALS and not options.baseline.endswith(".json"):
        parser.error(
            f"--baseline must be one of {', '.join(RIVALS)} or a results file that ends in .json, "
            f"got {options.baseline!r}"
        )

    def work() -> Results:
        _require_rival(options)
        subject = Subject.load(options)
        if options.baseline in SINGLE_STAGE:
            single = subject.without_easycache().single_stage()
            subject = replace(subject, plan=without_drawn_noise(single))
        sides = _sides(subject, given)
        whole = ColdStart(options, options.timeout) if options.cold_start else None
        return measured(subject, "compare", given, sides, cold_start=whole)

    return run_command(options, work, show)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--baseline", required=True, metavar="RIVAL", help=f"{', '.join(RIVALS)} or FILE.json"
    )
    add_model_options(parser)
    add_round_options(parser)
    parser.add_argument("--only", nargs="+", metavar="SIDE", help="of the sides, by name")
    parser.add_argument(
        "--cold-start",
        action="store_true",
        help="after the rounds also time a process of turbo's to its picture on the disk",
    )
    parser.add_argument(
        "--best-dtype",
        choices=("bfloat16", "float16"),
        help="measure the fastest settings in this too, as approximate (diffusers; comfyui "
        "with --comfyui-dir)",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=SECONDS_A_PICTURE,
        metavar="S",
        help=f"a rival's picture that takes longer ends it (default: {SECONDS_A_PICTURE:g})",
    )
    comfyui = parser.add_argument_group("comfyui")
    comfyui.add_argument("--comfyui-url", metavar="URL", help="a running server")
    comfyui.add_argument("--comfyui-dir", type=Path, metavar="DIR", help="an installation to start")
    comfyui.add_argument(
        "--comfyui-command", metavar="LINE", help="how to start one; {port} and {models} filled in"
    )
    comfyui.add_argument("--comfyui-python", metavar="FILE", help="the installation's interpreter")
    comfyui.add_argument(
        "--comfyui-flags", type=_words, default=(), metavar="LINE", help="added to every start"
    )
    comfyui.add_argument(
        "--comfyui-best-flags",
        type=_words,
        default=(),
        metavar="LINE",
        help="those of its fastest settings, such as --fast: a side of their own, approximate",
    )
    others = parser.add_argument_group("sdcpp and sglang, which make one stage")
    others.add_argument("--sdcpp", metavar="FILE", help="stable-diffusion.cpp's program")
    others.add_argument(
        "--sdcpp-best-flags",
        type=_words,
        default=(),
        metavar="LINE",
        help="those of its fastest settings: a side of their own, approximate",
    )
    others.add_argument("--sglang-url", metavar="URL", help="a server of its images API")
    return parser


def _words(line: str) -> tuple[str, ...]:
    """A command line's words, as an option's `type`."""
    try:
        return tuple(shlex.split(line))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is no command line: {error}, got {line!r}") from error


def without_drawn_noise(plan: Plan) -> Plan:
    """The plan with ``euler`` where a sampler draws noise between its steps.

    Of a rival that draws its own no picture could be compared.
    """
    stages = tuple(
        stage if SAMPLERS[stage.sampler].noise is None else replace(stage, sampler="euler")
        for stage in plan.stages
    )
    for stage, other in zip(plan.stages, stages):
        if stage != other:
            line = (
                f"{stage.name} runs with euler: {stage.sampler} draws noise, each program its own"
            )
            print(line, file=sys.stderr)
    return replace(plan, stages=stages)


def _require_rival(options: argparse.Namespace) -> None:
    """Say what is missing before a model is loaded."""
    baseline = options.baseline
    if options.best_dtype and baseline not in ("comfyui", "diffusers"):
        raise BadInputError(f"--best-dtype needs --baseline comfyui or diffusers, got {baseline}")
    if options.best_dtype and baseline == "comfyui" and not options.comfyui_dir:
        raise BadInputError(
            "--best-dtype needs --comfyui-dir: no other ComfyUI can be told its dtype"
        )
    if options.comfyui_best_flags and options.comfyui_url:
        raise BadInputError(
            "--comfyui-best-flags is for a ComfyUI to start; a running one has its flags already"
        )
    if options.output is not None and Path(baseline).resolve() == options.output.resolve():
        raise BadInputError(f"-o {options.output} is the baseline, which it would replace")
    if options.comfyui_url and (options.comfyui_dir or options.comfyui_command):
        raise BadInputError("give either --comfyui-url or what to start, not both")
    starts = (options.comfyui_url, options.comfyui_dir, options.comfyui_command)
    if baseline == "comfyui" and not any(starts):
        raise MissingRivalError(
            "which ComfyUI? give --comfyui-url of a running server, or --comfyui-dir of an "
            "installation (with the node pack ComfyUI-EulerDiscreteScheduler) to start"
        )
    if baseline == "sdcpp" and not options.sdcpp:
        raise MissingRivalError("which stable-diffusion.cpp? give --sdcpp with its program's path")
    if baseline == "sglang" and not options.sglang_url:
        raise MissingRivalError("which server? give --sglang-url")
    if baseline == "comfyui" and options.comfyui_url:
        require_here("--comfyui-url", options.comfyui_url)
    if baseline == "sglang":
        require_here("--sglang-url", options.sglang_url)


def _sides(subject: Subject, arguments: Sequence[str]) -> list[Side]:
    """All sides of the comparison, turbo first, without those that `--only` leaves out."""
    options = subject.options
    made = {
        "comfyui": _comfyui_sides,
        "diffusers": _diffusers_sides,
        "sdcpp": _single_stage_sides,
        "sglang": _single_stage_sides,
    }.get(options.baseline, _recorded_sides)(subject, arguments)
    if not options.only:
        return made
    known = [side.name for side in made]
    unknown = [name for name in options.only if name not in known]
    if unknown:
        listed = ", ".join(map(repr, known))
        raise BadInputError(f"there is no side {unknown[0]!r}; --only takes {listed}")
    first, *others = made  # all are compared with the first
    return [first, *(side for side in others if side.name in options.only)]


def _diffusers_sides(subject: Subject, arguments: Sequence[str]) -> list[Side]:
    from bench.diffusers_side import DiffusersSide

    if subject.models.transformer.quantize is not None:
        raise BadInputError(
            "diffusers runs here on turbo's own weights, which are in 8 bits; give --quantize none"
        )
    exact = subject.without_easycache()
    lower = _in_best_dtype(subject)
    warm_up = subject.warm_up_requests()
    sides = [
        *_turbo_sides(subject, exact),
        DiffusersSide(subject.loaded, exact),
        DiffusersSide(subject.loaded, exact, compiled=True, warm_up=warm_up),
    ]
    if lower is not None:
        sides += [
            _turbo_in_best_dtype(lower, exact),
            DiffusersSide(lower.loaded, exact, compiled=True, warm_up=warm_up, approximate=True),
        ]
    if subject.has_easycache:
        plan, fastest = subject.plan, _fastest(subject)
        sides.append(turbo_side(subject, "turbo, EasyCache", plan, fastest))
    return sides


def _comfyui_sides(subject: Subject, arguments: Sequence[str]) -> list[Side]:
    from bench.comfyui_server import Launch
    from bench.comfyui_side import ComfyUISide

    options = subject.options
    launch = Launch(
        folder=options.comfyui_dir,
        command=options.comfyui_command,
        python=options.comfyui_python,
        device=subject.models.device.type,
        dtype=str(subject.models.dtype).removeprefix("torch."),
        flags=options.comfyui_flags,
    )
    rival = ComfyUISide(
        subject.files,
        subject.plan,
        url=options.comfyui_url,
        launch=None if options.comfyui_url else launch,
        approximate=subject.has_easycache,
        run_seconds=options.timeout,
    )
    sides = [*_turbo_sides(subject, subject.plan), rival]
    lower = _in_best_dtype(subject)
    if lower is not None:
        sides.append(_turbo_in_best_dtype(lower, subject.plan))
    if lower is not None or options.comfyui_best_flags:
        fastest = replace(
            launch,
            dtype=options.best_dtype or launch.dtype,
            flags=(*launch.flags, *options.comfyui_best_flags),
        )
        sides.append(
            ComfyUISide(
                subject.files,
                subject.plan,
                launch=fastest,
                name="comfyui, fastest",
                approximate=True,
                best=True,
                run_seconds=options.timeout,
            )
        )
    return sides


def _single_stage_sides(subject: Subject, arguments: Sequence[str]) -> list[Side]:
    options, plan = subject.options, subject.plan
    rivals: list[Side]
    if options.baseline == "sdcpp":
        from bench.sdcpp_side import SdcppSide

        dtype = str(subject.models.dtype).removeprefix("torch.")
        shared = partial(
            SdcppSide, options.sdcpp, subject.files, plan, dtype=dtype, run_seconds=options.timeout
        )
        rivals = [shared()]
        if flags := options.sdcpp_best_flags:
            rivals.append(shared(flags=flags, name="sdcpp, fastest", best=True))
    else:
        from bench.sglang_side import SglangSide

        rivals = [SglangSide(options.sglang_url, plan, run_seconds=options.timeout)]
    return [*_turbo_sides(subject, plan), *rivals]


def _recorded_sides(subject: Subject, arguments: Sequence[str]) -> list[Side]:
    from bench.recorded_side import RecordedSide

    options = subject.options
    numbers = {subject.request(n).prompt: n for n in range(options.rounds + 1)}
    header = subject.header("compare", arguments)
    recorded = RecordedSide(Path(options.baseline), header, options.rounds, numbers)
    settings = recorded.settings()
    speed_ups = SpeedUps(
        compile=bool(settings.get("compile")),
        capture=str(settings.get("capture", "eager")),
        kernels=bool(settings.get("kernels")),
        strict=True,
    )
    cached = subject.plan if settings.get("easycache") else subject.without_easycache()
    return [turbo_side(subject, "turbo", cached, speed_ups), recorded]


def _turbo_sides(subject: Subject, plan: Plan) -> list[Side]:
    return [
        turbo_side(subject, "turbo", plan, SpeedUps()),
        turbo_side(subject, "turbo, compiled", plan, _fastest(subject), best=True),
    ]


def _in_best_dtype(subject: Subject) -> Subject | None:
    """The same model once more, if the fastest settings are to be measured in another dtype."""
    options = subject.options
    if options.best_dtype is None:
        return None
    if str(subject.models.dtype) == f"torch.{options.best_dtype}":
        raise BadInputError(f"--best-dtype {options.best_dtype} is what all sides calculate in")
    return Subject.load(argparse.Namespace(**{**vars(options), "dtype": options.best_dtype}))


def _turbo_in_best_dtype(subject: Subject, plan: Plan) -> Side:
    name = f"turbo, compiled, {subject.options.best_dtype}"
    return turbo_side(subject, name, plan, _fastest(subject), best=True, approximate=True)


def _fastest(subject: Subject) -> SpeedUps:
    return SpeedUps.choose(subject.models.device, compile=True, strict=True)
