"""Devices and dtypes by their names, and how much memory a device has left."""

from __future__ import annotations

from pathlib import Path

import torch

from turbo.errors import BadInputError

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def pick_device(device: str | torch.device) -> torch.device:
    """The device to work on.

    Raises:
        BadInputError: It does not exist here; says which do.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise BadInputError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise BadInputError(
            f"device {chosen} is not there: PyTorch sees {count} CUDA device(s); use auto or cpu"
        )
    if chosen.type not in ("cpu", "cuda"):
        raise BadInputError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if str(chosen) == "cuda":  # without a number; every thread has a current device of its own
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The network's dtype.

    Raises:
        BadInputError: It is none of float32, bfloat16, float16 and auto.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise BadInputError(f"dtype must be auto, float32, bfloat16 or float16, got {name!r}")
    return _DTYPES[name]


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where that cannot be told.

    On a GPU what the driver has left and what PyTorch holds unused, within this process's share. On
    a CPU what Linux calls available, its swap space, and no more than the control group allows.
    """
    if device.type == "cuda":
        return _free_on_cuda(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" not in kib:
        return None
    free = (kib["MemAvailable"] + kib.get("SwapFree", 0)) << 10
    return min([free, *_left_in_group()])


def _free_on_cuda(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    unused = reserved - torch.cuda.memory_allocated(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return max(0, min(free, share)) + unused


def _left_in_group() -> list[int]:
    """Bytes that this process's control group (version 2) has left, if it has a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        cached = (group / "memory.stat").read_text().split()
        reclaimable = int(cached[cached.index("inactive_file") + 1])
        return [int(limit) - int(used) + reclaimable]
    except (OSError, ValueError):
        return []
