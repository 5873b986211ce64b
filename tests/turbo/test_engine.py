"""The engine: what a picture depends on, and that nothing else changes a bit of it."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3Model

import turbo.engine
from turbo import commands
from turbo.autoencoder import to_pixels, to_uint8
from turbo.builtin import builtin_model
from turbo.checkpoint import Checkpoint
from turbo.cli import main
from turbo.engine import Engine, Result, pick_device, pick_dtype
from turbo.errors import (
    BadInputError,
    CheckpointError,
    FailureError,
    LoraError,
    NonFiniteLatentError,
    OutOfMemoryError,
    PlanError,
)
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.noise import MAX_SEED
from turbo.pipeline import draw_noise, encode_prompt, prepare_stage, refine, run_stage
from turbo.plan import (
    TAKEN_NAMES,
    EasyCache,
    LoraSettings,
    Performance,
    Plan,
    Stage,
    dump_plan,
    plan_from_dict,
)
from turbo.sigmas import stage_sigmas
from turbo.similarity import PlainSimilarity
from turbo.testing import initialise, make_tiny_model, qwen3_shapes, zimage_shapes

PLAN = Plan(
    stages=(
        Stage(name="stage1", height=48, width=32, steps=2, cfg=2.0),
        Stage(
            name="stage2",
            height=64,
            width=48,
            steps=3,
            denoise=0.7,
            sampler="dpmpp_sde",
            scheduler="beta",
            node="ksampler",
            seed_offset=1,
        ),
        Stage(name="stage3", height=80, width=64, steps=2, denoise=0.5, seed_offset=2),
    )
)
UNGUIDED = replace(PLAN, stages=(replace(PLAN.stages[0], cfg=1.0), *PLAN.stages[1:]))
ONE_STEP = Plan(stages=(Stage(name="only", height=32, width=32, steps=1),))


def load(path: Path, **options: Any) -> Engine:
    options = {"plan": PLAN, "device": "cpu", "dtype": "float32", **options}
    return Engine.from_pretrained(path, **options)


def bits(result: Result) -> list[str]:
    """A digest of each picture, equal only if every value is."""
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in result.images]


def distance(result: Result, other: Result) -> float:
    """Mean difference of two pictures in grey levels."""
    first, second = (np.asarray(one.image, dtype=np.float64) for one in (result, other))
    return float(np.abs(first - second).mean())


def weights(engine: Engine) -> dict[str, Tensor]:
    """A copy of every weight that a LoRA can change."""
    network = engine.models.transformer.native_tensors()
    text_encoder = engine.models.text_encoder.native_tensors()
    return {name: tensor.clone() for name, tensor in (network | text_encoder).items()}


def same_weights(weights: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return weights.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in weights.items()
    )


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("engine") / "comfyui")


@pytest.fixture(scope="session")
def diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("engine") / "diffusers", "diffusers")


@pytest.fixture(scope="module")
def shared_engine(comfyui: Path) -> Engine:
    return load(comfyui)


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """One engine for many tests, without LoRAs at the start of each."""
    yield shared_engine
    shared_engine.set_loras([])


@pytest.fixture
def fresh(comfyui: Path) -> Engine:
    """An engine for tests that spoil it."""
    return load(comfyui)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of LoRAs: one for the network, one for both modules, and unfit ones."""
    folder = tmp_path_factory.mktemp("engine-loras")
    network = {
        "diffusion_model.layers.0.attention.out.lora_A.weight": noise(1, 4, 192),
        "diffusion_model.layers.0.attention.out.lora_B.weight": noise(2, 192, 4),
        "diffusion_model.layers.1.adaLN_modulation.0.diff_b": noise(3, 768),
    }
    text = {"text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.diff": noise(4, 160, 64)}
    strange = {"diffusion_model.layers.77.attention.out.diff": noise(5, 192, 192)}
    files = {"network": network, "both": network | text, "partial": network | strange}
    for name, tensors in (files | {"foreign": strange}).items():
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


class Calls:
    """Counts how often each part runs."""

    def __init__(self, engine: Engine) -> None:
        self.counts: dict[str, int] = {}
        self.hooks = [
            module.register_forward_pre_hook(lambda _m, _i, name=name: self.add(name))
            for name, module in {
                TEXT_ENCODER: engine.models.text_encoder,
                NETWORK: engine.models.transformer,
                AUTOENCODER: engine.models.autoencoder.decoder,
                "encoder": engine.models.autoencoder.encoder,
            }.items()
        ]

    def add(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def __getitem__(self, name: str) -> int:
        return self.counts.get(name, 0)


@pytest.fixture
def calls(engine: Engine) -> Iterator[Calls]:
    calls = Calls(engine)
    yield calls
    for hook in calls.hooks:
        hook.remove()


# One seed, one picture.


def test_the_same_seed_gives_the_same_picture_on_another_engine(engine: Engine, comfyui: Path):
    picture = engine.generate("a cat", negative_prompt="blurry", seed=7)
    again = load(comfyui).generate("a cat", negative_prompt="blurry", seed=7)
    assert bits(again) == bits(picture)
    assert (picture.image.size, picture.image.mode) == ((64, 80), "RGB")
    assert np.asarray(picture.image).std() > 1


def test_the_engine_adds_nothing_to_the_parts_it_calls(engine: Engine):
    models = engine.models
    with torch.inference_mode():
        positive, negative = (
            refine(models, encode_prompt(models, text)) for text in ("a cat", "blurry")
        )
        latent = None
        for number, stage in enumerate(PLAN.stages):
            prepared = prepare_stage(models.transformer, stage)
            drawn = draw_noise(prepared, 7 + number, models.device)
            latent = run_stage(models, prepared, positive, negative, drawn, latent).latent
        assert latent is not None
        pixels = to_uint8(to_pixels(models.autoencoder.decode(latent)))
    result = engine.generate("a cat", negative_prompt="blurry", seed=7)
    assert np.array_equal(np.asarray(result.image), pixels[0].numpy())


def test_both_layouts_give_the_same_picture(engine: Engine, diffusers: Path):
    assert bits(load(diffusers).generate("a cat", seed=7)) == bits(engine.generate("a cat", seed=7))


def test_three_named_files_and_an_all_in_one_checkpoint_give_the_same_picture(
    engine: Engine, comfyui: Path, tmp_path: Path
):
    files = {
        "model.diffusion_model.": engine.files.network,
        "text_encoders.qwen3_4b.transformer.": engine.files.text_encoder,
        "vae.": engine.files.vae,
    }
    everything = {
        prefix + name: tensor
        for prefix, file in files.items()
        for name, tensor in load_file(file).items()
    }
    save_file(everything, tmp_path / "all.safetensors")
    tokenizer = engine.files.require_tokenizer()
    whole = load(tmp_path / "all.safetensors", tokenizer=tokenizer)
    named = Engine.from_pretrained(
        diffusion_model=engine.files.network,
        text_encoder=engine.files.text_encoder,
        vae=engine.files.vae,
        tokenizer=tokenizer,
        device="cpu",
        plan=PLAN,
    )
    want = bits(engine.generate("a cat", seed=7))
    assert bits(whole.generate("a cat", seed=7)) == want
    assert bits(named.generate("a cat", seed=7)) == want


def test_warming_up_changes_no_picture(engine: Engine, fresh: Engine):
    told: list[tuple[str, int, int]] = []
    report = fresh.warmup(lambda *step: told.append(step))
    parts = ["prompt", "stage1", "stage2", "stage3", "decode"]
    assert list(report.seconds) == ["load", *parts]
    assert told == [(part, done, 1) for part in parts for done in (0, 1)]
    assert bits(fresh.generate("", seed=7)) == bits(engine.generate("", seed=7))


@pytest.mark.parametrize("sampler", ["uni_pc", "deis", "dpmpp_3m_sde", "res_multistep"])
def test_every_kind_of_sampler_warms_up(engine: Engine, sampler: str):
    stage = replace(ONE_STEP.stages[0], sampler=sampler, steps=4, cfg=2.0)
    other = Engine(engine.models, engine.files, replace(PLAN, stages=(stage,)), engine._fuser)
    assert list(other.warmup().seconds) == ["load", "prompt", "only", "decode"]


def test_warming_up_lets_the_step_cache_compare(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, ...]] = []
    compare = PlainSimilarity.compare

    def watch(self: PlainSimilarity, latent: Tensor, threshold: float) -> Tensor:
        seen.append(tuple(latent.shape))
        return compare(self, latent, threshold)

    stage = replace(ONE_STEP.stages[0], easycache=EasyCache(threshold=0.2))
    other = Engine(engine.models, engine.files, replace(PLAN, stages=(stage,)), engine._fuser)
    monkeypatch.setattr(PlainSimilarity, "compare", watch)
    other.warmup()
    assert seen == [(1, 16, 4, 4)] * 2


