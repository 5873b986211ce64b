"""Which dtype is calculated in: that of the weights wherever the processor knows it."""

from __future__ import annotations

import pytest
import torch

from turbo.precision import arithmetic_dtype, whole_float32


def pretend(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_only_on_a_cpu_without_it(dtype, monkeypatch):
    pretend(monkeypatch, False)
    assert arithmetic_dtype(dtype, "cpu") == torch.float32
    assert arithmetic_dtype(dtype, torch.device("cuda", 1)) == dtype
    pretend(monkeypatch, True)
    assert arithmetic_dtype(dtype, "cpu") == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_stay(dtype, monkeypatch):
    pretend(monkeypatch, False)
    assert arithmetic_dtype(dtype, "cpu") == dtype


def test_this_processor_is_asked():
    assert arithmetic_dtype(torch.bfloat16, "cpu") in (torch.bfloat16, torch.float32)
    assert arithmetic_dtype(torch.float16, "cpu") in (torch.float16, torch.float32)


def test_convolutions_on_a_gpu_are_in_float32_for_a_while_only():
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    with whole_float32(torch.device("cpu")):
        assert convolutions.fp32_precision == before
    with whole_float32(torch.device("cuda")):
        assert convolutions.fp32_precision == "ieee"
    assert convolutions.fp32_precision == before
