"""Compiled and captured parts: the same pictures, and nothing made twice."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import turbo.acceleration
from tests.conftest import REPOSITORY
from turbo.acceleration import (
    MOST_CAPTURED_TOKENS,
    Accelerator,
    Counters,
    Role,
    SpeedUps,
    check_buckets,
    open_cache,
)
from turbo.attention import AttentionChoice
from turbo.cache_folder import default_cache_dir
from turbo.denoiser import ModulationTable
from turbo.easycache import StepCache
from turbo.engine import Engine, Result
from turbo.errors import AccelerationError, BadInputError, NonFiniteLatentError
from turbo.plan import EasyCache, Performance, Plan, Stage
from turbo.testing import make_tiny_model

PLAN = Plan(
    stages=(
        Stage(name="stage1", height=48, width=32, steps=2, cfg=2.0),
        Stage(name="stage2", height=64, width=48, steps=2, denoise=0.7, sampler="dpmpp_sde"),
        Stage(name="stage3", height=80, width=64, steps=2, denoise=0.5, seed_offset=2),
    )
)
ONE_STAGE = Plan(stages=(Stage(name="only", height=32, width=32, steps=1),))
CACHE = EasyCache(threshold=0.5, start=0.0, end=1.0)
CACHED = Plan(stages=(Stage(name="only", height=32, width=48, steps=8, cfg=2.0, easycache=CACHE),))
LONG = "a cat and a dog " * 47
TWINS: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "a dog"}
"""Two captions of one length."""

cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def load(path: Path, **options: Any) -> Engine:
    options = {"plan": PLAN, "device": "cpu", "dtype": "float32", **options}
    return Engine.from_pretrained(path, **options)


def poisoned(path: Path) -> Engine:
    """An engine whose results turn into NaN as soon as they may be overwritten."""
    made = load(path)
    accelerator = Accelerator(made.models, SpeedUps(capture="replay", strict=True), poison=True)
    accelerator.install(made.models)
    return Engine(made.models, made.files, PLAN, made._fuser, accelerator=accelerator)


def bits(result: Result) -> list[str]:
    pictures = [*result.images, *(one for stage in result.stage_images for one in stage.values())]
    return [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]


def grown(engine: Engine, work: Callable[[], object]) -> dict[str, int]:
    """What some work added to the counters, zeros left out."""
    before = asdict(engine.counters)
    work()
    after = asdict(engine.counters)
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("acceleration") / "model")


@pytest.fixture(scope="module")
def plain(model: Path) -> Engine:
    return load(model)


@pytest.fixture(scope="module")
def engines(model: Path) -> dict[str, Engine]:
    return {"replay": load(model, capture="replay"), "poisoned": poisoned(model)}


@pytest.fixture(params=["replay", "poisoned"])
def captured(engines: dict[str, Engine], request: pytest.FixtureRequest) -> Engine:
    """One engine for many tests, so that each meets what those before it left."""
    return engines[request.param]


@pytest.fixture
def fresh(model: Path) -> Engine:
    return load(model, capture="replay")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Changes attention, modulation, the caption's pad token and the text encoder."""
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise)

    text = "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj"
    tensors = {
        "diffusion_model.layers.0.attention.out.diff": draw(192, 192),
        "diffusion_model.context_refiner.0.attention.out.diff": draw(192, 192),
        "diffusion_model.layers.1.adaLN_modulation.0.diff_b": draw(768),
        f"{text}.diff": draw(160, 64),
    }
    path = tmp_path_factory.mktemp("acceleration-lora") / "lora.safetensors"
    save_file(tensors, path)
    return path


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    values = np.stack([rows * 3, columns * 3, rows + columns], axis=2)
    return Image.fromarray(values.astype(np.uint8))


# The pictures.

