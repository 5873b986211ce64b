"""What this machine and a model folder have: versions, devices, model files."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from turbo._version import __version__
from turbo.attention import usable_attention
from turbo.builtin import builtin_model
from turbo.cache_folder import default_cache_dir
from turbo.errors import CheckpointError
from turbo.model_files import ModelFiles, find_model_files, hub_cache

PACKAGES = (
    "torch",
    "triton",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "pyyaml",
    "torchsde",
    "websocket-client",
    "gguf",
    "torchao",
    "xformers",
)


def collect_info(
    model: str | Path | None = None,
    *,
    diffusion_model: str | Path | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """Collect what helps to see why something works or does not; JSON-able.

    Args:
        model: Model folder, as for `turbo.model_files.find_model_files`; so are the others.
        diffusion_model: Network file.
        text_encoder: Text encoder file.
        vae: Autoencoder file.
        tokenizer: Tokenizer folder or file.

    Returns:
        `turbo`, `python`, `platform`, `packages` (name -> version or None), `devices`, `caches`,
        and `model`: its files, and whether it is the built-in one, `built_in`, because none was
        given; or its `problem` if they are not found.
    """
    given = {
        "diffusion_model": diffusion_model,
        "text_encoder": text_encoder,
        "vae": vae,
        "tokenizer": tokenizer,
    }
    weights = (model, diffusion_model, text_encoder, vae)
    return {
        "turbo": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "caches": {
            "compiled_code": str(default_cache_dir()),
            "hugging_face": str(hub_cache()),
        },
        "model": _model(model, given, built_in=not any(weights)),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    cpu = {
        "device": "cpu",
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _host_memory(),
        "attention": list(usable_attention(torch.device("cpu"), torch.float32)),
    }
    return [cpu, *(_gpu(index) for index in range(torch.cuda.device_count()))]


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    return platform.processor() or platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "runtime": torch.version.cuda or torch.version.hip,
        "attention": list(usable_attention(torch.device("cuda", index))),
    }


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def _model(
    path: str | Path | None, given: dict[str, str | Path | None], *, built_in: bool
) -> dict[str, Any]:
    try:
        files = find_model_files(builtin_model() if built_in else path, **given)
        return {"layout": files.layout, "built_in": built_in, **_found(files)}
    except CheckpointError as error:
        return {"problem": str(error)}


def _found(files: ModelFiles) -> dict[str, Any]:
    checkpoints = files.open()
    components = {
        component: {
            "files": [str(file) for file in checkpoint.files],
            "file_bytes": sum(file.stat().st_size for file in checkpoint.files),
            "tensors": len(checkpoint.shapes),
        }
        for component, checkpoint in checkpoints.items()
    }
    loras = files.loras_dir.rglob("*.safetensors") if files.loras_dir else ()
    return {
        "components": components,
        "tokenizer": str(files.tokenizer) if files.tokenizer else None,
        "loras_dir": str(files.loras_dir) if files.loras_dir else None,
        "loras": sorted(str(path.relative_to(files.loras_dir or "")) for path in loras),
    }
