"""Scalars from the device."""

from __future__ import annotations

import math

import pytest
import torch

from turbo.host_read import HostRead

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_scalars_are_read_in_turn(device: str, dtype: torch.dtype):
    read = HostRead()
    assert [read(torch.tensor(value, device=device).to(dtype)) for value in (1, 0, 1)] == [1, 0, 1]
    if dtype.is_floating_point:
        assert math.isnan(read(torch.tensor(math.nan, device=device, dtype=dtype)))


@needs_cuda
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_read_waits_for_the_value_and_not_by_a_synchronising_call():
    read = HostRead()
    busy = torch.ones(4096, 4096, device="cuda")
    totals = []
    try:
        torch.cuda.set_sync_debug_mode("error")
        for value in range(1, 6):
            for _ in range(4):  # work that is still under way when the host arrives
                busy = busy @ busy / 4096
            totals.append(read((busy * value).mean()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert totals == pytest.approx([1, 2, 3, 4, 5], rel=1e-3)


@needs_cuda
@pytest.mark.gpu
def test_memory_and_event_are_made_once():
    read = HostRead()
    kept = set()
    for value in (3.0, 4.0):
        assert read(torch.tensor(value, device="cuda")) == value
        assert read._pinned is not None
        assert read._pinned.is_pinned()
        kept.add((read._pinned.data_ptr(), id(read._event)))
    assert len(kept) == 1