REQUESTS: dict[str, dict[str, Any]] = {
    "captions of unequal length": {"prompt": "a cat", "negative_prompt": "blurry and grey"},
    "captions of equal length": TWINS,
    "captions in unequal buckets": {"prompt": "a cat " * 20, "negative_prompt": ""},
    "several pictures": {**TWINS, "num_images": 2},
    "kept stages": {"prompt": "a cat", "num_images": 2, "keep_stages": True},
    "kept stages of one size": {
        "prompt": "a cat",
        "keep_stages": True,
        "plan": Plan(stages=tuple(replace(s, height=48, width=48) for s in PLAN.stages)),
    },
    "from a picture": {"prompt": "a cat", "image": gradient(70, 50), "strength": 0.7},
    "one stage": {"prompt": "a cat", "progressive": False, "num_inference_steps": 2},
    "no room for a token": {"prompt": "a cat " * 20, "max_tokens": 18},
    "the pad token": {"prompt": "a <|endoftext|> cat", "negative_prompt": "<|endoftext|>"},
    "more tokens than are captured": {"prompt": LONG, "negative_prompt": "a dog"},
    "an odd number of patches": {
        "prompt": "a cat",
        "plan": Plan(stages=(Stage(name="odd", height=48, width=80, steps=2),)),
    },
    "sizes that come back": {
        "prompt": "a cat",
        "plan": Plan(
            stages=tuple(
                replace(stage, height=height, width=48)
                for stage, height in zip(PLAN.stages, (48, 64, 48))
            )
        ),
    },
    "a step cache": {"plan": CACHED, **TWINS},
    "a step cache over two calls": {"plan": CACHED, "prompt": "a cat", "negative_prompt": ""},
    "an unguided step cache": {"plan": CACHED, "prompt": "a cat", "guidance_scale": 1.0},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_capturing_changes_no_bit(captured: Engine, plain: Engine, name: str):
    want, got = (engine.generate(seed=7, **REQUESTS[name]) for engine in (plain, captured))
    assert bits(got) == bits(want)
    assert got.skips == want.skips
    again = captured.generate(seed=7, **REQUESTS[name])
    assert bits(again) == bits(want)


def test_the_step_cache_skips_calls_in_these_tests(plain: Engine):
    for name in ("a step cache", "a step cache over two calls", "an unguided step cache"):
        ((skipped, calls),) = plain.generate(seed=7, **REQUESTS[name]).skips.values()
        assert 0 < skipped < calls, name


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "heun", "dpmpp_2m", "deis", "uni_pc", "res_multistep"]
)
def test_no_sampler_keeps_what_the_next_call_overwrites(
    engines: dict[str, Engine], plain: Engine, sampler: str
):
    plan = replace(ONE_STAGE, stages=(replace(ONE_STAGE.stages[0], sampler=sampler, steps=4),))
    want, got = (
        engine.generate("a cat", seed=7, plan=plan) for engine in (plain, engines["poisoned"])
    )
    assert bits(got) == bits(want)


def test_poisoning_finds_a_result_that_is_kept(model: Path, monkeypatch: pytest.MonkeyPatch):
    call = StepCache.call

    def keeping(self: StepCache, network: Callable[[], Tensor], *rest: Any) -> Any:
        kept = network()
        network()
        return call(self, lambda: kept, *rest)

    engine = poisoned(model)
    monkeypatch.setattr(StepCache, "call", keeping)
    with pytest.raises(NonFiniteLatentError, match="the latent of only is not finite"):
        engine.generate("a cat", seed=7, plan=CACHED)


def test_loras_come_and_go_under_the_captures(captured: Engine, plain: Engine, lora: Path):
    want = [plain.generate("a cat", seed=7, loras=loras) for loras in ([], [lora], [])]
    got = [captured.generate("a cat", seed=7, loras=loras) for loras in ([], [lora], [])]
    assert [bits(one) for one in got] == [bits(one) for one in want]
    assert bits(want[0]) != bits(want[1])
    used = grown(captured, lambda: captured.generate("a cat", seed=8, loras=[(lora, 0.5)]))
    assert list(used) == ["replays"]
    captured.set_loras([])


def test_a_latent_with_odd_sides_has_the_same_output(captured: Engine, plain: Engine):
    transformer = plain.models.transformer
    latent, caption = torch.randn(2, 16, 5, 7), torch.randn(2, 32, transformer.config.dim)
    modulation = ModulationTable.make(transformer, (0.5,))[0.5]
    inputs = (latent, caption, modulation, transformer.rotary_table(5, 7, 32))
    strided = (latent.to(memory_format=torch.channels_last), *inputs[1:])
    for given in (inputs, strided):
        assert torch.equal(captured.models.network(*given), transformer(*given))


