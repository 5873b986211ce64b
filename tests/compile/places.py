"""Where the contract is proven: each backend on a CPU, and on a CUDA device if there is one."""

from __future__ import annotations

import pytest
import torch

needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WITH_BUFFERS = [
    pytest.param(("replay", "cpu"), id="replay"),
    pytest.param(("replay", "cuda"), id="replay-cuda", marks=needs_cuda),
    pytest.param(("cuda-graph", "cuda"), id="cuda-graph", marks=needs_cuda),
]
EVERY = [
    *WITH_BUFFERS,
    pytest.param(("eager", "cpu"), id="eager"),
    pytest.param(("eager", "cuda"), id="eager-cuda", marks=needs_cuda),
]
