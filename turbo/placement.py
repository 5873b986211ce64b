"""Where a model's weights are while their part works and while it rests.

A part can be *resident* (on the device always), come *whole* when it works, or be *streamed*: block
by block while it works. Beside a GPU, weights that rest are in pinned host memory, from which they
are copied without waiting; the next block's copy runs while a block computes, and nothing is ever
copied back. On a CPU they rest nowhere: their memory is given back, and they are read from the
model's files again, which the system's page cache usually holds.

Where a plan keeps weights as their files store them (`turbo.stored`), these are what rests, comes
and goes; modules exchange their matrices when the plan changes, or LoRAs on them do.

Weights that are absent are on the meta device, so whoever writes weights can tell. A part's
parameters are exchanged as objects: nobody may keep them, or views of them, from one turn of work
to the next.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from turbo.checkpoint import Weight, native_weights
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.pinned import pinned_like
from turbo.quantize import QuantizedRows
from turbo.stopping import Stop, StoppedError
from turbo.stored import Keeping, StoredRows
from turbo.text_encoder import TextEncoder
from turbo.transformer import Transformer

RESIDENT, WHOLE, STREAMED = "resident", "whole", "streamed"
LOW = "low"
"""The memory plan in which weights are also kept as their files store them, where that is less."""

AT_ONCE = 2
"""Blocks of a streamed part that are on the device at a time: one at work, one on its way."""

HEEDED_S = 0.2
"""Seconds after which a wait for threads that load looks for Ctrl-C."""

_Held = TypeVar("_Held")

Fill = Callable[[str, Collection[str]], None]
"""Writes the weights of a component that have these native names; they are on no meta device.

Several threads may call it at a time, each for another component."""

Reading = Callable[[], contextlib.AbstractContextManager[Stop]]
"""Entered around fills that belong together; gives what ends those of other threads."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How each part is held; see `turbo.plan.Performance` for the names."""

    name: str
    """`fast`, `balanced` or `low`."""
    modes: Mapping[str, str]
    """Component -> `RESIDENT`, `WHOLE` or `STREAMED`."""
    is_tiled: bool
    """Whether pictures are decoded in tiles whatever the request's plan says."""
    loose_modes: Mapping[str, str] | None = None
    """As `modes` for components of which LoRAs change weights that would be kept as their files
    store them: these take more then. `WHOLE` and `STREAMED` alone may differ; None: none does."""

    @property
    def moves(self) -> bool:
        """Whether any part is not always on the device."""
        return any(mode != RESIDENT for mode in self.modes.values())

    @property
    def keeps_stored(self) -> bool:
        """Whether weights are kept as their files store them, where that is less."""
        return self.name == LOW


_ALL_RESIDENT = dict.fromkeys((NETWORK, TEXT_ENCODER, AUTOENCODER), RESIDENT)
RESIDENT_PLAN = MemoryPlan("fast", _ALL_RESIDENT, is_tiled=False)


@dataclass(frozen=True, slots=True)
class Block:
    """What a streamed part fetches at a time."""

    module: nn.Module
    """Runs with these weights and no other way."""
    parameters: tuple[nn.Parameter, ...]


def blocks_of(module: nn.Module) -> tuple[tuple[Block, ...], ...]:
    """A component's blocks, in rings in which they run one after the other.

    The network's norms and modulation are read outside the blocks' turns, so only the large
    matrices come and go. The autoencoder has no blocks.
    """
    if isinstance(module, TextEncoder):
        return (tuple(Block(layer, tuple(layer.parameters())) for layer in module.layers),)
    if isinstance(module, Transformer):
        rings = ([*module.context_refiner], [*module.noise_refiner, *module.layers])
        return tuple(tuple(map(_matrices, ring)) for ring in rings)
    return ()


def _matrices(block: nn.Module) -> Block:
    parts = (block.get_submodule("attention"), block.get_submodule("feed_forward"))
    return Block(block, tuple(weight for part in parts for weight in part.parameters()))


