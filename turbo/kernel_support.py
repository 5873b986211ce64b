"""Whether the fused kernels can run here: to ask for them where they cannot is an error."""

from __future__ import annotations

import contextlib

import torch

from turbo.errors import BadInputError


def require_kernels(device: torch.device) -> None:
    """Launch the smallest kernel once on `device`.

    So what Triton compiles with, a C compiler among it, is found missing here and not in the middle
    of a picture.

    Raises:
        BadInputError: Triton is missing, or cannot run on `device`.
    """
    try:
        from turbo.kernels.latent_upscale import latent_upscale
        from turbo.kernels.require import INTERPRETED
    except ImportError as error:
        raise BadInputError(
            f"kernels need Triton, which cannot be imported: {_first_line(error)}; install it "
            "(pip install triton) or leave kernels off"
        ) from error
    if device.type != "cuda" and not INTERPRETED:
        raise BadInputError(
            f"kernels need a CUDA device, got {device}; leave kernels off there, or set "
            "TRITON_INTERPRET=1 before the start to try them out in Triton's interpreter"
        )
    try:
        # Triton launches on the current device, whatever its tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            cell = torch.zeros(1, 1, 1, 1, device=device)
            latent_upscale(cell, cell, 0.5, 1, 1).cpu()  # a failed launch shows when waited for
    except Exception as error:  # Triton's own, its compilers' and the driver's
        raise BadInputError(
            f"kernels cannot run on {device}: {_first_line(error)}; leave kernels off"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
