"""A whole process of turbo's, from its start to a picture on the disk: what a user of it waits."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.side import OutsideSide, Request, Round, SideError
from turbo.messages import one_line

STEP = "process to picture"


class ColdStart(OutsideSide):
    """``turbo generate`` as a side that makes one picture.

    It follows the plan with EasyCache and has the command's own speed-ups, so its picture is
    approximate. Code that the sides before it compiled is in its cache already.

    Args:
        options: The measuring command's: model, plan, device, dtype, quantize.
        seconds: How long it may take.
    """

    def __init__(self, options: argparse.Namespace, seconds: float) -> None:
        super().__init__("turbo, whole process", approximate=True)
        self._options = options
        self._seconds = seconds

    def settings(self) -> dict[str, Any]:
        """The command it runs."""
        return {"program": "turbo", "threads": torch.get_num_threads()}

    def start(self) -> dict[str, float]:
        """Nothing is ready before its picture."""
        return {}

    def paint(self, request: Request) -> Round:
        """Start the process and wait for its picture.

        Raises:
            SideError: It failed, or took too long.
        """
        with tempfile.TemporaryDirectory(prefix="turbo-bench-") as folder:
            picture = Path(folder, "picture.png")
            begin = time.perf_counter()
            try:
                done = subprocess.run(
                    self._command(request, picture),
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=self._seconds,
                    env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
                )
            except subprocess.TimeoutExpired as error:
                raise SideError(
                    f"made no picture within {self._seconds:g} s; allow more with --timeout"
                ) from error
            seconds = time.perf_counter() - begin
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise SideError(f"failed: {one_line(said[-1], limit=300)}")
            with Image.open(picture) as image:
                return Round(seconds={STEP: seconds}, image=image.convert("RGB"), spans=2)

    def close(self) -> None:
        """Nothing is left of it."""

    def _command(self, request: Request, picture: Path) -> list[str]:
        options = self._options
        command = [
            sys.executable, "-m", "turbo", "generate", request.prompt, "--quiet",
            "--negative", request.negative_prompt, "--seed", str(request.seed),
            "--device", options.device, "--dtype", options.dtype,
            "--quantize", options.quantize, "-o", str(picture),
        ]  # fmt: skip
        for flag in ("model", "tokenizer", "plan"):
            if getattr(options, flag):
                command += [f"--{flag}", str(getattr(options, flag))]
        return command
