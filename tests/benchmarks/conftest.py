"""The model that all benchmarks share, and how they are timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from bench.setting import distance
from bench.timing import synchronise
from turbo.engine import Engine
from turbo.testing import make_tiny_model
from turbo.transformer import Transformer

Result = TypeVar("Result")
Module = TypeVar("Module", bound=nn.Module)
Timed = Callable[..., Any]
"""Called with what to time and the number of rounds; returns what the last round gave."""

NEAR = 1e-4
"""Relative distance to float64 within which float32 must lie; bfloat16 has 16 bits less."""


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A tiny model with the workflow's own plan, warmed up."""
    made = Engine.from_pretrained(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))
    made.warmup()
    return made


@pytest.fixture
def timed(benchmark: Any, engine: Engine) -> Timed:
    """Times a callable: a warm-up round, then rounds that each end when the device is done."""

    def run(work: Callable[[], Result], rounds: int, *, warm_up_rounds: int = 1) -> Result:
        def settled() -> Result:
            result = work()
            synchronise(engine.models.device)
            return result

        benchmark.extra_info["dtype"] = str(engine.models.dtype).removeprefix("torch.")
        synchronise(engine.models.device)
        with torch.inference_mode():
            result: Result = benchmark.pedantic(
                settled, rounds=rounds, warmup_rounds=warm_up_rounds
            )
        return result

    return run


def require_near_float64(engine: Engine, got: Tensor, want: Tensor) -> None:
    """Check a result against the same arithmetic in float64."""
    allowed = NEAR if engine.models.dtype == torch.float32 else 2**16 * NEAR / 256
    apart = distance(got.double().cpu(), want.cpu())
    assert apart <= allowed, f"relative distance to float64 {apart:.2e}, allowed {allowed:.0e}"


def in_float64(module: Module) -> Module:
    """A copy on the CPU that calculates in float64."""
    made = copy.deepcopy(module).to("cpu", torch.float64)
    if isinstance(made, Transformer):
        made.compute_dtype = torch.float64
    return made


def draw(engine: Engine, *shape: int, seed: int) -> Tensor:
    """Normal values where the engine works, in its dtype."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(engine.models.device, engine.models.dtype)
