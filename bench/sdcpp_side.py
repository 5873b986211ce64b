"""stable-diffusion.cpp as a side of a comparison: its program, started anew for each picture.

It has no stages: the plan's single stage is what it runs, over the plan's own sigmas. Times are
those of the program's log, to 0.01 s; the rest of its life, such as reading weights, is `load`.

Source of flags and log lines: https://github.com/leejet/stable-diffusion.cpp (docs/z_image.md,
examples/cli/README.md).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.child import Child
from bench.side import MissingRivalError, OutsideSide, Request, Round, SideError
from bench.single_stage import only_stage, open_picture
from turbo.model_files import ModelFiles
from turbo.plan import Plan
from turbo.sigmas import stage_sigmas

SAMPLERS: Mapping[str, str] = {
    "euler": "euler",
    "euler_ancestral": "euler_a",
    "heun": "heun",
    "dpm_2": "dpm2",
    "dpmpp_2m": "dpm++2m",
    "lcm": "lcm",
    "res_multistep": "res_multistep",
}
"""Samplers that it has too: ComfyUI's name -> its own."""
WEIGHT_TYPES: Mapping[str, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_PARTS = {"prompt": "get_learned_condition", "stage": "sampling", "decode": "decode_first_stage"}
_TIME = r"{} completed, taking (\d+(?:\.\d+)?) ?(ms|s)\b"


class SdcppSide(OutsideSide):
    """The program ``sd-cli`` (``sd`` in older versions).

    Args:
        program: Its path; None is an error that says what to give.
        files: The model.
        plan: Its single stage is run.
        dtype: Of the weights, ``float32``, ``bfloat16`` or ``float16``.
        flags: Put behind ours, such as ``--diffusion-fa``.
        name: Its name in the comparison.
        approximate: Whether its picture is another by more than float32's rounding: it calculates
            the decoder's convolutions in float16 whatever the dtype.
        best: Whether its flags make it its fastest.
        run_seconds: How long a picture may take.
    """

    def __init__(
        self,
        program: str | Path | None,
        files: ModelFiles,
        plan: Plan,
        *,
        dtype: str = "float32",
        flags: Sequence[str] = (),
        name: str = "sdcpp",
        approximate: bool = True,
        best: bool = False,
        run_seconds: float = 3600.0,
    ) -> None:
        super().__init__(name, approximate=approximate, best=best)
        self._program = program
        self._files = files
        self._stage = only_stage(plan)
        self._dtype = dtype
        self._flags = tuple(flags)
        self._run_seconds = run_seconds
        self._scratch: Path | None = None
        self._child: Child | None = None

    def settings(self) -> dict[str, Any]:
        """Program, weight type, threads and flags."""
        return {
            "program": "stable-diffusion.cpp",
            "file": Path(self._program).name if self._program is not None else None,
            "dtype": self._dtype,
            "threads": torch.get_num_threads(),
            "sampler": SAMPLERS.get(self._stage.sampler),
            "flags": [flag.rpartition("/")[2] for flag in self._flags],
            "started": "for each picture",
        }

    def start(self) -> dict[str, float]:
        """See that it can run; its weights are read for each picture.

        Raises:
            MissingRivalError: There is no such program.
            SideError: It cannot run this plan or model.
        """
        _require_program(self._program)
        stage = self._stage
        if stage.sampler not in SAMPLERS:
            raise SideError(
                f"stable-diffusion.cpp has no sampler {stage.sampler!r}; a plan for it may have "
                f"{', '.join(SAMPLERS)}"
            )
        parts = (self._files.network, self._files.text_encoder, self._files.vae)
        if self._files.layout in ("diffusers", "all-in-one") or not all(p.is_file() for p in parts):
            raise SideError(
                "stable-diffusion.cpp reads three single files; give ComfyUI's models folder, or "
                "what turbo convert --layout comfyui writes"
            )
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="turbo-bench-"))
        return {}

    def paint(self, request: Request) -> Round:
        """Make a picture.

        Raises:
            SideError: It could not.
        """
        if self._scratch is None:
            raise SideError(f"{self.name} is not started")
        picture = self._scratch / "picture.png"
        picture.unlink(missing_ok=True)
        begin = time.perf_counter()
        log = self._run(self._arguments(request, picture))
        wall = time.perf_counter() - begin
        if not picture.is_file():
            raise SideError("stable-diffusion.cpp ended without a picture")
        image = open_picture(picture.read_bytes(), self._stage, "stable-diffusion.cpp")
        return Round(seconds=self._seconds(log, wall), image=image, spans=2)

    def processes(self) -> tuple[int, ...]:
        """The program while it runs."""
        return self._child.processes() if self._child is not None else ()

    def close(self) -> None:
        """End the program and remove its files."""
        child, self._child = self._child, None
        try:
            if child is not None:
                child.end()
        finally:
            scratch, self._scratch = self._scratch, None
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)

    def _arguments(self, request: Request, picture: Path) -> list[str]:
        stage, files = self._stage, self._files
        sigmas = stage_sigmas(stage)
        return [
            str(Path(str(self._program)).absolute()),
            *("--diffusion-model", str(files.network.absolute())),
            *("--llm", str(files.text_encoder.absolute()), "--vae", str(files.vae.absolute())),
            *("-p", request.prompt, "-n", request.negative_prompt, "--seed", str(request.seed)),
            *("-W", str(stage.width), "-H", str(stage.height), "--cfg-scale", f"{stage.cfg:g}"),
            *("--sampling-method", SAMPLERS[stage.sampler], "--steps", str(len(sigmas) - 1)),
            *("--sigmas", ",".join(f"{sigma:.8g}" for sigma in sigmas)),
            *("--rng", "cpu", "--type", WEIGHT_TYPES[self._dtype]),
            *("--threads", str(torch.get_num_threads()), "-v", "-o", str(picture)),
            *self._flags,
        ]

    def _run(self, arguments: Sequence[str]) -> str:
        assert self._scratch is not None
        self.part = self._stage.name
        self._child = child = Child("stable-diffusion.cpp", arguments, self._scratch / "log")
        end = time.monotonic() + self._run_seconds
        try:
            while child.code() is None:
                if time.monotonic() > end:
                    raise SideError(
                        f"stable-diffusion.cpp made no picture within {self._run_seconds:g} s; "
                        "allow more with --timeout; the last lines of its log: "
                        f"{child.last_lines()}"
                    )
                time.sleep(0.005)
            if child.code() != 0:
                child.check("during a picture")
            return child.text()
        finally:
            self.part = ""
            self._child = None
            child.end()

    def _seconds(self, log: str, wall: float) -> dict[str, float]:
        """Parts as the log tells them; what is left of the process's life is `load`."""
        seconds = {}
        for part, words in _PARTS.items():
            found = re.findall(_TIME.format(words), log)
            if not found:
                raise SideError(
                    f"stable-diffusion.cpp's log does not tell the time of {words!r}; use a "
                    "version that logs it with -v"
                )
            name = self._stage.name if part == "stage" else part
            seconds[name] = sum(float(time) / (1000 if unit == "ms" else 1) for time, unit in found)
        total = sum(seconds.values())
        return {**seconds, "total": total, "load": max(0.0, wall - total)}


def _require_program(program: str | Path | None) -> None:
    what = "give the path of stable-diffusion.cpp's sd-cli with --sdcpp"
    if program is None:
        raise MissingRivalError(f"no stable-diffusion.cpp to compare with: {what}")
    if not os.path.isfile(program):
        raise MissingRivalError(f"{program}: no such file; {what}")
    if not os.access(program, os.X_OK):
        raise MissingRivalError(f"{program}: may not be executed; chmod +x it, or {what}")
