"""The three modules that a model is made of, built as the shapes in its files say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch

from turbo.autoencoder import Autoencoder, AutoencoderConfig
from turbo.checkpoint import Checkpoint, check_fit, norm_groups
from turbo.errors import CheckpointError
from turbo.header import one_line
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.precision import arithmetic_dtype
from turbo.stored import Keeping
from turbo.text_encoder import TextEncoder, TextEncoderConfig
from turbo.transformer import Transformer, TransformerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """A model's modules, under the names of its components."""

    network: Transformer
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    keepings: Mapping[str, Keeping] = field(default_factory=dict)
    """Component -> which of its matrices are kept as their file stores them, at first none; only
    what has such matrices, and only of `outline`."""

    @classmethod
    def build(
        cls,
        checkpoints: Mapping[str, Checkpoint],
        device: torch.device | str,
        dtypes: Mapping[str, torch.dtype],
        quantize: str | None = None,
    ) -> Components:
        """Make the modules without reading a weight: their values are uninitialised.

        Args:
            checkpoints: Component -> its opened files; all three.
            device: Where the weights are to be; on "meta" they take no memory.
            dtypes: Component -> dtype of its weights.
            quantize: How the network's large matrices are kept, one of
                `turbo.quantize.QUANTIZATIONS`; None: in its dtype.

        Raises:
            CheckpointError: No module has such shapes.
        """
        shapes = {component: checkpoint.shapes for component, checkpoint in checkpoints.items()}
        groups = norm_groups(checkpoints[AUTOENCODER])
        network = TransformerConfig.from_shapes(shapes[NETWORK])
        text_encoder = TextEncoderConfig.from_shapes(shapes[TEXT_ENCODER])
        autoencoder = AutoencoderConfig.from_shapes(shapes[AUTOENCODER], norm_num_groups=groups)
        return cls(
            network=Transformer(network, device, dtypes[NETWORK], quantize=quantize),
            text_encoder=TextEncoder(text_encoder, device, dtypes[TEXT_ENCODER]),
            autoencoder=Autoencoder(autoencoder, device, dtypes[AUTOENCODER]),
        )

    @classmethod
    def outline(
        cls,
        checkpoints: Mapping[str, Checkpoint],
        dtypes: Mapping[str, torch.dtype],
        quantize: str | None = None,
        *,
        keep: Collection[str] = (NETWORK, TEXT_ENCODER),
    ) -> Components:
        """Make the modules on the meta device, sure that the files hold what they need.

        Args:
            checkpoints: As for `build`, with `dtypes` and `quantize`.
            dtypes: Component -> dtype of its weights.
            quantize: How the network's large matrices are kept.
            keep: Components of which matrices may be kept as their files store them, in `keepings`.

        Raises:
            CheckpointError: Tensors are missing, left over or of another shape.
        """
        try:
            outline = cls.build(checkpoints, "meta", dtypes, quantize)
        except RuntimeError as error:  # nothing is allocated, so it is a size beyond 64 bits
            raise CheckpointError(
                f"the model's files hold shapes that no module can have: {one_line(error)}"
            ) from error
        for component, module in outline.by_name().items():
            check_fit(module, checkpoints[component])
        made = {part: _keeping(outline.by_name()[part], checkpoints[part]) for part in keep}
        return replace(outline, keepings={part: one for part, one in made.items() if one})

    def by_name(self) -> dict[str, Transformer | TextEncoder | Autoencoder]:
        """Component -> its module."""
        return {
            NETWORK: self.network,
            TEXT_ENCODER: self.text_encoder,
            AUTOENCODER: self.autoencoder,
        }


def _keeping(module: Transformer | TextEncoder | Autoencoder, checkpoint: Checkpoint) -> Keeping:
    found = {name: checkpoint.stored(name) for name in module.native_tensors()}
    return Keeping(module, {name: parts for name, parts in found.items() if parts is not None})


def keep_stored(asked: str | None, kept: str | None) -> tuple[str, ...]:
    """Components of which matrices may be kept as their files store them, for `outline`.

    The network's may not where `asked`, the setting `quantize`, says how to keep them, nor where
    they are kept in 8 bits (`kept`) in any case.
    """
    is_free = asked in (None, "auto") and kept is None
    return (NETWORK, TEXT_ENCODER) if is_free else (TEXT_ENCODER,)


def component_dtypes(
    dtype: torch.dtype, device: torch.device | str = "cuda"
) -> dict[str, torch.dtype]:
    """Component -> dtype of its weights where the network's is `dtype`.

    The autoencoder works in float32 instead of float16, which overflows in it, and on a CPU that
    only imitates bfloat16.
    """
    autoencoder = torch.float32 if dtype == torch.float16 else arithmetic_dtype(dtype, device)
    return {NETWORK: dtype, TEXT_ENCODER: dtype, AUTOENCODER: autoencoder}
