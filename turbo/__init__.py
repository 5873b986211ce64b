"""Fast, exact sampling of Z-Image-Turbo: a prompt through three growing stages to a picture.

Names are imported at first use, so that ``import turbo`` costs nothing but PyTorch's own import
when it comes to work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from turbo._version import __version__
from turbo.errors import (
    AccelerationError,
    BackendError,
    BadInputError,
    CheckpointError,
    FailureError,
    LoraError,
    NonFiniteLatentError,
    OutOfMemoryError,
    PlanError,
    SaveError,
    TokenizerNotFoundError,
    TurboError,
    WorkflowError,
)

if TYPE_CHECKING:
    from turbo.engine import Engine, Result, WarmupReport
    from turbo.generators import NativeImageGenerator, create_image_generator
    from turbo.plan import DEFAULT_PLAN, EasyCache, Plan, Stage, load_plan

_HOMES = {
    "DEFAULT_PLAN": "plan",
    "EasyCache": "plan",
    "Engine": "engine",
    "NativeImageGenerator": "generators",
    "Plan": "plan",
    "Result": "engine",
    "Stage": "plan",
    "WarmupReport": "engine",
    "create_image_generator": "generators",
    "load_plan": "plan",
}

__all__ = [
    "DEFAULT_PLAN",
    "AccelerationError",
    "BackendError",
    "BadInputError",
    "CheckpointError",
    "EasyCache",
    "Engine",
    "FailureError",
    "LoraError",
    "NativeImageGenerator",
    "NonFiniteLatentError",
    "OutOfMemoryError",
    "Plan",
    "PlanError",
    "Result",
    "SaveError",
    "Stage",
    "TokenizerNotFoundError",
    "TurboError",
    "WarmupReport",
    "WorkflowError",
    "__version__",
    "create_image_generator",
    "load_plan",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"turbo.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'turbo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
