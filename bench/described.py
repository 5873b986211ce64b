"""Which model a figure is of: its name, a fingerprint of its weights, its numbers of parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from turbo.checkpoint import native_weights
from turbo.components import Components
from turbo.pipeline import Models

SAMPLED_VALUES = 1024
"""Of a tensor, that go into a fingerprint."""


def describe_model(models: Models, name: str) -> dict[str, Any]:
    """A loaded model as results files describe it."""
    return {
        "name": name,
        "fingerprint": fingerprint(models),
        "parameters": {
            component: sum(weight.numel() for weight in module.parameters())
            for component, module in _modules(models).items()
        },
    }


def fingerprint(models: Models) -> str | None:
    """A short hash of all shapes and dtypes and of some values of each tensor.

    The same weights have the same one whatever files they came from. Of weights that a memory plan
    leaves in their files until they are needed there is none.
    """
    if any(
        weight.is_meta for module in _modules(models).values() for weight in module.parameters()
    ):
        return None
    digest = hashlib.sha256()
    for component, module in _modules(models).items():
        for name, weight in sorted(native_weights(module).items()):
            tensor = weight if isinstance(weight, Tensor) else weight.dequantize()
            step = max(1, tensor.numel() // SAMPLED_VALUES)
            values = tensor.detach().reshape(-1)[::step].float().cpu().numpy().tobytes()
            shape = "x".join(map(str, tensor.shape))
            digest.update(f"{component} {name} {shape} {tensor.dtype}\n".encode() + values)
    return digest.hexdigest()[:16]


def _modules(models: Models) -> Mapping[str, Any]:
    return Components(
        network=models.transformer,
        text_encoder=models.text_encoder,
        autoencoder=models.autoencoder,
    ).by_name()
