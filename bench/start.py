"""``python -m bench.start``: a process start to its first picture, one line of JSON for each step.

A process of `bench device`. The weights are random and made on the device, where a real start reads
files.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

SEED = 7


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=__doc__)
    parser.add_argument("--began", type=float, required=True, help="seconds since 1970")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--cache", type=Path, required=True, help="folder of compiled code")
    parser.add_argument("--picture", type=Path, required=True, help="PNG to write")
    options = parser.parse_args()

    def report(step: str, **facts: Any) -> None:
        seconds = time.time() - options.began
        print(json.dumps({"step": step, "seconds": seconds, **facts}), flush=True)

    report("python")
    import torch

    from bench.random_model import FULL, SMALL, make_random_model
    from bench.timing import synchronise
    from turbo.acceleration import Accelerator, SpeedUps, open_cache

    report("imports")
    device = torch.device(options.device)
    model = make_random_model(SMALL if options.small else FULL, device)
    synchronise(device)
    report("weights")
    speed_ups = SpeedUps.choose(device, compile="auto", capture="auto", kernels="auto")
    sizes = [(stage.height, stage.width) for stage in model.size.plan.stages]
    cache = open_cache(options.cache, model.models, sizes, speed_ups) if speed_ups.compile else None
    model.models.kernels = speed_ups.kernels
    accelerator = Accelerator(model.models, speed_ups, cache)
    if speed_ups.any_stand_in:
        accelerator.install(model.models)
    engine = model.engine(accelerator=accelerator)
    report("engine")
    for step, letter in (("first picture", "q"), ("second picture", "z")):
        result = engine.generate(
            model.prompt(letter), negative_prompt=model.prompt(letter.upper()), seed=SEED
        )
        counters = engine.counters
        report(
            step,
            graphs_traced=counters.compilations,
            captures=counters.captures,
            binaries_built=accelerator.built,
        )
        if letter == "q":
            result.image.save(options.picture)


if __name__ == "__main__":
    main()
