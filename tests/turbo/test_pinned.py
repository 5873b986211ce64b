"""Pinned memory: what is counted is what is taken, and little more than the tensors need."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.turbo.test_engine import PLAN
from turbo import pinned
from turbo.components import Components
from turbo.fusing import LoraFuser
from turbo.memory import count_outline, weight_dtypes
from turbo.model_files import find_model_files
from turbo.pinned import buffers_for, pinned_bytes, pinned_like
from turbo.placement import LOW, RESIDENT, STREAMED, WHOLE, MemoryPlan, Placement
from turbo.testing import make_tiny_model


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the buffers that are made, of ordinary memory."""
    sizes: list[int] = []

    def new_buffer(size: int) -> Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(pinned, "_new_buffer", new_buffer)
    return sizes


def test_tensors_lie_apart_in_buffers_of_powers_of_two():
    draws = random.Random(0)
    for _ in range(50):
        sizes = [draws.randrange(1, 1 << draws.randrange(1, 32)) for _ in range(30)]
        capacities, places = buffers_for(sizes)
        assert all(capacity & (capacity - 1) == 0 for capacity in capacities)
        taken = sorted((*place, size) for place, size in zip(places, sizes, strict=True))
        for (buffer, start, size), (other, following, _) in pairwise(taken):
            assert other != buffer or following >= start + size
        for buffer, start, size in taken:
            assert start % 64 == 0
            assert start + size <= capacities[buffer]


def test_the_real_model_takes_little_more_than_its_weights(shared: Path):
    manifest = json.loads((shared / "manifest" / "state_dict_shapes.json").read_text())
    for tensors in manifest.values():
        sizes = [2 * torch.Size(shape).numel() for shape, _ in tensors.values()]
        assert sum(buffers_for(sizes)[0]) < 1.05 * sum(sizes)
        # Each tensor on its own, 60 % of the network's bytes would be for nothing.
        rounded = sum(1 << (size - 1).bit_length() for size in sizes)
        assert rounded > 1.4 * sum(sizes)


def test_memory_like_tensors_has_their_shapes_and_dtypes(taken: list[int]):
    outlines = [
        torch.empty(3, 5, dtype=torch.bfloat16, device="meta"),
        torch.empty(7, dtype=torch.uint8, device="meta"),
        torch.empty(2, 1, dtype=torch.float32, device="meta"),
    ]
    made = pinned_like(outlines)
    assert [(m.shape, m.dtype) for m in made] == [(o.shape, o.dtype) for o in outlines]
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in made] == [[0], [1], [2]]
    assert sum(taken) == pinned_bytes(outlines)
    assert pinned_like([]) == []


@pytest.mark.parametrize("name", ["balanced", LOW])
def test_the_host_memory_of_a_memory_plan_is_what_is_taken(
    name: str, tmp_path: Path, taken: list[int]
):
    checkpoints = find_model_files(make_tiny_model(tmp_path / "tiny")).open()
    outline = Components.outline(checkpoints, weight_dtypes("bfloat16", "cpu"))
    need = count_outline(outline, PLAN)
    cuda = torch.device("cuda")
    plan = need.plan(name, cuda)
    fuser = LoraFuser(outline.by_name(), checkpoints)
    placement = Placement(outline.by_name(), torch.device("cpu"), fuser.fill)
    placement._pins = True  # as beside a GPU
    placement.use(plan)
    assert sum(taken) == need.host_bytes(plan, cuda) > 0
    assert need.host_bytes(plan, torch.device("cpu")) == 0


def test_what_rests_holds_the_files_weights(tmp_path: Path, taken: list[int]):
    checkpoints = find_model_files(make_tiny_model(tmp_path / "tiny")).open()
    weights = []
    for mode in (RESIDENT, WHOLE, STREAMED):
        outline = Components.outline(checkpoints, weight_dtypes("bfloat16", "cpu"))
        fuser = LoraFuser(outline.by_name(), checkpoints)
        placement = Placement(outline.by_name(), torch.device("cpu"), fuser.fill)
        placement._pins = mode != RESIDENT
        placement.use(MemoryPlan("any", dict.fromkeys(outline.by_name(), mode), is_tiled=True))
        weights.append([p for m in outline.by_name().values() for p in m.parameters()])
    for others in weights[1:]:
        assert all(map(torch.equal, weights[0], others))
    assert taken
