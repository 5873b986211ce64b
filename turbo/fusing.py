"""LoRAs fused into a loaded model's weights, and taken out again bit for bit.

The untouched weights are not kept in memory: they are read again from the checkpoint. A weight is
always made from its untouched value, in float32, and copied into the same storage, so nothing
drifts and whoever captured that storage stays valid.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from turbo.checkpoint import Checkpoint, Weight, WeightHolder, load_weight, native_weights
from turbo.errors import LoraError
from turbo.lora import Lora, Patch, apply_patches, match_lora, read_lora, require_match
from turbo.model_files import resolve_lora
from turbo.names import TEXT_ENCODER
from turbo.quantize import QuantizedRows
from turbo.stopping import Stop
from turbo.stored import StoredRows

FILES_KEPT = 4
MAX_STRENGTH = 1e6

Target = tuple[str, str]
"""(component, native tensor name)."""

_Patches = dict[Target, list[tuple[Patch, float]]]

MakeRoom = Callable[[Mapping[str, Collection[str]]], set[Target]]
"""Has the weights that LoRAs change (component -> native names) where these can be written, and no
others for that reason; returns all whose memory is new. See `turbo.placement.Placement.loosen`."""


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """A LoRA file and how strongly to apply it."""

    path: Path
    """The file."""
    strength: float
    """Factor for the network."""
    text_strength: float
    """Factor for the text encoder."""
    stamp: tuple[int, int]
    """Size and time of change of the file, so that a new version is read anew."""

    @classmethod
    def parse(cls, item: Any, folder: Path | None, default_strength: float) -> LoraChoice:
        """Read a path or name, a (path or name, strength) pair, or a triple.

        Raises:
            LoraError: It is none of these, the file is missing, or a strength is not finite.
        """
        values = tuple(item) if isinstance(item, tuple | list) else (item,)
        if not 1 <= len(values) <= 3 or not isinstance(values[0], str | Path):
            raise LoraError(
                f"a LoRA must be a path or name, (path, strength) or (path, strength, text "
                f"strength), got {item!r}"
            )
        strengths = [*values[1:]] or [default_strength]
        for strength in strengths:
            is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
            if not is_number or not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
                raise LoraError(f"a LoRA's strength must be a finite number, got {strength!r}")
        path = resolve_lora(values[0], folder)
        return cls(path, float(strengths[0]), float(strengths[-1]), _stamp_of(path))

    def strength_on(self, component: str) -> float:
        """The strength for one component."""
        return self.text_strength if component == TEXT_ENCODER else self.strength


class LoraFuser:
    """Keeps the weights of `modules` equal to the checkpoint's plus the LoRAs chosen.

    Args:
        modules: Component -> loaded module.
        checkpoints: Component -> the files it was loaded from.
        keep_files: Keep the last LoRA files in memory, for services that switch between a few.
    """

    def __init__(
        self,
        modules: Mapping[str, WeightHolder],
        checkpoints: Mapping[str, Checkpoint],
        *,
        keep_files: bool = False,
    ) -> None:
        self._modules = modules
        self._checkpoints = checkpoints
        self._keep_files = keep_files
        self._patches: _Patches | None = {}
        self._read = lru_cache(maxsize=FILES_KEPT if keep_files else 0)(_read_version)
        self._fused: tuple[LoraChoice, ...] | None = ()  # None: not known, a write failed
        self._fused_strictly = True
        self._changed: set[Target] = set()
        self._described: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._stops: list[Stop] = []
        self._reread: _Patches | None = None

    def check(self, choices: Sequence[LoraChoice], *, strict: bool = True) -> None:
        """Refuse LoRAs that do not fit, by the headers of the files alone.

        No weight is read or touched; the modules may be on the meta device.

        Args:
            choices: LoRAs.
            strict: As for `fuse`.

        Raises:
            LoraError: A file is missing, damaged or does not fit.
        """
        loras = [(choice, read_lora(choice.path, shapes_only=True)) for choice in choices]
        self._collect(loras, strict)

    def fuse(
        self,
        choices: Sequence[LoraChoice],
        *,
        strict: bool = True,
        make_room: MakeRoom | None = None,
    ) -> bool:
        """Make the weights those of the checkpoint with `choices` applied in order.

        Args:
            choices: LoRAs; none restores the checkpoint's weights.
            strict: Refuse a LoRA of which some keys fit nothing; one of which none fits always is.
            make_room: Called before weights are written; None: all can be written as they are.

        Returns:
            Whether any weight was written.

        Raises:
            LoraError: A file does not fit; no weight was touched.
            CheckpointError: The checkpoint's files have changed, so its weights cannot be restored.
            Exception: Writing failed; the weights are the checkpoint's, without any LoRA.
        """
        choices = tuple(choices)
        if choices == self._fused and (self._fused_strictly or not strict):
            return False
        loras = [(choice, self._read(choice.path, choice.stamp)) for choice in choices]
        patches = self._collect(loras, strict)
        targets = self._changed | set(patches)
        for component in {component for component, _ in targets}:
            self._checkpoints[component].check_unchanged()
        self._note(None, strict, targets, [])
        try:
            self._write(targets | self._room_for(patches, make_room), patches)
        except BaseException:
            self._write(targets | self._room_for((), make_room), {})
            self._note((), True, set(), [])
            raise
        described = [
            {
                "name": choice.path.name,
                "strength": choice.strength,
                "text_strength": choice.text_strength,
                "sha256": lora.fingerprint,
            }
            for choice, lora in loras
        ]
        self._note(choices, strict, set(patches), described)
        self._patches = patches if self._keep_files else None
        return True

    def fill(
        self,
        component: str,
        names: Collection[str],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write weights as they should be, from the files, with the LoRAs that are fused.

        For weights whose memory is new. A module's weights may be absent, on the meta device, while
        LoRAs change; these are left out then and get the LoRAs here.

        Args:
            component: Whose weights.
            names: Native names; none of these is absent.
            on_progress: Called with (tensors written, tensors in all) after each.

        Raises:
            CheckpointError: The files have changed or cannot be read.
            LoraError: A LoRA's file, which is not kept in memory, has changed or gone.
        """
        if self._fused is None:
            raise LoraError("the LoRAs fused are not known; call set_loras again")
        patches = self._patches if self._patches is not None else self._collect_fused()
        self._checkpoints[component].check_unchanged()
        self._write({(component, name) for name in names}, patches, on_progress)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Stop]:
        """Have LoRA files that are not kept in memory read once for all that is filled within.

        Gives what ends the filling of other threads at their next run of rows. May be entered
        again within, where it gives the same.
        """
        with self._lock:
            self._stops.append(self._stops[-1] if self._stops else Stop())
            stop = self._stops[-1]
            for checkpoint in self._checkpoints.values():
                checkpoint.stop = stop
        try:
            yield stop
        finally:
            with self._lock:
                self._stops.pop()
                if not self._stops:
                    self._reread = None
                    for checkpoint in self._checkpoints.values():
                        checkpoint.stop = None

    def _collect_fused(self) -> _Patches:
        with self._lock:
            if self._reread is not None:
                return self._reread
            read = [(one, self._read(one.path, one.stamp)) for one in self._fused or ()]
            collected = self._collect(read, self._fused_strictly)
            if self._stops:
                self._reread = collected
            return collected

    def describe(self) -> list[dict[str, Any]]:
        """Name, strengths and content hash of each fused LoRA, ready for JSON."""
        return [dict(entry) for entry in self._described]

    def _room_for(self, targets: Collection[Target], make_room: MakeRoom | None) -> set[Target]:
        names = {part: {name for owner, name in targets if owner == part} for part in self._modules}
        return set() if make_room is None else make_room(names)

    def _note(
        self,
        choices: tuple[LoraChoice, ...] | None,
        strictly: bool,
        changed: set[Target],
        described: list[dict[str, Any]],
    ) -> None:
        self._fused, self._fused_strictly = choices, strictly
        self._patches = {}
        self._reread = None
        self._changed, self._described = changed, described

    def _collect(self, loras: Sequence[tuple[LoraChoice, Lora]], strict: bool) -> _Patches:
        shapes = {name: self._checkpoints[name].shapes for name in self._modules}
        inert = {name: module.ignored_keys(shapes[name]) for name, module in self._modules.items()}
        collected: _Patches = {}
        for choice, lora in loras:
            match = match_lora(lora, shapes, inert)
            require_match(match, lora, strict=strict)
            for target, patches in match.patches.items():
                strength = choice.strength_on(target[0])
                collected.setdefault(target, []).extend((patch, strength) for patch in patches)
        return collected

    @torch.no_grad()
    def _write(
        self,
        targets: set[Target],
        patches: Mapping[Target, Sequence[tuple[Patch, float]]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        for component, module in self._modules.items():
            names = [name for owner, name in targets if owner == component]
            if not names:
                continue
            checkpoint, weights = self._checkpoints[component], native_weights(module)
            for done, name in enumerate(checkpoint.reading_order(names), start=1):
                if weights[name].device.type != "meta":
                    wanted = patches.get((component, name), ())
                    _write_weight(checkpoint, name, weights[name], wanted)
                if on_progress is not None:
                    on_progress(done, len(names))
            checkpoint.release()


def _stamp_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read_version(path: Path, stamp: tuple[int, int]) -> Lora:
    """Read one version of a file; another one must be chosen anew."""
    if not path.exists() or _stamp_of(path) != stamp:
        raise LoraError(f"{path}: has changed or gone since it was chosen; call set_loras again")
    return read_lora(path)


def _write_weight(
    checkpoint: Checkpoint,
    name: str,
    weight: Weight,
    patches: Sequence[tuple[Patch, float]],
) -> None:
    if not patches:
        load_weight(checkpoint, name, weight)
    elif isinstance(weight, StoredRows):
        raise AssertionError(f"{name} is kept as its file stores it; a LoRA cannot be fused there")
    elif isinstance(weight, QuantizedRows):  # fused first: a patch changes a row's range
        base = torch.empty(weight.shape, device=weight.device)
        checkpoint.copy_into(name, base)
        weight.quantize(apply_patches(base, patches))
    else:
        base = torch.empty_like(weight)
        checkpoint.copy_into(name, base)
        weight.copy_(apply_patches(base.float(), patches))
