"""Counting memory before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from turbo.components import Components, component_dtypes
from turbo.errors import BadInputError, CheckpointError
from turbo.memory import (
    MemoryNeed,
    _first_that_fits,
    _peak_bytes,
    count_memory,
    count_outline,
    memory_plans,
    roomy_activations,
    weight_dtypes,
)
from turbo.model_files import find_model_files
from turbo.plan import DEFAULT_PLAN, Performance
from turbo.quantize import QUANTIZATIONS, QuantizedLinear
from turbo.testing import TINY_AUTOENCODER, make_tiny_model

FLOAT32 = weight_dtypes("float32", "cpu")


def test_the_peak_counts_what_is_alive_at_once():
    linear = nn.Linear(100, 100, device="meta")
    x = torch.empty(10, 100, device="meta")

    def work() -> torch.Tensor:
        first = linear(x)  # 4000 bytes
        both = torch.cat((first, first))  # 8000 more
        del first
        return both.relu_().sum() + both[0].view(10, 10).sum()  # views add nothing

    assert 12_000 <= _peak_bytes(linear, work) <= 12_100


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_product_with_8_bits_is_counted_as_what_a_cpu_holds(kind: str):
    def peak(device: str) -> int:
        made, x = QuantizedLinear(kind, 96, 64, device), torch.zeros(40, 96, device=device)
        made.counted_on = "cpu"
        return _peak_bytes(made, lambda: made(x))

    assert peak("meta") == peak("cpu") > 64 * 96 * 4  # the weight in float32


def test_a_product_with_8_bits_is_counted_without_a_cpus_copies_where_a_gpu_has_none():
    x = torch.empty(40, 96, dtype=torch.bfloat16, device="meta")

    def peak(kind: str, device: str) -> int:
        made = QuantizedLinear(kind, 96, 4096, "meta")
        made.counted_on = device
        return _peak_bytes(made, lambda: made(x))

    weight = 4096 * 96
    results = 40 * 4096
    for kind in ("fp8", "int8"):
        assert peak(kind, "cpu") >= 4 * weight
    assert 2 * results <= peak("fp8", "cuda") < 2 * results + 8 * x.numel()
    assert 4 * results <= peak("int8", "cuda") < 14 * results + 8 * x.numel() < 4 * weight * 2
    assert peak("int8-weight-only", "cuda") == peak("int8-weight-only", "cpu") >= 2 * weight


def test_attention_is_counted_without_a_score_matrix():
    query = torch.empty(1, 2, 1000, 8, device="meta")
    bytes_ = _peak_bytes(nn.Module(), lambda: F.scaled_dot_product_attention(query, query, query))
    assert bytes_ == query.numel() * 4


def test_the_real_model_needs_what_its_files_hold(shared: Path):
    manifest = json.loads((shared / "manifest" / "state_dict_shapes.json").read_text())
    components = ("network", "text_encoder", "autoencoder")
    checkpoints: dict[str, Any] = {
        component: SimpleNamespace(
            component=component,
            label=file,
            config={},
            stored=lambda name: None,
            shapes={name: tuple(shape) for name, (shape, _) in tensors.items()},
        )
        for component, (file, tensors) in zip(components, manifest.items(), strict=True)
    }
    need = count_memory(checkpoints, DEFAULT_PLAN, component_dtypes(torch.bfloat16))
    assert need.weights["network"] == 2 * sum(
        torch.Size(shape).numel() for shape in checkpoints["network"].shapes.values()
    )
    gib = {name: round(count / 2**30, 2) for name, count in need.weights.items()}
    assert gib == {"network": 11.46, "text_encoder": 7.3, "autoencoder": 0.16}
    assert list(need.activations) == ["prompt", "stage1", "stage2", "stage3", "decode"]
    # The widest feature map alone, and no more than a few of them.
    widest = 256 * 864 * 672 * 2
    assert 2 * widest < need.activations["decode"] < 6 * widest
    assert need.total == sum(need.weights.values()) + need.activations["decode"]


def test_a_larger_picture_and_guidance_need_more(tmp_path: Path):
    checkpoints = find_model_files(make_tiny_model(tmp_path / "model")).open()

    def stage3(**changes: Any) -> int:
        *others, last = DEFAULT_PLAN.stages
        plan = replace(DEFAULT_PLAN, stages=(*others, replace(last, **changes)))
        return count_memory(checkpoints, plan, FLOAT32).activations["stage3"]

    assert stage3(height=432, width=336) < stage3() < stage3(cfg=2.0)


def test_files_of_another_model_are_refused(tmp_path: Path):
    checkpoints = find_model_files(make_tiny_model(tmp_path / "model")).open()
    checkpoints["network"].shapes["extra.weight"] = (1,)
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        count_memory(checkpoints, DEFAULT_PLAN, FLOAT32)


def test_the_total_of_nothing_is_nothing():
    assert MemoryNeed({}, {}).total == 0


def test_float16_keeps_the_autoencoder_in_float32():
    dtypes = weight_dtypes("float16", "cpu")
    assert dtypes == {
        "network": torch.float16,
        "text_encoder": torch.float16,
        "autoencoder": torch.float32,
    }


def test_an_autoencoder_with_groups_of_its_own_is_counted(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setitem(TINY_AUTOENCODER, "ch", 16)
    monkeypatch.setitem(TINY_AUTOENCODER, "norm_num_groups", 16)
    folder = make_tiny_model(tmp_path / "model", layout="diffusers")
    need = count_memory(find_model_files(folder).open(), DEFAULT_PLAN, FLOAT32)
    assert need.activations["decode"] > 0


def test_what_is_not_counted_is_far_above_what_is(tmp_path: Path):
    checkpoints = find_model_files(make_tiny_model(tmp_path / "model")).open()
    outline = Components.outline(checkpoints, FLOAT32)
    for height in (864, 1920, 64):
        last = replace(DEFAULT_PLAN.stages[-1], height=height, cfg=2.0)
        plan = replace(DEFAULT_PLAN, stages=(*DEFAULT_PLAN.stages[:-1], last))
        counted = max(count_outline(outline, plan).activations.values())
        assert roomy_activations(outline, plan) > 1.5 * counted


NEED = MemoryNeed(
    weights={"network": 600, "text_encoder": 700, "autoencoder": 20},
    activations={"prompt": 5, "stage1": 10, "stage2": 40, "decode": 90},
    tiled_decode=30,
    streamed={"network": 60, "text_encoder": 110, "autoencoder": 20},
)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "device", "free", "peak"),
    [
        ("fast", CUDA, None, 600 + 700 + 20 + 90),
        ("balanced", CUDA, None, 600 + 20 + 700 + 5),
        ("balanced", CUDA, 800, 600 + 20 + 110 + 5),
        ("balanced", CPU, None, 600 + 20 + 110 + 5),
        ("low", CUDA, None, 700 + 5),
        ("low", CUDA, 700, 600 + 40),
        ("low", CUDA, 600, 110 + 5),
        ("low", CPU, None, 600 + 40),
    ],
)
def test_a_memory_plan_needs_what_is_there_at_once(
    name: str, device: torch.device, free: int | None, peak: int
):
    plans = memory_plans(NEED, Performance(), device, free)
    assert plans[name][1] == peak


def test_a_plan_in_tiles_needs_less_and_offload_alone_has_none():
    def peaks(**keys: Any) -> dict[str, int]:
        plans = memory_plans(NEED, Performance(**keys), CUDA, 600)
        return {name: peak for name, (_, peak) in plans.items()}

    assert peaks(enable_vae_tiling=True)["fast"] == 600 + 700 + 20 + 40
    assert peaks(enable_model_cpu_offload=True)["low"] == 110 + 5
    plans = memory_plans(NEED, Performance(enable_model_cpu_offload=True), CUDA, None)
    assert not plans["low"][0].is_tiled


@pytest.mark.parametrize(
    ("free", "asked", "chosen"),
    [
        (1500, "auto", "fast"),
        (1400, "auto", "balanced"),
        (730, "auto", "low"),
        (1500, "low", "low"),
    ],
)
def test_auto_is_the_first_plan_that_fits_a_gpu(free: int, asked: str, chosen: str):
    plans = memory_plans(NEED, Performance(memory=asked), CUDA, free)
    assert _first_that_fits(plans, asked, CUDA, free, True).name == chosen


@pytest.mark.parametrize(
    ("free", "asked", "may_move", "message"),
    [
        (730, "auto", False, "'balanced' needs 735 bytes on cuda, where 730 are free: 5 too few"),
        (730, "fast", True, "memory 'low' would fit"),
        (100, "auto", True, "15 too few; no memory plan would; use 8-bit weights"),
        (100, "fast", True, "no memory plan would, 'low' comes nearest with 15 too few; use 8-bit"),
    ],
)
def test_what_does_not_fit_is_an_error_with_numbers(
    free: int, asked: str, may_move: bool, message: str
):
    plans = memory_plans(NEED, Performance(memory=asked), CUDA, free)
    with pytest.raises(BadInputError, match=message):
        _first_that_fits(plans, asked, CUDA, free, may_move)


def test_on_a_cpu_auto_is_fast_or_an_error():
    plans = memory_plans(NEED, Performance(), CPU, 1400)
    with pytest.raises(BadInputError, match=r"memory 'fast' needs 1410 .* 'balanced' would fit"):
        _first_that_fits(plans, "auto", CPU, 1400, True)
