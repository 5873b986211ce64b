"""Stages with kernels against stages without: the same starts, decisions and latents."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import INTERPRETED
from turbo import plan as plans
from turbo.denoiser import Caption
from turbo.easycache import StepCache
from turbo.pipeline import (
    Drawing,
    Models,
    PreparedStage,
    StageNoise,
    draw_noise,
    make_cache,
    prepare_stage,
    run_stage,
    run_stages,
)

pytest.importorskip("triton", reason="the kernels need Triton")

FLOATS = (torch.float32, torch.bfloat16)


@dataclass
class Network:
    """A velocity that changes slowly with the latent and differs between captions."""

    dtype: torch.dtype
    seen: list[Tensor] = field(default_factory=list)

    def __call__(
        self, latent: Tensor, tokens: Tensor, modulation: Tensor, rotary: Tensor
    ) -> Tensor:
        self.seen.append(latent.clone())
        return torch.tanh(latent) * tokens[:, :1, :1, None] + 0.1 * latent.square()

    def modulation_table(self, sigmas: list[float]) -> Tensor:
        return torch.zeros(len(sigmas), 1, 1, dtype=self.dtype)

    def rotary_table(self, rows: int, columns: int, caption_tokens: int) -> Tensor:
        return torch.zeros(1)


def make_models(device: str, dtype: torch.dtype, *, kernels: bool) -> tuple[Models, Network]:
    network = Network(dtype)
    missing: Any = None
    transformer: Any = network
    place = torch.device(device)
    models = Models(missing, missing, transformer, missing, network, place, kernels=kernels)
    return models, network


def caption(value: float, length: int, models: Models) -> Caption:
    tokens = torch.full((1, 32, 1), value, dtype=models.dtype, device=models.device)
    return Caption(tokens, length)


def make_stage(**settings: Any) -> plans.Stage:
    window = plans.EasyCache(threshold=0.4, start=0.15, end=0.9)
    usual = {"name": "stage", "height": 208, "width": 176, "steps": 16, "sampler": "euler"}
    return plans.Stage(**{**usual, "easycache": window, **settings})


@dataclass
class Run:
    """What came of one stage."""

    latent: Tensor
    cache: StepCache
    calls: int
    """Of the network."""


def follow(
    device: str,
    dtype: torch.dtype,
    stage: plans.Stage,
    negative_length: int = 10,
    batch: int = 1,
    noise: StageNoise | None = None,
) -> tuple[Run, Run]:
    """One stage with kernels and once without."""
    runs = []
    for kernels in (True, False):
        models, network = make_models(device, dtype, kernels=kernels)
        prepared = prepare_stage(models.transformer, stage)
        captions = caption(0.5, 10, models), caption(0.8, negative_length, models)
        drawn = noise or draw_noise(prepared, 7, models.device, batch=batch)
        cache = make_cache(stage, kernels=kernels)
        assert cache is not None
        cache.sums = []
        result = run_stage(models, prepared, *captions, drawn, cache=cache)
        runs.append(Run(result.latent, cache, len(network.seen)))
    return runs[0], runs[1]


CALLS = {"one caption": (1.0, 10), "two in a call": (2.0, 10), "two calls": (2.0, 11)}
"""cfg and the negative caption's length."""


