"""How much memory a plan needs, and which memory plan it fits, before any weight is read.

Counted on the meta device: weights exactly, activations operation by operation.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbo.autoencoder import Autoencoder
from turbo.checkpoint import Checkpoint
from turbo.components import Components, component_dtypes, keep_stored
from turbo.devices import free_bytes, pick_device, pick_dtype
from turbo.errors import BadInputError
from turbo.latent import STRIDE
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.pinned import pinned_bytes
from turbo.placement import (
    LOW,
    RESIDENT,
    RESIDENT_PLAN,
    STREAMED,
    WHOLE,
    MemoryPlan,
    streamed_bytes,
)
from turbo.plan import Performance, Plan, Stage
from turbo.quantize import QuantizedLinear
from turbo.text_encoder import TextEncoder
from turbo.transformer import PATCH, Transformer, padded_length

CAPTION_TOKENS = 64
"""Prompt length that the counts assume, in tokens: a paragraph."""
VAE_TILE = 64
"""Latent positions a side of a tile when a picture is decoded in tiles."""
MEMORY_PLANS = ("fast", "balanced", LOW)
"""From the largest and fastest to the smallest."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes, by what they are for."""

    weights: dict[str, int]
    """Component -> its weights."""
    activations: dict[str, int]
    """`prompt`, stage name or `decode` -> most bytes of tensors alive at once while it is computed.

    Counted on the eager operations; workspaces of convolutions and attention, and what an
    allocator rounds up or keeps, are not in it.
    """
    tiled_decode: int = 0
    """As `activations` has it for `decode`, in tiles."""
    streamed: dict[str, int] = field(default_factory=dict)
    """Component -> most bytes of its weights on the device at once while it is streamed."""
    pinned: dict[str, int] = field(default_factory=dict)
    """Component -> bytes of host memory that its weights take beside a GPU where they move."""
    low: MemoryNeed | None = None
    """The same where weights are kept as their files store them, as `low` does; the largest matrix
    of floats made of them is among the activations. None: no file stores any in fewer bytes."""

    def of(self, name: str) -> MemoryNeed:
        """What the memory plan of that name needs."""
        return self.low if self.low is not None and name == LOW else self

    @property
    def total(self) -> int:
        """All weights and the largest activations: what is held if nothing is offloaded."""
        return sum(self.weights.values()) + max(self.activations.values(), default=0)

    def peak(self, plan: MemoryPlan) -> int:
        """Most bytes on the device at once, as a memory plan holds the parts."""
        if self.of(plan.name) is not self:
            return self.of(plan.name).peak(plan)
        resident = {part for part, mode in plan.modes.items() if mode == RESIDENT}
        always = sum(self.weights[part] for part in resident)

        def at_work(part: str, activations: int) -> int:
            if part in resident:
                return always + activations
            held = self.streamed if plan.modes[part] == STREAMED else self.weights
            return always + held[part] + activations

        return max(at_work(*each) for each in self._turns(plan))

    def host_bytes(self, plan: MemoryPlan, device: torch.device) -> int:
        """Host memory, pinned, that is held beside a device as a memory plan has it."""
        if device.type != "cuda":
            return 0
        pinned = self.of(plan.name).pinned
        return sum(pinned[part] for part, mode in plan.modes.items() if mode != RESIDENT)

    def _turns(self, plan: MemoryPlan) -> Iterator[tuple[str, int]]:
        for name, count in self.activations.items():
            if name == "prompt":
                yield TEXT_ENCODER, count
            elif name == "decode":
                yield AUTOENCODER, self.tiled_decode if plan.is_tiled else count
            else:
                yield NETWORK, count

    def plan(self, name: str, device: torch.device, free: int | None = None) -> MemoryPlan:
        """How each part is held by a memory plan.

        A part that moves comes whole where that fits, else it is streamed. The text encoder is
        streamed on every CPU: it is read once a prompt in any case.

        Args:
            name: One of `MEMORY_PLANS`.
            device: Where the work is done.
            free: Bytes that the device has; None: no bound.
        """
        if name == "fast":
            return RESIDENT_PLAN
        need = self.of(name)
        if need is self:
            return self._plan(name, device, free)
        # A LoRA may change every matrix, so with one that is counted as if none were kept.
        loose = self._plan(name, device, free).modes
        return replace(need._plan(name, device, free), loose_modes=loose)

    def _plan(self, name: str, device: torch.device, free: int | None) -> MemoryPlan:
        text = STREAMED if device.type == "cpu" else WHOLE
        modes = {NETWORK: RESIDENT, TEXT_ENCODER: text, AUTOENCODER: RESIDENT}
        if name == LOW:
            modes = {NETWORK: WHOLE, TEXT_ENCODER: text, AUTOENCODER: WHOLE}
        for part in (TEXT_ENCODER, NETWORK):
            tried = MemoryPlan(name, dict(modes), is_tiled=True)
            if free is not None and modes[part] == WHOLE and self._part_peak(tried, part) > free:
                modes[part] = STREAMED
        return MemoryPlan(name, modes, is_tiled=True)

    def _part_peak(self, plan: MemoryPlan, part: str) -> int:
        counts = [count for worker, count in self._turns(plan) if worker == part]
        always = sum(self.weights[name] for name, mode in plan.modes.items() if mode == RESIDENT)
        return always + self.weights[part] + max(counts, default=0)


