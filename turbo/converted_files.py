"""``turbo convert``: a model in another layout of its files, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from turbo.checkpoint import Checkpoint, norm_groups, norm_groups_metadata
from turbo.diffusers_folder import DIFFUSERS_FILES, diffusers_configs, write_json, write_pipeline
from turbo.errors import BadInputError
from turbo.model_files import COMFYUI_FOLDERS, PREFERRED_FILES, ModelFiles
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER, diffusers_names, is_plain_matrix
from turbo.quantized_files import copy_tokenizer
from turbo.tensor_file import write_streamed
from turbo.tokenizer import Tokenizer
from turbo.whole_file import whole_folder

LAYOUTS = ("comfyui", "diffusers")


def write_converted(
    files: ModelFiles,
    out: Path,
    layout: str,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write a model in a layout, each tensor in the dtype it has; quantised ones in bfloat16.

    Args:
        files: The model, in any layout.
        out: Folder to make; it appears whole or not at all.
        layout: ``comfyui`` (one file of each component, under the names of the workflow) or
            ``diffusers`` (component folders that diffusers and transformers load too).
        on_progress: Called with (component, tensors written, tensors in all).

    Returns:
        `out`, for ``Engine.from_pretrained``.

    Raises:
        BadInputError: No such layout, `out` exists, or the network is in `turbo quantize`'s 8 bits.
        CheckpointError: The model is damaged or incomplete.
        SaveError: The folder cannot be written, or the disk is full.
    """
    if layout not in LAYOUTS:
        raise BadInputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if os.path.lexists(out):
        raise BadInputError(f"{str(out)!r} exists; give the name of a new folder")
    checkpoints = files.open()
    if checkpoints[NETWORK].quantization is not None:
        raise BadInputError(
            f"{files.network}: the network is in 8 bits ({checkpoints[NETWORK].quantization}); "
            "convert the original, then quantize what that gives"
        )
    write = _write_comfyui if layout == "comfyui" else _write_diffusers
    with whole_folder(out) as folder:
        write(folder, files, checkpoints, on_progress or (lambda *_: None))
    return out


def _write_comfyui(
    folder: Path,
    files: ModelFiles,
    checkpoints: Mapping[str, Checkpoint],
    on_progress: Callable[[str, int, int], None],
) -> None:
    for component, checkpoint in checkpoints.items():
        path = folder / COMFYUI_FOLDERS[component][0] / PREFERRED_FILES[component]
        path.parent.mkdir()
        names = {name: (name,) for name in checkpoint.shapes}
        _stream(path, checkpoint, names, on_progress, norm_groups_metadata(checkpoint))
    if files.tokenizer is not None:
        copy_tokenizer(files.tokenizer, folder / "tokenizer")


def _write_diffusers(
    folder: Path,
    files: ModelFiles,
    checkpoints: Mapping[str, Checkpoint],
    on_progress: Callable[[str, int, int], None],
) -> None:
    tokenizer = files.require_tokenizer()
    last_token = Tokenizer.from_path(tokenizer).encode("<|im_end|>")[0]
    shapes = {component: checkpoint.shapes for component, checkpoint in checkpoints.items()}
    dtype = checkpoints[TEXT_ENCODER].float_dtype("model.embed_tokens.weight")
    configs = diffusers_configs(shapes, dtype, last_token, norm_groups(checkpoints[AUTOENCODER]))
    for component, checkpoint in checkpoints.items():
        path = folder / DIFFUSERS_FILES[component]
        write_json(path.with_name("config.json"), configs[component])
        _stream(path, checkpoint, diffusers_names(component, checkpoint.shapes), on_progress)
    copy_tokenizer(tokenizer, folder / "tokenizer")
    write_pipeline(folder)


def _stream(
    path: Path,
    checkpoint: Checkpoint,
    names: Mapping[str, Sequence[str]],
    on_progress: Callable[[str, int, int], None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file; `names` has the file's names of the rows of each native tensor."""
    outline: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, parts in names.items():
        shape = checkpoint.shapes[name]
        if len(parts) > 1:
            shape = (shape[0] // len(parts), *shape[1:])
        if is_plain_matrix(name) and name not in parts:
            shape = shape[:2]  # diffusers has a matrix for a convolution of 1x1
        outline |= {part: (checkpoint.float_dtype(name), shape) for part in parts}
    order = checkpoint.reading_order(checkpoint.shapes)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, name in enumerate(order, start=1):
            whole = torch.empty(checkpoint.shapes[name], dtype=checkpoint.float_dtype(name))
            checkpoint.copy_into(name, whole)
            yield from zip(names[name], whole.chunk(len(names[name])), strict=True)
            on_progress(checkpoint.component, done, len(order))

    write_streamed(path, outline, tensors(), metadata)
    checkpoint.release()
