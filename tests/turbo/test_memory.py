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

from turbo.components import component_dtypes
from turbo.errors import CheckpointError
from turbo.memory import MemoryNeed, _peak_bytes, count_memory, weight_dtypes
from turbo.model_files import find_model_files
from turbo.plan import DEFAULT_PLAN
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
    folder = make_tiny_model(tmp_path / "model", layout="diffusers")
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"norm_num_groups": 32', '"norm_num_groups": 16'))
    need = count_memory(find_model_files(folder).open(), DEFAULT_PLAN, FLOAT32)
    assert need.activations["decode"] > 0