def weight_dtypes(dtype: str, device: str) -> dict[str, torch.dtype]:
    """Component -> dtype of its weights in memory, for a plan's `torch_dtype` and `device`.

    Raises:
        BadInputError: The device does not exist here.
    """
    chosen = pick_device(device)
    return component_dtypes(pick_dtype(dtype, chosen), chosen)


def count_memory(
    checkpoints: Mapping[str, Checkpoint],
    plan: Plan,
    dtypes: Mapping[str, torch.dtype],
    quantize: str | None = None,
    device: torch.device | str = "cpu",
) -> MemoryNeed:
    """Count what the components of `checkpoints` need for `plan`, reading only file headers.

    Args:
        checkpoints: Component -> its opened files; all three.
        plan: Gives the sizes.
        dtypes: Component -> dtype that its weights are to have in memory.
        quantize: How the network's large matrices are kept; None: in its dtype.
        device: Where the work is done: products with 8 bits differ.

    Raises:
        CheckpointError: The files do not hold what the component needs.
    """
    keep = keep_stored(None, quantize)
    outline = Components.outline(checkpoints, dtypes, quantize, keep=keep)
    return count_outline(outline, plan, device)


def count_outline(
    outline: Components, plan: Plan, device: torch.device | str = "cpu"
) -> MemoryNeed:
    """`count_memory` of modules on the meta device, of which no matrix is kept as in its file."""
    need = _count(outline, plan, device, keeps=False)
    if not outline.keepings:
        return need
    for keeping in outline.keepings.values():
        keeping.use(())
    try:
        return replace(need, low=_count(outline, plan, device, keeps=True))
    finally:
        for keeping in outline.keepings.values():
            keeping.use(None)


def _count(
    outline: Components, plan: Plan, device: torch.device | str, *, keeps: bool
) -> MemoryNeed:
    with torch.device("meta"):
        network, encoder = _shallow_network(outline.network), _shallow_encoder(outline.text_encoder)
        shallow: dict[str, nn.Module] = {NETWORK: network, TEXT_ENCODER: encoder}
        for part, keeping in outline.keepings.items() if keeps else ():
            keeping.imitate(shallow[part])
        for layer in network.modules():
            if isinstance(layer, QuantizedLinear):
                layer.counted_on = torch.device(device).type
        activations = {"prompt": _prompt_bytes(encoder)}
        activations |= {stage.name: _stage_bytes(network, stage) for stage in plan.stages}
        activations["decode"] = _decode_bytes(outline.autoencoder, plan)
        tiled = _decode_bytes(outline.autoencoder, plan, VAE_TILE)
    modules = outline.by_name()
    weights = {name: _weight_bytes(module) for name, module in modules.items()}
    streamed = {name: streamed_bytes(module) for name, module in modules.items()}
    pinned = {name: pinned_bytes(list(module.parameters())) for name, module in modules.items()}
    return MemoryNeed(weights, activations, tiled, streamed, pinned)


def _shallow_network(network: Transformer) -> Transformer:
    """A network of few blocks: each needs as much, and 34 take seconds to count."""
    config = network.config
    few = replace(
        config, layers=min(config.layers, 2), noise_refiners=min(config.noise_refiners, 1)
    )
    return Transformer(
        few,
        "meta",
        network.dtype,
        compute_dtype=network.compute_dtype,
        quantize=network.quantize,
    )


def _shallow_encoder(encoder: TextEncoder) -> TextEncoder:
    few = replace(encoder.config, num_layers=min(encoder.config.num_layers, 3))
    dtype, compute_dtype = encoder.embed_tokens.dtype, encoder.compute_dtype
    return TextEncoder(few, "meta", dtype, compute_dtype=compute_dtype)


