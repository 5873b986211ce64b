"""The model that is used when none is given: small, trained from scratch, part of the package."""

from __future__ import annotations

from pathlib import Path

from turbo.errors import CheckpointError


def builtin_model() -> Path:
    """Folder of the built-in model, in diffusers' layout; it paints coloured shapes.

    ``tools/train_demo_model.py`` made it. Two LoRAs, ``outlined`` and ``zorp``, lie in ``loras``.

    Raises:
        CheckpointError: The package was installed without it.
    """
    folder = Path(__file__).with_name("demo_model")
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"the built-in model is missing at {folder}; install turbo again, or give --model"
        )
    return folder
