"""What a figure depends on besides the code: processor, GPU, versions, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from turbo import __version__

_SMI_FIELDS = (
    "driver_version",
    "power.limit",
    "power.default_limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "clocks.sm",
    "temperature.gpu",
    "mig.mode.current",
)


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Facts about this machine and checkout; what cannot be read is None."""
    commit = _commit()
    described: dict[str, Any] = {
        "id": machine_id(device),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": None if commit is None else commit.endswith("-dirty"),
        "turbo": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = _gpu(torch.device(device))
    return described


def machine_id(device: str = "cpu") -> str:
    """A short name of the hardware: equal on two machines whose times may be compared.

    Processor, vector instructions, number of cores, memory to the GiB, and the GPU. No serial
    numbers: rented machines of one kind change daily, and names of people's machines are private.
    """
    facts = [
        platform.machine(),
        _processor(),
        torch.backends.cpu.get_cpu_capability(),
        str(os.cpu_count()),
        str(round(_memory_gib() or 0)),
    ]
    chosen = torch.device(device)
    if chosen.type == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(chosen)
        facts += [gpu.name, str(round(gpu.total_memory / 2**30)), str(gpu.multi_processor_count)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _memory_gib() -> float | None:
    info = Path("/proc/meminfo")
    found = re.search(r"MemTotal:\s+(\d+) kB", info.read_text()) if info.is_file() else None
    return int(found[1]) / 2**20 if found else None


def _commit() -> str | None:
    """The commit, ``-dirty`` behind it if files differ; of a copy without git, TURBO_COMMIT."""
    described = _output("git", "describe", "--always", "--dirty", "--abbrev=12")
    return described or os.environ.get("TURBO_COMMIT")


def _gpu(device: torch.device) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(device)
    values = (
        _output(
            "nvidia-smi",
            f"--id=GPU-{facts.uuid}",
            f"--query-gpu={','.join(_SMI_FIELDS)}",
            "--format=csv,noheader",
        )
        or ""
    ).splitlines()
    first = values[0].split(", ") if values else []
    readable = dict(zip(_SMI_FIELDS, first)) if len(first) == len(_SMI_FIELDS) else {}
    return {
        "name": facts.name,
        "memory_gib": facts.total_memory / 2**30,
        "multiprocessors": facts.multi_processor_count,
        "capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nvidia_smi": {name: readable.get(name) for name in _SMI_FIELDS},
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
