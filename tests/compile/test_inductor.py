"""Inductor for one callable in one shape, and what it leaves for the next process.

The callables of most tests are one matrix product: Inductor then calls the library and builds no
kernel, which takes milliseconds. Two tests start processes that build a real kernel.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from turbo.compile import (
    Captures,
    CompileCache,
    CompileError,
    InputError,
    SignatureError,
    capture,
    compile_counts,
    compiled,
)

from tests.compile.places import needs_cuda
from tests.conftest import REPOSITORY

# Raised by an import inside Inductor, whatever is compiled.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    # Inductor's advice about float32 products on a GPU, which are float32 here on purpose.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor's files go to the test's folder, and what it remembers of them is dropped."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    yield
    torch.compiler.reset()


def product(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


# Compiling.


def test_the_second_call_compiles_nothing():
    run = compiled(product, name="product")
    x, y = torch.randn(2, 3), torch.randn(3, 4)
    state = [(run.is_compiled, run.graphs)]
    torch.testing.assert_close(run(x, y), x @ y)
    state.append((run.is_compiled, run.graphs))
    assert state == [(False, 0), (True, 1)]
    assert run.seconds > 0
    before = compile_counts()
    for _ in range(3):
        torch.testing.assert_close(run(2 * x, y), 2 * x @ y)
    assert compile_counts() == before
    assert run.graphs == 1


def test_another_shape_is_refused_and_not_compiled():
    run = compiled(product, name="stage 1 block")
    run(torch.ones(2, 3), torch.ones(3, 4))
    before = compile_counts()
    with pytest.raises(SignatureError, match=r"^stage 1 block: input 0 is float32\[5, 3\]"):
        run(torch.ones(5, 3), torch.ones(3, 4))
    assert compile_counts() == before


def test_each_role_has_code_of_its_own():
    runs = [compiled(product, name=f"stage {n}") for n in range(10)]  # past Dynamo's limit of 8
    for n, run in enumerate(runs):
        x = torch.ones(n + 2, 3)
        assert run(x, torch.ones(3, 4)).shape == (n + 2, 4)
    for n, run in enumerate(runs):
        run(torch.ones(n + 2, 3), torch.ones(3, 4))
        assert run.graphs == 1


def test_modules_of_one_make_share_one_graph():
    blocks = [torch.nn.Linear(4, 4, bias=False).requires_grad_(False) for _ in range(12)]
    run = compiled(lambda block, x: block(x), name="block")
    x = torch.randn(2, 4)
    for block in blocks:
        torch.testing.assert_close(run(block, x), block(x))
    assert run.graphs == 1
    with pytest.raises(SignatureError, match="input 0 is Identity, made for Linear"):
        run(torch.nn.Identity(), x)


def test_weights_may_change_in_place():
    block = torch.nn.Linear(3, 3, bias=False).requires_grad_(False)
    run, x = compiled(block, name="block"), torch.randn(2, 3)
    run(x)
    block.weight.mul_(-2)
    torch.testing.assert_close(run(x), block(x))
    assert run.graphs == 1


def test_gradients_and_inference_mode_of_the_caller_do_not_matter():
    run = compiled(product, name="product")
    x = torch.ones(2, 2, requires_grad=True)
    assert not run(x, x).requires_grad
    with torch.inference_mode():
        assert not run(x, x).is_inference()
    with torch.no_grad():
        run(x, x)
    assert run.graphs == 1


def test_constants_are_compiled_in_and_checked():
    run = compiled(lambda x, y, transpose: y @ x if transpose else x @ y, name="product")
    x, y = torch.randn(2, 2, 2)
    torch.testing.assert_close(run(x, y, True), y @ x)
    with pytest.raises(SignatureError, match="input 2 is False, made for True"):
        run(x, y, False)
    with pytest.raises(SignatureError, match="input 2 is 1, made for True"):
        run(x, y, 1)


def test_containers_are_refused():
    run = compiled(lambda xs: xs[0] @ xs[1], name="pair")
    with pytest.raises(InputError, match="argument 0 is a list"):
        run([torch.ones(2, 2), torch.ones(2, 2)])


def test_a_later_recompilation_is_logged(caplog: pytest.LogCaptureFixture):
    class Changing(torch.nn.Module):
        flipped = False

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y @ x if self.flipped else x @ y

    module = Changing()
    run, (x, y) = compiled(module, name="changing"), torch.randn(2, 2, 2)
    run(x, y)
    module.flipped = True
    torch.testing.assert_close(run(x, y), y @ x)
    assert run.graphs == 2
    assert "changing was compiled again: what it closes over has changed" in caplog.text


def test_no_setting_is_left_changed():
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    modules = (torch._dynamo.config, torch._functorch.config, torch._inductor.config)
    before = [module.get_config_copy() for module in modules]
    variables = dict(os.environ)
    options = {"max_autotune": False, "shape_padding": True}
    compiled(product, name="product", mode="max-autotune-no-cudagraphs", options=options)(
        torch.ones(2, 3), torch.ones(3, 4)
    )
    assert [module.get_config_copy() for module in modules] == before
    assert dict(os.environ) == variables


# Refusing and stepping down.


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "fastest"])
def test_modes_that_record_graphs_themselves_are_refused(mode: str):
    with pytest.raises(InputError, match=f"must be one of default, max-.*, got '{mode}'"):
        compiled(product, name="product", mode=mode)


def test_options_are_checked():
    with pytest.raises(InputError, match="Inductor has no setting named fastest"):
        compiled(product, name="product", options={"fastest": True})
    with pytest.raises(InputError, match=r"let capture\(\) record CUDA graphs"):
        compiled(product, name="product", options={"triton.cudagraphs": True})


def breaks(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x @ x


def test_a_callable_that_cannot_be_traced_whole_is_an_error():
    run = compiled(breaks, name="breaks")
    with pytest.raises(CompileError, match=r"^breaks: cannot be compiled: .+") as caught:
        run(torch.ones(2, 2))
    assert "\n" not in str(caught.value)
    assert not run.is_compiled


def test_stepping_down_is_logged_in_one_line(caplog: pytest.LogCaptureFixture):
    run = compiled(breaks, name="breaks", strict=False)
    for _ in range(2):
        assert run(torch.ones(2, 2)).tolist() == [[2.0, 2.0]] * 2
    assert not run.is_compiled
    (record,) = [record for record in caplog.records if record.name.startswith("turbo")]
    assert record.message.startswith("breaks: cannot be compiled: ")
    assert record.message.endswith("; it runs uncompiled")
    with pytest.raises(SignatureError):
        run(torch.ones(3, 3))


def test_a_compiler_that_is_switched_off_is_an_error():
    run = compiled(product, name="product")
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(CompileError, match="nothing was compiled"),
    ):
        run(torch.ones(2, 2), torch.ones(2, 2))


def test_memory_that_runs_out_is_no_failure_of_the_compiler(monkeypatch: pytest.MonkeyPatch):
    run = compiled(product, name="product", strict=False)
    x = torch.ones(2, 2)

    def full(arguments: tuple[Any, ...]) -> Any:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patched:
        patched.setattr(run, "_try_to_compile", full)
        with pytest.raises(CompileError, match="full"):
            run(x, x)
    run(x, x)
    assert run.is_compiled


# Compiled and captured.


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(("replay", "cpu"), id="replay"),
        pytest.param(("cuda-graph", "cuda"), id="cuda-graph", marks=needs_cuda),
    ],
)
def test_a_warm_capture_compiles_nothing(place: tuple[str, str]):
    backend, device = place
    captures = Captures(backend=backend)
    run = compiled(product, name="product")
    x, y = torch.randn(2, 2, 2, device=device)
    captures.call("a", lambda x, y: run(x, y) @ y, x, y)
    warm = captures.counters
    assert warm.compilations == 1
    with torch.inference_mode():
        result = captures.call("a", product, 2 * x, y)
    torch.testing.assert_close(result, 2 * x @ y @ y)
    assert captures.counters.compilations == warm.compilations
    assert captures.counters.captures == warm.captures


def test_what_cannot_be_compiled_cannot_be_captured():
    with pytest.raises(CompileError, match=r"^breaks: "):
        capture(compiled(breaks, name="breaks"), (torch.ones(2, 2),), backend="replay")


# The next process.

FUNCTION = """
import json, os, subprocess, sys
import torch
import torch._dynamo  # names Inductor's usual folder in the environment
from turbo.compile import CompileCache, CompileError, compile_counts, compiled