def test_a_picture_that_failed_changes_no_later_one(captured: Engine, plain: Engine):
    want = bits(plain.generate("a cat", seed=7))
    weight = captured.models.transformer.final_linear.weight
    kept = weight.clone()
    try:
        weight.fill_(float("nan"))
        with pytest.raises(NonFiniteLatentError, match="the latent of stage1 is not finite"):
            captured.generate("a cat", seed=7)
    finally:
        weight.copy_(kept)
    assert bits(captured.generate("a cat", seed=7)) == want


def test_tiling_and_slicing_go_with_captures(captured: Engine, plain: Engine):
    for key in ("enable_vae_tiling", "enable_vae_slicing"):
        switch: dict[str, Any] = {key: True}
        plan = replace(PLAN, performance=Performance(**switch))
        want, got = (one.generate("a cat", seed=7, plan=plan) for one in (plain, captured))
        assert bits(got) == bits(want)


def test_no_part_reads_a_value_on_the_host(fresh: Engine):
    # A CUDA graph could not hold it; the search does not need one.
    fresh.accelerator._captures.allow_host_reads = False
    fresh.warmup(buckets=(32,))
    assert fresh.counters.captures == 6


def test_threads_get_the_pictures_that_they_would_get_alone(captured: Engine, plain: Engine):
    names = ["captions of equal length", "a step cache over two calls", "one stage"]
    with ThreadPoolExecutor(3) as threads:
        got = list(threads.map(lambda name: captured.generate(seed=9, **REQUESTS[name]), names))
    want = [plain.generate(seed=9, **REQUESTS[name]) for name in names]
    assert [bits(result) for result in got] == [bits(result) for result in want]


# Counters.


def test_a_warm_request_only_replays(fresh: Engine):
    report = fresh.warmup(buckets=(32, 64))
    assert len(report.captures) == fresh.counters.captures == 3 * 2 + 2 * 2 + 1
    assert {line.backend for line in report.captures} == {"replay"}
    assert report.seconds["capture"] > 0
    assert report.seconds["compile"] == report.built == 0

    def request() -> None:
        fresh.generate("a cat", negative_prompt="a cat " * 8, seed=7)

    first, second = grown(fresh, request), grown(fresh, request)
    assert list(first) == list(second) == ["replays"]
    assert first["replays"] - second["replays"] == 4  # two captions are kept
    assert fresh.counters.first_uses == fresh.counters.evictions == fresh.counters.uncaptured == 0


def test_warming_up_twice_captures_nothing_new(fresh: Engine):
    fresh.warmup(buckets=(32,))
    assert list(grown(fresh, lambda: fresh.warmup(buckets=(32, 32)))) == ["replays"]
    assert grown(fresh, lambda: fresh.warmup(buckets=(32, 64)))["captures"] == 5


def test_an_unknown_bucket_is_captured_at_its_first_use(fresh: Engine):
    fresh.warmup(buckets=(32,))
    used = grown(fresh, lambda: fresh.generate("a cat " * 20, seed=7))
    # Text encoder, caption refiner and the network at three sizes.
    assert (used["captures"], used["first_uses"]) == (5, 5)
    assert list(grown(fresh, lambda: fresh.generate("a dog " * 20, seed=7))) == ["replays"]


def test_captions_of_one_length_are_captured_at_their_first_use(fresh: Engine):
    fresh.warmup(buckets=(32,))
    used = grown(fresh, lambda: fresh.generate(**TWINS, seed=7))
    assert (used["captures"], used["first_uses"]) == (1, 1)
    assert list(grown(fresh, lambda: fresh.generate(**TWINS, seed=7))) == ["replays"]


