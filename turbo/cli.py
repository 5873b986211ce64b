"""The command ``turbo``: its grammar, exit codes and error lines. `turbo.commands` does the work.

Nothing that takes time to import is imported for ``--help`` or a mistaken flag. Exit codes: 0; 1
for a failure, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from turbo._version import __version__
from turbo.errors import BadInputError, PlanError, TurboError
from turbo.messages import one_line

SEEDS = 2**64
IMAGES_LIMIT = 1000
STEPS_LIMIT = 1000
SWITCH = ("auto", "on", "off")
CAPTURES = ("auto", "cuda-graph", "replay", "eager")
MEMORY = ("auto", "fast", "balanced", "low")
LAYOUTS = ("comfyui", "diffusers")
QUANTIZE = ("auto", "none", "fp8", "int8", "int8-weight-only")
ATTENTION = ("auto", "sdpa", "cudnn", "flash", "efficient", "xformers", "flex")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; argparse itself exits with 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        with contextlib.suppress(AttributeError, ValueError):
            # A file name need not be text that the terminal's encoding has.
            getattr(sys, name).reconfigure(errors="backslashreplace")
    # Huge pages for PyTorch's large tensors: a third off the decoder's time on a CPU. PyTorch reads
    # this once, when it first takes memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    args = build_parser().parse_args(arguments)
    code = _run(args)
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # keeps Python's exit quiet about it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or _fail(error, args.debug)
    return code


def _run(args: argparse.Namespace) -> int:
    try:
        from turbo import commands

        command = getattr(commands, args.command)
        command(args)
        return 0
    except KeyboardInterrupt:
        return _report("interrupted", 130, args.debug)
    except Exception as error:
        return _fail(error, args.debug)


def _fail(error: Exception, debug: bool) -> int:
    if isinstance(error, BrokenPipeError):
        return 1  # whoever read our output, such as head, has had enough: nothing to say
    if isinstance(error, TurboError):
        return _report(str(error), 2 if isinstance(error, BadInputError) else 1, debug)
    return _report(_describe(error), 1, debug)


def _report(message: str, code: int, debug: bool) -> int:
    with contextlib.suppress(OSError):
        if debug:
            import traceback

            traceback.print_exc()
        print(f"turbo: {one_line(message, limit=None)}", file=sys.stderr)
    return code


def _describe(error: Exception) -> str:
    """What to say about an error that nobody raised on purpose."""
    text = str(error)
    kind = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename!r}" if error.filename else ""
        return f"{error.strerror}{where} (--debug shows where)"
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate" in text:
        return (
            "out of memory; --dry-run shows the need: use --memory low, --dtype bfloat16 or "
            f"smaller stages ({text or kind})"
        )
    return f"unexpected {kind}: {text} (--debug shows where)"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; the usage, a dozen lines, is in ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"turbo: {one_line(message, limit=None)}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = _Parser(
        prog="turbo", description="Make pictures with Z-Image-Turbo.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"turbo {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True
    )
    _add_generate(commands)
    _add_info(commands)
    _add_plan(commands)
    _add_quantize(commands)
    _add_convert(commands)
    _add_cache(commands)
    return parser


def _add_generate(commands: Any) -> None:
    parser = _add_command(commands, "generate", "make a picture from a prompt")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        type=_text,
        help="what the picture shows; put -- before one that begins with -",
    )
    what = parser.add_argument_group("picture")
    what.add_argument("--negative", metavar="TEXT", type=_text, default="", help="what it avoids")
    what.add_argument(
        "--trigger-word", metavar="W", type=_text, default="", help="put before the prompt"
    )
    what.add_argument("--seed", metavar="N", type=_seed, help="0 to 2^64 - 1; default: random")
    what.add_argument(
        "-n", metavar="N", type=_count, default=1, help="pictures, of seed, seed + 1, ..."
    )
    what.add_argument("--image", metavar="FILE", help="start from this picture")
    what.add_argument(
        "--strength", metavar="S", type=_strength, help="how much of --image changes, up to 1"
    )
    _add_plan_options(parser)
    _add_model_options(parser)
    _add_lora_options(parser)
    _add_speed_options(parser)
    _add_output_options(parser)


def _add_info(commands: Any) -> None:
    parser = _add_command(commands, "info", "show versions, devices and the model files found")
    _add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _add_plan(commands: Any) -> None:
    parser = _add_command(
        commands, "plan", "print the resolved plan as YAML, and what memory a model needs for it"
    )
    _add_plan_options(parser)
    _add_model_options(parser)
    _add_memory(parser)
    parser.add_argument("-o", "--output", metavar="FILE.yaml", help="write it to a new file")


def _add_quantize(commands: Any) -> None:
    parser = _add_command(commands, "quantize", "write a model with its network in 8 bits")
    parser.add_argument(
        "model", metavar="MODEL", help="ComfyUI's models folder, a diffusers folder or a checkpoint"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=_folder, required=True, help="a new folder"
    )
    parser.add_argument(
        "--quantize",
        metavar="|".join(QUANTIZE[2:]),
        choices=QUANTIZE[2:],
        required=True,
        help="fp8 for Ada, Hopper and newer, int8 for Ampere, int8-weight-only for any",
    )
    _add_file_options(parser)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_convert(commands: Any) -> None:
    parser = _add_command(commands, "convert", "write a model in another layout of its files")
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="ComfyUI's models folder, a diffusers folder or a checkpoint; default: the built-in",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=_folder, required=True, help="a new folder"
    )
    parser.add_argument(
        "--layout",
        metavar="|".join(LAYOUTS),
        choices=LAYOUTS,
        required=True,
        help="comfyui: a file of each component; diffusers: a folder of each",
    )
    _add_file_options(parser)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_cache(commands: Any) -> None:
    parser = _add_command(commands, "cache", "list or remove compiled code kept on disk")
    parser.add_argument(
        "action", metavar="list|clear", choices=("list", "clear"), help="list it, or remove it all"
    )
    _add_cache_dir(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _add_cache_dir(parser: Any) -> None:
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=_folder,
        help="where compiled code is kept; default: TURBO_CACHE, or turbo in the user's caches",
    )


def _add_command(commands: Any, name: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=description, description=description.capitalize() + ".", allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--plan", metavar="FILE.yaml", help="sizes, steps, samplers, ...; see turbo plan"
    )
    plan.add_argument("--single-stage", action="store_true", help="one stage, at the last size")
    plan.add_argument("--steps", metavar="N", type=_steps, help="steps of the first stage")
    plan.add_argument("--cfg", metavar="X", type=_cfg, help="guidance of the first stage; 1 is off")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="PATH",
        help="ComfyUI's models folder, a diffusers folder or a checkpoint; default: TURBO_MODEL, "
        "or the built-in",
    )
    _add_file_options(model)
    model.add_argument(
        "--device", metavar="D", type=_device, help="auto (default), cpu, cuda or cuda:N"
    )
    model.add_argument(
        "--dtype", metavar="T", type=_dtype, help="auto (default), float32, bfloat16 or float16"
    )
    model.add_argument(
        "--quantize",
        metavar="|".join(QUANTIZE),
        choices=QUANTIZE,
        help="keep the network in 8 bits; auto (default): as its file has it",
    )


def _add_file_options(parser: Any) -> None:
    parser.add_argument("--diffusion-model", metavar="FILE", help="the network's file")
    parser.add_argument("--text-encoder", metavar="FILE", help="the text encoder's file")
    parser.add_argument("--vae", metavar="FILE", help="the autoencoder's file")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer folder or tokenizer.json")


def _add_lora_options(parser: argparse.ArgumentParser) -> None:
    lora = parser.add_argument_group("LoRA")
    lora.add_argument(
        "--lora",
        metavar="FILE[:STRENGTH]",
        action="append",
        default=[],
        help="may be given several times; the strength is the plan's default if left out",
    )
    lora.add_argument(
        "--no-strict-lora",
        action="store_true",
        help="accept a LoRA of which a part does not fit the model",
    )


def _add_speed_options(parser: argparse.ArgumentParser) -> None:
    speed = parser.add_argument_group("speed")
    _add_choice(speed, "--compile", SWITCH, "compile the model's parts; auto: on a GPU")
    _add_choice(
        speed, "--capture", CAPTURES, "how parts are captured and replayed; auto: graphs on a GPU"
    )
    _add_choice(speed, "--kernels", SWITCH, "fused Triton kernels; auto: on a GPU")
    speed.add_argument(
        "--attention",
        metavar="|".join(ATTENTION),
        choices=ATTENTION,
        help="what computes attention; auto (default): on a GPU the fastest, found at warm-up",
    )
    _add_memory(speed)
    speed.add_argument(
        "--allow-fallback",
        action="store_true",
        help="when memory runs out, try once more with the next smaller --memory",
    )
    cache = speed.add_mutually_exclusive_group()
    _add_cache_dir(cache)
    cache.add_argument("--no-cache", action="store_true", help="keep no compiled code on disk")
    speed.add_argument(
        "--strict-speed", action="store_true", help="fail where something cannot be made fast"
    )


def _add_memory(parser: Any) -> None:
    parser.add_argument(
        "--memory",
        metavar="|".join(MEMORY),
        choices=MEMORY,
        help="fast keeps all on the device, balanced moves the text encoder out, low every part "
        "and keeps GGUF and 8-bit files as they are; auto (default): the first that fits",
    )


def _add_choice(parser: Any, name: str, choices: Sequence[str], text: str) -> None:
    parser.add_argument(
        name, metavar="|".join(choices), choices=choices, default=choices[0], help=text
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("output")
    out.add_argument(
        "-o",
        "--output",
        metavar="FILE.png",
        help="replaced if it exists; with -n: FILE-1.png, ...; default: a new turbo-SEED.png",
    )
    out.add_argument(
        "--save-stages", action="store_true", help="also save FILE-stage1.png and so on"
    )
    out.add_argument(
        "--no-metadata", action="store_true", help="do not write into the file what made it"
    )
    out.add_argument(
        "--dry-run", action="store_true", help="print plan and memory need, load nothing"
    )
    out.add_argument(
        "--timings", action="store_true", help="print the start's parts and seconds to stderr"
    )
    out.add_argument("--json", action="store_true", help="print one JSON object a picture")
    out.add_argument("--quiet", action="store_true", help="print nothing but errors and --json")


def _text(text: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):  # how Python hands on broken bytes
        raise argparse.ArgumentTypeError("is not valid UTF-8 text")
    return text


def _folder(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    return text


def _seed(text: str) -> int:
    return _whole(text, 0, SEEDS - 1, "2^64 - 1")


def _count(text: str) -> int:
    return _whole(text, 1, IMAGES_LIMIT, str(IMAGES_LIMIT))


def _whole(text: str, low: int, high: int, shown: str) -> int:
    if not re.fullmatch("[0-9]{1,20}", text) or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {low} to {shown}, got {text!r}"
        )
    return int(text)


def _steps(text: str) -> int:
    return _whole(text, 1, STEPS_LIMIT, str(STEPS_LIMIT))


def _cfg(text: str) -> float:
    cfg = _float(text)
    if not 0 <= cfg < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, at least 0, got {text!r}")
    return cfg


def _strength(text: str) -> float:
    strength = _float(text)
    if not 0 < strength <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0, at most 1, got {text!r}")
    return strength


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _device(text: str) -> str:
    from turbo.plan import ModelSettings

    with _plan_errors_as_usage():
        return ModelSettings(device=text).device


def _dtype(text: str) -> str:
    from turbo.plan import ModelSettings

    with _plan_errors_as_usage():
        return ModelSettings(torch_dtype=text).torch_dtype


@contextlib.contextmanager
def _plan_errors_as_usage() -> Any:
    try:
        yield
    except PlanError as error:
        _, _, problem = str(error).partition(" ")  # without the setting's name
        raise argparse.ArgumentTypeError(problem) from None
