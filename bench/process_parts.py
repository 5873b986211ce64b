"""The parts of ``bench device`` that run in processes of their own: the checks, and the start."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.processes import REPOSITORY, Finished, run_together
from bench.results import Found, recorded
from bench.setting import Setting, require_near

END_SECONDS = 2.0
"""Left of a part's time when its processes are ended, to record what they said."""
MOST_LINES = 60
"""Failures kept of one check."""


def checks(setting: Setting, found: Found, seconds: float) -> None:
    """The recorded cases on the device, in each way the runner offers, and the marked tests."""
    tests = ["tests/kernels/test_latent_upscale.py"] if setting.small else []
    commands = {"pytest -m gpu": ["pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider",
                                 "--continue-on-collection-errors", *tests]}  # fmt: skip
    golden = shared_folder() / "golden"
    if golden.is_dir():
        for name, flags in _golden_ways(setting).items():
            commands[f"recorded cases, {name}"] = [
                "tests.golden", str(golden), "--device", str(setting.device), *flags
            ]  # fmt: skip
    else:
        found["recorded cases"] = {"withheld": f"no folder {golden}; TURBO_SHARED names its parent"}
    python = {name: [sys.executable, "-m", *command] for name, command in commands.items()}
    for name, finished in run_together(python, seconds=seconds - END_SECONDS).items():
        found[name] = summary_of(finished)


def _golden_ways(setting: Setting) -> dict[str, list[str]]:
    """The runner's flags for each way; those it does not have (yet) are left out."""
    if setting.small:
        return {"plain": ["--only", "sigmas"]}
    graph = "cuda-graph" if setting.device.type == "cuda" else "replay"
    ways: dict[str, list[str]] = {"plain": []}
    if not setting.missing_kernels:
        ways["kernels"] = ["--kernels"]
    runner = (REPOSITORY / "tests/golden/__main__.py").read_text(encoding="utf-8")
    if '"--compile"' in runner and '"--backend"' in runner:
        ways["captured"] = ["--backend", graph]
        ways["compiled, captured"] = ["--compile", "--backend", graph]
    return ways


def shared_folder() -> Path:
    """The reference data: TURBO_SHARED, or `shared` in or beside the repository."""
    given = os.environ.get("TURBO_SHARED")
    inside = REPOSITORY / "shared"
    if given:
        return Path(given)
    return inside if inside.is_dir() else REPOSITORY.parent / "shared"


def summary_of(finished: Finished) -> Found:
    """A check's exit code, closing lines and failures."""
    lines = [line[:400] for line in finished.output.splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAIL", "ERROR", "E  "))]
    return {
        "passed": finished.code == 0,
        "code": finished.code,
        "timed_out": finished.code is None,
        "seconds": round(finished.seconds, 1),
        "closing": lines[-3:],
        "failures": failures[:MOST_LINES],
    }


def start(setting: Setting, found: Found, seconds: float) -> None:
    """Process start to first picture: with an empty cache of compiled code, then with a filled one.

    Both processes make the same picture; if the second one's differs, its times are not given.
    """
    deadline = time.monotonic() + seconds - END_SECONDS
    with tempfile.TemporaryDirectory(prefix="turbo-bench-") as folder:
        # Inductor's, Triton's and the driver's own caches begin empty too.
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "CUDA_CACHE_PATH": f"{folder}/cuda",
        }
        pictures = {name: Path(folder, f"{name}.png") for name in ("cold", "warm")}
        for name, picture in pictures.items():
            with recorded(found, name) as numbers:
                left = deadline - time.monotonic()
                steps, finished = _run_start(setting, folder, picture, environment, left)
                if finished.code != 0:
                    tail = "; ".join(finished.output.splitlines()[-3:])[-600:]
                    done = ", ".join(f"{step['step']} {step['seconds']:.1f} s" for step in steps)
                    raise ChildProcessError(f"code {finished.code}, steps done: {done}; {tail}")
                found_distance = require_near(_values(picture), _values(pictures["cold"]), 0.02)
                numbers |= {"distance_to_cold": found_distance, "steps": steps}
            if "withheld" in found[name]:
                break  # nothing to be warm from


def _run_start(
    setting: Setting, folder: str, picture: Path, environment: dict[str, str], seconds: float
) -> tuple[list[dict[str, Any]], Finished]:
    command = [
        sys.executable, "-m", "bench.start", "--began", repr(time.time()),
        "--device", str(setting.device), "--cache", f"{folder}/turbo", "--picture", str(picture),
        *(["--small"] if setting.small else []),
    ]  # fmt: skip
    finished = run_together({"start": command}, seconds=seconds, environment=environment)["start"]
    lines = [line for line in finished.output.splitlines() if line.startswith('{"step"')]
    return [json.loads(line) for line in lines], finished


def _values(picture: Path) -> torch.Tensor:
    import numpy as np

    with Image.open(picture) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy())
