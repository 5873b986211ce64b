"""``python -m tests``: lint, types, tests and the recorded cases.

This is what continuous integration runs. Exits with 1 if any part failed; parts after a failed one
still run, so that one run shows everything. Tests run in as many processes as there are cores, then
the recorded cases side by side: much of either is Python, which uses one core.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MOST_PROCESSES = 4


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
    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    environment = _environment(processes)
    tests = ["pytest", "-n", str(processes), "--dist", "worksteal"]
    failed += [] if _passes("tests", tests, environment) else ["tests"]
    failed += _failing_together(recorded, _environment(max(1, len(recorded))))
    if failed:
        print(f"failed: {', '.join(failed)}")
        return 1
    print(f"all good: {', '.join([*checks, 'tests', *recorded])}")
    return 0


def _environment(processes: int) -> dict[str, str]:
    """Each of some programs side by side has its share of the cores.

    More threads than cores slow everything many times over, and threads that wait for others of
    theirs should sleep.
    """
    cores = max(1, (os.cpu_count() or 1) // processes)
    passive = {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    return {"OMP_NUM_THREADS": str(cores), **passive, **os.environ}


def _failing_together(commands: dict[str, list[str]], environment: dict[str, str]) -> list[str]:
    """Run commands side by side, and show what each said when it has ended."""
    if not commands:
        return []

    def quietly(command: list[str]) -> subprocess.CompletedProcess[str]:
        return _run(command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    failed = []
    with ThreadPoolExecutor(len(commands)) as pool:
        for name, done in zip(commands, pool.map(quietly, commands.values())):
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