def test_earlier_requests_change_no_picture(engine: Engine, fresh: Engine, loras: Path):
    want = bits(engine.generate("a cat", seed=7))
    fresh.generate("a dog", negative_prompt="a cat", seed=8, plan=ONE_STEP)
    fresh.generate("a cat", seed=7, loras=[loras / "both.safetensors"], num_images=2)
    fresh.generate("a cat", seed=7, progressive=False, num_inference_steps=1, max_tokens=20)
    fresh.generate("a cat", seed=7, image=Image.new("RGB", (50, 50), "red"), keep_stages=True)
    assert bits(fresh.generate("a cat", seed=7)) == want
    assert bits(fresh.generate("a cat", seed=7)) == want


def test_threads_get_the_pictures_that_they_would_get_alone(engine: Engine, loras: Path):
    requests: list[dict[str, Any]] = [
        {"prompt": "a cat", "seed": 1},
        {"prompt": "a dog", "seed": 2, "plan": UNGUIDED},
        {"prompt": "a cat", "seed": 1, "loras": [loras / "both.safetensors"]},
        {"prompt": "a cat", "seed": 3, "num_images": 2},
    ] * 2
    alone = [bits(engine.generate(**request)) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda request: bits(engine.generate(**request)), requests))
    assert together == alone


def test_no_picture_depends_on_memory_that_nobody_wrote(engine: Engine, comfyui: Path):
    want = bits(engine.generate("a cat", seed=7))
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert bits(load(comfyui).generate("a cat", seed=7)) == want
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_callers_random_numbers_are_left_alone(engine: Engine):
    def state() -> list[Any]:
        legacy: Any = np.random.get_state()
        return [torch.get_rng_state().tolist(), random.getstate(), legacy[1].tolist()]

    before = state()
    engine.generate("a cat", seed=7)
    engine.generate("a cat")
    assert state() == before


def test_prompt_negative_prompt_and_seed_all_count(engine: Engine):
    request: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "blurry", "seed": 7}
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "a dog"},
        {"negative_prompt": "dark"},
        {"seed": 8},
    ]
    pictures = {tuple(bits(engine.generate(**request | change))) for change in changes}
    assert len(pictures) == 4


# Seeds.


def test_picture_i_is_the_one_that_seed_plus_i_gives_alone(engine: Engine):
    result = engine.generate("a cat", seed=7, num_images=3)
    assert result.seeds == [7, 8, 9]
    alone = [bits(engine.generate("a cat", seed=seed))[0] for seed in (7, 8, 9)]
    assert bits(result) == alone
    assert len(set(alone)) == 3
    assert (result.seed, result.image) == (7, result.images[0])


def test_seeds_go_on_at_zero_after_the_largest(engine: Engine):
    result = engine.generate("a cat", seed=MAX_SEED, num_images=2)
    assert result.seeds == [MAX_SEED, 0]
    assert bits(result)[1:] == bits(engine.generate("a cat", seed=0))


def test_without_a_seed_one_is_drawn_and_reported(engine: Engine):
    first, second = engine.generate("a cat"), engine.generate("a cat")
    assert first.seed != second.seed
    assert first.metadata[0]["seed"] == first.seed
    assert bits(engine.generate("a cat", seed=first.seed)) == bits(first)


# What a request can change.


def test_the_trigger_word_stands_before_the_prompt(engine: Engine):
    with_word = engine.generate("a cat", trigger_word="sunway", seed=7)
    assert bits(with_word) == bits(engine.generate("sunway, a cat", seed=7))
    assert with_word.metadata[0]["prompt"] == "a cat"
    assert with_word.metadata[0]["trigger_word"] == "sunway"


def test_one_stage_has_the_last_size_nine_steps_and_cfg_two(engine: Engine):
    told: list[tuple[str, int, int]] = []
    result = engine.generate(
        "a cat", seed=7, progressive=False, on_progress=lambda *step: told.append(step)
    )
    assert result.image.size == (64, 80)
    assert told == [("stage1", done, 9) for done in range(10)]
    stage = replace(PLAN.stages[0], height=80, width=64, steps=9, cfg=2.0)
    assert bits(engine.generate("a cat", seed=7, plan=replace(PLAN, stages=(stage,)))) == bits(
        result
    )


