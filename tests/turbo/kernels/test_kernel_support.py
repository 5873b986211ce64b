"""Asking for kernels where they can run."""

from __future__ import annotations

import pytest
import torch

from turbo.errors import BadInputError
from turbo.kernel_support import require_kernels

pytest.importorskip("triton", reason="the kernels need Triton")


def test_a_device_where_they_run_is_accepted(device: str):
    require_kernels(torch.device(device))


def test_what_keeps_them_from_running_is_told_in_one_line(
    device: str, monkeypatch: pytest.MonkeyPatch
):
    from turbo.kernels import latent_upscale

    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(latent_upscale, "latent_upscale", fail)
    with pytest.raises(BadInputError) as caught:
        require_kernels(torch.device(device))
    assert str(caught.value) == (
        f"kernels cannot run on {device}: Failed to find C compiler; leave kernels off"
    )