def streamed_bytes(module: nn.Module) -> int:
    """Most bytes of a component's weights on the device at a time while it is streamed."""
    sizes = [_bytes(block.parameters) for ring in blocks_of(module) for block in ring]
    return _bytes(module.parameters()) - sum(sizes) + AT_ONCE * max(sizes, default=0)


def _bytes(weights: Any) -> int:
    return sum(weight.untyped_storage().nbytes() for weight in weights)


@dataclass(eq=False)
class _Slot:
    """One parameter's place in its module."""

    owner: nn.Module
    name: str
    outline: nn.Parameter
    """The parameter on the meta device."""
    has_padding: bool
    """Whether it holds values that no file has, which are 0."""
    names: Sequence[str]
    """Native names of what it holds."""

    def put(self, parameter: nn.Parameter) -> None:
        self.owner._parameters[self.name] = parameter

    def make(self, device: torch.device | str) -> nn.Parameter:
        new = torch.zeros if self.has_padding else torch.empty
        shape, dtype = self.outline.shape, self.outline.dtype
        # Made in inference mode, they could not be written outside it.
        with torch.inference_mode(mode=False):
            values = new(shape, dtype=dtype, device=device)
            return nn.Parameter(values, requires_grad=False)


@dataclass(eq=False)
class _Group:
    """Parameters that come and go together."""

    slots: list[_Slot]
    resting: list[nn.Parameter] | None = None
    """In host memory, beside a GPU."""
    coming: tuple[list[nn.Parameter], Any] | None = None
    """On the way to the device, and the event after the copy."""

    @property
    def names(self) -> list[str]:
        """Native names of what they hold."""
        return list(dict.fromkeys(name for slot in self.slots for name in slot.names))

    def put(self, parameters: Sequence[nn.Parameter]) -> None:
        for slot, parameter in zip(self.slots, parameters, strict=True):
            slot.put(parameter)

    def clear(self) -> None:
        """Make the weights absent."""
        self.put([slot.outline for slot in self.slots])

    def rest(self) -> None:
        if self.resting is None:
            self.clear()
        else:
            self.put(self.resting)


@dataclass(eq=False)
class _Component:
    module: nn.Module
    base: _Group = field(init=False)
    """What is no block's."""
    rings: list[list[_Group]] = field(init=False)
    blocks: dict[nn.Module, tuple[list[_Group], int]] = field(init=False)
    """Block -> its ring and place there."""
    keeps_stored: bool = False
    """Whether weights are kept as their files store them."""
    mode: str | None = None
    """None: nothing is there."""
    depth: int = 0
    """How many have asked for it to be at work."""
    hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.arrange()

    def arrange(self) -> None:
        """Find the places of the module's parameters, all of which must be absent."""
        left = _slots(self.module)
        self.rings, self.blocks = [], {}
        for ring in blocks_of(self.module):
            made: list[_Group] = []
            self.rings.append(made)
            for block in ring:
                self.blocks[block.module] = made, len(made)
                made.append(_Group([left.pop(parameter) for parameter in block.parameters]))
        self.base = _Group(list(left.values()))

    @property
    def groups(self) -> list[_Group]:
        return [self.base, *(group for ring in self.rings for group in ring)]

    @property
    def slots(self) -> list[_Slot]:
        return [slot for group in self.groups for slot in group.slots]

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group.names]