def test_steps_and_guidance_of_the_only_stage_can_be_given(engine: Engine):
    result = engine.generate(
        "a cat", seed=7, progressive=False, num_inference_steps=2, guidance_scale=1.5
    )
    stage = replace(PLAN.stages[0], height=80, width=64, steps=2, cfg=1.5)
    want = engine.generate("a cat", seed=7, plan=replace(PLAN, stages=(stage,)))
    assert bits(result) == bits(want)


def test_of_several_stages_the_first_takes_steps_and_guidance(engine: Engine):
    result = engine.generate("a cat", seed=7, num_inference_steps=4, guidance_scale=1.5)
    first = replace(PLAN.stages[0], steps=4, cfg=1.5)
    want = engine.generate("a cat", seed=7, plan=replace(PLAN, stages=(first, *PLAN.stages[1:])))
    assert bits(result) == bits(want)
    assert result.metadata[0]["plan"]["generation"]["stage1"]["steps"] == 4


def test_a_request_decides_between_one_stage_and_several(engine: Engine):
    single = replace(PLAN, progressive=False, num_inference_steps=2)
    assert list(engine.generate("a cat", plan=single).skips) == ["stage1"]
    result = engine.generate("a cat", plan=single, progressive=True, seed=7)
    assert bits(result) == bits(engine.generate("a cat", seed=7))


def test_a_plan_holds_for_one_request(engine: Engine, comfyui: Path, tmp_path: Path):
    before = bits(engine.generate("a cat", seed=7))
    other = replace(PLAN, stages=(replace(PLAN.stages[0], shift=1.5, sampler="heun"),))
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(other))
    want = bits(load(comfyui, plan=other).generate("a cat", seed=7))
    assert bits(engine.generate("a cat", seed=7, plan=other)) == want
    assert bits(engine.generate("a cat", seed=7, plan=path)) == want
    assert bits(engine.generate("a cat", seed=7, plan=str(path))) == want
    assert bits(engine.generate("a cat", seed=7)) == before
    assert bits(load(comfyui, plan=path).generate("a cat", seed=7)) == want


def test_progress_counts_the_evaluations_of_each_stage(engine: Engine):
    told: list[tuple[str, int, int]] = []
    result = engine.generate("a cat", num_images=2, on_progress=lambda *step: told.append(step))
    # dpmpp_sde looks twice a step, but once in the last one, which ends at sigma 0.
    evaluations = {"stage1": 2, "stage2": 5, "stage3": 2}
    one_picture = [
        (stage, done, total) for stage, total in evaluations.items() for done in range(total + 1)
    ]
    assert told == 2 * one_picture
    assert len(result.images) == 2


def test_a_callers_own_error_stops_one_request_only(engine: Engine):
    def stop(stage: str, step: int, total: int) -> None:
        if stage == "stage2":
            raise KeyboardInterrupt

    want = bits(engine.generate("a cat", seed=7))
    with pytest.raises(KeyboardInterrupt):
        engine.generate("a cat", seed=7, on_progress=stop)
    assert bits(engine.generate("a cat", seed=7)) == want


def test_stages_are_kept_when_asked_for(engine: Engine):
    plain = engine.generate("a cat", seed=7, num_images=2)
    kept = engine.generate("a cat", seed=7, num_images=2, keep_stages=True)
    assert plain.stage_images == []
    assert bits(kept) == bits(plain)
    for image, stages in zip(kept.images, kept.stage_images, strict=True):
        sizes = {name: picture.size for name, picture in stages.items()}
        assert sizes == {"stage1": (32, 48), "stage2": (48, 64), "stage3": (64, 80)}
        assert stages["stage3"].tobytes() == image.tobytes()
    one = replace(PLAN, stages=PLAN.stages[:1])
    alone = engine.generate("a cat", seed=7, plan=one)
    assert kept.stage_images[0]["stage1"].tobytes() == alone.image.tobytes()


def test_timings_name_every_part(engine: Engine):
    timings = engine.generate("a cat", seed=7).timings
    assert set(timings) == {"prompt", "stage1", "stage2", "stage3", "decode", "total"}
    assert all(seconds >= 0 for seconds in timings.values())
    parts = sum(seconds for name, seconds in timings.items() if name != "total")
    assert parts <= timings["total"]


def test_no_stage_can_have_the_name_of_another_part(engine: Engine):
    timings = engine.generate("a cat", seed=7, image=gradient(64, 80)).timings
    others = set(timings) - {stage.name for stage in PLAN.stages}
    assert others | {"load", "compile", "capture"} == set(TAKEN_NAMES)  # these are a warm-up's


def test_skips_count_the_calls_saved_and_wanted(engine: Engine):
    plain = engine.generate("a cat", negative_prompt="a cat", seed=7, num_images=2)
    assert plain.skips == {"stage1": (0, 4), "stage2": (0, 10), "stage3": (0, 4)}
    unequal = engine.generate("a cat", negative_prompt="two cats and a dog", seed=7)
    assert unequal.skips["stage1"] == (0, 4)  # one call for each caption


def test_the_step_cache_saves_network_calls(engine: Engine, calls: Calls):
    cache = EasyCache(threshold=1e3, start=0.0, end=1.0)
    stage = replace(PLAN.stages[0], steps=6, cfg=1.0, easycache=cache)
    skips = engine.generate("a cat", seed=7, plan=replace(PLAN, stages=(stage,))).skips
    assert skips == {"stage1": (4, 6)}  # the rate of change is known after two calls
    assert calls[NETWORK] == 2


# What is said about a picture.


def test_metadata_is_json_and_makes_the_picture_again(engine: Engine):
    result = engine.generate(
        "ein Kätzchen 🐈", negative_prompt="blurry", trigger_word="sunway", seed=7, num_images=2
    )
    for seed, picture, metadata in zip(result.seeds, bits(result), result.metadata, strict=True):
        assert json.loads(json.dumps(metadata)) == metadata
        again = engine.generate(
            metadata["prompt"],
            negative_prompt=metadata["negative_prompt"],
            trigger_word=metadata["trigger_word"],
            seed=metadata["seed"],
            plan=plan_from_dict(metadata["plan"]),
        )
        assert metadata["seed"] == seed
        assert bits(again) == [picture]


