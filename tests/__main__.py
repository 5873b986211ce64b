"""``python -m tests``: lint, types, tests and the recorded cases.

This is what continuous integration runs. Exits with 1 if any part failed; parts after a failed one
still run, so that one run shows everything. The recorded cases run beside the tests: much of either
is Python, which uses one core.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TOGETHER = 2


def main() -> int:
    """Run all parts; returns the exit code."""
    shared = Path(os.environ.get("TURBO_SHARED", REPOSITORY.parent / "shared"))
    golden = shared / "golden"
    checks = {
        "lint": ["ruff", "check", "."],
        "format": ["ruff", "format", "--check", "."],
        "types": ["mypy"],
    }
    recorded: dict[str, list[str]] = {}
    if golden.is_dir():
        captured = ["--only", "seed0", "--backend", "replay"]
        recorded["recorded cases"] = ["tests.golden", str(golden)]
        recorded["recorded cases, captured"] = ["tests.golden", str(golden), *captured]
    elif os.environ.get("CI"):
        print(f"no recorded cases at {golden}: TURBO_SHARED must name the folder that holds them")
        return 1
    else:
        print(f"no recorded cases at {golden}: they are left out (TURBO_SHARED names their folder)")
    failed = [name for name, command in checks.items() if not _passes(name, command)]
    failed += _failing_beside(recorded, {"tests": ["pytest"]})
    if failed:
        print(f"failed: {', '.join(failed)}")
        return 1
    print(f"all good: {', '.join([*checks, 'tests', *recorded])}")
    return 0


def _failing_beside(behind: dict[str, list[str]], shown: dict[str, list[str]]) -> list[str]:
    """Run some parts one after the other beside others, and show what they said afterwards.

    Each side has half of the cores: more threads than cores slow everything many times over.
    """
    cores = max(1, (os.cpu_count() or 1) // TOGETHER)
    # Threads that wait for others of theirs should sleep: the programs run side by side.
    passive = {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {"OMP_NUM_THREADS": str(cores), **passive, **os.environ}

    def quietly(name: str, command: list[str]) -> tuple[str, subprocess.CompletedProcess[str]]:
        return name, _run(command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(quietly, name, command) for name, command in behind.items()]
        failed = [
            name for name, command in shown.items() if not _passes(name, command, environment)
        ]
        for one in waiting:
            name, done = one.result()
            print(f"--- {name}\n{done.stdout}", end="", flush=True)
            failed += [name] if done.returncode else []
    return failed


def _passes(name: str, command: list[str], environment: dict[str, str] | None = None) -> bool:
    print(f"--- {name}", flush=True)
    return _run(command, environment or dict(os.environ)).returncode == 0


def _run(
    command: list[str], environment: dict[str, str], **options: Any
) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *command]
    return subprocess.run(line, cwd=REPOSITORY, check=False, env=environment, text=True, **options)


if __name__ == "__main__":
    sys.exit(main())
