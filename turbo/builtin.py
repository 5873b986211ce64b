"""The built-in model: what is used where no weights are given."""

from __future__ import annotations

from pathlib import Path

from turbo.errors import CheckpointError

_FOLDER = Path(__file__).with_name("demo_model")


def builtin_model() -> Path:
    """The folder of the built-in model, in diffusers' layout, bfloat16, part of this package.

    It paints simple scenes, such as "a red circle on a blue background";
    ``tools.train_demo_model`` made it from nothing.

    Raises:
        CheckpointError: The package was installed without it.
    """
    if not (_FOLDER / "model_index.json").is_file():
        raise CheckpointError(
            f"{_FOLDER}: the built-in model is not there; install turbo again, or give a model"
        )
    return _FOLDER
