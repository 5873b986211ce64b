"""Where the kernel tests run, here and in `tests/turbo/kernels`.

A test that takes `device` runs a kernel. In an ordinary process that needs a CUDA device. With
TRITON_INTERPRET=1 set before the start, kernels run on the CPU in Triton's interpreter instead:
`test_interpreter.py` starts such a process, since the variable has to be there before anything
imports Triton, and would change what other tests do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill in `device`."""
    if "device" not in metafunc.fixturenames:
        return
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    cuda = pytest.param("cuda", marks=[pytest.mark.gpu, missing])
    metafunc.parametrize("device", ["cpu"] if INTERPRETED else [cuda])


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN, so that a value which a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def chosen_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose what Triton 3.9 would choose, since it warns where nobody has."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture(autouse=True)
def arithmetic_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the interpreter, round to nearest, and make infinity and NaN without a warning."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        truncate = InterpreterBuilder.create_fp_trunc

        def round_(builder: Any, source: Any, target: object) -> Any:
            """Round to bfloat16 as GPUs do; the interpreter cuts the last 16 bits off."""
            handle = truncate(builder, source, target)
            if str(handle.dtype) == "bf16":
                rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
                handle.data = rounded.view(torch.uint16).numpy()
            return handle

        monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", round_)
    with np.errstate(all="ignore") if INTERPRETED else nullcontext():
        yield