torch.set_num_threads(1)
weight = torch.full((8,), 0.5)

def fn(x):
    return torch.sin(x) * weight + x.exp()

def report(**more):
    counts = compile_counts()
    print(json.dumps({"generated": counts.generated, "loaded": counts.loaded, **more}))
"""

START = (
    FUNCTION
    + """
def folders():
    return [os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]

before = folders()
commands = []
start = subprocess.Popen.__init__

def watch(self, args, *rest, **settings):
    commands.append(args if isinstance(args, str) else " ".join(map(str, args)))
    start(self, args, *rest, **settings)

subprocess.Popen.__init__ = watch
cache = CompileCache(sys.argv[1], facts={"shape": [4, 8]}, version="1", device="cpu")
run, x = compiled(fn, name="fn", cache=cache), torch.linspace(0, 1, 32).view(4, 8)
torch.testing.assert_close(run(x), fn(x))
run(x)
state = cache.report()
report(
    graphs=run.graphs,
    built=run.generated,
    loaded_files=state.loaded_files,
    new_binaries=state.new_binaries,
    saved=cache.save(),
    builds=[command for command in commands if ".cpp" in command],
    same_folders=folders() == before,
)
"""
)

NO_COMPILER = (
    FUNCTION
    + """
import logging
logging.basicConfig(format="%(message)s")
x = torch.ones(4, 8)
try:
    compiled(fn, name="fn")(x)
