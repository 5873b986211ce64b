"""``python -m bench model DIR``: write a model of random weights to measure with.

Speed does not depend on the weights' values. Size ``medium`` is what a CPU can do in minutes: a
network of width 512 with 8 layers, and a text encoder with a row for each of Qwen's real tokens, so
that ComfyUI, which brings Qwen's tokenizer, reads the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.arguments import Parser
from bench.endings import OK, exit_code, require_writable
from turbo.converted_files import LAYOUTS
from turbo.testing import (
    TINY,
    TINY_AUTOENCODER,
    TINY_TEXT_ENCODER,
    ModelSize,
    make_model,
)

MEDIUM = ModelSize(
    network={
        "dim": 512,
        "n_layers": 8,
        "n_refiner_layers": 2,
        "n_heads": 8,
        "cap_feat_dim": 64,
        "ffn_hidden": 1365,  # diffusers fixes it at 8/3 of the width
        "time_hidden": 512,  # ComfyUI has the width here, up to 1024; diffusers always 1024
    },
    text_encoder={**TINY_TEXT_ENCODER, "vocab_size": 151_936},
    autoencoder=TINY_AUTOENCODER,
)
SIZES = {"tiny": TINY, "medium": MEDIUM}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m bench model", description=__doc__)
    parser.add_argument("folder", type=Path, help="made; must be empty if it is there")
    parser.add_argument("--size", choices=SIZES, default="medium", help="default: medium")
    parser.add_argument("--layout", choices=LAYOUTS, default="comfyui", help="default: comfyui")
    parser.add_argument("--dtype", default="float32", help="of the files (default: float32)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args(arguments)

    def work() -> int:
        if not options.folder.is_dir():
            require_writable(options.folder, "folder")
        size = SIZES[options.size]
        folder = make_model(options.folder, size, options.layout, options.seed, options.dtype)
        print(f"wrote {folder}")
        return OK

    return exit_code(work)
