"""One picture's way, on a small real model or a network of one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from turbo import plan as plans
from turbo.autoencoder import to_pixels
from turbo.denoiser import Caption
from turbo.engine import Engine
from turbo.errors import BadInputError
from turbo.latent import from_sampler, to_sampler
from turbo.noise import BrownianNoise, ancestral_noise, start_noise
from turbo.pipeline import (
    Drawing,
    Models,
    PreparedStage,
    StageNoise,
    StageResult,
    decode,
    draw_noise,
    encode_prompt,
    make_cache,
    prepare_stage,
    refine,
    run_stage,
    run_stages,
)
from turbo.samplers import SAMPLERS
from turbo.sigmas import as_float32, stage_sigmas
from turbo.testing import make_tiny_model
from turbo.transformer import Transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder: Path = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", dtype="float32")
    return Engine.from_pretrained(folder, device="cpu", dtype="float32").models


@pytest.fixture(scope="module")
def positive(models: Models) -> Caption:
    return make_caption(models, "a red fox")


def make_caption(models: Models, prompt: str) -> Caption:
    return refine(models, encode_prompt(models, prompt))


def make_stage(**settings: Any) -> plans.Stage:
    return plans.Stage(**{"name": "stage", "height": 64, "width": 48, "steps": 4, **settings})


class Constant:
    """A network that returns one velocity whatever it sees, and keeps what it saw."""

    def __init__(self, velocity: Tensor | float) -> None:
        self.velocity = velocity
        self.seen: list[Tensor] = []
        self.modulations: list[Tensor] = []

    def __call__(
        self, latent: Tensor, tokens: Tensor, modulation: Tensor, rotary: Tensor
    ) -> Tensor:
        self.seen.append(latent.clone())
        self.modulations.append(modulation)
        return torch.zeros_like(latent) + self.velocity


def run(
    models: Models, stage: plans.Stage, positive: Caption, seed: int = 7, **kwargs: Any
) -> Tensor:
    prepared = prepare_stage(models.transformer, stage)
    noise = draw_noise(prepared, seed, CPU)
    return run_stage(models, prepared, positive, None, noise, **kwargs).latent


def draw(
    models: Models,
    stages: list[plans.Stage],
    positive: Caption,
    latent: Tensor | None = None,
    on_step: Any = None,
) -> list[StageResult]:
    """All stages of a picture with seed 7."""
    prepared = [prepare_stage(models.transformer, stage) for stage in stages]
    drawing = Drawing(
        positive=positive, latent=latent, noise=lambda stage: draw_noise(stage, 7, CPU)
    )
    return list(run_stages(models, prepared, drawing, on_step=on_step))


def test_a_network_that_knows_the_picture_leads_a_stage_to_it(models: Models, positive: Caption):
    # Velocity is noise minus picture, in the sampler's scale.
    picture, stage = torch.randn(1, 16, 8, 6), make_stage(sampler="euler")
    network = Constant(start_noise((1, 16, 8, 6), 7) - to_sampler(picture))
    latent = run(replace(models, network=network), stage, positive)
    torch.testing.assert_close(latent, picture, atol=1e-4, rtol=1e-4)


def test_a_first_stage_starts_from_its_noise(models: Models, positive: Caption):
    network = Constant(0)
    run(replace(models, network=network), make_stage(), positive)
    assert torch.equal(network.seen[0], start_noise((1, 16, 8, 6), 7))


def test_a_later_stage_starts_between_its_latent_and_its_noise(models: Models, positive: Caption):
    network, latent = Constant(0), torch.randn(1, 16, 8, 6)
    stage = make_stage(denoise=0.5)
    run(replace(models, network=network), stage, positive, latent=latent)
    sigma = stage_sigmas(stage)[0]
    want = sigma * start_noise((1, 16, 8, 6), 7) + (1 - sigma) * (latent - 0.1159) * 0.3611
    torch.testing.assert_close(network.seen[0], want)


def test_a_stochastic_solver_starts_from_pure_noise_but_at_a_sigma_below_1(
    models: Models, positive: Caption
):
    network = Constant(0)
    stage = make_stage(sampler="dpmpp_sde")
    prepared = prepare_stage(models.transformer, stage)
    assert (prepared.sigmas[0], prepared.followed[0]) == (1.0, as_float32(2.9997 / 2.9998))
    run(replace(models, network=network), stage, positive)
    assert torch.equal(network.seen[0], start_noise((1, 16, 8, 6), 7))
    assert torch.equal(network.modulations[0], prepared.modulation[prepared.followed[0]])


def test_ancestral_noise_is_drawn_ahead_as_the_sampler_asks(models: Models):
    prepared = prepare_stage(models.transformer, make_stage(sampler="euler_ancestral"))
    noise = draw_noise(prepared, 7, CPU)
    assert torch.equal(noise.start, start_noise((1, 16, 8, 6), 7))
    want = ancestral_noise((1, 16, 8, 6), 7, 3)  # none for the step to 0
    assert all(torch.equal(got, step) for got, step in zip(noise.steps, want, strict=True))


def test_brownian_noise_is_drawn_ahead_from_the_schedule_as_it_was_made(models: Models):
    # Its path ends at sigma 1, though the solver starts a little below.
    prepared = prepare_stage(models.transformer, make_stage(sampler="dpmpp_sde"))
    path = BrownianNoise((1, 16, 8, 6), 7, prepared.sigmas)
    steps = draw_noise(prepared, 7, CPU).steps
    assert len(steps) == 6  # two for each step but the last
    for got, asked in zip(steps, prepared.trace.noises, strict=True):
        assert torch.equal(got, path(*asked))


@pytest.mark.parametrize("sampler", ["euler", "uni_pc"])
def test_a_deterministic_sampler_gets_start_noise_alone(models: Models, sampler: str):
    prepared = prepare_stage(models.transformer, make_stage(sampler=sampler))
    assert draw_noise(prepared, 7, CPU).steps == ()


def test_one_step_of_a_stochastic_solver_needs_no_path(models: Models):
    # Smallest and largest sigma would be the same end of the path.
    prepared = prepare_stage(models.transformer, make_stage(sampler="dpmpp_2m_sde", steps=1))
    assert draw_noise(prepared, 7, CPU).steps == ()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_finds_its_modulations_and_its_noise_prepared(
    models: Models, positive: Caption, sampler: str
):
    network = Constant(0.5)
    for node in plans.NODES:
        stage = make_stage(sampler=sampler, node=node, denoise=0.7)
        latent = run(
            replace(models, network=network), stage, positive, latent=torch.ones(1, 16, 8, 6)
        )
        assert latent.isfinite().all()
        assert latent.shape == (1, 16, 8, 6)


def test_progress_counts_network_evaluations(models: Models, positive: Caption):
    # heun evaluates twice a step, but for the last
    steps: list[int] = []
    network = Constant(0)
    stage = make_stage(sampler="heun", steps=3)
    run(replace(models, network=network), stage, positive, on_step=steps.append)
    assert steps == [1, 2, 3, 4, 5]
    assert len(network.seen) == 5


@pytest.mark.parametrize(("negative", "calls"), [("a red fox", 4), ("fog", 8)])
def test_calls_are_counted_with_those_of_the_negative_caption(
    models: Models, positive: Caption, negative: str, calls: int
):
    # One batch for captions of one length, else two calls.
    prepared = prepare_stage(models.transformer, make_stage(cfg=2.0))
    noise = draw_noise(prepared, 7, CPU)
    network = Constant(0)
    result = run_stage(
        replace(models, network=network), prepared, positive, make_caption(models, negative), noise
    )
    assert (result.calls, result.skipped) == (calls, 0)
    assert len(network.seen) == calls


def test_skipped_calls_are_counted_and_not_run(models: Models, positive: Caption):
    # Threshold so high that all are skipped but the first two and those after the end: of 8 sigmas
    # S(1), S(7/8) .. S(1/8) only S(1/8) = 0.3 is not above S(1 - 0.8) = 0.43.
    settings = plans.EasyCache(threshold=1e6, start=0.0, end=0.8)
    stage = make_stage(sampler="euler", steps=8, easycache=settings)
    network = Constant(torch.randn(1, 16, 8, 6))
    [result] = draw(replace(models, network=network), [stage], positive)
    assert (result.skipped, result.calls, len(network.seen)) == (5, 8, 3)


def test_the_host_reads_the_decisions_and_nothing_else(models: Models, positive: Caption):
    settings = plans.EasyCache(threshold=1e6, start=0.0, end=0.8)
    stage = make_stage(sampler="euler", steps=8, easycache=settings)
    network = Constant(torch.randn(1, 16, 8, 6))
    reads: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.aten._local_scalar_dense.default:
                reads.append(str(args))
            return func(*args, **kwargs or {})

    prepared = prepare_stage(models.transformer, stage)
    noise = draw_noise(prepared, 7, CPU)
    models = replace(models, network=network)
    with Watch():
        run_stage(models, prepared, positive, None, noise, cache=make_cache(stage))
    assert len(reads) == 5  # of 8 calls: not of the first two nor of that after the end


def test_each_run_has_a_fresh_cache(models: Models, positive: Caption):
    stage = make_stage(easycache=plans.EasyCache(threshold=0.5, start=0.0, end=1.0))
    [first], [second] = (draw(models, [stage], positive) for _ in range(2))
    assert first.skipped == second.skipped > 0
    assert torch.equal(first.latent, second.latent)


def test_the_caches_window_is_turned_into_sigmas():
    # S(1 - 0.45) = 1.65 / 2.1, S(1 - 0.95) = 0.15 / 1.1
    settings = plans.EasyCache(threshold=0.37, start=0.45, end=0.95)
    cache = make_cache(make_stage(easycache=settings))
    assert cache is not None
    assert cache.threshold == 0.37
    assert (cache.start, cache.end) == pytest.approx((1.65 / 2.1, 0.15 / 1.1), rel=1e-6)
    assert make_cache(make_stage()) is None


def test_guidance_without_a_negative_caption_is_an_error(models: Models, positive: Caption):
    with pytest.raises(BadInputError, match="stage has cfg 2, which needs a negative prompt"):
        run(models, make_stage(cfg=2.0), positive)


def test_with_guidance_1_the_negative_caption_makes_no_difference(
    models: Models, positive: Caption
):
    prepared = prepare_stage(models.transformer, make_stage())
    noise = draw_noise(prepared, 7, CPU)
    negative = make_caption(models, "fog")
    with_it, without = (
        run_stage(models, prepared, positive, other, noise).latent for other in (negative, None)
    )
    assert torch.equal(with_it, without)


def test_the_same_seed_gives_the_same_bits_and_another_others(models: Models, positive: Caption):
    stage = make_stage(sampler="dpmpp_sde")
    latents = [run(models, stage, positive, seed) for seed in (7, 8, 7)]
    assert torch.equal(latents[0], latents[2])
    assert not torch.equal(latents[0], latents[1])


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde"])
def test_a_batch_of_two_pictures_is_two_pictures(models: Models, positive: Caption, sampler: str):
    prepared = prepare_stage(models.transformer, make_stage(sampler=sampler, cfg=2.0))
    noises = [draw_noise(prepared, seed, CPU) for seed in (7, 8)]
    both = StageNoise(
        torch.cat([noise.start for noise in noises]),
        tuple(torch.cat(steps) for steps in zip(*(noise.steps for noise in noises))),
    )
    negative = make_caption(models, "fog")
    single = [run_stage(models, prepared, positive, negative, n).latent for n in noises]
    together = run_stage(models, prepared, positive, negative, both).latent
    torch.testing.assert_close(together, torch.cat(single), atol=1e-4, rtol=1e-4)


def test_a_stage_makes_one_rotary_table_for_each_caption_length(models: Models):
    prepared = prepare_stage(models.transformer, make_stage())
    tables = [prepared.rotary_for(models.transformer, length) for length in (32, 64, 32)]
    assert tables[0] is tables[2]
    assert torch.equal(tables[1], models.transformer.rotary_table(8, 6, 64))


def test_a_prompt_becomes_features_and_then_a_caption(models: Models):
    ids = torch.tensor([models.tokenizer.encode_prompt("a red fox")])
    features = encode_prompt(models, "a red fox")
    want = models.text_encoder.encode(ids)
    torch.testing.assert_close(features, want, atol=1e-5, rtol=1e-5)  # summed in another order
    caption = refine(models, features)
    assert caption.length == ids.shape[1]
    assert torch.equal(caption.tokens, models.transformer.refine_caption(features))


def test_a_prompt_that_spells_out_the_pad_token_is_masked_from_there(models: Models):
    prompt = "a red<|endoftext|> fox"
    ids = models.tokenizer.encode_prompt(prompt)
    visible = ids.index(models.tokenizer.pad_id)
    mask = torch.tensor([[1] * visible + [0] * (len(ids) - visible)])
    want = models.text_encoder.encode(torch.tensor([ids]), mask)
    assert torch.equal(encode_prompt(models, prompt), want)


def test_a_prompt_can_be_cut(models: Models):
    assert encode_prompt(models, "a red fox " * 20, max_tokens=40).shape[1] == 40


def test_each_stage_starts_from_the_resized_latent_of_the_one_before(
    models: Models, positive: Caption
):
    first = make_stage(height=32, width=32)
    second = make_stage(height=64, width=48, denoise=0.5, upscale="bilinear")
    network = Constant(0)
    results = draw(replace(models, network=network), [first, second], positive)
    sigma = stage_sigmas(second)[0]
    latent = F.interpolate(results[0].latent, (8, 6), mode="bilinear")
    want = sigma * start_noise((1, 16, 8, 6), 7) + (1 - sigma) * to_sampler(latent)
    torch.testing.assert_close(network.seen[4], want)
    assert [result.latent.shape[2:] for result in results] == [(4, 4), (8, 6)]


def test_stages_can_start_from_a_latent_of_any_size(models: Models, positive: Caption):
    latent = torch.arange(4.0).reshape(1, 1, 2, 2).expand(1, 16, 2, 2)
    stage = make_stage(height=32, width=64, denoise=0.5)
    network = Constant(0)
    draw(replace(models, network=network), [stage], positive, latent=latent)
    sigma = stage_sigmas(stage)[0]
    seen = (network.seen[0] - sigma * start_noise((1, 16, 4, 8), 7)) / (1 - sigma)
    want = torch.tensor([[0.0] * 4 + [1] * 4] * 2 + [[2] * 4 + [3] * 4] * 2)
    torch.testing.assert_close(from_sampler(seen)[0, 0], want, atol=1e-4, rtol=1e-4)


def test_stages_report_their_start_and_each_evaluation(models: Models, positive: Caption):
    stages = [make_stage(name="small", steps=2), make_stage(name="large", steps=1)]
    steps: list[tuple[str, int, int]] = []
    draw(
        replace(models, network=Constant(0)),
        stages,
        positive,
        on_step=lambda stage, done, total: steps.append((stage.name, done, total)),
    )
    small, large = [("small", done, 2) for done in range(3)], [("large", 0, 1), ("large", 1, 1)]
    assert steps == small + large


def test_a_stage_runs_when_its_result_is_asked_for(models: Models, positive: Caption):
    prepared = [prepare_stage(models.transformer, make_stage(steps=1)) for _ in range(2)]
    begun: list[PreparedStage] = []

    def noise(stage: PreparedStage) -> StageNoise:
        begun.append(stage)
        return draw_noise(stage, 7, CPU)

    results = run_stages(models, prepared, Drawing(positive=positive, noise=noise))
    assert begun == []
    next(results)
    assert begun == prepared[:1]


def test_a_latent_becomes_8_bit_pictures(models: Models):
    latent = from_sampler(torch.randn(2, 16, 4, 3))
    pictures, finite = decode(models.autoencoder, latent, slicing=True)
    exact = to_pixels(models.autoencoder.decode(latent))
    assert (pictures.shape, pictures.dtype) == ((2, 32, 24, 3), torch.uint8)
    assert float((pictures / 255 - exact).abs().max()) <= 1.001 / 255
    assert bool(finite)


def test_a_decoders_overflow_is_told(models: Models):
    _, finite = decode(models.autoencoder, torch.full((1, 16, 2, 2), torch.nan))
    assert not finite


def test_a_stage_can_be_prepared_for_another_size_and_for_several_latents(models: Models):
    prepared = prepare_stage(models.transformer, make_stage(), (5, 7))
    noise = draw_noise(prepared, 7, CPU, batch=2)
    assert torch.equal(noise.start, start_noise((2, 16, 5, 7), 7))
    assert prepared.rotary_for(models.transformer, 32).shape[0] == 32 + 32  # 3 x 4 patches


def test_the_dtype_is_the_networks(models: Models):
    assert models.dtype == torch.float32
    assert (
        replace(
            models, transformer=Transformer(models.transformer.config, "meta", torch.half)
        ).dtype
        == torch.half
    )
