"""The small models that the recorded cases were computed with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from turbo.acceleration import Accelerator, SpeedUps
from turbo.autoencoder import Autoencoder, AutoencoderConfig
from turbo.pipeline import Models
from turbo.testing import autoencoder_shapes, initialise, qwen3_shapes, zimage_shapes
from turbo.text_encoder import TextEncoder, TextEncoderConfig
from turbo.tokenizer import Tokenizer
from turbo.transformer import Transformer, TransformerConfig

_Module = TypeVar("_Module", Transformer, TextEncoder, Autoencoder)


class ModelStore:
    """Loads the models named in ``weights.json``, from files or from their seeds."""

    def __init__(
        self, folder: Path, device: torch.device, *, speed_ups: SpeedUps | None = None
    ) -> None:
        self.folder = folder
        self.device = device
        self.speed_ups = speed_ups or SpeedUps()
        self._models: dict[tuple[str | None, ...], Models] = {}
        self.entries: dict[str, Any] = json.loads((folder / "weights.json").read_text())
        self._values: dict[str, dict[str, Tensor]] = {}

    def values(self, name: str) -> dict[str, Tensor]:
        """Tensors of a model, float32, by native name."""
        if name not in self._values:
            entry = self.entries[name]
            file = self.folder / entry["file"] if entry.get("file") else None
            if file is not None and file.is_file():
                values = {key: value.float() for key, value in load_file(file).items()}
            else:
                values = initialise(_shapes(name, entry), entry["seed"])
                recorded = entry.get("values_sha256")
                assert recorded in (None, values_digest(values)), f"{name}: wrong values"
            self._values[name] = values
        return self._values[name]

    def transformer(self, name: str) -> Transformer:
        """A network, float32."""
        values = self.values(name)
        config = TransformerConfig.from_shapes(_shapes_of(values))
        return _filled(Transformer(config, self.device, torch.float32), values)

    def text_encoder(self, name: str) -> TextEncoder:
        """A text encoder, float32."""
        values = self.values(name)
        config = TextEncoderConfig.from_shapes(_shapes_of(values))
        return _filled(TextEncoder(config, self.device, torch.float32), values)

    def autoencoder(self, name: str) -> Autoencoder:
        """An autoencoder, float32."""
        values = self.values(name)
        config = AutoencoderConfig.from_shapes(_shapes_of(values))
        return _filled(Autoencoder(config, self.device, torch.float32), values)

    def models(
        self, network: str, text_encoder: str | None = None, autoencoder: str | None = None
    ) -> Models:
        """Parts together, sped up as asked; there is no tokenizer, the cases give ids.

        Made once for each set of names. What a case changed in the weights is undone here, in
        place, as the engine does it under captured graphs.
        """
        names = (network, text_encoder, autoencoder)
        if names not in self._models:
            transformer = self.transformer(network)
            models = Models(
                tokenizer=cast("Tokenizer", None),
                text_encoder=cast("TextEncoder", text_encoder and self.text_encoder(text_encoder)),
                transformer=transformer,
                autoencoder=cast("Autoencoder", autoencoder and self.autoencoder(autoencoder)),
                network=transformer,
                device=self.device,
                kernels=self.speed_ups.kernels,
            )
            if self.speed_ups.any_stand_in:
                Accelerator(models, self.speed_ups).install(models)
            self._models[names] = models
        models = self._models[names]
        _filled(models.transformer, self.values(network))
        if text_encoder is not None:
            _filled(models.text_encoder, self.values(text_encoder))
        if autoencoder is not None:
            _filled(models.autoencoder, self.values(autoencoder))
        return models


def values_digest(values: dict[str, Tensor]) -> str:
    """sha256 over names and float32 values, as ``weights.json`` records it."""
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(name.encode())
        digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def clean_name(entry: str) -> str:
    """``dit_mid (from seed)`` -> ``dit_mid``."""
    return entry.split(" ")[0]


def pick(names: list[str], prefix: str) -> str:
    """The name in a case's list of weights that begins with `prefix`."""
    return next(clean_name(name) for name in names if name.startswith(prefix))


def _filled(module: _Module, values: dict[str, Tensor]) -> _Module:
    tensors = module.native_tensors()
    unread = module.ignored_keys(_shapes_of(values))
    assert set(values) - unread == set(tensors), "recorded weights and module disagree on names"
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
    return module


def _shapes(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    config = dict(entry["config"])
    if name.startswith("dit"):
        return zimage_shapes(config | {"ffn_hidden": entry["ffn_hidden"]})
    return qwen3_shapes(config) if name.startswith("te") else autoencoder_shapes(config)


def _shapes_of(values: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in values.items()}