def test_a_long_prompt_runs_uncaptured_and_is_counted(fresh: Engine):
    tokens = len(fresh.models.tokenizer.encode_prompt(LONG))
    assert tokens > MOST_CAPTURED_TOKENS
    fresh.warmup(buckets=(32,))
    calls = sum(stage.steps for stage in PLAN.stages)
    # Encoded, refined and called; the decoder and the negative prompt's parts are replayed.
    used = grown(fresh, lambda: fresh.generate(LONG, seed=7))
    assert used["uncaptured"] == 2 + calls + 1  # dpmpp_sde evaluates twice, but for its last step
    assert set(used) == {"uncaptured", "replays"}


def test_a_capture_that_failed_is_not_counted(fresh: Engine, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(fresh.models.transformer, "refine_padded", fail)
    with pytest.raises(AccelerationError, match="cannot be captured: no such operation"):
        fresh.generate("a cat", seed=7)
    assert fresh.counters == Counters(captures=1, first_uses=1, replays=2)  # the text encoder


def test_too_many_shapes_evict_those_used_least(
    model: Path, plain: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turbo.acceleration, "MOST_CAPTURES", 4)
    engine = load(model, capture="replay")
    want = bits(plain.generate("a cat", negative_prompt="a cat " * 20, seed=7))
    for _ in range(2):
        got = engine.generate("a cat", negative_prompt="a cat " * 20, seed=7)
        assert bits(got) == want
    assert engine.counters.evictions > 0
    assert len(engine.accelerator._captures) == 4


def test_an_evicted_capture_lets_go_of_its_buffers(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turbo.acceleration, "MOST_CAPTURES", 1)
    engine = load(model, capture="replay")
    engine.models.network(*network_inputs(engine, 4, 4))
    (entry,) = engine.accelerator._captures._entries.values()
    buffers = [weakref.ref(buffer) for buffer in entry.inputs]
    del entry
    engine.models.network(*network_inputs(engine, 6, 4))
    assert [buffer() for buffer in buffers] == [None] * 4


def network_inputs(engine: Engine, height: int, width: int) -> tuple[Tensor, ...]:
    transformer = engine.models.transformer
    return (
        torch.zeros(1, 16, height, width),
        torch.zeros(1, 32, transformer.config.dim),
        ModulationTable.make(transformer, (0.5,))[0.5],
        transformer.rotary_table(height, width, 32),
    )


def test_a_capture_keeps_none_of_the_first_callers_tensors(fresh: Engine):
    inputs = network_inputs(fresh, 4, 4)
    kept = [weakref.ref(tensor) for tensor in inputs]
    fresh.models.network(*inputs)
    del inputs
    assert [tensor() for tensor in kept] == [None] * 4


@pytest.mark.parametrize("memory", ["fast", "balanced", "low"])
def test_an_engine_frees_its_weights_when_it_goes(model: Path, memory: str):
    capture = "eager" if memory == "low" else "replay"
    engine = load(model, capture=capture, plan=ONE_STAGE, memory=memory)
    engine.generate("a cat", seed=7)
    weights = weakref.ref(engine.models.transformer)
    gc.collect()
    gc.disable()
    try:
        del engine
        assert weights() is None
    finally:
        gc.enable()


# Warming up.


def test_warming_up_makes_room_for_what_it_captures(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turbo.acceleration, "MOST_CAPTURES", 6)
    engine = load(model, capture="replay")
    engine.generate("a cat", seed=7, plan=ONE_STAGE)  # leaves a network and a decoder
    report = engine.warmup(buckets=(32,))
    assert len(report.captures) == 6
    assert list(grown(engine, lambda: engine.generate("a cat", seed=7))) == ["replays"]


def test_more_buckets_than_can_be_kept_are_refused(fresh: Engine):
    with pytest.raises(BadInputError) as caught:
        fresh.warmup(buckets=range(32, 513, 32))
    assert str(caught.value) == (
        "16 buckets at 3 picture sizes make 81 captures, at most 64 are kept; give fewer buckets"
    )
    assert fresh.counters == Counters()


def test_the_last_stages_decoder_is_warmed_up_whatever_sizes_came_before(model: Path):
    engine = load(model, capture="replay", plan=REQUESTS["sizes that come back"]["plan"])
    engine.warmup(buckets=(32,))
    assert list(grown(engine, lambda: engine.generate("a cat", seed=7))) == ["replays"]


def test_a_tiled_decoder_is_not_captured_whole(model: Path):
    plan = replace(PLAN, performance=Performance(enable_vae_tiling=True))
    report = load(model, capture="replay", plan=plan).warmup(buckets=(32,))
    assert "decoder" not in {role.part for role in roles(report.captures)}


def roles(captures: Any) -> list[Role]:
    return [line.key for line in captures]


def test_progress_names_every_part(fresh: Engine):
    told: list[tuple[str, int, int]] = []
    report = fresh.warmup(lambda *step: told.append(step), buckets=(32,))
    assert [done for _, done, total in told if total == 6] == list(range(6))
    assert told[0][0] == "network (height 10, width 8, caption 32, batch 1)"
    assert {name for name, _, total in told if total == 6} == set(map(str, roles(report.captures)))


def test_a_warm_up_that_failed_half_way_can_be_repeated(fresh: Engine, plain: Engine):
    class StopError(Exception):
        pass

    def stop(part: str, done: int, total: int) -> None:
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        fresh.warmup(stop, buckets=(32,))
    assert fresh.counters.captures == 3
    fresh.warmup(buckets=(32,))
    assert fresh.counters.captures == 6
    assert bits(fresh.generate("a cat", seed=7)) == bits(plain.generate("a cat", seed=7))


def test_an_offloaded_model_warms_up_one_module_at_a_time(
    model: Path, plain: Engine, monkeypatch: pytest.MonkeyPatch
):
    plan = replace(PLAN, performance=Performance(enable_model_cpu_offload=True))
    engine = load(model, plan=plan)
    monkeypatch.setattr(SpeedUps, "any_stand_in", True)  # as a compiled model has it
    engine.accelerator.install(engine.models)
    held: list[nn.Module] = []
    most = 0
    bring = engine._on_device

    @contextlib.contextmanager
    def on_device(module: nn.Module) -> Iterator[None]:
        nonlocal most
        held.append(module)
        most = max(most, len(set(held)))
        with bring(module):
            yield
        held.pop()

    monkeypatch.setattr(engine, "_on_device", on_device)
    report = engine.warmup(buckets=(32,))
    assert most == 1
    assert {line.backend for line in report.captures} == {"eager"}
    assert len(report.captures) == 6
    got = engine.generate("a cat", seed=7)
    assert bits(got) == bits(plain.generate("a cat", seed=7))
    assert engine.counters.first_uses == 0


# Bad input.


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ((), "buckets must hold at least one number of tokens, got none"),
        ((32, 40), "buckets must be multiples of 32 from 32 to 512 tokens, got 40"),
        ((0,), "buckets must be multiples of 32 from 32 to 512 tokens, got 0"),
        ((544,), "buckets must be multiples of 32 from 32 to 512 tokens, got 544"),
        ((32.0,), "buckets must be multiples of 32 from 32 to 512 tokens, got 32.0"),
        ((True,), "buckets must be multiples of 32 from 32 to 512 tokens, got True"),
        ("32", "buckets must be multiples of 32 from 32 to 512 tokens, got '3'"),
        (32, "buckets must be a list of numbers of tokens, got 32"),
        (None, "buckets must be a list of numbers of tokens, got None"),
    ],
)
def test_bad_buckets_are_refused_before_anything_runs(plain: Engine, buckets: Any, message: str):
    with pytest.raises(BadInputError) as caught:
        plain.warmup(buckets=buckets)
    assert str(caught.value) == message