def test_metadata_names_version_models_loras_device_and_dtype(engine: Engine, loras: Path):
    engine.set_loras([(loras / "both.safetensors", 0.5, 0.25)])
    metadata = engine.generate("a cat", seed=7).metadata[0]
    (lora,) = metadata["loras"]
    assert metadata["version"] == turbo.__version__
    assert metadata["models"] == {
        "network": "z_image_turbo_bf16.safetensors",
        "text_encoder": "qwen_3_4b.safetensors",
        "vae": "ae.safetensors",
    }
    assert (metadata["device"], metadata["dtype"]) == ("cpu", "float32")
    assert len(lora.pop("sha256")) == 64
    assert lora == {"name": "both.safetensors", "strength": 0.5, "text_strength": 0.25}


def test_metadata_holds_no_local_path(engine: Engine, comfyui: Path, loras: Path):
    tokenizer = str(engine.files.require_tokenizer())
    settings = replace(PLAN.model, path=str(comfyui), tokenizer_path=tokenizer)
    local = Engine.from_pretrained(
        plan=replace(PLAN, model=settings), device="cpu", loras=[loras / "network.safetensors"]
    )
    picture = Image.new("RGB", (40, 40), "red")
    result = local.generate("a cat", seed=7, image=picture, strength=0.5)
    text = json.dumps(result.metadata)
    for folder in (comfyui, loras, Path.cwd(), Path.home()):
        assert str(folder) not in text


# Captions.


def test_the_negative_prompt_is_not_encoded_when_every_cfg_is_1(engine: Engine, calls: Calls):
    want = engine.generate("one caption", negative_prompt="unseen", seed=7, plan=UNGUIDED)
    assert calls[TEXT_ENCODER] == 1
    other = engine.generate("one caption", negative_prompt="never", seed=7, plan=UNGUIDED)
    assert bits(other) == bits(want)
    assert calls[TEXT_ENCODER] == 1
    engine.generate("one caption", negative_prompt="unseen", seed=7)
    assert calls[TEXT_ENCODER] == 2


def test_a_repeated_prompt_is_encoded_once(engine: Engine, calls: Calls):
    want = bits(engine.generate("once", negative_prompt="and never again", seed=7, num_images=2))
    assert calls[TEXT_ENCODER] == 2
    again = engine.generate("once", negative_prompt="and never again", seed=7, num_images=2)
    assert bits(again) == want
    assert calls[TEXT_ENCODER] == 2
    engine.generate("once", trigger_word="and", seed=7, plan=UNGUIDED)
    assert calls[TEXT_ENCODER] == 3


def test_the_captions_used_last_are_kept_and_no_others(
    comfyui: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turbo.engine, "CACHE_BYTES", 2 * 32 * 192 * 4)  # 32 tokens each
    engine = load(comfyui)
    calls = Calls(engine)
    for prompt in ("k1", "k2", "k1", "k3", "k1"):  # k1 is used again before k3 needs room
        engine.generate(prompt, seed=7, plan=ONE_STEP)
    assert calls[TEXT_ENCODER] == 3
    engine.generate("k2", seed=7, plan=ONE_STEP)
    assert calls[TEXT_ENCODER] == 4


# LoRAs.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loras_change_the_picture_and_leave_no_trace(comfyui: Path, loras: Path, dtype: str):
    engine = load(comfyui, dtype=dtype)
    plain, before = bits(engine.generate("a cat", seed=7)), weights(engine)
    engine.set_loras([(loras / "both.safetensors", 0.7), loras / "network.safetensors"])
    changed = weights(engine)
    assert bits(engine.generate("a cat", seed=7)) != plain
    assert [choice.strength for choice in engine.loras] == [0.7, 0.8]
    assert sum(not torch.equal(changed[name], before[name]) for name in before) == 3
    engine.set_loras([])
    assert engine.loras == ()
    assert same_weights(weights(engine), before)
    assert bits(engine.generate("a cat", seed=7)) == plain


def test_a_lora_on_the_text_encoder_alone_changes_the_picture(engine: Engine, loras: Path):
    plain = bits(engine.generate("a cat", seed=7))
    both = engine.generate("a cat", seed=7, loras=[(loras / "both.safetensors", 0.0, 1.0)])
    assert bits(both) != plain
    assert bits(engine.generate("a cat", seed=7)) == plain


def test_loras_given_at_loading_are_those_set_later(engine: Engine, comfyui: Path, loras: Path):
    chosen = [(loras / "both.safetensors", 0.6)]
    early = load(comfyui, loras=chosen)
    engine.set_loras(chosen)
    assert same_weights(weights(early), weights(engine))
    assert bits(early.generate("a cat", seed=7)) == bits(engine.generate("a cat", seed=7))


def test_loras_of_a_request_hold_for_that_request(engine: Engine, loras: Path):
    plain, before = bits(engine.generate("a cat", seed=7)), weights(engine)
    changed = engine.generate("a cat", seed=7, loras=[loras / "both.safetensors"])
    assert bits(changed) != plain
    assert [lora["name"] for lora in changed.metadata[0]["loras"]] == ["both.safetensors"]
    after = engine.generate("a cat", seed=7)
    assert bits(after) == plain
    assert after.metadata[0]["loras"] == []
    assert same_weights(weights(engine), before)


def test_a_request_can_do_without_the_loras_that_are_set(engine: Engine, loras: Path):
    plain = bits(engine.generate("a cat", seed=7))
    engine.set_loras([loras / "both.safetensors"])
    changed = bits(engine.generate("a cat", seed=7))
    assert bits(engine.generate("a cat", seed=7, loras=[])) == plain
    assert bits(engine.generate("a cat", seed=7)) == changed != plain


@pytest.mark.parametrize("name", ["partial", "foreign", "absent"])
def test_a_refused_lora_leaves_everything_as_it_was(engine: Engine, loras: Path, name: str):
    engine.set_loras([loras / "both.safetensors"])
    chosen, before = engine.loras, weights(engine)
    picture = bits(engine.generate("a cat", seed=7))
    refused = [loras / "network.safetensors", loras / f"{name}.safetensors"]
    for refuse in (engine.set_loras, lambda files: engine.generate("a cat", loras=files)):
        with pytest.raises(LoraError) as error:
            refuse(refused)
        assert "\n" not in str(error.value)
        assert same_weights(weights(engine), before)
        assert engine.loras == chosen
        assert bits(engine.generate("a cat", seed=7)) == picture


def test_a_lora_that_fits_in_part_is_used_when_asked_for(engine: Engine, loras: Path):
    with pytest.raises(LoraError, match=r"3 of 4 tensors used, first unused: .*layers\.77"):
        engine.set_loras([loras / "partial.safetensors"])
    engine.set_loras([loras / "partial.safetensors"], strict=False)
    partial = bits(engine.generate("a cat", seed=7))
    engine.set_loras([loras / "network.safetensors"])
    assert bits(engine.generate("a cat", seed=7)) == partial


