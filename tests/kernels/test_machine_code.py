"""Every kernel compiles for the GPUs in use, without one being there, and stays in its registers.

The launchers are called with tensors that hold nothing, and what they would launch is compiled as
Triton's own launch would have it compiled: same argument types, constants and warps.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.conftest import INTERPRETED

triton = pytest.importorskip("triton", reason="the kernels need Triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

from turbo.kernels import easycache, latent_upscale  # noqa: E402

CAPABILITIES = (80, 89, 90, 100)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
MOST_REGISTERS = 80
"""A thread; Triton 3.9 takes 64 at most."""
REGISTERS = 65536
"""A multiprocessor."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch as a launcher asked for it."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def compile(self, capability: int, *, fusion: bool = True) -> Any:
        """Compile it; `fusion` lets the compiler merge products with sums, Triton 3.9's default."""
        keywords = dict(self.keywords)
        options = {"num_warps": keywords.pop("num_warps", 4), "enable_fp_fusion": fusion}
        values = dict(zip(self.kernel.arg_names, self.arguments)) | keywords
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for position, (name, value) in enumerate(values.items()):
            if name in keywords or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                whole = isinstance(value, int)
                signature[name] = "i32" if whole else POINTERS[value.dtype]
                if not whole or value % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(self.kernel, signature, constants, attributes)
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options=options)


@pytest.fixture(scope="module")
def compiled_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what Triton has compiled, used by this file's tests alone."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, compiled_files: Path) -> list[Launch]:
    """The launches that the launchers ask for, which are not carried out."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(1 <= count < 2**16 for count in grid)
            return lambda *args, **kwargs: launches.append(Launch(self.kernel, args, kwargs))

    for module in (easycache, latent_upscale):
        monkeypatch.setattr(module, "wrap_triton", Recorder)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled_files))
    return launches


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def upscale(dtype: torch.dtype) -> None:
    latent, noise = empty(1, 16, 54, 42, dtype=dtype), empty(1, 16, 108, 84, dtype=torch.float32)
    latent_upscale.latent_upscale(latent, noise, 0.6, 108, 84, dtype=torch.float32)


def compare(dtype: torch.dtype, *, parity: bool) -> None:
    latent, kept = empty(1, 16, 108, 84, dtype=dtype), empty(1, 16, 14, 11, dtype=dtype)
    state = empty(easycache.STATE_SIZE, dtype=torch.float32)
    easycache.easycache_compare(latent, kept, state, 0.12, parity=parity)


def observe(dtype: torch.dtype, *, measured: bool, parity: bool) -> None:
    latent, kept = empty(1, 16, 108, 84, dtype=dtype), empty(1, 16, 14, 11, dtype=dtype)
    state = empty(easycache.STATE_SIZE, dtype=torch.float32)
    easycache.easycache_observe(
        latent, latent, kept, kept, latent, state, 0, measured=measured, parity=parity
    )


def usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """What a kernel takes: REG registers a thread, STACK bytes that spill to memory, and so on."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run(
        [tool, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True
    )
    return {name: int(count) for name, count in re.findall(r"\b([A-Z]+):(\d+)", done.stdout)}


def arithmetic(cubin: bytes, folder: Path) -> Counter[str]:
    """How often each float32 instruction occurs."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = triton.knobs.nvidia.nvdisasm.path
    done = subprocess.run([tool, "-c", str(file)], capture_output=True, text=True, check=True)
    return Counter(re.findall(r"\b(?:FFMA|FMUL|FADD)2?\b", done.stdout))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_and_spills_nothing(
    recorded: list[Launch], tmp_path: Path, capability: int
):
    for dtype in (torch.bfloat16, torch.float32):
        upscale(dtype)
        compare(dtype, parity=dtype is torch.bfloat16)
        observe(dtype, measured=True, parity=dtype is torch.bfloat16)
    observe(torch.bfloat16, measured=False, parity=False)
    for launch in recorded:
        used = usage(launch.compile(capability).asm["cubin"], tmp_path)
        print(capability, launch.kernel.__name__, launch.arguments[0].dtype, launch.keywords, used)
        assert used["REG"] <= MOST_REGISTERS
        assert used["REG"] * 32 * launch.keywords.get("num_warps", 4) <= REGISTERS
        assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_compiler_merges_no_product_of_the_renoising_with_a_sum(
    recorded: list[Launch], tmp_path: Path, capability: int
):
    upscale(torch.bfloat16)
    (launch,) = recorded
    merged, separate = (
        arithmetic(launch.compile(capability, fusion=fusion).asm["cubin"], tmp_path)
        for fusion in (True, False)
    )
    assert merged == separate
    assert merged["FFMA"] > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_compiler_keeps_the_roundings_of_parity(recorded: list[Launch], capability: int):
    # Difference, distance, change, norm, rate, product, quotient, sum, threshold: each a conversion
    # or an operation of bfloat16's own.
    compare(torch.bfloat16, parity=True)
    compare(torch.bfloat16, parity=False)
    parity, plain = (
        re.findall(
            r"\b(?:cvt\.rn\.bf16|(?:add|sub|mul|fma)(?:\.rn)?\.bf16)",
            launch.compile(capability).asm["ptx"],
        )
        for launch in recorded
    )
    assert len(parity) >= 9
    assert not plain
