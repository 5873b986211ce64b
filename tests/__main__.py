"""``python -m tests``: lint, types, tests and the recorded cases, one after the other.

This is what continuous integration runs. Exits with 1 if any part failed; parts after a failed one
still run, so that one run shows everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run all parts; returns the exit code."""
    shared = Path(os.environ.get("TURBO_SHARED", REPOSITORY.parent / "shared"))
    golden = shared / "golden"
    parts = {
        "lint": ["ruff", "check", "."],
        "format": ["ruff", "format", "--check", "."],
        "types": ["mypy"],
        "tests": ["pytest"],
    }
    if golden.is_dir():
        parts["recorded cases"] = ["tests.golden", str(golden)]
        captured = ["--only", "seed0", "--backend", "replay"]
        parts["recorded cases, captured"] = ["tests.golden", str(golden), *captured]
    elif os.environ.get("CI"):
        print(f"no recorded cases at {golden}: TURBO_SHARED must name the folder that holds them")
        return 1
    else:
        print(f"no recorded cases at {golden}: they are left out (TURBO_SHARED names their folder)")
    failed = [name for name, command in parts.items() if not _passes(name, command)]
    if failed:
        print(f"failed: {', '.join(failed)}")
        return 1
    print(f"all good: {', '.join(parts)}")
    return 0


def _passes(name: str, command: list[str]) -> bool:
    print(f"--- {name}", flush=True)
    return (
        subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, check=False).returncode
        == 0
    )


if __name__ == "__main__":
    sys.exit(main())