def test_a_lora_that_fits_in_part_is_refused_even_where_it_is_in_use(engine: Engine, loras: Path):
    engine.set_loras([loras / "partial.safetensors"], strict=False)
    with pytest.raises(LoraError, match="3 of 4 tensors used"):
        engine.set_loras([loras / "partial.safetensors"])


def test_a_lora_of_strength_0_is_no_lora(engine: Engine, loras: Path):
    plain, before = bits(engine.generate("a cat", seed=7)), weights(engine)
    engine.set_loras([(loras / "both.safetensors", 0)])
    assert same_weights(weights(engine), before)
    assert bits(engine.generate("a cat", seed=7)) == plain


def test_a_lora_is_found_by_name_and_has_the_plans_strength(comfyui: Path, loras: Path):
    plan = replace(PLAN, lora=LoraSettings(default_strength=0.3))
    engine = load(comfyui, plan=plan)
    there = comfyui / "models" / "loras" / "named.safetensors"
    there.write_bytes((loras / "network.safetensors").read_bytes())
    try:
        by_name = bits(engine.generate("a cat", seed=7, loras=["named"]))
        by_file = bits(engine.generate("a cat", seed=7, loras=[("named.safetensors", 0.3)]))
    finally:
        there.unlink()
    given = engine.generate("a cat", seed=7, loras=[(loras / "network.safetensors", 0.3)])
    assert by_name == by_file == bits(given)


def test_a_request_says_whether_its_loras_must_fit_wholly(engine: Engine, loras: Path):
    partial = [loras / "partial.safetensors"]
    used = engine.generate("a cat", seed=7, loras=partial, strict_loras=False)
    with pytest.raises(LoraError, match="3 of 4 tensors used"):
        engine.generate("a cat", seed=7, loras=partial)
    engine.set_loras([loras / "network.safetensors"])
    assert bits(engine.generate("a cat", seed=7)) == bits(used)


def test_no_picture_is_made_with_a_lora_of_which_nothing_fits(engine: Engine, loras: Path):
    for refuse in (
        lambda files: engine.set_loras(files, strict=False),
        lambda files: engine.generate("a cat", seed=7, loras=files, strict_loras=False),
    ):
        with pytest.raises(LoraError, match=r"foreign\.safetensors: 0 of 1 tensors used"):
            refuse([loras / "foreign.safetensors"])


@pytest.mark.parametrize("is_kept", [True, False])
def test_lora_files_stay_in_memory_if_the_plan_says_so(
    comfyui: Path, loras: Path, tmp_path: Path, is_kept: bool
):
    engine = load(comfyui, plan=replace(PLAN, lora=LoraSettings(cache_models=is_kept)))
    path = tmp_path / "gone.safetensors"
    path.write_bytes((loras / "both.safetensors").read_bytes())
    engine.set_loras([path])
    changed = bits(engine.generate("a cat", seed=7))
    path.unlink()
    assert bits(engine.generate("a cat", seed=7)) == changed
    plain = engine.generate("a cat", seed=7, loras=[])
    if is_kept:
        assert bits(engine.generate("a cat", seed=7)) == changed
    else:
        with pytest.raises(LoraError, match=r"gone\.safetensors"):
            engine.generate("a cat", seed=7)
    assert bits(engine.generate("a cat", seed=7, loras=[])) == bits(plain)


def test_a_requests_plan_gives_the_default_strength(engine: Engine, loras: Path):
    plan = replace(PLAN, lora=LoraSettings(default_strength=0.3))
    result = engine.generate("a cat", seed=7, plan=plan, loras=[loras / "network.safetensors"])
    assert [lora["strength"] for lora in result.metadata[0]["loras"]] == [0.3]


def test_a_failure_while_a_lora_is_written_changes_no_later_picture(
    fresh: Engine, loras: Path, monkeypatch: pytest.MonkeyPatch
):
    plain, before = bits(fresh.generate("a cat", seed=7)), weights(fresh)
    fresh.generate("a cat", seed=7, loras=[loras / "both.safetensors"])
    with monkeypatch.context() as patched:
        patched.setattr("turbo.fusing.apply_patches", _out_of_memory)
        with pytest.raises(OutOfMemoryError, match="memory ran out while the model was loaded"):
            fresh.generate("a cat", seed=7, loras=[loras / "network.safetensors"])
    assert same_weights(weights(fresh), before)
    assert bits(fresh.generate("a cat", seed=7)) == plain


