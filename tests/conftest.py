"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytest_plugins = ["bench.pytest_benchmarks"]
"""Adds ``--benchmark``."""

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Let Ctrl-C be Ctrl-C: a shell starts what it runs in the background deaf to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference folder (`golden/`, `manifest/`, `tokenizer/`), kept beside the repository."""
    folder = Path(os.environ.get("TURBO_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"the reference data folder {folder.name}/ is not beside this checkout")
    return folder
