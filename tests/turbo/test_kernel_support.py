"""Asking for kernels where they cannot run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.kernels.conftest import INTERPRETED
from turbo.errors import BadInputError
from turbo.kernel_support import require_kernels

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
import turbo, turbo.cli, turbo.engine
from turbo.easycache import StepCache
from turbo.errors import BadInputError
from turbo.kernel_support import require_kernels

latent = torch.ones(1, 1, 8, 8)
StepCache(0.5, 1.0, 0.0).call(lambda: latent, latent, 0.5, ["positive"])
try:
    require_kernels(torch.device("cpu"))
except BadInputError as error:
    print(error)
"""


def test_all_but_the_kernels_works_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith("kernels need Triton, which cannot be imported: ")
    assert line.endswith("; install it (pip install triton) or leave kernels off")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs them")
def test_a_cpu_is_refused():
    pytest.importorskip("triton")
    with pytest.raises(BadInputError, match="kernels need a CUDA device, got cpu; leave kernels"):
        require_kernels(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs that there is no CUDA device")
def test_a_device_that_is_not_there_is_refused():
    pytest.importorskip("triton")
    with pytest.raises(BadInputError, match=r"kernels cannot run on cuda: .*; leave kernels off"):
        require_kernels(torch.device("cuda"))