class Placement:
    """Moves the weights of components as a memory plan says.

    Args:
        modules: Component -> module on the meta device, which is given its weights here.
        device: Where work is done.
        fill: Writes weights; see `Fill`.
        keepings: Component -> which of its matrices can be kept as their file stores them.
        reading: Entered around calls of `fill`; see `Reading`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        fill: Fill,
        keepings: Mapping[str, Keeping] | None = None,
        reading: Reading = lambda: contextlib.nullcontext(Stop()),
    ) -> None:
        self._device = device
        self._fill = fill
        self._names = {module: component for component, module in modules.items()}
        self._components = {name: _Component(module) for name, module in modules.items()}
        self._keepings = keepings or {}
        self._reading = reading
        self._loose: dict[str, Collection[str]] = {}
        self._plan = RESIDENT_PLAN
        self._pins = device.type == "cuda"
        self._side: torch.cuda.Stream | None = None

    def use(self, plan: MemoryPlan) -> None:
        """Hold each component as a plan says, which may read its files.

        What leaves the device goes first. If this fails, the component that failed is absent and
        the others are as they were or as the plan says; it can be called again.
        """
        self._plan = plan
        modes = {component: self._mode_of(component) for component in self._components}
        for component, part in self._components.items():
            keeps_stored = plan.keeps_stored and component in self._keepings
            if part.mode != modes[component] or part.keeps_stored != keeps_stored:
                self._leave(part)
            if part.keeps_stored != keeps_stored:
                part.keeps_stored = keeps_stored
                self._exchange(component, part)
        absent = [name for name, part in self._components.items() if part.mode is None]
        if absent:
            with self._reading() as stop:
                self._enter_all({name: modes[name] for name in absent}, stop)

    def _enter_all(self, modes: Mapping[str, str], stop: Stop) -> None:
        """Side by side: 0.82 against 1.75 s for 690 MB of files in the page cache, two cores.

        Whatever ends this, an error in one of them or Ctrl-C, ends them all.
        """
        on_stream = _on_stream_of_caller(self._device)

        def enter(component: str, mode: str) -> None:
            with on_stream():
                self._enter(component, mode, stop)

        pool = ThreadPoolExecutor(len(modes), "turbo-load")
        try:
            entered = [pool.submit(enter, *each) for each in modes.items()]
            waiting = set(entered)
            while waiting:  # in short waits: one without end may not hear of Ctrl-C
                done, waiting = wait(waiting, HEEDED_S, FIRST_EXCEPTION)
                if any(each.exception() is not None for each in done):
                    stop.ask()
        except BaseException:
            stop.ask()
            raise
        finally:
            pool.shutdown()
        errors = [error for each in entered if (error := each.exception()) is not None]
        for error in errors:
            if not isinstance(error, StoppedError):
                raise error

    def clear(self) -> None:
        """Make everything absent."""
        for part in self._components.values():
            self._leave(part)

    def loosen(self, names: Mapping[str, Collection[str]]) -> set[tuple[str, str]]:
        """Hold weights that LoRAs change in their module's dtype, and no others for that reason.

        For when no part is at work. What is affected must be written again if it is not absent.

        Args:
            names: Component -> native names of what LoRAs change.

        Returns:
            (component, native name) of all weights whose memory is new.
        """
        fresh: set[tuple[str, str]] = set()
        for component, part in self._components.items():
            self._loose[component] = names.get(component, ())
            if part.keeps_stored:
                assert part.depth == 0
                fresh |= {(component, name) for name in self._exchange(component, part)}
                if part.mode is not None:
                    self._set_mode(component, part, self._mode_of(component))
        return fresh

    @property
    def modes(self) -> dict[str, str | None]:
        """Component -> how it is held now; None: it is absent."""
        return {component: part.mode for component, part in self._components.items()}

    def _mode_of(self, component: str) -> str:
        """How the plan has a component held, with the LoRAs that are on."""
        keeping, loose = self._keepings.get(component), self._plan.loose_modes
        if keeping is None or loose is None or not keeping.has(self._loose.get(component, ())):
            return self._plan.modes[component]
        return loose[component]

    def _exchange(self, component: str, part: _Component) -> set[str]:
        """Have a module's matrices as they are to be kept; names of those whose memory is new.

        If this fails, the component is absent.
        """
        try:
            return self._try_to_exchange(component, part)
        except BaseException:
            self._leave(part)
            raise

    def _try_to_exchange(self, component: str, part: _Component) -> set[str]:
        rested = {
            (slot.owner, slot.name): parameter
            for group in part.groups
            for slot, parameter in zip(group.slots, group.resting or (), strict=False)
        }
        for group in part.groups:
            group.clear()
        self._keepings[component].use(self._loose.get(component, ()) if part.keeps_stored else None)
        part.arrange()
        if not rested:
            return set()
        fresh = [slot for slot in part.slots if (slot.owner, slot.name) not in rested]
        for slot, parameter in zip(fresh, _make_pinned(fresh), strict=True):
            rested[slot.owner, slot.name] = parameter
        for group in part.groups:
            group.resting = [rested[slot.owner, slot.name] for slot in group.slots]
            group.rest()
        return {name for slot in fresh for name in slot.names}

    @property
    def held_bytes(self) -> int:
        """Bytes of the weights that are on the device now."""
        groups = [group for part in self._components.values() for group in part.groups]
        there = [slot.owner._parameters[slot.name] for group in groups for slot in group.slots]
        device = self._device.type
        return _bytes(
            weight for weight in there if weight is not None and weight.device.type == device
        )

    def at_work(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Have a component's weights on the device, or its blocks' when each runs."""
        component = self._names[module]
        part = self._components[component]
        if part.mode == RESIDENT:
            return contextlib.nullcontext()
        return self._turn(component, part)

    @contextlib.contextmanager
    def _turn(self, component: str, part: _Component) -> Iterator[None]:
        groups = [part.base] if part.mode == STREAMED else part.groups
        part.depth += 1
        try:
            with self._reading():
                if part.depth == 1:
                    self._bring(component, groups)
                yield
        finally:
            part.depth -= 1
            if part.depth == 0:
                for group in part.groups:
                    self._stop(group)
                    group.rest()

    def _leave(self, part: _Component) -> None:
        """Make a component absent."""
        _remove_hooks(part)
        for group in part.groups:
            group.resting = None
            group.clear()
        part.mode = None

    def _enter(self, component: str, mode: str, stop: Stop) -> None:
        part = self._components[component]
        try:
            if mode == RESIDENT or self._pins:
                self._read(component, part, stop, resident=mode == RESIDENT)
        except BaseException:
            self._leave(part)
            raise
        self._set_mode(component, part, mode)

    def _set_mode(self, component: str, part: _Component, mode: str) -> None:
        """What rests is the same for `WHOLE` and `STREAMED`."""
        _remove_hooks(part)
        if mode == STREAMED:
            for block in part.blocks:
                before = block.register_forward_pre_hook(self._fetcher(component, part))
                after = block.register_forward_hook(_dropper(part), always_call=True)
                part.hooks += [before, after]
        part.mode = mode

    def _read(self, component: str, part: _Component, stop: Stop, *, resident: bool) -> None:
        """Fill all of a component, on the device or where it rests beside a GPU."""
        rested = iter(() if resident else _make_pinned(part.slots, stop.check))
        for group in part.groups:
            stop.check()
            made = [slot.make(self._device) if resident else next(rested) for slot in group.slots]
            group.put(made)
            group.resting = None if resident else made
        self._fill(component, part.names)

    def _bring(self, component: str, groups: Sequence[_Group]) -> None:
        if self._pins:
            for group in groups:
                self._start(group)
            for group in groups:
                self._finish(group)
            return
        for group in groups:
            group.put([slot.make(self._device) for slot in group.slots])
        self._fill(component, [name for group in groups for name in group.names])

    def _fetcher(self, component: str, part: _Component) -> Callable[..., None]:
        placement, of = _weakly(self), _weakly(part)

        def fetch(block: nn.Module, inputs: Any) -> None:
            self = placement()
            ring, place = of().blocks[block]
            if not self._pins:
                self._bring(component, [ring[place]])
                return
            self._start(ring[place])
            self._finish(ring[place])
            following = ring[(place + 1) % len(ring)]
            if following is not ring[place]:
                self._start(following)

        return fetch

    def _start(self, group: _Group) -> None:
        """Begin to copy a group to the GPU, beside the work that is queued there."""
        if group.coming is not None or group.resting is None:
            return
        compute = torch.cuda.current_stream(self._device)
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        made = [slot.make(self._device) for slot in group.slots]
        # This memory may be another tensor's until the work queued so far is done.
        self._side.wait_stream(compute)
        with torch.cuda.stream(self._side):
            for target, source in zip(made, group.resting, strict=True):
                target.data.copy_(source.data, non_blocking=True)
        group.coming = made, self._side.record_event()

    def _finish(self, group: _Group) -> None:
        """Let the work that is queued from now on use what `_start` began to copy."""
        if group.coming is not None:
            made, event = group.coming
            torch.cuda.current_stream(self._device).wait_event(event)
            group.put(made)
            group.coming = None

    def _stop(self, group: _Group) -> None:
        """Drop what is on its way; its memory is free again when the copy is done."""
        if group.coming is not None:
            torch.cuda.current_stream(self._device).wait_event(group.coming[1])
            group.coming = None