def test_buckets_keep_their_order_without_repeats():
    assert check_buckets([64, 32, 64]) == (64, 32)
    buckets: Any = (bucket for bucket in (32, 96))
    assert check_buckets(buckets) == (32, 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "yes"}, "compile must be True, False or 'auto', got 'yes'"),
        ({"compile": 1}, "compile must be True, False or 'auto', got 1"),
        ({"kernels": None}, "kernels must be True, False or 'auto', got None"),
        ({"kernels": 1}, "kernels must be True, False or 'auto', got 1"),
        (
            {"capture": "graph"},
            "capture must be one of auto, cuda-graph, replay, eager, got 'graph'",
        ),
        (
            {"capture": "cuda-graph"},
            "capture='cuda-graph' needs a CUDA device, the engine is on cpu; use 'replay', "
            "'eager' or 'auto'",
        ),
        ({"cache_dir": 5}, "cache_dir must be a folder, 'auto' or None, got 5"),
    ],
)
def test_a_speed_up_that_cannot_be_had_is_refused(
    model: Path, options: dict[str, Any], message: str
):
    with pytest.raises(BadInputError) as caught:
        load(model, **options)
    assert str(caught.value) == message


def test_captures_and_offload_do_not_go_together(model: Path):
    plan = replace(PLAN, performance=Performance(enable_model_cpu_offload=True))
    with pytest.raises(BadInputError, match="capture='replay' does not go with enable_model_cpu"):
        load(model, plan=plan, capture="replay")


GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_auto_means_what_pays_on_the_device():
    assert SpeedUps.choose(CPU) == SpeedUps()
    assert SpeedUps.choose(CPU, compile=True) == SpeedUps(compile=True, capture="replay")
    assert SpeedUps.choose(CPU, capture="replay") == SpeedUps(capture="replay")
    assert SpeedUps.choose(CPU, compile=True, offload=True) == SpeedUps(compile=True)
    graphs = SpeedUps(compile=True, capture="cuda-graph")
    assert SpeedUps.choose(GPU, kernels=False) == graphs
    assert SpeedUps.choose(GPU, kernels=False, compile=False) == replace(graphs, compile=False)
    assert SpeedUps.choose(GPU, kernels=False, offload=True) == SpeedUps(compile=True)


def test_kernels_that_cannot_run_are_a_line_in_the_log_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(device: torch.device) -> None:
        raise BadInputError("kernels need Triton")

    monkeypatch.setattr(turbo.acceleration, "require_kernels", refuse)
    assert not SpeedUps.choose(GPU).kernels
    assert [record.message for record in caplog.records] == [
        "kernels need Triton; the plain operations run"
    ]
    with pytest.raises(BadInputError, match="kernels need Triton"):
        SpeedUps.choose(GPU, kernels=True)
    with pytest.raises(BadInputError, match="kernels need Triton"):
        SpeedUps.choose(GPU, strict=True)


# Compiling, as far as it needs no compiler.


@pytest.fixture
def broken_compiler() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("broken_compiler")
def test_what_cannot_be_compiled_is_an_error_where_that_is_asked(model: Path):
    engine = load(model, plan=ONE_STAGE, compile=True, cache_dir=None, strict_speed=True)
    for work in (lambda: engine.generate("a cat", seed=7), lambda: engine.warmup(buckets=(32,))):
        with pytest.raises(AccelerationError, match=r"^\w.*: cannot be compiled: nothing was comp"):
            work()
    assert engine.counters == Counters()


