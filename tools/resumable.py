"""Training that a kill at any point does not change.

Step n's batch depends on (seed, phase, n) alone, and all that a step changes is kept: weights,
their running average, the optimiser's moments. So a run that was stopped and went on has the bits
of one that was not, on the same machine.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.muon import Muon
from turbo.errors import BadInputError
from turbo.messages import one_line
from turbo.whole_file import write_out

SAVE_SECONDS = 120.0
SHOW_SECONDS = 600.0
"""Between two calls of `on_save`, which takes some seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long, and how fast, a phase learns."""

    steps: int
    rate: float
    """The highest learning rate."""
    warm_up: int = 50
    """Steps until it is reached."""
    ema: float = 0.998
    """Share of the running average that a step keeps."""
    decay: float = 0.01
    """Weight decay, times the rate at each step."""
    horizon: int = 0
    """After how many steps the rate would be nearly nothing; 0: `steps`."""

    def progress(self, step: int) -> float:
        """How much of the horizon is behind, from 0 to 1."""
        return step / (self.horizon or self.steps)

    def rate_at(self, step: int) -> float:
        """Rising to `rate`, then along a half cosine to nearly nothing."""
        rise = min(1.0, (step + 1) / self.warm_up)
        fall = 0.5 * (1 + math.cos(math.pi * self.progress(step)))
        return self.rate * rise * (0.02 + 0.98 * fall)


def train(
    name: str,
    weights: Mapping[str, Tensor],
    loss_of: Callable[[int], Tensor],
    schedule: Schedule,
    folder: Path,
    log: Callable[[str], None],
    on_save: Callable[[int], None] | None = None,
    matrices: Mapping[str, int] | None = None,
    precision: torch.dtype = torch.float32,
) -> None:
    """Train `weights` in place; at the end they are their running average.

    Args:
        name: Of the phase; its state is kept under it.
        weights: Leaves that require gradients.
        loss_of: The loss of a step's batch.
        schedule: Steps and rates.
        folder: Where the state is kept.
        log: Takes a line.
        on_save: Called with the step after the state was kept, now and then and at the end, with
            the averages in `weights`.
        matrices: The weights that Muon trains -> how many matrices are stacked in each; AdamW
            trains the others.
        precision: Of Muon's products.

    Raises:
        FloatingPointError: A loss is not finite; what was kept before is left as it is.
    """
    path = folder / f"{name}.safetensors"
    average = {key: weight.detach().clone() for key, weight in weights.items()}
    optimiser = _Optimiser(weights, matrices or {}, schedule.decay, precision)
    step = _restore(path, weights, average, optimiser)
    if step:
        log(f"{name}: goes on at step {step} of {schedule.steps}")
    started = saved = shown = time.time()
    seen, total, first = 0, 0.0, step
    while step < schedule.steps:
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{name}: the loss of step {step} is {loss.item()}")
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step(schedule.rate_at(step))
        step += 1
        with torch.no_grad():
            keep = min(schedule.ema, step / (step + 10))
            for key, weight in weights.items():
                average[key].lerp_(weight, 1 - keep)
        seen, total = seen + 1, total + float(loss.detach())
        if step % 50 == 0 or step == schedule.steps:
            pace = (time.time() - started) / (step - first)
            log(f"{name}: step {step} of {schedule.steps}, loss {total / seen:.4f}, {pace:.2f} s")
            seen, total = 0, 0.0
        if time.time() - saved > SAVE_SECONDS or step == schedule.steps:
            _keep(path, step, weights, average, optimiser)
            saved = time.time()
            is_due = saved - shown > SHOW_SECONDS or step == schedule.steps
            if on_save is not None and is_due:
                shown = saved
                with _swapped(weights, average):
                    on_save(step)
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(average[key])


class _Optimiser:
    """Muon for matrices, AdamW for the rest."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        matrices: Mapping[str, int],
        decay: float,
        precision: torch.dtype,
    ):
        self.muon = Muon({name: weights[name] for name in matrices}, matrices, decay, precision)
        self.others = {name: of for name, of in weights.items() if name not in matrices}
        self.adam = torch.optim.AdamW(self.others.values(), betas=(0.9, 0.99), weight_decay=decay)

    def step(self, rate: float) -> None:
        """Step along the gradients and drop them."""
        torch.nn.utils.clip_grad_norm_(self.others.values(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.muon.step(rate)
        for weight in (*self.others.values(), *self.muon.weights.values()):
            weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """What has to be kept, by name; the tensors themselves."""
        state = {f"momentum/{name}": value for name, value in self.muon.state.items()}
        for name, weight in self.others.items():  # nothing for one that had no gradient yet
            state |= {f"{part}/{name}": value for part, value in self.adam.state[weight].items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was kept."""
        for name, value in self.muon.state.items():
            value.copy_(state[f"momentum/{name}"])
        for name, weight in self.others.items():
            parts = ("step", "exp_avg", "exp_avg_sq")
            kept = {part: state[f"{part}/{name}"] for part in parts if f"{part}/{name}" in state}
            if kept:
                self.adam.state[weight] = kept


class _swapped:
    """The averages in place of the weights, for a while."""

    def __init__(self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
        self.weights, self.average = weights, average
        self.own = {key: weight.detach().clone() for key, weight in weights.items()}

    def __enter__(self) -> None:
        self._put(self.average)

    def __exit__(self, *_: object) -> None:
        self._put(self.own)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for key, weight in self.weights.items():
            weight.copy_(values[key])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that is whole or not there."""
    unfinished = path.with_suffix(".tmp")
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(contiguous, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)
    with unfinished.open("rb") as file:
        write_out(file)  # or a power cut may leave the name without the content
    os.replace(unfinished, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote.

    Raises:
        BadInputError: The file is damaged.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except SafetensorError as error:
        raise BadInputError(
            f"{path} is damaged ({one_line(error)}); delete it, what it held is made again"
        ) from error


def _keep(
    path: Path,
    step: int,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimiser: _Optimiser,
) -> None:
    state: dict[str, Tensor] = {"step": torch.tensor(step), **optimiser.state()}
    for key, weight in weights.items():
        state |= {f"weight/{key}": weight, f"average/{key}": average[key]}
    write_tensors(path, state)


@torch.no_grad()
def _restore(
    path: Path,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimiser: _Optimiser,
) -> int:
    if not path.exists():
        return 0
    state = read_tensors(path)
    step = int(state["step"])
    for key, weight in weights.items():
        weight.copy_(state[f"weight/{key}"])
        average[key].copy_(state[f"average/{key}"])
    optimiser.restore(state)
    return step