except CompileError as error:
    message = str(error)
run = compiled(fn, name="other", strict=False)
torch.testing.assert_close(run(x), fn(x))
report(message=message, is_compiled=run.is_compiled)
"""
)


@dataclass(frozen=True)
class Process:
    """What a process printed last, as JSON, and what it logged."""

    said: dict[str, Any]
    log: str


def start(code: str, folder: Path, **variables: str) -> Process:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        # Plain C++ without vectors: the checks of each instruction set take seconds.
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
        **variables,
    }
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "cache")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Process(json.loads(done.stdout.splitlines()[-1]), done.stderr)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> list[Process]:
    """Two starts with one cache folder, then one after what was kept has been spoiled."""
    folder = tmp_path_factory.mktemp("starts")
    processes = [start(START, folder)]
    processes.append(start(START, folder, PATH=path_with_a_compiler_that_refuses(folder)))
    spoil_shared_objects(folder / "cache")
    processes.append(start(START, folder))
    return processes


def path_with_a_compiler_that_refuses(folder: Path) -> str:
    """Tells its version, which Inductor asks for, and builds nothing."""
    program = folder / "bin" / "g++"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {shutil.which("g++")} "$@"\n'
        f'echo "$@" >> {folder}/refused\nexit 1\n'
    )
    program.chmod(0o700)
    return os.pathsep.join([str(program.parent), os.environ["PATH"]])


def spoil_shared_objects(folder: Path) -> None:
    """Replace code by nonsense under a checksum that fits, as only a fault of our own could."""
    from turbo.compile import cache

    (path,) = folder.iterdir()
    facts, files = cache.unpack(cache.read_entry(path))
    spoiled = {
        name: b"nonsense" if name.endswith(".so") else content for name, content in files.items()
    }
    cache.write_entry(path, cache.pack(facts, spoiled))


def test_the_first_start_compiles_and_saves(starts: list[Process]):
    said = starts[0].said
    assert (said["graphs"], said["built"], said["generated"], said["loaded"]) == (1, 1, 1, 0)
    assert said["loaded_files"] == 0
    assert said["new_binaries"]
    assert said["builds"]
    assert said["saved"]


def test_the_second_start_compiles_nothing(starts: list[Process]):
    said = starts[1].said
    assert (said["graphs"], said["built"], said["generated"], said["loaded"]) == (1, 0, 0, 1)
    assert said["loaded_files"] > 0
    assert said["new_binaries"] == []
    assert said["builds"] == []  # and its compiler would have refused
    assert not said["saved"]


def test_code_that_cannot_be_loaded_is_compiled_again(starts: list[Process]):
    said = starts[2].said
    assert "fn: the cached code fails (" in starts[2].log
    assert said["new_binaries"]
    assert said["saved"]


def test_a_start_leaves_the_environment_alone(starts: list[Process]):
    assert all(process.said["same_folders"] for process in starts)


def test_without_a_c_compiler_there_is_a_clear_error_or_a_step_down(tmp_path: Path):
    process = start(NO_COMPILER, tmp_path, CXX="there-is-no-such-compiler")
    assert "fn: no working C++ compiler was found" in process.said["message"]
    assert "install g++ or name one in CXX" in process.said["message"]
    assert process.said["is_compiled"] is False
    assert "other: no working C++ compiler was found" in process.log
    assert "; it runs uncompiled" in process.log


def test_a_cache_that_cannot_be_written_changes_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("not a folder")
    kept = CompileCache(tmp_path / "file" / "cache", facts={}, version="1", device="cpu")
    run, x = compiled(product, name="product", cache=kept), torch.randn(2, 2)
    with caplog.at_level(logging.WARNING), kept:
        torch.testing.assert_close(run(x, x), x @ x)
    assert run.generated == 1
    assert [record.name for record in caplog.records] == ["turbo.compile.cache"]


@pytest.mark.parametrize("place", [pytest.param("cuda", marks=needs_cuda)])
def test_a_kernel_for_a_gpu_is_kept(place: str, tmp_path: Path):
    code = START.replace('device="cpu"', 'device="cuda"').replace(
        "(8,), 0.5", '(8,), 0.5, device="cuda"'
    )
    code = code.replace(".view(4, 8)", '.view(4, 8).to("cuda")')
    first, second = start(code, tmp_path), start(code, tmp_path)
    assert first.said["generated"] == 1
    assert (second.said["generated"], second.said["loaded"]) == (0, 1)
    assert second.said["new_binaries"] == []
