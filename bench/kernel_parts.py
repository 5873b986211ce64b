"""The parts of ``bench device`` that time single operations.

The fused kernels beside Inductor's and eager code, and the network's attention by each backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.random_model import PROMPT_TOKENS
from bench.results import Found, recorded
from bench.setting import Judge, Setting, require_near
from bench.timing import time_launches, time_runs
from turbo.attention import AUTO, FLEX, SDPA, attend, why_not
from turbo.denoiser import is_unguided
from turbo.errors import BadInputError
from turbo.latent import SCALE, SHIFT, STRIDE
from turbo.plan import ATTENTION
from turbo.similarity import KernelSimilarity, PlainSimilarity, Similarity
from turbo.transformer import Transformer

SIGMA = 0.7
THRESHOLD = 0.12
LAUNCHES = 20
"""In one CUDA graph."""


@torch.inference_mode()
def kernels(setting: Setting, found: Found, seconds: float) -> None:
    """Each fused operation at the three stages' sizes: kernel, Inductor, eager."""
    if setting.missing_kernels:
        found["kernel"] = {"withheld": setting.missing_kernels}
    for stage in setting.stages:
        rows, columns = stage.height // STRIDE, stage.width // STRIDE
        entry: Found = {"latent": [rows, columns]}
        found[stage.name] = entry
        _upscale(setting, entry, rows, columns)
        _easycache(setting, entry, rows, columns)


