"""Which model a figure is of: its name, a fingerprint of its files, its numbers of parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER

if TYPE_CHECKING:
    from turbo.engine import Engine

BLOCK, BLOCKS = 4096, 1024
"""Bytes, and how many places of a file are looked at: all of a small file, 4 MiB of a large one."""


def describe_model(engine: Engine, name: str) -> dict[str, Any]:
    """A loaded model as results files describe it."""
    models, files = engine.models, engine.files
    modules = {
        NETWORK: models.transformer,
        TEXT_ENCODER: models.text_encoder,
        AUTOENCODER: models.autoencoder,
    }
    return {
        "name": name,
        "fingerprint": fingerprint(files.network, files.text_encoder, files.vae),
        "parameters": {
            component: sum(one.numel() for one in module.parameters())
            for component, module in modules.items()
        },
    }


def fingerprint(*paths: Path) -> str:
    """A short hash of safetensors files, or folders of them, that differs if training changed them.

    Covers every file's size and blocks spread evenly over it, not each byte: a full-size model
    would take a minute. Names and folders do not count.
    """
    digest = hashlib.sha256()
    for path in paths:
        for file in _weights(path):
            digest.update(f"{file.stat().st_size}\n".encode())
            for block in _blocks(file):
                digest.update(block)
    return digest.hexdigest()[:16]


def _weights(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    step = max(BLOCK, size // BLOCKS)
    with file.open("rb") as opened:
        for place in range(0, size, step):
            opened.seek(place)
            yield opened.read(BLOCK)
