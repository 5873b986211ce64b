"""``python -m bench loading``: peak host memory and time of reading a network's files.

A made-up network of about 2 GB in bfloat16, with blocks of the full size, is written in each form
in which people have it and read by a process of its own, into bfloat16. Allowed are the weights'
own size, the largest tensor and a tenth. Linux only: the figures are those of
``/proc/self/status``, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.arguments import Parser
from bench.random_model import FULL
from turbo.checkpoint import load_weights, open_checkpoint
from turbo.diffusers_folder import to_diffusers
from turbo.names import NETWORK
from turbo.testing import zimage_shapes
from turbo.transformer import Transformer, TransformerConfig

SHARE = 0.1
"""Of the weights' size that may come on top of it and the largest tensor."""
SHARD_BYTES = 1 << 30
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_BLOCK_BYTES = 362e6
"""Of a full-size block in bfloat16."""


def sizes_of(gigabytes: float) -> dict[str, Any]:
    """Dimensions, for `zimage_shapes`, of a network of at least so many gigabytes in bfloat16."""
    full = zimage_shapes({**FULL.network, "n_layers": 1, "n_refiner_layers": 1})
    smallest = sum(torch.Size(shape).numel() for shape in full.values()) * 2
    layers = 1 + max(0, math.ceil((gigabytes * 1e9 - smallest) / _BLOCK_BYTES))
    return {**FULL.network, "n_layers": layers, "n_refiner_layers": 1}


def write_comfyui(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """One safetensors file."""
    path = folder / "network.safetensors"
    save_file(dict(weights), path)
    return path


def write_diffusers(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """A folder of shards with an index, q, k and v apart."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in to_diffusers(NETWORK, weights).items():
        if sum(one.nbytes for one in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    stem = "diffusion_pytorch_model"
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        places |= dict.fromkeys(shard, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def write_gguf(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """A GGUF file, its matrices in Q8_0 and the rest in float32, as converters make it."""
    import gguf

    path = folder / "network.gguf"
    writer = gguf.GGUFWriter(path, "lumina2")
    for name, tensor in weights.items():
        kinds = gguf.GGMLQuantizationType
        is_matrix = tensor.dim() > 1 and tensor.shape[-1] % 32 == 0
        kind = kinds.Q8_0 if is_matrix else kinds.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FORMS: Mapping[str, Callable[[Path, Mapping[str, Tensor]], Path]] = {
    "comfyui": write_comfyui,
    "diffusers": write_diffusers,
    "gguf": write_gguf,
}


def _memory(key: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def load(path: str, threads: int) -> dict[str, Any]:
    """Read a network's files in this process and say what that took, in bytes and seconds."""
    torch.set_num_threads(threads)
    if path.endswith(".gguf"):
        import gguf.quants  # noqa: F401
    _CLEAR.write_text("5")  # the peak so far is forgotten
    before, begin = _memory("VmHWM"), time.perf_counter()
    checkpoint = open_checkpoint(NETWORK, path)
    network = Transformer(TransformerConfig.from_shapes(checkpoint.shapes), dtype=torch.bfloat16)
    load_weights(network, checkpoint)
    seconds, peak = time.perf_counter() - begin, _memory("VmHWM") - before
    weights = network.native_tensors().values()
    size, largest = sum(one.nbytes for one in weights), max(one.nbytes for one in weights)
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "weight_bytes": size,
        "largest_bytes": largest,
        "allowed_bytes": int((1 + SHARE) * size + largest),
    }


def measure(
    forms: Sequence[str], folder: Path, *, sizes: Mapping[str, Any], threads: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Write a network in each form and read it with each number of threads, one at a time.

    Args:
        forms: Keys of `FORMS`.
        folder: For the files, which are removed again.
        sizes: Of the network, as `zimage_shapes` has them.
        threads: PyTorch's.

    Yields:
        What `load` says, with `form` and `threads`.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in zimage_shapes(sizes).items()
    }
    for form in forms:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            path = FORMS[form](Path(own), weights)
            for count in threads:
                yield {"form": form, "threads": count, **_load_apart(path, count)}


def _load_apart(path: Path, threads: int) -> dict[str, Any]:
    """`load` in a process of its own."""
    code = f"import json; from bench.loading import load; print(json.dumps(load({str(path)!r}, "
    command = [sys.executable, "-c", f"{code}{threads})))"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"reading {path.name} failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 if more memory was taken than is allowed."""
    parser = Parser(prog="python -m bench loading", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of weights (default: 2)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM",
                        help=f"of {', '.join(FORMS)} (default: all)")  # fmt: skip
    parser.add_argument("--threads", type=_count, nargs="+", default=[1], help="(default: 1)")
    parser.add_argument("--folder", type=Path, help="for the files (default: the temporary one)")
    options = parser.parse_args(arguments)
    if not _STATUS.exists():
        parser.error("needs Linux's memory figures")
    is_within = True
    sizes = sizes_of(options.gigabytes)
    for one in measure(options.forms, options.folder, sizes=sizes, threads=options.threads):
        is_within &= one["peak_bytes"] <= one["allowed_bytes"]
        peak, allowed, size = (one[f"{name}_bytes"] / 1e6 for name in ("peak", "allowed", "weight"))
        print(
            f"{one['form']:10} {one['threads']} threads: {one['seconds']:6.2f} s, peak "
            f"{peak:.0f} MB, allowed {allowed:.0f} MB for {size:.0f} MB of weights",
            flush=True,
        )
    return 0 if is_within else 1


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