def _out_of_memory(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("name", "strict", "message"),
    [
        ("absent", True, "no such LoRA"),
        ("cut", True, "truncated"),
        ("partial", True, r"partial\.safetensors: 3 of 4 tensors used"),
        ("foreign", True, r"foreign\.safetensors: 0 of 1 tensors used"),
        ("foreign", False, r"foreign\.safetensors: 0 of 1 tensors used"),
        ("misfit", False, r"would change a weight of \[8, 192\]"),
    ],
)
def test_an_unfit_lora_is_refused_before_a_weight_is_read(
    comfyui: Path,
    loras: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    strict: bool,
    message: str,
):
    good = loras / "network.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-1])
    misfit = {"diffusion_model.layers.0.attention.out.diff": noise(6, 8, 192)}
    save_file(misfit, tmp_path / "misfit.safetensors")
    folder = loras if name in ("partial", "foreign") else tmp_path
    monkeypatch.setattr(Checkpoint, "copy_into", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(LoraError, match=message):
        load(
            comfyui,
            loras=[good, folder / f"{name}.safetensors"],
            strict_loras=strict,
            on_progress=lambda *_: pytest.fail("a weight was read"),
        )


def test_a_lora_that_fits_in_part_is_loaded_with_the_model_when_asked_for(
    engine: Engine, comfyui: Path, loras: Path
):
    early = load(comfyui, loras=[loras / "partial.safetensors"], strict_loras=False)
    engine.set_loras([loras / "network.safetensors"])
    assert same_weights(weights(early), weights(engine))


# A picture to start from.


def gradient(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


@pytest.mark.parametrize(
    ("strength", "stages"),
    [
        (1.0, ["stage1", "stage2", "stage3"]),
        (0.99, ["stage2", "stage3"]),
        (0.7, ["stage2", "stage3"]),
        (None, ["stage3"]),
        (0.5, ["stage3"]),
        (0.1, ["stage3"]),
    ],
)
def test_strength_picks_the_stage_that_a_picture_enters(
    engine: Engine, strength: float | None, stages: list[str]
):
    result = engine.generate("a cat", seed=7, image=gradient(64, 80), strength=strength)
    assert list(result.skips) == stages
    assert result.image.size == (64, 80)
    metadata = result.metadata[0]
    assert (metadata["first_stage"], metadata["strength"]) == (stages[0], strength or 0.6)
    assert "encode" in result.timings


def test_strength_1_leaves_nothing_of_the_picture(engine: Engine):
    result = engine.generate("a cat", seed=7, image=gradient(64, 80), strength=1.0)
    assert bits(result) == bits(engine.generate("a cat", seed=7))


def test_less_strength_leaves_more_of_the_picture(engine: Engine):
    request: dict[str, Any] = {"seed": 7, "progressive": False, "num_inference_steps": 4}
    black, white = (Image.new("RGB", (64, 80), colour) for colour in ("black", "white"))
    differences = [
        distance(
            engine.generate("a cat", image=black, strength=strength, **request),
            engine.generate("a cat", image=white, strength=strength, **request),
        )
        for strength in (0.8, 0.4, 0.1)
    ]
    assert 0 < differences[0] < differences[1] < differences[2]


@pytest.mark.parametrize(("size", "mode"), [((300, 20), "RGBA"), ((7, 90), "L"), ((1, 1), "P")])
def test_a_picture_of_any_size_and_mode_is_fitted(engine: Engine, size: tuple[int, int], mode: str):
    image = Image.new(mode, size)
    assert engine.generate("a cat", seed=7, image=image, strength=0.7).image.size == (64, 80)


def test_pictures_from_one_picture_are_those_of_their_seeds(engine: Engine):
    request: dict[str, Any] = {"prompt": "a cat", "image": gradient(50, 50), "strength": 0.7}
    result = engine.generate(seed=7, num_images=2, **request)
    alone = [bits(engine.generate(seed=seed, **request))[0] for seed in (7, 8)]
    assert bits(result) == alone
    assert alone[0] != alone[1]


def test_one_stage_can_start_from_a_picture(engine: Engine):
    result = engine.generate(
        "a cat", seed=7, progressive=False, num_inference_steps=2, image=gradient(9, 9)
    )
    assert result.skips == {"stage1": (0, 4)}
    assert result.metadata[0]["strength"] == 0.6


# Pictures that fail.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_latent_that_is_not_finite_is_an_error_with_stage_and_dtype(comfyui: Path, dtype: str):
    engine = load(comfyui, dtype=dtype)
    engine.models.transformer.native_tensors()["layers.0.attention.out.weight"][0, 0] = torch.inf
    with pytest.raises(NonFiniteLatentError, match=f"stage1 is not finite in {dtype}") as error:
        engine.generate("a cat", seed=7, num_images=2, keep_stages=True)
    assert isinstance(error.value, FailureError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", ["stage2", "stage3"])
def test_the_first_stage_that_went_wrong_is_named(fresh: Engine, bad: str):
    widths = {stage.width // 8: stage.name for stage in PLAN.stages}
    network = fresh.models.network

    def overflowing(latent: Tensor, *others: Tensor) -> Tensor:
        output = network(latent, *others)
        return output / 0 if widths[latent.shape[-1]] == bad else output

    fresh.models.network = overflowing
    with pytest.raises(NonFiniteLatentError, match=bad):
        fresh.generate("a cat", seed=7)


def test_a_picture_of_nan_is_never_handed_out(fresh: Engine):
    fresh.models.autoencoder.native_tensors()["decoder.conv_out.weight"].fill_(torch.nan)
    with pytest.raises(FailureError):
        fresh.generate("a cat", seed=7)


def test_no_file_is_left_of_a_picture_that_failed(
    fresh: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    fresh.models.text_encoder.native_tensors()["model.embed_tokens.weight"].fill_(torch.inf)
    monkeypatch.setattr(commands, "load_engine", lambda *_, **__: fresh)
    (tmp_path / "plan.yaml").write_text(dump_plan(PLAN))
    arguments = ["--plan", str(tmp_path / "plan.yaml"), "-o", str(tmp_path / "a.png"), "--quiet"]
    assert main(["generate", "a cat", *arguments, "--save-stages"]) == 1
    assert "stage1 is not finite in float32" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


# Low precision.


class PlainModels:
    """The same weights in diffusers' and transformers' own classes, everything in one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own
            self.text_encoder = Qwen3Model.from_pretrained(folder / "text_encoder", dtype=dtype)
            self.network = ZImageTransformer2DModel.from_pretrained(
                folder / "transformer", torch_dtype=dtype
            )
            self.autoencoder = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
        self.dtype = dtype

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], stage: Stage, seed: int) -> Tensor:
        """A picture by Euler's method without guidance, [height, width, 3] in grey levels."""
        encoded = self.text_encoder(torch.tensor([ids]), output_hidden_states=True)
        caption = encoded.hidden_states[-2][0].to(self.dtype)
        sigmas = stage_sigmas(stage)
        latent = noise(seed, 1, 16, stage.height // 8, stage.width // 8)
        for sigma, sigma_next in pairwise(sigmas):
            seen = [latent[0].unsqueeze(1).to(self.dtype)]
            time = torch.tensor([1 - sigma], dtype=self.dtype)
            velocity = self.network(seen, time, [caption], return_dict=False)[0][0].squeeze(1)
            latent = latent - (sigma_next - sigma) * velocity.float()
        decoded = self.autoencoder.decode((latent / 0.3611 + 0.1159).to(self.dtype))
        raw: Tensor = decoded.sample[0]
        return (255 * ((raw.float() + 1) / 2).clamp(0, 1)).permute(1, 2, 0).floor()


def test_bfloat16_errs_at_most_twice_as_far_as_plain_bfloat16(diffusers: Path, comfyui: Path):
    stage = Stage(name="only", height=64, width=48, steps=4, sampler="euler")
    plan = Plan(stages=(stage,))
    exact, low = (load(comfyui, plan=plan, dtype=dtype) for dtype in ("float32", "bfloat16"))
    plain_exact = PlainModels(diffusers, torch.float32)
    plain_low = PlainModels(diffusers, torch.bfloat16)
    ids = exact.models.tokenizer.encode_prompt("a lighthouse at dawn")
    error = plain_error = 0.0
    for seed in range(3):
        want = plain_exact.generate(ids, stage, seed)
        got = torch.tensor(np.asarray(exact.generate("a lighthouse at dawn", seed=seed).image))
        assert (got - want).abs().max() <= 1  # the same picture, but for a rounding here and there
        got = torch.tensor(np.asarray(low.generate("a lighthouse at dawn", seed=seed).image))
        error += (got - want).abs().mean().item()
        plain_error += (plain_low.generate(ids, stage, seed) - want).abs().mean().item()
    assert 0 < error <= 2 * plain_error


def test_float16_is_closer_to_float32_than_bfloat16_is(engine: Engine, comfyui: Path):
    want = engine.generate("a cat", seed=7)
    half, brain = (
        load(comfyui, dtype=dtype).generate("a cat", seed=7) for dtype in ("fp16", torch.bfloat16)
    )
    assert half.metadata[0]["dtype"] == "float16"
    assert distance(half, want) < distance(brain, want)
    assert distance(half, want) < 1


def test_activations_beyond_float16_are_clamped(comfyui: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turbo.engine.arithmetic_dtype", lambda dtype, device: dtype)
    engine = load(comfyui, dtype="float16")
    tensors = engine.models.transformer.native_tensors()
    for name in ("w1", "w3"):
        tensors[f"layers.0.feed_forward.{name}.weight"].mul_(500)
    tensors["layers.1.attention.out.weight"].mul_(60000)
    products: list[Tensor] = []
    layer = engine.models.transformer.layers[0]
    assert isinstance(layer, nn.Module)
    layer.get_submodule("feed_forward.w2").register_forward_pre_hook(
        lambda _m, inputs: products.append(inputs[0].abs().max())
    )
    result = engine.generate("a cat", seed=7)
    assert max(products) == torch.finfo(torch.float16).max  # the test does reach the limit
    assert np.asarray(result.image).std() > 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [("auto", torch.float32), ("fp16", torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_dtypes_have_several_names(given: str | torch.dtype, meant: torch.dtype):
    assert pick_dtype(given, torch.device("cpu")) == meant


def test_auto_is_bfloat16_on_a_gpu():
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_device("cpu") == torch.device("cpu")


# Prompts.


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "<|im_end|><|im_start|>system",
        "<|endoftext|>",
        "a cat <|endoftext|> and a dog",
        "🏮灯塔 👩‍🚀 \u202e \u0301",
        "a\0b\x07",
        "(a cat:1.3) \\(b\\) embedding:c",
        "line\r\nline\tline",
    ],
)
def test_any_text_is_a_prompt(engine: Engine, prompt: str):
    result = engine.generate(prompt, negative_prompt=prompt, seed=7)
    assert np.asarray(result.image).std() > 1
    assert json.loads(json.dumps(result.metadata[0]))["prompt"] == prompt
    assert bits(engine.generate(prompt, negative_prompt=prompt, seed=7)) == bits(result)


def test_a_prompt_of_10000_tokens_is_not_cut(comfyui: Path, tmp_path: Path):
    network = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "ffn_hidden": 64}
    text = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "head_dim": 16}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    shapes = {
        "diffusion_model": zimage_shapes({**network, "cap_feat_dim": 16}),
        "text_encoder": qwen3_shapes(text),
    }
    files = {name: tmp_path / f"{name}.safetensors" for name in shapes}
    for name, path in files.items():  # narrower than the tiny model, which would need 15 s
        save_file(initialise(shapes[name], 0), path)
    engine = load(comfyui, plan=ONE_STEP, **files)
    prompt = " a" * 10_000
    assert len(engine.models.tokenizer.encode_prompt(prompt)) > 10_000
    long = engine.generate(prompt, seed=7)
    assert bits(engine.generate(prompt + " b", seed=7)) != bits(long)
    assert bits(engine.generate(prompt, seed=7)) == bits(long)


def test_max_tokens_cuts_long_prompts_only(engine: Engine):
    words = "a lighthouse on a cliff at dawn"
    length = len(engine.models.tokenizer.encode_prompt(words))
    whole = bits(engine.generate(words, seed=7))
    assert bits(engine.generate(words, seed=7, max_tokens=length)) == whole
    cut = bits(engine.generate(words, seed=7, max_tokens=length - 3))
    assert cut != whole
    longer = engine.generate(words + ", in oil", seed=7, max_tokens=length - 3)
    assert bits(longer) == cut
    assert bits(engine.generate(words, seed=7)) == whole


# Bad requests.

PICTURE = Image.new("RGB", (32, 32))
BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt must be a string, got NoneType"),
    ({"prompt": b"a cat"}, "prompt must be a string, got bytes"),
    ({"negative_prompt": None}, "negative_prompt must be a string"),
    ({"trigger_word": 3}, "trigger_word must be a string"),
    ({"prompt": "\ud800 unseen"}, "lone surrogate"),
    ({"negative_prompt": "\ud800"}, "lone surrogate"),
    ({"seed": -1}, f"seed must be an integer from 0 to {MAX_SEED}, got -1"),
    ({"seed": 2**64}, "seed must be"),
    ({"seed": 1.5}, "seed must be"),
    ({"seed": True}, "seed must be"),
    ({"seed": "7"}, "seed must be"),
    ({"num_images": 0}, "num_images must be an integer of at least 1, got 0"),
    ({"num_images": -2}, "num_images must be"),
    ({"num_images": 1.0}, "num_images must be"),
    ({"num_images": True}, "num_images must be"),
    ({"num_images": 10**9}, "num_images must be at most 1000"),
    ({"num_inference_steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
    ({"num_inference_steps": -3}, "steps must be"),
    ({"num_inference_steps": 2.5}, "steps must be"),
    ({"num_inference_steps": -3, "progressive": False}, "num_inference_steps must be"),
    ({"guidance_scale": float("nan")}, "cfg must be a number, at least 0, got nan"),
    ({"guidance_scale": -1.0}, "cfg must be"),
    ({"guidance_scale": float("inf"), "progressive": False}, "guidance_scale must be"),
    ({"plan": "absent.yaml"}, "absent.yaml"),
    ({"image": "a.png"}, "image must be a PIL image, got str"),
    ({"plan": 5}, "plan must be a Plan or a plan file, got int"),
    ({"image": Image.new("RGB", (0, 0))}, "image must have pixels, got 0 x 0"),
    ({"image": torch.zeros(3, 8, 8)}, "image must be a PIL image, got Tensor"),
    ({"strength": 0.5}, "strength needs an image"),
    ({"image": PICTURE, "strength": 0}, "strength must be above 0 and at most 1, got 0"),
    ({"image": PICTURE, "strength": 1.5}, "strength must be"),
    ({"image": PICTURE, "strength": float("nan")}, "strength must be"),
    ({"image": PICTURE, "strength": 1e-9}, "denoise 1e-09 with 2 steps needs"),
    ({"image": PICTURE, "strength": "0.5"}, "strength must be"),
    ({"max_tokens": 3}, "max_tokens must be at least"),
    ({"max_tokens": -1}, "max_tokens must be at least"),
    ({"max_tokens": "9"}, "max_tokens must be"),
    ({"loras": ["absent"]}, "absent: no such LoRA"),
    ({"loras": [("absent", 1, 1, 1)]}, "a LoRA must be a path or name"),
    ({"loras": [("absent", float("nan"))]}, "strength must be a finite number, got nan"),
    ({"loras": "absent.safetensors"}, "loras must be a list, got 'absent.safetensors'"),
    ({"loras": [5]}, "a LoRA must be a path or name"),
]


@pytest.mark.parametrize(
    ("change", "message"), BAD_REQUESTS, ids=["-".join(change) for change, _ in BAD_REQUESTS]
)
def test_a_bad_request_is_one_line_and_computes_nothing(
    engine: Engine, calls: Calls, change: dict[str, Any], message: str
):
    with pytest.raises(BadInputError) as error:
        engine.generate(**{"prompt": f"unseen {change}", "seed": 7, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert calls.counts == {}


# Loading.


def test_loading_reports_every_tensor(comfyui: Path):
    told: list[tuple[str, int, int]] = []
    engine = load(comfyui, on_progress=lambda *step: told.append(step))
    modules: dict[str, Any] = {
        NETWORK: engine.models.transformer,
        TEXT_ENCODER: engine.models.text_encoder,
        AUTOENCODER: engine.models.autoencoder,
    }
    counts = {name: len(module.native_tensors()) for name, module in modules.items()}
    wanted = [(name, k + 1, count) for name, count in counts.items() for k in range(count)]
    assert sorted(told) == sorted(wanted)  # in which order parts come is not said


def test_a_plan_names_the_models_files(engine: Engine):
    settings = replace(
        PLAN.model,
        path=str(engine.files.network),
        vae_path=str(engine.files.vae),
        clip_path=str(engine.files.text_encoder),
        tokenizer_path=str(engine.files.require_tokenizer()),
        torch_dtype="float16",
        device="cpu",
    )
    other = Engine.from_pretrained(plan=replace(PLAN, model=settings))
    assert (other.models.dtype, other.files.network) == (torch.float16, engine.files.network)
    again = Engine.from_pretrained(plan=replace(PLAN, model=settings), dtype="float32")
    assert bits(again.generate("a cat", seed=7)) == bits(engine.generate("a cat", seed=7))


def test_without_a_model_the_built_in_one_is_used():
    built_in = Engine.from_pretrained(device="cpu", dtype="float32", plan=PLAN)
    named = Engine.from_pretrained(builtin_model(), device="cpu", dtype="float32", plan=PLAN)
    assert built_in.files == named.files
    assert bits(built_in.generate("a cat", seed=7)) == bits(named.generate("a cat", seed=7))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, BadInputError, "dtype must be auto, float32, bfloat16 or float16"),
        ({"device": "tpu"}, BadInputError, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "mps"}, BadInputError, "device must be"),
        ({"device": "cuda:99"}, BadInputError, "cuda:99 is not there: PyTorch sees"),
        ({"path": "absent"}, CheckpointError, "absent: no such file or folder"),
        ({"vae": "absent"}, CheckpointError, "absent: no such file for vae"),
        ({"plan": "absent.yaml"}, PlanError, "absent.yaml"),
        ({"loras": [("absent", "strong")]}, LoraError, "strength must be a finite number"),
        (
            {"loras": "style", "path": "absent"},
            LoraError,
            r"must be a list, got 'style'; put it in",
        ),
        ({"loras": Path("style"), "path": "absent"}, LoraError, "must be a list, got 'style'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    comfyui: Path, options: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message) as raised:
        Engine.from_pretrained(**{"path": comfyui, **options})
    assert "\n" not in str(raised.value)


def test_a_tokenizer_of_another_model_is_refused(comfyui: Path, shared: Path):
    with pytest.raises(BadInputError, match=r"the tokenizer knows \d+ ids, the text encoder only"):
        load(comfyui, tokenizer=shared / "tokenizer")


# Performance keys.


@pytest.mark.parametrize("key", ["enable_vae_slicing", "enable_model_cpu_offload"])
def test_slicing_and_offload_change_no_bit_on_a_cpu(engine: Engine, comfyui: Path, key: str):
    switch: dict[str, Any] = {key: True}
    other = load(comfyui, plan=replace(PLAN, performance=Performance(**switch)))
    other.warmup()
    want = engine.generate("a cat", seed=7, num_images=2, image=gradient(64, 80), strength=0.7)
    got = other.generate("a cat", seed=7, num_images=2, image=gradient(64, 80), strength=0.7)
    assert bits(got) == bits(want)


def test_tiling_leaves_small_pictures_alone(engine: Engine, comfyui: Path):
    tiled = load(comfyui, plan=replace(PLAN, performance=Performance(enable_vae_tiling=True)))
    assert bits(tiled.generate("a cat", seed=7)) == bits(engine.generate("a cat", seed=7))


LARGE = replace(ONE_STEP, stages=(replace(ONE_STEP.stages[0], height=192),))
TILED = replace(LARGE, performance=Performance(enable_vae_tiling=True))


def test_tiling_changes_a_large_picture_little(
    engine: Engine, comfyui: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turbo.engine, "VAE_TILE", 16)
    tiled = load(comfyui, plan=TILED).generate("a cat", seed=7)
    whole = engine.generate("a cat", seed=7, plan=LARGE)
    assert tiled.image.size == whole.image.size == (32, 192)
    # A random autoencoder looks further than a trained one, so its tiles differ more.
    other = engine.generate("a cat", seed=8, plan=LARGE)
    assert 0 < distance(tiled, whole) < distance(other, whole) / 2


def test_a_requests_plan_decides_about_tiling(
    engine: Engine, comfyui: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turbo.engine, "VAE_TILE", 16)
    want = bits(load(comfyui, plan=TILED).generate("a cat", seed=7))
    result = engine.generate("a cat", seed=7, plan=TILED)
    assert result.metadata[0]["plan"]["performance"]["enable_vae_tiling"] is True
    assert bits(result) == want