def _weakly(held: _Held) -> Callable[[], _Held]:
    """For a module's hook: were it to hold what holds the module, weights would outlive both."""
    reference = weakref.ref(held)

    def get() -> _Held:
        there = reference()
        assert there is not None, "a module is used whose placement is gone"
        return there

    return get


def _dropper(part: _Component) -> Callable[..., None]:
    of = _weakly(part)

    def drop(block: nn.Module, inputs: Any, output: Any) -> None:
        ring, place = of().blocks[block]
        ring[place].rest()

    return drop


def _remove_hooks(part: _Component) -> None:
    for hook in part.hooks:
        hook.remove()
    part.hooks.clear()


def _make_pinned(
    slots: Sequence[_Slot], check: Callable[[], None] = lambda: None
) -> list[nn.Parameter]:
    """Parameters in pinned host memory, where those with padding are zeros."""
    with torch.inference_mode(mode=False):
        made = pinned_like([slot.outline.detach() for slot in slots], check)
        for slot, values in zip(slots, made, strict=True):
            if slot.has_padding:
                values.zero_()
        return [nn.Parameter(values, requires_grad=False) for values in made]


def _on_stream_of_caller(
    device: torch.device,
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context for other threads, whose work on a GPU then queues where the caller's does.

    So it is done before what the caller queues when they have ended, and memory that is given back
    is taken again in that order too. A thread of its own would start on the default stream.
    """
    if device.type != "cuda":
        return contextlib.nullcontext
    stream = torch.cuda.current_stream(device)
    return lambda: torch.cuda.stream(stream)


def _slots(module: nn.Module) -> dict[nn.Parameter, _Slot]:
    filled, names = _filled_values(module), _names_of(module)
    return {
        parameter: _Slot(
            owner,
            name,
            parameter,
            filled.get(_key(parameter), 0) < parameter.numel(),
            names.get(_key(parameter), ()),
        )
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    }


def _names_of(module: Any) -> dict[int, list[str]]:
    """Storage -> native names of the weights in it."""
    names: dict[int, list[str]] = {}
    for name, weight in native_weights(module).items():
        for tensor in _tensors(weight):
            names.setdefault(_key(tensor), []).append(name)
    return names


def _filled_values(module: Any) -> dict[int, int]:
    """Storage -> how many of its values the files fill."""
    filled: dict[int, int] = {}
    for weight in native_weights(module).values():
        for tensor in _tensors(weight):
            filled[_key(tensor)] = filled.get(_key(tensor), 0) + tensor.numel()
    return filled


def _tensors(weight: Weight) -> tuple[Tensor, ...]:
    if isinstance(weight, StoredRows):
        return weight.tensors
    return (weight.values, weight.scales) if isinstance(weight, QuantizedRows) else (weight,)


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