@pytest.mark.usefixtures("broken_compiler")
def test_what_cannot_be_compiled_runs_as_it_is(
    model: Path, plain: Engine, caplog: pytest.LogCaptureFixture
):
    engine = load(model, plan=ONE_STAGE, compile=True, cache_dir=None)
    for _ in range(2):
        got = engine.generate("a cat", seed=7)
        assert bits(got) == bits(plain.generate("a cat", seed=7, plan=ONE_STAGE))
    lines = [record.message for record in caplog.records if record.name.startswith("turbo")]
    assert [line.partition(":")[0] for line in lines] == [
        "text layer, 1 x 32 tokens",
        "context refiner, 1 x 32 tokens",
        "noise refiner, 1 x 32 tokens",
        "layer, 1 x 64 tokens",
    ]
    assert all(line.endswith("; it runs uncompiled") for line in lines)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo traces, and what Inductor would compile runs as it was traced."""
    import torch._inductor.compile_fx as inductor

    monkeypatch.setattr(inductor, "compile_fx", lambda graph, inputs, **_: graph)
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("traced_only")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("capture", ["replay", "eager"])
def test_a_warm_compiled_request_traces_nothing(model: Path, plain: Engine, capture: str):
    plan = replace(PLAN, stages=PLAN.stages[:2])
    engine = load(model, plan=plan, compile=True, capture=capture, cache_dir=None)
    engine.warmup(buckets=(32,))
    # Text layer and context refiner; noise refiner and layer, alike at both sizes.
    assert engine.counters.compilations == 4
    got: list[str] = []
    request: dict[str, Any] = {"negative_prompt": "blurry and grey", "seed": 7}
    used = grown(engine, lambda: got.extend(bits(engine.generate("a cat", **request))))
    assert list(used) == ["replays"]
    assert got == bits(plain.generate("a cat", **request, plan=plan))


# The cache of compiled code.


def key(engine: Engine, **options: Any) -> str:
    given = {"sizes": [(64, 64)], "speed_ups": SpeedUps(compile=True), **options}
    path: Path = open_cache("folder", engine.models, **given).path
    return path.name


def test_the_caches_key_holds_all_that_code_is_made_for(model: Path, plain: Engine):
    small = load(model)
    config = small.models.transformer.config
    small.models.transformer.config = replace(config, layers=config.layers + 1)
    other = load(model)
    other.models.transformer.attention = AttentionChoice("flex")
    keys = [
        key(plain),
        key(small),
        key(load(model, dtype="bfloat16")),
        key(load(model, dtype="float16")),
        key(plain, sizes=[(64, 80)]),
        key(plain, sizes=[(64, 64), (64, 64)]),
        key(plain, speed_ups=SpeedUps(compile=True, capture="replay")),
        key(other),
    ]
    assert len(set(keys)) == len(keys)
    assert key(load(model)) == keys[0]


def test_the_cache_folder_can_be_chosen(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("TURBO_CACHE", str(tmp_path / "chosen"))
    assert default_cache_dir() == tmp_path / "chosen"
    monkeypatch.delenv("TURBO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "turbo"
    for cache_dir, folder in (("auto", tmp_path / "turbo"), (tmp_path / "own", tmp_path / "own")):
        cache = load(model, compile=True, cache_dir=cache_dir).accelerator.cache
        assert cache is not None
        assert cache.path.parent == folder
    assert load(model, compile=True, cache_dir=None).accelerator.cache is None
    assert load(model).accelerator.cache is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced_only")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("problem", ["no folder", "corrupt"])
def test_an_unusable_cache_folder_costs_a_line_in_the_log(
    model: Path,
    plain: Engine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    problem: str,
):
    folder = tmp_path / "cache"
    engine = load(model, plan=ONE_STAGE, compile=True, cache_dir=folder)
    cache = engine.accelerator.cache
    assert cache is not None
    if problem == "no folder":
        folder.write_text("a file")  # root may write to a folder that is read-only
    else:
        folder.mkdir()
        cache.path.write_bytes(b"nonsense")
        cache.path.chmod(0o600)
    with cache.active():  # the traced graphs are not worth keeping, a file is
        Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "made.so").write_bytes(b"code")
    for _ in range(2):
        got = np.asarray(engine.generate("a cat", seed=7).image, dtype=np.int16)
    wanted = np.asarray(plain.generate("a cat", seed=7, plan=ONE_STAGE).image, dtype=np.int16)
    assert np.abs(got - wanted).max() <= 1  # what is traced may round otherwise
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in lines] == ["turbo.compile.cache"]
    # Counted once, kept or not.
    assert engine.warmup(buckets=(32,)).built == engine.warmup(buckets=(64,)).built == 1


@pytest.mark.usefixtures("traced_only")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_request_that_compiled_nothing_leaves_the_cache_folder_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = load(model, plan=ONE_STAGE, compile=True, cache_dir=tmp_path)
    cache = engine.accelerator.cache
    assert cache is not None
    saves: list[None] = []
    monkeypatch.setattr(cache, "save", lambda: saves.append(None))
    for _ in range(3):
        engine.generate("a cat", seed=7)
    assert len(saves) == 1


# The real compiler, once: in two processes, one after the other, with one cache folder.

START = """
import json, sys
import numpy as np
from turbo import Engine, Plan, Stage
from turbo.acceleration import Accelerator

