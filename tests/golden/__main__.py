"""``python -m tests.golden DIR``: run every recorded case of a folder, one line each.

Ends with ``N passed, M failed`` and exits with 1 if anything failed or nothing ran.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from turbo.compile import BACKENDS

from tests.golden.check import Case, Outcome, find_cases
from tests.golden.models import ModelStore
from tests.golden.parts import (
    check_dit,
    check_dit_trace,
    check_latent_resize,
    check_noise,
    check_samplers,
    check_sigmas,
    check_text_encoder,
    check_vae,
)
from tests.golden.pictures import check_e2e, check_easycache, check_lora
from turbo.acceleration import SpeedUps
from turbo.errors import BadInputError

Handler = Callable[[Case, ModelStore, "Path | None"], Iterator[Outcome]]

HANDLERS: dict[str, Handler] = {
    "sigmas": check_sigmas,
    "samplers": check_samplers,
    "noise": check_noise,
    "easycache": check_easycache,
    "dit": check_dit,
    "dit_trace": check_dit_trace,
    "text_encoder": check_text_encoder,
    "vae": check_vae,
    "lora": check_lora,
    "latent_resize": check_latent_resize,
    "e2e": check_e2e,
    "e2e_mid": check_e2e,
}


def run_case(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """All outcomes of one case; an exception is one of them."""
    handler = HANDLERS.get(case.kind)
    if handler is None:
        outcome = case.outcome()
        outcome.problems.append(f"no handler for cases of kind {case.kind!r}")
        yield outcome
        return
    try:
        yield from handler(case, store, tokenizer)
    except Exception as error:
        outcome = case.outcome()
        outcome.problems.append(f"{type(error).__name__}: {error}")
        yield outcome


def find_tokenizer(folder: Path, given: Path | None) -> Path | None:
    """The real tokenizer's folder: given, or `tokenizer/` beside or inside the cases."""
    beside = [folder / "tokenizer", folder.parent / "tokenizer"]
    shared = os.environ.get("TURBO_SHARED")
    places = [given] if given else beside + ([Path(shared, "tokenizer")] if shared else [])
    return next((place for place in places if place and (place / "vocab.json").is_file()), None)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder laid out like golden/")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument("--tokenizer", type=Path, help="folder of the real tokenizer")
    parser.add_argument(
        "--device", help="where the models run (default: cuda for --backend cuda-graph, else cpu)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the parts by Inductor")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="eager",
        help="how the parts are captured (default: eager, not at all)",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="start stages and check EasyCache by the fused kernels, on a CUDA device or under "
        "TRITON_INTERPRET=1",
    )
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    if not (folder / "weights.json").is_file():
        parser.error(f"{options.folder} is not a folder of recorded cases: weights.json is missing")
    device = torch.device(options.device or ("cuda" if options.backend == "cuda-graph" else "cpu"))
    try:
        speed_ups = SpeedUps.choose(
            device,
            compile=options.compile,
            capture=options.backend,
            kernels=options.kernels,
            strict=True,
        )
    except BadInputError as error:
        parser.error(str(error))
    store = ModelStore(folder, device, speed_ups=speed_ups)
    tokenizer = find_tokenizer(folder, options.tokenizer)
    passed = failed = skipped = 0
    start = time.perf_counter()
    with torch.inference_mode():
        for case in find_cases(folder):
            if options.only not in case.name:
                continue
            for outcome in run_case(case, store, tokenizer):
                passed += outcome.passed
                failed += not outcome.passed and not outcome.skipped
                skipped += outcome.skipped
                print(_line(outcome), flush=True)
    print(f"took {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if skipped:
        print(f"{skipped} skipped")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def _line(outcome: Outcome) -> str:
    word = "skip" if outcome.skipped else "ok  " if outcome.passed else "FAIL"
    numbers = f"{outcome.error:9.2e} of {outcome.allowed:9.2e}" if outcome.share >= 0 else ""
    details = "; ".join([*outcome.problems, *([outcome.note] if outcome.note else [])])
    return f"{word} {outcome.name:60s} {numbers} {details}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