def _upscale(setting: Setting, entry: Found, rows: int, columns: int) -> None:
    latent = setting.draw(1, 16, rows // 2, columns // 2, seed=1, dtype=torch.float32)
    noise = setting.draw(1, 16, rows, columns, seed=2, dtype=torch.float32)

    def eager() -> Tensor:
        return upscale_formula(latent, noise, rows, columns)

    def fused() -> Tensor:
        from turbo.kernels.latent_upscale import latent_upscale  # needs Triton

        start: Tensor = latent_upscale(
            latent, noise, SIGMA, rows, columns, scale=SCALE, shift=SHIFT, dtype=noise.dtype
        )
        return start

    inductor = _by_inductor(upscale_formula)
    sides = {"kernel": fused, "inductor": lambda: inductor(latent, noise, rows, columns)}
    _compare(setting, entry, "latent_upscale", eager, sides)


def upscale_formula(latent: Tensor, noise: Tensor, rows: int, columns: int) -> Tensor:
    """What a stage's start is, in plain PyTorch."""
    resized = F.interpolate(latent, size=(rows, columns), mode="nearest-exact")
    return SIGMA * noise + (1 - SIGMA) * ((resized - SHIFT) * SCALE)


def _easycache(setting: Setting, entry: Found, rows: int, columns: int) -> None:
    shape = (1, 16, rows, columns)
    drift = setting.draw(*shape, seed=3)
    x = [setting.draw(*shape, seed=1) + drift * step / 10 for step in range(3)]
    y = [setting.draw(*shape, seed=2) + drift * step / 5 for step in range(3)]
    rest = torch.empty_like(x[0])
    everything = slice(0, 1)

    def seen(similarity: Similarity) -> Similarity:
        """One that has rate and norm, so that a comparison is that of the middle of a run."""
        similarity.observe(x[0], y[0], rest, everything, measured=False)
        similarity.compare(x[1], THRESHOLD)
        similarity.observe(x[1], y[1], rest, everything, measured=True)
        return similarity

    def compare(similarity: Similarity) -> Tensor:
        similarity.compare(x[2], THRESHOLD)
        return similarity.compared

    def observe(similarity: Similarity) -> Tensor:
        similarity.observe(x[2], y[2], rest, everything, measured=True)
        return rest

    plain = seen(PlainSimilarity())
    assert isinstance(plain, PlainSimilarity)
    state = [plain._last_input, plain._last_output, plain._rate, plain._norm]
    last_input, last_output, rate, norm = (torch.as_tensor(value).clone() for value in state)
    fresh = torch.zeros_like(norm)
    inductor_compare = _by_inductor(compare_formula)
    inductor_observe = _by_inductor(observe_formula)
    inductor: dict[str, Callable[[], Tensor]] = {
        "compare": lambda: inductor_compare(x[2], last_input, fresh, rate, norm)[0],
        "observe": lambda: inductor_observe(x[2], y[2], last_output, norm)[0],
    }
    for name, does in {"compare": compare, "observe": observe}.items():
        sides = {"inductor": inductor[name]}
        if not setting.missing_kernels:
            sides["kernel"] = partial(does, seen(KernelSimilarity()))
        eager = partial(does, seen(PlainSimilarity()))
        _compare(setting, entry, f"easycache {name}", eager, sides)


def compare_formula(
    x: Tensor, last_input: Tensor, total: Tensor, rate: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """`PlainSimilarity.compare` as a function."""
    distance = (x[..., ::8, ::8] - last_input).abs().mean()
    total = total + rate * distance / norm
    return total, total < THRESHOLD


def observe_formula(
    x: Tensor, y: Tensor, last_output: Tensor, distance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`PlainSimilarity.observe` as a function."""
    seen = y[..., ::8, ::8]
    rate = (seen - last_output).abs().mean() / distance
    return y - x, rate, y.abs().mean(), x[..., ::8, ::8].clone(), seen.clone()


@torch.inference_mode()
def attention(setting: Setting, found: Found, seconds: float) -> None:
    """The network's attention over each stage's joint tokens, by each backend that can run."""
    config, dtype = setting.size.network_config, setting.product_dtype
    for stage in reversed(setting.stages):  # the longest first: it matters most
        size = stage.height // STRIDE, stage.width // STRIDE
        _, tokens = Transformer.token_counts(*size, [PROMPT_TOKENS])
        batch = 1 if is_unguided(stage.cfg) else 2
        shape = (batch, tokens, 3, config.heads, config.head_dim)
        qkv = setting.draw(*shape, seed=1, dtype=dtype).unbind(2)
        exact = attend(SDPA, *(part.float() for part in qkv))
        judge = Judge(exact, attend(SDPA, *qkv))
        operations = 4 * batch * tokens**2 * config.dim
        entry = found[stage.name] = {"batch": batch, "tokens": tokens}
        for backend in ATTENTION:
            if backend == AUTO or (backend == FLEX and setting.small):  # which would compile
                continue
            with recorded(entry, backend) as numbers:
                numbers |= _attention(setting, backend, qkv, judge, operations)


def _attention(
    setting: Setting, backend: str, qkv: tuple[Tensor, ...], judge: Judge, operations: int
) -> Found:
    problem = why_not(backend, setting.device, qkv[0].dtype, qkv[0].shape[-1])
    if problem is not None:
        raise BadInputError(f"attention {backend!r} {problem}")
    run = partial(attend, backend, *qkv)
    checked = judge.check(run())
    timed = time_launches([run] * LAUNCHES, setting.device, seconds=setting.seconds * 0.2)
    return checked | timed | setting.share(operations, timed)


def _by_inductor(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for each size apart, as the engine compiles."""
    compiled: Callable[..., Any] = torch.compile(formula, dynamic=False, fullgraph=True)
    return compiled


def _compare(
    setting: Setting,
    entry: Found,
    name: str,
    eager: Callable[[], Tensor],
    others: Mapping[str, Callable[[], Tensor]],
) -> None:
    """Check the others against eager code, then time all of them.

    `device` is what the device needs, all launches in one CUDA graph; `call` has the host's share,
    which an operation outside a captured part pays.
    """
    found: Found = {}
    entry[name] = found
    expected = eager().float().clone()
    for side, run in {"eager": eager, **others}.items():
        if side == "kernel" and setting.missing_kernels:
            continue
        if side == "inductor" and setting.small:
            continue
        with recorded(found, side) as numbers:
            result = run().float().clone()
            if side != "eager":  # which adds to EasyCache's sum each time
                numbers["distance"] = require_near(result, expected, 2e-2)
                numbers["equals_eager"] = torch.equal(result, expected)
            numbers["device"] = _microseconds(
                time_launches([run] * LAUNCHES, setting.device, seconds=setting.seconds * 0.2)
            )
            numbers["call"] = _microseconds(
                time_runs(run, setting.device, seconds=setting.seconds * 0.2)
            )


def _microseconds(timed: Mapping[str, Any]) -> Found:
    return {
        f"{name.removesuffix('_ms')}_us": 1000 * timed[name]
        for name in ("median_ms", "p20_ms", "p80_ms")
    }
