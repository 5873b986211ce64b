"""The command line: its flags, files, lines and exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from turbo.compile import BACKENDS
from turbo.compile.cache import pack, write_entry

from tests.conftest import REPOSITORY
from turbo import __version__, commands
from turbo.builtin import builtin_model
from turbo.checkpoint import Checkpoint
from turbo.cli import CAPTURES, main
from turbo.commands import parse_lora
from turbo.errors import BadInputError, LoraError, NonFiniteLatentError
from turbo.image_file import read_metadata
from turbo.plan import DEFAULT_PLAN, ModelSettings, Plan, load_plan, plan_to_dict

SMALL_PLAN = """\
generation:
  stage1: {height: 64, width: 64, steps: 2}
  stage2: {height: 80, width: 64, steps: 3}
  stage3: {height: 96, width: 80, steps: 2}
"""


class FakeEngine:
    """Notes what it is asked for and answers with plain pictures."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        self.requests: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.fails_at = 1

    def load(self, path: str | None, **options: Any) -> FakeEngine:
        self.loaded = {"path": path, **options}
        return self

    def generate(self, prompt: str, **options: Any) -> SimpleNamespace:
        self.requests.append({"prompt": prompt, **options})
        if self.error is not None and len(self.requests) == self.fails_at:
            raise self.error
        plan: Plan = options["plan"]
        seed = 7 if options["seed"] is None else options["seed"]
        stages = {s.name: Image.new("RGB", (s.width, s.height)) for s in plan.stages}
        last = plan.stages[-1].name
        return SimpleNamespace(
            image=stages[last],
            seed=seed,
            timings={"total": 0.5},
            skips={"stage1": (0, 9), "stage2": (9, 16)},
            stage_images=[stages] if options["keep_stages"] else [],
            metadata=[{"prompt": prompt, "seed": seed, "plan": plan_to_dict(plan)}],
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(commands, "load_engine", fake.load)
    return fake


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in a folder of its own, without the user's settings."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("TURBO_MODEL", raising=False)
    monkeypatch.delenv("TURBO_CACHE", raising=False)
    return here


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line that the command prints on standard error."""
    try:
        assert main(arguments) == code
    except SystemExit as error:
        assert error.code == code  # noqa: PT017
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def python(*arguments: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with this checkout's `turbo`."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    command = [sys.executable, *arguments]
    return subprocess.run(command, text=True, timeout=120, env=environment(), **streams)


def environment() -> dict[str, str]:
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def turbo(*arguments: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    return python("-m", "turbo", *arguments, **streams)


# Help.


def test_help_imports_nothing_heavy():
    code = (
        "import sys, turbo.cli\n"
        "turbo.cli.build_parser().format_help()\n"
        "print(sorted({'torch', 'numpy', 'yaml', 'PIL', 'diffusers', 'transformers', "
        "'turbo.plan', 'turbo.commands'} & set(sys.modules)))"
    )
    assert python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize("arguments", ["--help", "generate -h", "info -h", "plan -h", "cache -h"])
def test_every_command_has_help(arguments: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 0
    assert "usage: turbo" in capsys.readouterr().out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"turbo {__version__}\n"


def test_python_dash_m_turbo_is_the_command():
    assert turbo("--version").stdout == f"turbo {__version__}\n"


# What reaches the engine.


def test_a_bare_prompt_uses_the_default_plan_and_says_what_model(
    engine: FakeEngine, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", "a cat"]) == 0
    assert engine.loaded["path"] is None
    assert engine.requests[0] | {"on_progress": None} == {
        "prompt": "a cat",
        "negative_prompt": "",
        "trigger_word": "",
        "seed": None,
        "plan": DEFAULT_PLAN,
        "image": None,
        "strength": None,
        "on_progress": None,
        "keep_stages": False,
    }
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"turbo-7\.png: seed 7, \d+\.\d\d s, network calls skipped: stage2 9 of 16\n", out
    )
    assert err.count("\n") == 1
    assert "the built-in one paints simple scenes" in err
    assert "--model (or TURBO_MODEL)" in err
    assert os.listdir(folder) == ["turbo-7.png"]


def test_all_flags_reach_the_engine(engine: FakeEngine, folder: Path):
    Image.new("L", (20, 10)).save("start.png")
    arguments = [
        *("generate", "a cat", "--negative", "a dog", "--trigger-word", "w", "--seed", "5"),
        *("--model", "m", "--diffusion-model", "d", "--text-encoder", "t", "--vae", "v"),
        *("--tokenizer", "k", "--device", "cpu", "--dtype", "torch.float16", "--no-strict-lora"),
        *("--lora", "a.safetensors:0.5", "--lora", "b", "--image", "start.png"),
        *("--strength", "0.4", "--save-stages", "-o", "out.png", "--compile", "on"),
        *("--capture", "replay", "--kernels", "off", "--cache-dir", "c", "--strict-speed"),
        *("--attention", "flex"),
    ]
    assert main(arguments) == 0
    engine.loaded.pop("on_progress")
    plan = replace(DEFAULT_PLAN, model=ModelSettings(torch_dtype="float16", device="cpu"))
    assert engine.loaded == {
        "path": "m",
        "diffusion_model": "d",
        "text_encoder": "t",
        "vae": "v",
        "tokenizer": "k",
        "loras": [("a.safetensors", 0.5), ("b", 0.8)],
        "device": "cpu",
        "dtype": "float16",
        "plan": plan,
        "strict_loras": False,
        "compile": True,
        "capture": "replay",
        "kernels": False,
        "attention": "flex",
        "cache_dir": "c",
        "strict_speed": True,
    }
    request = engine.requests[0]
    texts = (request["negative_prompt"], request["trigger_word"])
    assert (*texts, request["seed"]) == ("a dog", "w", 5)
    assert (request["strength"], request["keep_stages"]) == (0.4, True)
    assert (request["image"].mode, request["image"].size) == ("RGB", (20, 10))
    names = ["out-stage1.png", "out-stage2.png", "out.png", "start.png"]
    assert sorted(os.listdir(folder)) == names


def test_compiled_code_is_kept_where_the_flags_say(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", "/home/somebody")
    seen = []
    for flags in ([], ["--no-cache"], ["--cache-dir", "~/c"]):
        assert main(["generate", "x", *flags]) == 0
        seen.append(engine.loaded["cache_dir"])
    assert seen == ["auto", None, "/home/somebody/c"]


def test_speed_is_chosen_by_the_engine_unless_told(engine: FakeEngine):
    assert main(["generate", "x"]) == 0
    names = ("compile", "capture", "kernels", "strict_speed")
    assert [engine.loaded[name] for name in names] == ["auto", "auto", "auto", False]
    assert ("auto", *BACKENDS) == CAPTURES


def test_a_model_is_named_by_flag_then_plan_then_environment(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("plan.yaml").write_text("model: {path: ~/from-plan, vae_path: v, device: cpu}")
    with_plan = ["generate", "x", "--plan", "plan.yaml"]
    monkeypatch.setenv("TURBO_MODEL", "from-environment")
    monkeypatch.setenv("HOME", "/home/somebody")
    seen = []
    for arguments in (["generate", "x"], with_plan, [*with_plan, "--model", "from-flag"]):
        assert main(arguments) == 0
        seen.append((engine.loaded["path"], engine.loaded["vae"], engine.loaded["device"]))
    assert seen == [
        ("from-environment", None, "auto"),
        ("/home/somebody/from-plan", "v", "cpu"),
        ("from-flag", "v", "cpu"),
    ]
    assert "no model given" not in capsys.readouterr().err


def test_the_built_in_model_is_pointed_out_once_all_is_loaded(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", "x"]) == 0
    assert "turbo: no model given" in capsys.readouterr().err

    def failing(*_: Any, **__: Any) -> FakeEngine:
        raise LoraError("absent: no such LoRA")

    monkeypatch.setattr(commands, "load_engine", failing)
    assert "no such LoRA" in refused(capsys, "generate", "x", "--lora", "absent")


def test_three_named_files_need_no_model_folder(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TURBO_MODEL", "elsewhere")
    files = ["--diffusion-model", "d", "--text-encoder", "t", "--vae", "v"]
    assert main(["generate", "x", *files]) == 0
    assert engine.loaded["path"] is None


def test_where_the_model_lies_does_not_get_into_pictures(engine: FakeEngine):
    assert main(["generate", "x", "--model", "/home/somebody/models", "-o", "a.png"]) == 0
    assert "somebody" not in json.dumps(read_metadata("a.png"))


def test_the_single_stage_takes_steps_and_cfg(engine: FakeEngine):
    assert main(["generate", "x", "--single-stage", "--steps", "4", "--cfg", "1.5"]) == 0
    assert engine.requests[0]["plan"] == DEFAULT_PLAN.single_stage(4, 1.5)
    assert main(["generate", "x", "--steps", "4", "--cfg", "1.5"]) == 0
    first, *rest = DEFAULT_PLAN.stages
    stages = (replace(first, steps=4, cfg=1.5), *rest)
    assert engine.requests[1]["plan"] == replace(DEFAULT_PLAN, stages=stages)


def test_a_plan_may_ask_for_the_single_stage(engine: FakeEngine):
    Path("plan.yaml").write_text("generation: {progressive: false, num_inference_steps: 5}")
    assert main(["generate", "x", "--plan", "plan.yaml"]) == 0
    assert [s.steps for s in engine.requests[0]["plan"].stages] == [5]


def test_a_plan_gives_loras_without_strength_theirs(engine: FakeEngine):
    Path("plan.yaml").write_text("lora: {default_strength: 0.3}")
    assert main(["generate", "x", "--plan", "plan.yaml", "--lora", "~/a", "--lora", "b:1"]) == 0
    assert engine.loaded["loras"] == [(os.path.expanduser("~/a"), 0.3), ("b", 1.0)]


def test_a_negative_prompt_that_nothing_reads_is_pointed_out(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
):
    unguided = ["generate", "x", "--model", "m", "--cfg", "1"]
    assert main([*unguided, "--negative", "y"]) == 0
    assert capsys.readouterr().err.startswith("turbo: --negative has no effect")
    assert main(unguided) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a.safetensors", ("a.safetensors", None)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a:-1", ("a", -1.0)),
        ("a:1e-1", ("a", 0.1)),
        ("a:.5", ("a", 0.5)),
        (r"C:\x.safetensors", (r"C:\x.safetensors", None)),
        (r"C:\x.safetensors:0.8", (r"C:\x.safetensors", 0.8)),
        ("a:b.safetensors", ("a:b.safetensors", None)),
        ("a:b:2", ("a:b", 2.0)),
        ("style:3.safetensors", ("style:3.safetensors", None)),
    ],
)
def test_a_lora_is_a_file_and_perhaps_a_strength(text: str, meant: tuple[str, float | None]):
    assert parse_lora(text) == meant


def test_a_lora_whose_name_ends_like_a_strength_can_be_named():
    Path("style:2").touch()
    assert parse_lora("style:2") == ("style:2", None)
    assert parse_lora("style:2:0.5") == ("style:2", 0.5)


@pytest.mark.parametrize("text", ["", ":0.8", "a:", "a:nan", "a:-inf", ":", "there:strong"])
def test_a_lora_needs_a_name_and_a_finite_strength(text: str):
    Path("there").touch()
    with pytest.raises(BadInputError, match=r"--lora needs FILE|finite number"):
        parse_lora(text)


# Files.


def test_an_automatic_name_never_replaces_a_file(engine: FakeEngine, folder: Path):
    for _ in range(3):
        assert main(["generate", "x", "--seed", "1", "--quiet"]) == 0
    assert sorted(os.listdir(folder)) == ["turbo-1-2.png", "turbo-1-3.png", "turbo-1.png"]


def test_a_given_name_is_replaced(engine: FakeEngine, folder: Path):
    Path("out.png").write_bytes(b"old")
    assert main(["generate", "x", "--seed", "1", "-o", "out.png"]) == 0
    assert read_metadata("out.png") is not None
    assert os.listdir(folder) == ["out.png"]


def test_several_pictures_have_numbers_and_following_seeds(engine: FakeEngine, folder: Path):
    last = str(2**64 - 1)
    assert main(["generate", "x", "-n", "3", "--seed", last, "-o", "out.png"]) == 0
    assert [request["seed"] for request in engine.requests] == [2**64 - 1, 0, 1]
    assert sorted(os.listdir(folder)) == ["out-1.png", "out-2.png", "out-3.png"]
    assert main(["generate", "x", "-n", "2"]) == 0
    assert [request["seed"] for request in engine.requests[3:]] == [None, 8]
    assert {"turbo-7.png", "turbo-8.png"} <= set(os.listdir(folder))


def test_the_file_says_what_made_it_unless_told_not_to(engine: FakeEngine):
    assert main(["generate", "a cat", "-o", "a.png", "--save-stages"]) == 0
    assert (read_metadata("a.png") or {})["prompt"] == "a cat"
    assert (read_metadata("a-stage1.png") or {})["stage"] == "stage1"
    with Image.open("a.png") as image:
        assert image.info["parameters"].startswith("a cat\nSteps: 9, Sampler: Euler a")
    assert main(["generate", "a cat", "-o", "a.png", "--save-stages", "--no-metadata"]) == 0
    for name in ("a.png", "a-stage1.png"):
        assert b"cat" not in Path(name).read_bytes()


def test_json_is_one_line_a_picture(engine: FakeEngine, capsys: pytest.CaptureFixture[str]):
    arguments = [
        "generate",
        "x",
        "-n",
        "2",
        "--seed",
        "1",
        "--json",
        "--save-stages",
        "-o",
        "a.png",
    ]
    assert main(arguments) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["file"] == "a-1.png"
    assert first["stages"] == {"stage1": "a-1-stage1.png", "stage2": "a-1-stage2.png"}
    assert (second["seed"], second["skips"]["stage2"]) == (2, [9, 16])
    assert second["timings"] == {"total": 0.5}


def test_quiet_is_quiet(engine: FakeEngine, capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "x", "--negative", "y", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_pictures_that_are_done_stay_when_a_later_one_fails(
    engine: FakeEngine, folder: Path, capsys: pytest.CaptureFixture[str]
):
    engine.error, engine.fails_at = NonFiniteLatentError("stage3 is not finite"), 2
    assert main(["generate", "x", "-n", "3", "-o", "a.png", "--model", "m"]) == 1
    assert os.listdir(folder) == ["a-1.png"]
    assert capsys.readouterr().err == "turbo: stage3 is not finite\n"


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["generate"], "the following arguments are required: PROMPT"),
        (["generate", "x", "--seed", "-1"], "--seed: must be a whole number from 0 to 2^64 - 1"),
        (["generate", "x", "--seed", "1" + "0" * 25], "--seed: must be a whole number from 0"),
        (["generate", "x", "--seed", "1.5"], "got '1.5'"),
        (["generate", "x", "-n", "0"], "-n: must be a whole number from 1 to 1000, got '0'"),
        (["generate", "x", "--steps", "-3"], "--steps: "),
        (["generate", "x", "--cfg", "nan"], "--cfg: must be a number, at least 0, got 'nan'"),
        (["generate", "x", "--cfg", "inf"], "--cfg: must be a number, at least 0, got 'inf'"),
        (["generate", "x", "--strength", "0"], "--strength: must be a number above 0, at most 1"),
        (["generate", "x", "--dtype", "int8"], "--dtype: must be one of auto, float32, bfloat16"),
        (["generate", "x", "--device", "gpu"], "--device: must be auto, cpu, cuda or cuda:N"),
        (["generate", "\udcff"], "PROMPT: is not valid UTF-8 text"),
        (["generate", "x", "--single"], "unrecognized arguments: --single"),
        (["generate", "x", "--strength", "0.5"], "--strength needs --image"),
        (["generate", "x", "--image", "none.png"], "cannot read the picture 'none.png': No such"),
        (["generate", "x", "--image", "."], "cannot read the picture '.': Is a directory"),
        (
            ["generate", "x", "--plan", "none.yaml"],
            "cannot read the plan file 'none.yaml': No such",
        ),
        (["generate", "x", "-o", "a.jpg"], "-o must be a name that ends in .png, got 'a.jpg'"),
        (["generate", "x", "-o", "a"], "-o must be a name that ends in .png, got 'a'"),
        (["generate", "x", "-o", ""], "-o must be a name that ends in .png, got ''"),
        (["generate", "x", "-o", ".png"], "-o must be a name that ends in .png, got '.png'"),
        (["generate", "x", "-o", "a.png/"], "-o must be a name that ends in .png, got 'a.png/'"),
        (["generate", "x", "-o", "a" * 300 + ".png"], "cannot be a file: File name too long"),
        (
            ["generate", "x", "-o", "a" * 248 + ".png", "--save-stages"],
            "-stage1.png' cannot be a file: File name too long; give another -o",
        ),
        (
            ["generate", "x", "-o", "no/a.png"],
            "the output folder 'no' does not exist; make it first",
        ),
        (["cache"], "the following arguments are required: list|clear"),
        (["cache", "show"], "argument list|clear: invalid choice: 'show'"),
        (["cache", "list", "--cache-dir", ""], "--cache-dir: must name a folder, got ''"),
        (["generate", "x", "--compile", "yes"], "argument --compile: invalid choice: 'yes'"),
        (["generate", "x", "--capture", "graph"], "argument --capture: invalid choice: 'graph'"),
        (["generate", "x", "--kernels", ""], "argument --kernels: invalid choice: ''"),
        (["generate", "x", "--cache-dir", ""], "--cache-dir: must name a folder, got ''"),
        (["generate", "x", "--cache-dir", "c", "--no-cache"], "--no-cache: not allowed with"),
        (["generate", "x", "--lora", "a:nan"], "a LoRA's strength must be a finite number"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    engine: FakeEngine,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert message in refused(capsys, *arguments)
    assert engine.loaded == {}
    assert os.listdir(folder) == []


def test_a_folder_as_output_is_refused(engine: FakeEngine, capsys: pytest.CaptureFixture[str]):
    Path("a.png").mkdir()
    message = refused(capsys, "generate", "x", "-o", "a.png")
    assert message == "turbo: -o must be a file, but 'a.png' is a folder\n"
    assert engine.loaded == {}


def test_an_unwritable_folder_is_found_before_the_model_is_loaded(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(self: Path, exist_ok: bool = True) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "touch", refuse)
    message = refused(capsys, "generate", "x", "-o", "a.png", code=1)
    assert message == "turbo: cannot write into the folder '.': Permission denied\n"
    assert engine.loaded == {}


def test_a_full_disk_is_one_line_and_leaves_nothing(
    engine: FakeEngine,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    fill_the_disk(monkeypatch)
    message = refused(capsys, "generate", "x", "--model", "m", code=1)
    assert "cannot save 'turbo-7.png': No space left on device" in message
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BadInputError("bad\ninput \x1b[31m"), 2, "bad input \\x1b[31m"),
        (NonFiniteLatentError("not finite"), 1, "not finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory; --dry-run shows the need"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), 1, "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 1, "out of memory"),
        (KeyError("key"), 1, "unexpected KeyError: 'key' (--debug shows where)"),
    ],
)
def test_a_failure_is_one_line_with_its_exit_code(
    error: BaseException,
    code: int,
    message: str,
    engine: FakeEngine,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
):
    engine.error = error
    assert message in refused(capsys, "generate", "x", "--model", "m", code=code)
    assert os.listdir(folder) == []
    assert main(["generate", "x", "--model", "m", "--debug"]) == 0
    engine.fails_at = 3
    assert main(["generate", "x", "--model", "m", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_mistaken_plan_is_found_before_torch_is_imported(folder: Path):
    Path("plan.yaml").write_text("generation:\n  stage1:\n    height: 1000\n")
    code = (
        "import sys; from turbo.cli import main\n"
        "code = main(['generate', 'x', '--plan', 'plan.yaml'])\n"
        "print(code, {'torch', 'numpy', 'PIL'} & set(sys.modules))"
    )
    done = python("-c", code)
    assert done.stdout == "2 set()\n"
    assert done.stderr == (
        "turbo: plan.yaml, line 3: generation.stage1.height must be a multiple of 16 pixels, "
        "got 1000; use 992 or 1008\n"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_output_that_cannot_be_written_is_a_failure():
    with open("/dev/full", "w") as full:
        done = turbo("plan", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "turbo: No space left on device (--debug shows where)\n"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such shell on Windows")
def test_streams_that_are_closed_are_no_error(folder: Path):
    command = f"{sys.executable} -m turbo plan -o a.yaml <&- >&- 2>&- && "
    command += f"{sys.executable} -m turbo plan >&-"
    done = subprocess.run(["sh", "-c", command], env=environment(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert load_plan("a.yaml") == DEFAULT_PLAN


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise on Windows")
def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = turbo("plan", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# turbo plan, turbo info


def test_the_plan_command_prints_a_plan(capsys: pytest.CaptureFixture[str]):
    assert main(["plan"]) == 0
    Path("plan.yaml").write_text(capsys.readouterr().out)
    assert load_plan("plan.yaml") == DEFAULT_PLAN
    assert main(["plan", "--plan", "plan.yaml", "--single-stage", "-o", "one.yaml"]) == 0
    assert load_plan("one.yaml") == DEFAULT_PLAN.single_stage()
    assert "'one.yaml' exists" in refused(capsys, "plan", "-o", "one.yaml")
    assert "folder 'no' does not exist" in refused(capsys, "plan", "-o", "no/a.yaml")


def test_a_plan_on_a_full_disk_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fill_the_disk(monkeypatch)
    message = refused(capsys, "plan", "-o", "a.yaml", code=1)
    assert "cannot save 'a.yaml': No space left on device" in message
    assert os.listdir(folder) == []


def test_without_the_built_in_model_nothing_is_said_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("turbo.builtin._FOLDER", folder)
    assert "the built-in model is not there; install turbo" in refused(capsys, "generate", "a cat")


def test_info_tells_versions_and_names_a_missing_model(capsys: pytest.CaptureFixture[str]):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"turbo {__version__}, Python" in out
    assert "model: none given" in out
    assert main(["info", "--model", "nowhere", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["model"]["problem"]
    assert err == "turbo: nowhere: no such file or folder\n"


# turbo cache

FACTS = {
    "torch": "2.13.0",
    "device": "cpu",
    "caller": {
        "dtypes": ["torch.bfloat16"] * 2 + ["torch.float32"],
        "stages": [[64, 48], [96, 64]],
    },
}


@pytest.fixture
def compiled(folder: Path) -> Path:
    """A cache folder with one entry that is whole, one of other facts and one that is damaged."""
    kept = folder / "kept"
    write_entry(kept / "a.compiled", pack(FACTS, {"kernel.so": bytes(2000)}))
    write_entry(kept / "b.compiled", pack({"caller": [], "torch": "1\n2"}, {}))
    write_entry(kept / "c.compiled", b"damaged")
    for age, name in enumerate("abc"):
        os.utime(kept / f"{name}.compiled", (1e9 - age, 1e9 - age))
    (kept / "another file").touch()
    return kept


def test_the_cache_is_listed_with_what_each_entry_is_for(
    compiled: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["cache", "list", "--cache-dir", "kept"]) == 0
    out, err = capsys.readouterr()
    first, *lines = out.splitlines()
    assert (first, err) == ("folder: kept", "")
    assert re.fullmatch(
        r"a\.compiled: 2\.\d+ KiB, 2001-09-\d\d \d\d:\d\d, for torch 2\.13\.0, cpu, "
        r"bfloat16/float32, stages 48x64 64x96",
        lines[0],
    )
    assert re.fullmatch(r"b\.compiled: \d+ bytes, 2001-09-[\d :-]+, for torch 1 2", lines[1])
    assert re.fullmatch(r"c\.compiled: 7 bytes, 2001-09-[\d :-]+", lines[2])
    assert lines[3] == "  not used: it is of another format"
    assert re.fullmatch(r"3 entries, [\d.]+ KiB", lines[4])


def test_the_cache_is_listed_as_json(compiled: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["cache", "list", "--cache-dir", str(compiled), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(compiled)
    assert told["bytes"] == sum(entry["bytes"] for entry in told["entries"])
    first, _, last = told["entries"]
    assert first == {
        "path": str(compiled / "a.compiled"),
        "bytes": (compiled / "a.compiled").stat().st_size,
        "modified": 1e9,
        "facts": FACTS,
        "files": 1,
        "problem": None,
    }
    assert last["problem"] == "it is of another format"


def test_clearing_the_cache_removes_compiled_code_alone(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TURBO_CACHE", str(compiled))
    assert main(["cache", "clear"]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(rf"folder: {compiled}\nremoved 3 entries, [\d.]+ KiB\n", out)
    assert os.listdir(compiled) == ["another file"]
    for action in ("list", "clear"):
        assert main(["cache", action]) == 0
        assert capsys.readouterr().out == f"folder: {compiled}\nno compiled code is kept here\n"
    assert main(["cache", "clear", "--json"]) == 0
    told = {"folder": str(compiled), "entries": 0, "bytes": 0}
    assert json.loads(capsys.readouterr().out) == told


def test_a_cache_folder_may_be_missing_but_no_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    for action in ("list", "clear"):
        assert main(["cache", action, "--cache-dir", "none"]) == 0
        assert capsys.readouterr().out == "folder: none\nthe folder does not exist yet\n"
    Path("file").touch()
    message = refused(capsys, "cache", "clear", "--cache-dir", "file")
    assert "cannot list the cache folder 'file': Not a directory; give another" in message
    assert os.listdir(folder) == ["file"]


def test_an_entry_that_cannot_be_removed_is_a_failure(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    message = refused(capsys, "cache", "clear", "--cache-dir", "kept", code=1)
    assert "cannot clear the cache folder kept: " in message


def test_listing_the_cache_does_not_import_torch(compiled: Path):
    code = (
        "import sys; from turbo.cli import main\n"
        "code = main(['cache', 'list', '--cache-dir', 'kept'])\n"
        "print(code, {'torch', 'numpy', 'PIL'} & set(sys.modules))"
    )
    assert python("-c", code).stdout.endswith("\n0 set()\n")


# With the real engine and the built-in model.


@pytest.fixture
def small(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a quick picture."""
    monkeypatch.setenv("TURBO_CACHE", str(tmp_path / "compiled"))
    Path("plan.yaml").write_text(SMALL_PLAN)
    return ["generate", "a lighthouse", "--plan", "plan.yaml", "--seed", "42"]


def pixels(path: str) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_built_in_model_makes_pictures(small: list[str]):
    done = turbo(*small, "-o", "a.png", "--save-stages")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "the built-in one paints simple scenes" in done.stderr
    assert re.match(r"a\.png: seed 42, \d", done.stdout)
    assert pixels("a.png").shape == (96, 80, 3)
    assert pixels("a-stage1.png").shape == (64, 64, 3)
    assert pixels("a.png").std() > 1
    metadata = read_metadata("a.png") or {}
    assert (metadata["prompt"], metadata["seed"]) == ("a lighthouse", 42)
    assert metadata["plan"]["generation"]["stage3"]["width"] == 80


def test_the_same_seed_gives_the_same_file(small: list[str], capsys: pytest.CaptureFixture[str]):
    for name in ("a.png", "b.png"):
        assert main([*small, "-o", name]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert main([*small[:-1], "41", "-n", "2", "-o", "c.png"]) == 0
    assert Path("c-2.png").read_bytes() == Path("a.png").read_bytes()
    assert main([*small, "--no-metadata", "-o", "d.png"]) == 0
    assert np.array_equal(pixels("d.png"), pixels("a.png"))


def test_the_metadata_alone_makes_the_picture_again(small: list[str]):
    assert main([*small, "-o", "a.png"]) == 0
    metadata = read_metadata("a.png") or {}
    Path("again.yaml").write_text(json.dumps(metadata["plan"]))
    again = ["generate", metadata["prompt"], "--seed", str(metadata["seed"])]
    assert main([*again, "--plan", "again.yaml", "-o", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_picture_can_start_from_a_picture(small: list[str]):
    assert main([*small, "-o", "a.png"]) == 0
    start = ["--image", "a.png", "--strength", "0.6"]
    assert main([*small, *start, "-o", "b.png"]) == 0
    assert pixels("b.png").shape == (96, 80, 3)
    assert (read_metadata("b.png") or {})["strength"] == 0.6


def test_the_single_stage_is_made(small: list[str]):
    assert main([*small, "--single-stage", "--steps", "2", "-o", "a.png"]) == 0
    assert pixels("a.png").shape == (96, 80, 3)


def test_a_dry_run_prints_plan_and_memory_and_makes_nothing(
    small: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*small, "--dry-run", "-o", "a.png"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"# weights of network: [\d.]+ MiB, from .*transformer", out)
    assert "# largest activations of decode: " in out
    assert re.search(r"# memory low: [\d.]+ MiB at most on .*\n(# .*\n)*# memory: fast\n", out)
    assert re.search(r"# tokenizer: .+", out)
    assert "# pictures: a.png" in out
    Path("again.yaml").write_text(out)
    assert load_plan("again.yaml").stages == load_plan("plan.yaml").stages
    assert not Path("a.png").exists()
    assert main([*small, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    memory = told["memory_bytes"]
    assert memory["total"] > sum(memory["weights"].values())
    peaks = [memory["plans"][name]["peak"] for name in ("fast", "balanced", "low")]
    assert peaks == sorted(peaks, reverse=True)
    assert memory["total"] == peaks[0]
    assert memory["chosen"] == "fast"
    assert told["files"] == ["turbo-42.png"]


def test_a_dry_run_tells_the_need_and_what_is_missing_where_no_memory_plan_fits(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("turbo.devices.free_bytes", lambda device: 1_048_576)
    assert main([*small, "--dry-run", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert re.search(r"# memory low: [\d.]+ MiB at most on cpu", out)
    assert "# free on cpu now: 1 MiB\n" in out
    assert re.search(r"# no memory plan fits: low comes nearest, [\d.]+ MiB are missing", out)
    assert "# memory: none that fits\n" in out
    assert re.search(r"memory 'fast' needs \d+ bytes .*'low' comes nearest with \d+ too few", err)
    assert main([*small, "--dry-run", "--json", "--device", "cpu"]) == 2
    memory = json.loads(capsys.readouterr().out)["memory_bytes"]
    assert (memory["chosen"], memory["nearest"], memory["free"]) == (None, "low", 1 << 20)
    assert memory["missing"] == memory["plans"]["low"]["peak"] - memory["free"]


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_a_memory_plan_that_does_not_go_with_the_plan_is_bad_input(
    command: str, capsys: pytest.CaptureFixture[str]
):
    Path("offload.yaml").write_text("performance: {enable_model_cpu_offload: true}")
    what = [command, *["a cat"] * (command == "generate"), "--plan", "offload.yaml"]
    message = refused(capsys, *what, "--memory", "balanced")
    assert "memory 'balanced' does not go with enable_model_cpu_offload" in message


def test_a_plan_tells_what_memory_the_model_needs_for_it(
    small: list[str], capsys: pytest.CaptureFixture[str]
):
    model = str(builtin_model())
    options = ["--plan", "plan.yaml", "--model", model, "--device", "cpu", "--memory", "low"]
    assert main(["plan", *options]) == 0
    out = capsys.readouterr().out
    for name in ("fast", "balanced", "low"):
        assert re.search(rf"# memory {name}: [\d.]+ MiB at most on cpu \(", out)
    Path("again.yaml").write_text(out)
    assert load_plan("again.yaml").performance.memory == "low"
    assert load_plan("again.yaml").stages == load_plan("plan.yaml").stages


def test_timings_are_a_table_of_the_starts_parts(
    small: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*small, "--device", "cpu", "--quiet", "--timings", "-o", "a.png"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    rows = re.findall(r"^( *\S.*?) +(\d+\.\d{3}) s$", err, re.MULTILINE)
    seconds = {name.strip(): float(value) for name, value in rows}
    assert [*seconds][:4] == ["import", "load", "find files", "plan memory"]
    assert {"read network", "read text encoder", "read autoencoder"} < set(seconds)
    whole = ("import", "load", "first picture", "check and save")
    assert sum(seconds[name] for name in whole) == pytest.approx(
        seconds["start to first file"], abs=0.005
    )
    assert all(seconds[name] <= seconds["load"] for name in seconds if name.startswith("read "))


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_speed_that_a_device_cannot_have_is_bad_input(
    dry: list[str], small: list[str], capsys: pytest.CaptureFixture[str]
):
    options = ["--device", "cpu", "--capture", "cuda-graph", "--quiet", *dry]
    assert "needs a CUDA device, the engine is on cpu; use" in refused(capsys, *small, *options)


def test_captured_parts_make_the_same_picture(small: list[str]):
    assert main([*small, "--device", "cpu", "-o", "a.png"]) == 0
    speed = ["--capture", "replay", "--compile", "off", "--no-cache", "--strict-speed"]
    assert main([*small, "--device", "cpu", *speed, "-o", "b.png"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_a_dry_run_matches_loras_with_the_model_and_reads_no_weight(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    good = {"diffusion_model.layers.0.attention.out.diff": torch.ones(192, 192)}
    strange = {"diffusion_model.layers.77.attention.out.diff": torch.ones(192, 192)}
    save_file(good, "good.safetensors")
    save_file(strange, "foreign.safetensors")
    save_file(good | strange, "partial.safetensors")
    monkeypatch.setattr(Checkpoint, "copy_into", lambda *_: pytest.fail("a weight was read"))
    dry = [*small, "--dry-run", "--lora"]
    assert main([*dry, "good.safetensors:0.5"]) == 0
    assert "# LoRA: good.safetensors at 0.5" in capsys.readouterr().out
    assert "0 of 1 tensors used" in refused(capsys, *dry, "foreign.safetensors")
    assert "1 of 2 tensors used" in refused(capsys, *dry, "partial.safetensors")
    assert main([*dry, "partial.safetensors", "--no-strict-lora"]) == 0


@pytest.mark.parametrize("flag", ["--model", "--vae", "--lora", "--tokenizer"])
def test_a_missing_file_is_bad_input(
    flag: str, small: list[str], capsys: pytest.CaptureFixture[str]
):
    for dry in ([], ["--dry-run"]):
        message = refused(capsys, *small, flag, "nowhere.safetensors", "--quiet", *dry)
        assert "nowhere.safetensors" in message
