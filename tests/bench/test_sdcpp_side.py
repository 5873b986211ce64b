"""Against a script with the flags and log lines that the real program documents."""

from __future__ import annotations

import _thread
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.sdcpp_side import SdcppSide
from bench.side import MissingRivalError, Request, SideError
from turbo.model_files import ModelFiles, find_model_files
from turbo.plan import DEFAULT_PLAN
from turbo.testing import make_tiny_model

REQUEST = Request(prompt="a lighthouse", negative_prompt="blurry", seed=42)
LOG = """
print("[INFO ] stable-diffusion.cpp:814  - loading tensors completed, taking 1.31s (read: 0.90s)")
print("[INFO ] stable-diffusion.cpp:3168 - get_learned_condition completed, taking 369 ms")
print("  |==================================================| 9/9 - 7.62it/s")
print("[INFO ] stable-diffusion.cpp:3432 - sampling completed, taking 2.64s")
print("[INFO ] stable-diffusion.cpp:3435 - generating 1 latent images completed, taking 2.66s")
print("[INFO ] stable-diffusion.cpp:3212 - decode_first_stage completed, taking 0.50s")
"""
PROGRAM = f"""#!{sys.executable} -S
import sys
given = sys.argv[1:]
value = lambda flag: given[given.index(flag) + 1]
open(__file__ + ".arguments", "w").write("\\n".join(given))
def write_picture(width=int(value("-W")), height=int(value("-H"))):
    import struct, zlib
    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\\0" + b"\\x80" * (3 * width)) * height)
    with open(value("-o"), "wb") as file:
        file.write(b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header))
        file.write(chunk(b"IDAT", rows) + chunk(b"IEND", b""))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    return find_model_files(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def made(files, tmp_path) -> Iterator[Callable[..., SdcppSide]]:
    sides = []

    def make(what_it_does: str = LOG + "write_picture()", **options: Any) -> SdcppSide:
        program = tmp_path / "sd-cli"
        program.write_text(PROGRAM + what_it_does)
        program.chmod(0o755)
        sides.append(SdcppSide(program, files, DEFAULT_PLAN, **options))
        sides[-1].start()
        return sides[-1]

    yield make
    for side in sides:
        side.close()


def line_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_times_are_the_programs_own_and_the_rest_of_its_life_is_load(made):
    picture = made().paint(REQUEST)
    load = picture.seconds["load"]
    assert load >= 0
    assert picture.seconds == {
        "prompt": 0.369,
        "stage1": 2.64,
        "decode": 0.5,
        "load": load,
        "total": pytest.approx(0.369 + 2.64 + 0.5),
    }
    assert picture.image.size == (672, 864)


def test_the_single_stage_is_asked_for_with_the_plans_own_sigmas(made, files, tmp_path):
    made(dtype="bfloat16", flags=["--diffusion-fa"]).paint(REQUEST)
    words = (tmp_path / "sd-cli.arguments").read_text().splitlines()
    given = dict(pairwise(words))
    assert given["--diffusion-model"] == str(files.network)
    assert given["--llm"] == str(files.text_encoder)
    assert (given["-p"], given["-n"], given["--seed"]) == ("a lighthouse", "blurry", "42")
    assert (given["-W"], given["-H"], given["--steps"]) == ("672", "864", "9")
    assert (given["--cfg-scale"], given["--sampling-method"]) == ("2", "euler_a")
    sigmas = [float(sigma) for sigma in given["--sigmas"].split(",")]
    assert len(sigmas) == 10
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert given["--type"] == "bf16"
    assert words[-1] == "--diffusion-fa"


def test_nothing_is_left_of_a_picture_that_ctrl_c_stops(made):
    side = made("import signal; print('here', flush=True); signal.pause()")
    seen: list[int] = []

    def press() -> None:
        while not side.processes():
            time.sleep(0.01)
        seen.extend(side.processes())
        _thread.interrupt_main()

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        side.paint(REQUEST)
    assert seen
    assert not psutil.pid_exists(seen[0])
    assert side.part == ""


@pytest.mark.parametrize(
    ("what_it_does", "message"),
    [
        ("sys.exit('unknown argument: --llm')", "ended with code 1 during a picture; .*: --llm"),
        (LOG, "ended without a picture"),
        (LOG + "open(value('-o'), 'w').write('no picture')", "gave no whole PNG picture"),
        (LOG + "write_picture(64, 64)", "64x64 pixels where 672x864"),
        ("write_picture()", "does not tell the time of 'get_learned_condition'"),
    ],
)
def test_a_program_that_fails_is_one_line(made, what_it_does, message):
    with pytest.raises(SideError, match=message) as caught:
        made(what_it_does).paint(REQUEST)
    line_of(caught)


def test_a_program_that_hangs_is_given_up_and_ended(made):
    side = made("import signal; signal.pause()", run_seconds=0.5)
    with pytest.raises(SideError, match=r"no picture within 0\.5 s"):
        side.paint(REQUEST)
    assert side.processes() == ()


def test_a_program_that_is_not_there_is_a_missing_rival(files, tmp_path):
    plain = tmp_path / "sd-cli"
    plain.touch(mode=0o644)
    for program, message in (
        (None, "no stable-diffusion.cpp to compare with"),
        (Path("/no/such/sd-cli"), "/no/such/sd-cli: no such file"),
        (plain, "may not be executed"),
    ):
        with pytest.raises(MissingRivalError, match=f"{message}.*--sdcpp") as caught:
            SdcppSide(program, files, DEFAULT_PLAN).start()
        line_of(caught)


def test_a_plan_or_a_model_that_it_cannot_run_says_why(files, tmp_path):
    program = tmp_path / "sd-cli"
    program.touch(mode=0o755)
    first, *rest = DEFAULT_PLAN.stages
    plan = replace(DEFAULT_PLAN, stages=(replace(first, sampler="uni_pc"), *rest))
    with pytest.raises(SideError, match="no sampler 'uni_pc'; a plan for it may have euler"):
        SdcppSide(program, files, plan).start()
    with pytest.raises(SideError, match="three single files"):
        SdcppSide(program, replace(files, layout="diffusers"), DEFAULT_PLAN).start()