@pytest.mark.parametrize(("cfg", "length"), CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("sampler", "batch"), [("euler", 1), ("euler", 2), ("dpmpp_sde", 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_kernels_skip_the_same_calls_and_lead_to_the_same_bits(
    device: str, dtype: torch.dtype, sampler: str, batch: int, cfg: float, length: int
):
    stage = make_stage(sampler=sampler, cfg=cfg)
    fused, plain = follow(device, dtype, stage, length, batch)
    assert fused.cache.skipped == plain.cache.skipped
    skipped = sum(plain.cache.skipped)
    assert skipped >= 4
    assert fused.calls == plain.calls == len(plain.cache.skipped) - skipped
    assert torch.equal(fused.latent, plain.latent)
    assert fused.cache.sums is not None
    assert plain.cache.sums is not None
    compared = [total is not None for total in plain.cache.sums]
    assert [total is not None for total in fused.cache.sums] == compared
    assert sum(compared) >= 6
    # Other orders of summing; on the CPU they do not reach the last bit of bfloat16.
    rounding = 0.0 if device == "cpu" and dtype == torch.bfloat16 else 8 * torch.finfo(dtype).eps
    pairs = zip(fused.cache.sums, plain.cache.sums)
    for got, want in ((got, want) for got, want in pairs if want is not None):
        assert got == pytest.approx(want, rel=rounding, abs=0)


@pytest.mark.parametrize("row", [0, 1])  # looked at by the distances, or only by the norm
def test_a_latent_that_is_no_number_is_never_skipped(device: str, row: int):
    start = torch.randn(1, 16, 26, 22, generator=torch.Generator().manual_seed(1))
    start[0, 0, row, 0] = math.nan
    stage = make_stage(easycache=plans.EasyCache(threshold=1e6, start=0.0, end=1.0))
    noise = StageNoise(start.to(device), ())
    for run in follow(device, torch.float32, stage, noise=noise):
        assert not any(run.cache.skipped)
        assert all(math.isnan(total) for total in (run.cache.sums or [])[2:] if total is not None)


def test_nothing_is_skipped_outside_the_window(device: str):
    # S(t) of 16 even steps; the window is above half of them and begins after four.
    window = plans.EasyCache(threshold=1e6, start=0.25, end=0.5)
    for run in follow(device, torch.float32, make_stage(easycache=window)):
        first = run.cache.skipped.index(True)
        assert run.cache.skipped[:first] == [False] * first
        assert not any(run.cache.skipped[8:])
        assert all(run.cache.skipped[first:8])
        assert first == 6  # two runs in the window first


def test_buffers_are_allocated_once_a_run(device: str):
    cache = StepCache(0.0, start=1.0, end=0.0, kernels=True)
    similarity: Any = cache._similarity
    places = set()
    for value in range(1, 5):
        for name in ("positive", "negative"):
            latent = torch.full((1, 2, 8, 8), 1.0 * value, device=device)
            cache.call(lambda latent=latent: 2 * latent, latent, 0.5, (name,))  # type: ignore[misc]
        kept = [similarity._last_input, similarity._last_output, similarity._state]
        places.add(tuple(tensor.data_ptr() for tensor in [*kept, *cache._differences.values()]))
    assert len(places) == 1


def draw(
    device: str, stages: list[plans.Stage], *, kernels: bool, latent: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Every stage's latent, and what the network saw first in each."""
    models, network = make_models(device, torch.float32, kernels=kernels)

    def noise(prepared: PreparedStage) -> StageNoise:
        return draw_noise(prepared, 7, models.device)

    prepared = [prepare_stage(models.transformer, stage) for stage in stages]
    drawing = Drawing(positive=caption(0.5, 10, models), noise=noise, latent=latent)
    latents, seen = [], []
    for result in run_stages(models, prepared, drawing):
        latents.append(result.latent)
        seen.append(network.seen[0])
        network.seen.clear()
    return latents, seen


@pytest.mark.parametrize("upscale", ["nearest-exact", "bilinear", "bislerp"])
def test_stages_start_from_the_same_bits_with_kernels(device: str, upscale: str):
    first = make_stage(name="small", steps=2, easycache=None)
    second = replace(first, name="large", height=416, width=320, denoise=0.7, upscale=upscale)
    third = replace(second, name="larger", height=800, width=624, denoise=0.5)
    fused, plain = (draw(device, [first, second, third], kernels=k) for k in (True, False))
    for got, want in zip([*fused[0], *fused[1]], [*plain[0], *plain[1]], strict=True):
        assert torch.equal(got, want)


def test_a_given_latent_starts_the_first_stage_with_kernels(device: str):
    latent = torch.randn(1, 16, 5, 3, generator=torch.Generator().manual_seed(2)).to(device)
    stage = make_stage(steps=3, denoise=0.6)
    fused, plain = (draw(device, [stage], kernels=k, latent=latent) for k in (True, False))
    assert torch.equal(fused[1][0], plain[1][0])


def test_a_first_sigma_that_rounding_lifts_above_1_is_followed_with_kernels(device: str):
    stage = make_stage(steps=3, node="custom", scheduler="simple", shift=4.069639535215108)
    assert prepare_stage(make_models(device, torch.float32, kernels=True)[1], stage).sigmas[0] > 1  # type: ignore[arg-type]
    latent = torch.randn(1, 16, 5, 3, generator=torch.Generator().manual_seed(2)).to(device)
    fused, plain = (draw(device, [stage], kernels=k, latent=latent) for k in (True, False))
    assert torch.equal(fused[1][0], plain[1][0])


def test_kernels_run_where_they_are_asked_for(device: str, monkeypatch: pytest.MonkeyPatch):
    from turbo.kernels import easycache, latent_upscale

    launched: set[str] = set()

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def launch(*args: Any, **kwargs: Any) -> Any:
            launched.add(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, launch)

    watch(latent_upscale, "latent_upscale")
    watch(easycache, "easycache_compare")
    watch(easycache, "easycache_observe")
    stages = [make_stage(steps=4), make_stage(name="large", steps=4, denoise=0.5)]
    draw(device, stages, kernels=False)
    assert launched == set()
    draw(device, stages, kernels=True)
    assert launched == {"latent_upscale", "easycache_compare", "easycache_observe"}


@pytest.mark.skipif(INTERPRETED, reason="a CPU is never waited for")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("length", [10, 11])
def test_the_loop_waits_for_nothing_but_the_decision(device: str, kernels: bool, length: int):
    models, _ = make_models(device, torch.bfloat16, kernels=kernels)
    stage = make_stage(cfg=2.0)
    prepared = prepare_stage(models.transformer, stage)
    captions = caption(0.5, 10, models), caption(0.8, length, models)
    noise = draw_noise(prepared, 7, models.device)
    results = []
    for mode in ("default", "error"):  # what runs the first time may be loaded and compiled
        cache = make_cache(stage, kernels=kernels)
        try:
            torch.cuda.set_sync_debug_mode(mode)
            results.append(run_stage(models, prepared, *captions, noise, cache=cache))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert results[0].skipped == results[1].skipped > 0
    assert torch.equal(results[0].latent, results[1].latent)
