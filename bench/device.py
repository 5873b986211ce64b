"""``python -m bench device``: every check and measurement that needs a GPU, in one results file.

In order of worth: what comes last is what is missing if the time is short. A number is written only
if the check of the same variant passed in the same run; otherwise the reason stands in its place.
Weights are random and made on the device; prompts have 64 tokens, and where a stage has guidance
the negative prompt has as many, so that both go through the network together.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import arithmetic
from bench.arguments import Parser, positive, without_folders
from bench.endings import FAILED, OK, exit_code, require_writable
from bench.kernel_parts import attention, kernels
from bench.machine import describe_machine
from bench.model_parts import decode, fp8, network, picture, profile, prompt
from bench.process_parts import checks, start
from bench.random_model import PROMPT_TOKENS
from bench.results import FORMAT, Found, Part, Results, recorded, run_parts
from bench.setting import Setting
from turbo.denoiser import is_unguided
from turbo.engine import pick_device
from turbo.errors import BadInputError
from turbo.latent import STRIDE

PARTS = {
    "machine": 15,
    "matmul": 40,
    "checks": 150,
    "network": 170,
    "prompt": 45,
    "decode": 75,
    "picture": 130,
    "start": 200,
    "fp8": 90,
    "profile": 30,
    "kernels": 60,
    "attention": 60,
}
"""Name -> seconds that a part may take at the most. Most need far less, so the sum may be more than
there is."""


def make_parts(setting: Setting) -> list[Part]:
    """All parts, in order of worth."""

    runs: dict[str, Callable[[Setting, Found, float], None]] = {
        "machine": machine,
        "matmul": matmul,
        "checks": checks,
        "network": network,
        "prompt": prompt,
        "decode": decode,
        "picture": picture,
        "start": start,
        "fp8": fp8,
        "profile": profile,
        "kernels": kernels,
        "attention": attention,
    }
    return [Part(name, partial(runs[name], setting), seconds) for name, seconds in PARTS.items()]


def machine(setting: Setting, found: Found, seconds: float) -> None:
    """GPU, limits, versions, commit."""
    found |= describe_machine(str(setting.device))


@torch.inference_mode()
def matmul(setting: Setting, found: Found, seconds: float) -> None:
    """The rate of a large matrix product, and the share of it that the network's reach."""
    found["limit"] = setting.limit
    for stage in setting.stages:
        entry: Found = {}
        found[stage.name] = entry
        shapes = arithmetic.block_products(
            setting.size.network_config,
            (stage.height // STRIDE, stage.width // STRIDE),
            PROMPT_TOKENS,
            1 if is_unguided(stage.cfg) else 2,
        )
        for name, shape in shapes.items():
            with recorded(entry, name) as numbers:
                numbers["shape"] = dict(zip("MNK", shape))
                timed = setting.product_rate(shape)
                numbers |= timed
                numbers["share_of_limit"] = timed["tflop_per_s"] / setting.limit["tflop_per_s"]


@contextlib.contextmanager
def memory(setting: Setting, found: Found) -> Iterator[None]:
    """Note a part's peak memory on the device; what it leaves unused goes back."""
    if setting.device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(setting.device)
    try:
        yield
    finally:
        found["peak_memory_gib"] = {
            "allocated": torch.cuda.max_memory_allocated(setting.device) / 2**30,
            "reserved": torch.cuda.max_memory_reserved(setting.device) / 2**30,
        }


def table(parts: dict[str, Any]) -> Iterator[str]:
    """A line for each measurement and for each reason why there is none."""
    for path, entry in _entries(parts, ()):
        name = " / ".join(path)
        if "median_ms" in entry or "median_us" in entry:
            unit = "ms" if "median_ms" in entry else "us"
            median, p20, p80 = (entry[f"{key}_{unit}"] for key in ("median", "p20", "p80"))
            share = entry.get("share_of_limit")
            shown = "" if share is None else f"  {share:6.1%} of the limit"
            if not entry.get("equals_uncaptured", True):
                shown += "  (differs from uncaptured)"
            yield f"{name:54.54} {median:10.3f} [{p20:.3f} {p80:.3f}] {unit}{shown}"
        if "outside_share" in entry:
            yield f"{name:54.54} {entry['outside_share']:10.1%} of the time outside the models"
        if "closing" in entry:
            yield f"{name:54.54} {'; '.join(entry['closing'][-1:])[:100]}"
        if "steps" in entry:
            steps = (f"{step['step']} {step['seconds']:.1f} s" for step in entry["steps"])
            yield f"{name:54.54} {', '.join(steps)}"
        if "withheld" in entry:
            yield f"{name:54.54} no number: {entry['withheld'].splitlines()[0][:160]}"
        if "error" in entry:
            error = entry["error"]
            yield f"{name:54.54} {error['type']}: {error['message'].splitlines()[:1]}"


def _entries(
    value: dict[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    yield path, value
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _entries(inner, (*path, name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every part came to its end."""
    parser = Parser(prog="python -m bench device", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="JSON results file, renewed as it goes")
    parser.add_argument("--device", default="cuda", help="where to measure (default: cuda)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the command out")
    parser.add_argument("--minutes", type=positive, default=9, help="for everything (default: 9)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    given = sys.argv[2:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    return exit_code(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> int:
    require_writable(options.output)
    device = _device(options.device, options.small)
    setting = Setting(device, options.small)
    chosen = [part for part in make_parts(setting) if part.name in (options.only or PARTS)]
    header = {
        "format": FORMAT,
        "kind": "device",
        "command": ["device", *without_folders(given)],
        "machine": describe_machine(str(device)),
        "size": "small" if options.small else "full",
        "prompt_tokens": PROMPT_TOKENS,
    }
    results = Results(options.output, header)
    run_parts(
        chosen,
        results,
        seconds=60 * options.minutes,
        around=lambda found: memory(setting, found),
    )
    for line in table(results.data["parts"]):
        print(line)
    return FAILED if any("error" in found for found in results.data["parts"].values()) else OK


def _device(name: str, small: bool) -> torch.device:
    """Where to measure.

    Raises:
        BadInputError: There is no such device, or it is none for the full size.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BadInputError("no CUDA device here; try the command out with --small --device cpu")
    device = pick_device(name)
    if device.type != "cuda" and not small:
        raise BadInputError(f"the full size is for CUDA devices; on {device}, add --small")
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
    return device
