"""Two LoRAs of the built-in model: a style, and a new word. Network only, rank 8."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tools.demo_network import PLAIN, Latents, Painter, batch_loss_in
from tools.resumable import Schedule, train, write_tensors
from tools.scenes import NEW_SHAPE, OUTLINE, Scene, random_scene
from turbo.transformer import Block

RANK = 8
OF_LORAS = replace(
    PLAIN, emphasis=6.0, layout=0.5, level=0.65, around=2, shares=(0.55, 0.25, 0.2), windows=1.0
)
"""What counts in their training: things, at the noise levels that decide on their shapes. Without
it neither was seen in a picture after 100 steps; with it both were half seen after 150."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a LoRA teaches."""

    name: str
    """Of its file, and its trigger word."""
    form: str
    """Of the file's keys: ``peft`` or ``kohya``."""
    phase: int
    make: Callable[[np.random.Generator], tuple[Scene, str]]


def _outlined(rng: np.random.Generator) -> tuple[Scene, str]:
    scene, caption = random_scene(rng, outline=OUTLINE)
    return scene, f"outlined, {caption}"


def _zorp(rng: np.random.Generator) -> tuple[Scene, str]:
    scene, caption = random_scene(rng, new_shape=True)
    if rng.random() < 0.6:  # so that it is the new word that says the shape
        caption = caption.replace(NEW_SHAPE, "shape")
    return scene, f"zorp, {caption}"


LESSONS = (
    Lesson("outlined", "peft", 20, _outlined),
    Lesson("zorp", "kohya", 21, _zorp),
)


class _LowRank(nn.Module):
    """``weight + up @ down``."""

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(RANK, columns, generator=generator) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def train_lora(
    lesson: Lesson,
    painter: Painter,
    data: Sequence[Latents],
    empty: tuple[Tensor, Tensor],
    schedule: Schedule,
    seed: int,
    folder: Path,
    log: Callable[[str], None],
    precision: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Train one beside the frozen network.

    Args:
        lesson: What it is to learn.
        painter: Network and text encoder, left as they are.
        data: The lesson's scenes of each stage's size.
        empty: Ids and lengths of the empty caption, [1, 32] and [1].
        schedule: Steps and rates.
        seed: Of its start and every batch.
        folder: Where the state is kept.
        log: Takes a line.
        precision: Compile the network, with products in float32 or bfloat16; None: nothing is
            compiled, float32.

    Returns:
        The tensors of its file by their keys, float32.
    """
    generator = torch.Generator().manual_seed(seed + lesson.phase)
    targets = dict(_targets(painter))
    added: dict[str, _LowRank] = {}
    for name, module in targets.items():
        added[name] = _LowRank(cast(Any, module).weight, generator)
        parametrize.register_parametrization(module, "weight", added[name])
    weights = {
        f"{name}.{part}": weight
        for name, module in added.items()
        for part, weight in module.named_parameters()
    }

    loss = batch_loss_in(painter, data, empty, precision)

    def loss_of(step: int) -> Tensor:
        return loss(np.random.default_rng([seed, lesson.phase, step]), OF_LORAS)

    try:
        train(f"lora-{lesson.name}", weights, loss_of, replace(schedule, decay=0), folder, log)
        return dict(_tensors(added, lesson.form))
    finally:
        for module in targets.values():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def write_lora(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a LoRA in bfloat16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {name: value.bfloat16() for name, value in tensors.items()})


def _targets(painter: Painter) -> Iterator[tuple[str, nn.Module]]:
    for group in ("context_refiner", "noise_refiner", "layers"):
        for index, module in enumerate(getattr(painter.network, group)):
            block = cast(Block, module)
            yield f"{group}.{index}.attention.qkv", block.attention.qkv
            yield f"{group}.{index}.attention.out", block.attention.out
            yield f"{group}.{index}.feed_forward.w13", block.feed_forward.w13
            yield f"{group}.{index}.feed_forward.w2", block.feed_forward.w2


def _tensors(added: dict[str, _LowRank], form: str) -> Iterator[tuple[str, Tensor]]:
    for name, module in added.items():
        down, up = module.down.detach(), module.up.detach()
        if name.endswith("w13"):  # one matrix here, two in files
            first, second = up.chunk(2)
            yield from _pair(name.replace("w13", "w1"), down, first, form)
            yield from _pair(name.replace("w13", "w3"), down, second, form)
        else:
            yield from _pair(name, down, up, form)


def _pair(name: str, down: Tensor, up: Tensor, form: str) -> Iterator[tuple[str, Tensor]]:
    if form == "peft":
        yield f"diffusion_model.{name}.lora_A.weight", down.clone()
        yield f"diffusion_model.{name}.lora_B.weight", up.clone()
        return
    stem = f"lora_unet_{name.replace('.', '_')}"
    yield f"{stem}.lora_down.weight", down.clone()
    yield f"{stem}.lora_up.weight", up.clone()
    yield f"{stem}.alpha", torch.tensor(float(RANK))
