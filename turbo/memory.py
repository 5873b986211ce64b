"""How much memory a plan needs, counted on the meta device before any weight is read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbo.autoencoder import Autoencoder
from turbo.checkpoint import Checkpoint
from turbo.components import Components, component_dtypes
from turbo.engine import pick_device, pick_dtype
from turbo.latent import STRIDE
from turbo.plan import Plan, Stage
from turbo.transformer import Transformer, padded_length

CAPTION_TOKENS = 64
"""Prompt length that the counts assume, in tokens: a paragraph."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes, by what they are for."""

    weights: dict[str, int]
    """Component -> its weights."""
    activations: dict[str, int]
    """Stage name, or `decode` -> most bytes of tensors alive at once while it is computed.

    Counted on the eager operations; workspaces of convolutions and attention, and what an
    allocator rounds up or keeps, are not in it.
    """

    @property
    def total(self) -> int:
        """All weights and the largest activations: what is held if nothing is offloaded."""
        return sum(self.weights.values()) + max(self.activations.values(), default=0)


def weight_dtypes(dtype: str, device: str) -> dict[str, torch.dtype]:
    """Component -> dtype of its weights in memory, for a plan's `torch_dtype` and `device`.

    Raises:
        BadInputError: The device does not exist here.
    """
    chosen = pick_device(device)
    return component_dtypes(pick_dtype(dtype, chosen), chosen)


def count_memory(
    checkpoints: Mapping[str, Checkpoint], plan: Plan, dtypes: Mapping[str, torch.dtype]
) -> MemoryNeed:
    """Count what the components of `checkpoints` need for `plan`, reading only file headers.

    Args:
        checkpoints: Component -> its opened files; all three.
        plan: Gives the sizes.
        dtypes: Component -> dtype that its weights are to have in memory.

    Raises:
        CheckpointError: The files do not hold what the component needs.
    """
    outline = Components.outline(checkpoints, dtypes)
    with torch.device("meta"):
        activations = {stage.name: _stage_bytes(outline.network, stage) for stage in plan.stages}
        activations["decode"] = _decode_bytes(outline.autoencoder, plan)
    weights = {name: _weight_bytes(module) for name, module in outline.by_name().items()}
    return MemoryNeed(weights, activations)


def _weight_bytes(module: nn.Module) -> int:
    return sum(weight.untyped_storage().nbytes() for weight in module.parameters())


def _stage_bytes(network: Transformer, stage: Stage) -> int:
    height, width = stage.height // STRIDE, stage.width // STRIDE
    batch = 1 if stage.cfg == 1 else 2
    config = network.config
    tokens = padded_length(CAPTION_TOKENS)
    latent = torch.empty(batch, config.channels, height, width, dtype=network.dtype)
    caption = torch.empty(batch, tokens, config.dim, dtype=network.dtype)
    rows = 4 * (config.noise_refiners + config.layers) + 1
    modulation = torch.empty(rows, config.dim, dtype=network.dtype)
    rotary = network.rotary_table(height, width, tokens)
    return _peak_bytes(network, lambda: network(latent, caption, modulation, rotary))


def _decode_bytes(autoencoder: Autoencoder, plan: Plan) -> int:
    last = plan.stages[-1]
    channels = autoencoder.config.latent_channels
    latent = torch.empty(1, channels, last.height // STRIDE, last.width // STRIDE)
    return _peak_bytes(autoencoder, lambda: autoencoder.decode(latent))


def _peak_bytes(module: nn.Module, work: Callable[[], Tensor]) -> int:
    with torch.no_grad(), _LiveBytes(module.parameters()) as live, _PlainAttention():
        work()
    peak: int = live.peak
    return peak


class _PlainAttention(TorchFunctionMode):
    """Attention without the score matrix that it has on the meta device only."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps count of the storages alive that were made inside the ``with`` block."""

    def __init__(self, weights: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {weight.untyped_storage()._cdata for weight in weights}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, sum(self.alive.values()))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive and key not in self.weights:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