# The network's layers alone: to build the other three roles too takes three times as long.
compile_any = Accelerator._compile
Accelerator._compile = lambda self, name, fn: (
    compile_any(self, name, fn) if name.startswith("layer") else fn
)
model, cache, picture = sys.argv[1:]
plan = Plan(stages=(Stage(name="only", height=32, width=32, steps=1),))
options = {"device": "cpu", "dtype": "float32", "plan": plan}
engine = Engine.from_pretrained(
    model, compile=True, cache_dir=cache, strict_speed=True, **options
)
report = engine.warmup(buckets=(32,))
before = engine.counters
engine.generate("a cat", seed=7).image.save(picture)
after = engine.counters
said = {
    "built": report.built,
    "compiled": before.compilations,
    "captured": before.captures,
    "while warm": [after.compilations - before.compilations, after.captures - before.captures],
}
print(json.dumps(said))
"""


def start(model: Path, folder: Path, picture: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        # Plain C++, neither vectors nor optimised: takes half as long to build.
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
        "TORCHINDUCTOR_DEBUG_COMPILE": "1",
    }
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", START, str(model), str(folder / "cache"), str(picture)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_the_second_start_builds_nothing_and_makes_the_same_picture(
    model: Path, plain: Engine, tmp_path: Path
):
    pictures = [tmp_path / name for name in ("first.png", "second.png")]
    first, second = (start(model, tmp_path, picture) for picture in pictures)
    assert first.pop("built") > 0
    assert second.pop("built") == 0
    assert first == second == {"compiled": 1, "captured": 4, "while warm": [0, 0]}
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    got = np.asarray(Image.open(pictures[0]), dtype=int)
    want = np.asarray(plain.generate("a cat", seed=7, plan=ONE_STAGE).image, dtype=int)
    assert np.abs(got - want).max() <= 1


# On a GPU.

GUIDED: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "blurry and grey", "seed": 7}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=cuda)])
def test_graphs_change_no_bit(device: str, dtype: str, model: Path, lora: Path):
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "compile": False,
        "kernels": False,
        "strict_speed": True,
        "attention": "sdpa",  # what is measured at warm-up would differ from what is not
    }
    eager, graphs = (load(model, capture=one, **options) for one in ("eager", "cuda-graph"))
    report = graphs.warmup(buckets=(32, 64))
    assert {line.backend for line in report.captures} == {"cuda-graph"}
    for request in REQUESTS.values():
        want, got = (engine.generate(seed=7, **request) for engine in (eager, graphs))
        assert bits(got) == bits(want)
        assert got.skips == want.skips
    for loras in ([lora], []):
        want, got = (engine.generate(**GUIDED, loras=loras) for engine in (eager, graphs))
        assert bits(got) == bits(want)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=cuda)])
def test_a_warm_request_allocates_nothing_above_its_buffers(device: str, model: Path):
    cache = EasyCache(threshold=0.2)
    plan = replace(PLAN, stages=tuple(replace(one, easycache=cache) for one in PLAN.stages))
    engine = load(
        model, plan=plan, device=device, dtype="bfloat16", compile=False, capture="cuda-graph"
    )
    engine.warmup(buckets=(32,))
    engine.generate(**GUIDED)
    peaks, reserved = [], [torch.cuda.memory_reserved()]
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        assert list(grown(engine, lambda: engine.generate(**GUIDED))) == ["replays"]
        peaks.append(torch.cuda.max_memory_allocated())
        reserved.append(torch.cuda.memory_reserved())
    assert peaks[0] == peaks[1]
    assert len(set(reserved)) == 1
    assert torch.cuda.memory_stats()["num_alloc_retries"] == retries == 0


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=cuda)])
def test_an_evicted_graph_is_recorded_anew(
    device: str, model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turbo.acceleration, "MOST_CAPTURES", 4)
    options: dict[str, Any] = {"device": device, "compile": False, "kernels": False}
    eager, graphs = (load(model, capture=one, **options) for one in ("eager", "cuda-graph"))
    want = bits(eager.generate(**GUIDED))
    for _ in range(2):
        assert bits(graphs.generate(**GUIDED)) == want
    assert graphs.counters.evictions > 0
