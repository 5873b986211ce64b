"""The parts of a picture, each checked and then timed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks.conftest import Timed, draw, in_float64, require_near_float64
from turbo import pipeline
from turbo.denoiser import POSITIVE, is_unguided
from turbo.easycache import StepCache
from turbo.engine import Engine
from turbo.latent import SCALE, SHIFT, STRIDE
from turbo.plan import DEFAULT_PLAN, Stage

TOKENS = 64
"""Of a caption."""
PROMPT = "a lighthouse on a cliff at dawn"
FIRST, SECOND, THIRD = DEFAULT_PLAN.stages
ROUNDS = {FIRST: 51, SECOND: 25, THIRD: 7}

pytestmark = pytest.mark.benchmark(group="parts")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def size(stage: Stage) -> tuple[int, int]:
    """Rows and columns of a stage's latent."""
    return stage.height // STRIDE, stage.width // STRIDE


@pytest.mark.parametrize("stage", [FIRST, SECOND, THIRD], ids=lambda stage: stage.name)
def test_a_network_call(timed: Timed, engine: Engine, benchmark: Any, stage: Stage):
    models, batch = engine.models, 1 if is_unguided(stage.cfg) else 2
    prepared = pipeline.prepare_stage(models.transformer, stage)
    features = draw(engine, batch, TOKENS, models.transformer.config.caption_dim, seed=1)
    inputs = (
        draw(engine, batch, models.transformer.config.channels, *size(stage), seed=2),
        models.transformer.refine_caption(features),
        prepared.modulation.rows[len(prepared.modulation.rows) // 2],
        prepared.rotary_for(models.transformer, TOKENS),
    )
    reference = in_float64(models.transformer)(*(one.double().cpu() for one in inputs))
    require_near_float64(engine, models.network(*inputs), reference)

    benchmark.extra_info |= {"latent": list(size(stage)), "batch": batch, "tokens": TOKENS}
    timed(lambda: models.network(*inputs), ROUNDS[stage])


def test_a_prompt(timed: Timed, engine: Engine, benchmark: Any):
    models = engine.models
    ids = models.tokenizer.encode_prompt(PROMPT)
    plain = in_float64(models.text_encoder)
    reference = plain.encode(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
    require_near_float64(engine, pipeline.encode_ids(models, ids), reference)

    benchmark.extra_info["tokens"] = len(ids)
    timed(lambda: pipeline.encode_prompt(models, PROMPT), 501)


def test_a_decode(timed: Timed, engine: Engine, benchmark: Any):
    models = engine.models
    small = draw(engine, 1, 16, 8, 6, seed=3).float()
    reference = in_float64(models.autoencoder).decode(small.double().cpu())
    require_near_float64(engine, models.autoencoder.decode(small), reference)

    latent = draw(engine, 1, 16, *size(THIRD), seed=4).float()
    benchmark.extra_info["picture"] = [THIRD.height, THIRD.width]
    decode = models.decode or (lambda latent: pipeline.decode(models.autoencoder, latent))
    pixels, finite = timed(lambda: decode(latent), 3)
    assert finite
    assert pixels.shape == (1, THIRD.height, THIRD.width, 3)


def skipping(engine: Engine, threshold: float) -> StepCache:
    """A step cache that has run as often as it must before it may skip."""
    cache = StepCache(threshold, start=1.0, end=0.0, kernels=engine.models.kernels)
    for seed in (5, 6):
        latent = draw(engine, 1, 16, *size(THIRD), seed=seed)
        cache.begin_evaluation()
        cache.call(partial(torch.mul, latent, 2), latent, 0.5, (POSITIVE,))
    return cache


def test_a_check_of_the_step_cache(timed: Timed, engine: Engine):
    last, latent = (draw(engine, 1, 16, *size(THIRD), seed=seed) for seed in (6, 7))

    def check(cache: StepCache) -> tuple[Tensor, bool]:
        cache.begin_evaluation()
        return cache.call(lambda: 2 * latent, latent, 0.5, (POSITIVE,))

    output, skipped = check(skipping(engine, threshold=1e6))
    assert skipped
    torch.testing.assert_close(output, latent + (2 * last - last), rtol=0, atol=0)
    output, skipped = check(skipping(engine, threshold=0.0))
    assert not skipped
    assert torch.equal(output, 2 * latent)

    cache = skipping(engine, threshold=1e6)
    _, skipped = timed(lambda: check(cache), 2001)
    assert skipped


def test_a_latent_upscale(timed: Timed, engine: Engine):
    prepared = pipeline.prepare_stage(engine.models.transformer, THIRD)
    latent = draw(engine, 1, 16, *size(SECOND), seed=8).float()
    noise = draw(engine, 1, 16, *size(THIRD), seed=9).float()

    def start() -> Tensor:
        return pipeline.stage_start(prepared, noise, latent, kernels=engine.models.kernels)

    assert THIRD.upscale == "nearest-exact"
    sigma = prepared.sigmas[0]
    larger = F.interpolate(latent.double(), size=size(THIRD), mode="nearest-exact")
    reference = sigma * noise.double() + (1 - sigma) * (larger - SHIFT) * SCALE
    torch.testing.assert_close(start().double(), reference, rtol=1e-5, atol=1e-5)
    timed(start, 2001)


def write_lora(path: Path, engine: Engine, seed: int) -> dict[str, Tensor]:
    """A LoRA of rank 8 on every attention's output; returns its tensors."""
    config = engine.models.transformer.config
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config.layers):
        name = f"diffusion_model.layers.{layer}.attention.out"
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, config.dim, generator=generator) / 64
        tensors[f"{name}.lora_B.weight"] = torch.randn(config.dim, 8, generator=generator) / 64
    save_file(tensors, path)
    return tensors


def test_a_lora_swap(timed: Timed, engine: Engine, benchmark: Any, tmp_path: Path):
    paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    tensors = [write_lora(path, engine, seed) for seed, path in enumerate(paths)]
    weight = engine.models.transformer.native_tensors()["layers.0.attention.out.weight"]
    before = weight.clone()
    name = "diffusion_model.layers.0.attention.out"

    def swap() -> None:
        for path in paths:
            engine.set_loras([(path, 0.5)])

    try:
        swap()
        product = tensors[1][f"{name}.lora_B.weight"] @ tensors[1][f"{name}.lora_A.weight"]
        require_near_float64(engine, weight, before.double().cpu() + 0.5 * product.double())
        assert not torch.equal(weight, before)
        engine.set_loras([])
        assert torch.equal(weight, before)

        benchmark.extra_info["swaps"] = len(paths)
        timed(swap, 15)
    finally:
        engine.set_loras([])