def choose_memory(
    outline: Components,
    plan: Plan,
    device: torch.device,
    *,
    may_move_network: bool = True,
    free: int | None = None,
) -> MemoryPlan:
    """The memory plan that a plan asks for, sure that it fits the device.

    Nothing is counted where the weights leave so much room that it cannot matter.

    Args:
        outline: The model's modules on the meta device.
        plan: What is asked for; its `performance` says how memory is used.
        device: Where the work is done.
        may_move_network: False rules `low` out for `auto`.
        free: Bytes that the device has free; None asks it.

    Raises:
        BadInputError: It does not fit; says by how many bytes, and which would.
    """
    asked = plan.performance
    name = LOW if asked.enable_model_cpu_offload else asked.memory
    free = free_bytes(device) if free is None else free
    weights = sum(map(_weight_bytes, outline.by_name().values()))
    if free is None or weights + roomy_activations(outline, plan) <= free:
        need = MemoryNeed({}, {})
        chosen = need.plan("fast" if name == "auto" else name, device)
        told = ""
    else:
        plans = memory_plans(count_outline(outline, plan, device), asked, device, free)
        chosen = _first_that_fits(plans, name, device, free, may_move_network)
        needed = plans[chosen.name][1]
        told = f", {needed / 2**30:.2f} GiB at most of {free / 2**30:.2f} that are free"
    chosen = _tiled_as_asked(chosen, asked)
    moved = [f"{part} {mode}" for part, mode in chosen.modes.items() if mode != RESIDENT]
    logger.info(
        "memory plan %s on %s: %s%s%s",
        chosen.name,
        device,
        ", ".join(moved) or "everything resident",
        ", decoded in tiles" * chosen.is_tiled,
        told,
        extra={"keeps_all": not moved and not chosen.is_tiled},
    )
    return chosen


def lower_plan(name: str) -> str | None:
    """The next smaller memory plan, or None for the smallest."""
    place = MEMORY_PLANS.index(name) + 1
    return MEMORY_PLANS[place] if place < len(MEMORY_PLANS) else None


def memory_plans(
    need: MemoryNeed, asked: Performance, device: torch.device, free: int | None
) -> dict[str, tuple[MemoryPlan, int]]:
    """Name -> each memory plan with the keys of `asked`, and the bytes that it needs."""
    plans = {name: need.plan(name, device, free) for name in MEMORY_PLANS}
    tiled = {name: _tiled_as_asked(plan, asked) for name, plan in plans.items()}
    return {name: (plan, need.peak(plan)) for name, plan in tiled.items()}


def nearest_plan(plans: Mapping[str, tuple[MemoryPlan, int]]) -> str:
    """The name of the memory plan that needs least."""
    return min(plans, key=lambda name: plans[name][1])


def _tiled_as_asked(plan: MemoryPlan, asked: Performance) -> MemoryPlan:
    whole = asked.enable_model_cpu_offload and asked.memory == "auto"
    is_tiled = asked.enable_vae_tiling or (plan.is_tiled and not whole)
    return replace(plan, is_tiled=is_tiled)


def _first_that_fits(
    plans: Mapping[str, tuple[MemoryPlan, int]],
    name: str,
    device: torch.device,
    free: int,
    may_move_network: bool,
) -> MemoryPlan:
    """The plan of that name, or for `auto` the first that fits; on a CPU that is `fast` alone."""
    tried: Sequence[str] = (name,)
    if name == "auto":
        tried = ("fast",) if device.type == "cpu" else MEMORY_PLANS[: 3 if may_move_network else 2]
    for each in tried:
        plan, needed = plans[each]
        if needed <= free:
            return plan
    fitting = [f"memory {each!r} would fit" for each in plans if plans[each][1] <= free]
    nearest = nearest_plan(plans)
    nearer = f", {nearest!r} comes nearest with {plans[nearest][1] - free} too few"
    hint = (
        f"no memory plan would{nearer * (nearest != tried[-1])}; use 8-bit weights (quantize), "
        "bfloat16, or a smaller last stage"
    )
    raise BadInputError(
        f"memory {tried[-1]!r} needs {needed} bytes on {device}, where {free} are free: "
        f"{needed - free} too few; {(fitting or [hint])[0]}"
    )


def roomy_activations(outline: Components, plan: Plan) -> int:
    """A bound that the counted activations stay far below, without counting: it takes seconds."""
    pixels = max(stage.height * stage.width for stage in plan.stages)
    network, text = outline.network.config, outline.text_encoder.config
    channels = max(outline.autoencoder.config.level_channels[:2])
    tokens = pixels // (STRIDE * PATCH) ** 2 + 2 * padded_length(CAPTION_TOKENS)
    stage = 2 * tokens * (24 * network.dim + 8 * network.ffn_dim)
    wide = text.num_heads * text.head_dim + text.hidden_size + text.intermediate_size
    prompt = padded_length(CAPTION_TOKENS) * wide * 24 + text.hidden_size * text.intermediate_size
    return 4 * max(12 * channels * pixels, stage, 8 * prompt)


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


def _prompt_bytes(encoder: TextEncoder) -> int:
    ids = torch.empty(1, padded_length(CAPTION_TOKENS), dtype=torch.int64)
    rotary = torch.empty(2, ids.shape[1], encoder.config.head_dim)
    return _peak_bytes(encoder, lambda: encoder(ids, rotary))


def _decode_bytes(autoencoder: Autoencoder, plan: Plan, tile: int | None = None) -> int:
    last = plan.stages[-1]
    channels = autoencoder.config.latent_channels
    latent = torch.empty(1, channels, last.height // STRIDE, last.width // STRIDE)
    return _peak_bytes(autoencoder, lambda: autoencoder.decode(latent, tile=tile))


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
