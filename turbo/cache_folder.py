"""Where caches lie. Imports nothing heavy, so that a command about a folder starts at once."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """The folder of the user's caches; relative if the user has no home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path(os.path.expanduser("~")) / ".cache"


def default_cache_dir() -> Path:
    """Where compiled code is kept: TURBO_CACHE, or `turbo` in the user's cache folder."""
    given = os.environ.get("TURBO_CACHE")
    return Path(os.path.expanduser(given)) if given else user_cache() / "turbo"
