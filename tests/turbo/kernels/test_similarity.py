"""The kernels' numbers: EasyCache's hand-worked tests once more, with kernels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from tests.turbo import test_easycache as hand_worked
from turbo.easycache import StepCache

pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.fixture(autouse=True)
def _with_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hand_worked, "StepCache", partial(StepCache, kernels=True))
    with torch.device(device):
        yield


globals().update(
    {name: test for name, test in vars(hand_worked).items() if name.startswith("test_")}
)
