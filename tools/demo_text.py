"""The built-in model's text encoder, taught what captions say before anything is painted.

Z-Image's was a language model before the network was trained beside it. A network that learns to
paint together with an encoder that knows nothing finds the background's colour and no more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo_network import Painter, encode_captions, matrices_of
from tools.resumable import Schedule, train
from tools.scenes import COLORS, PLACES, SHAPES, SIZES, STYLES, random_scene
from turbo.tokenizer import Tokenizer

BATCH = 192
RELATIONS = ("left of", "right of", "above", "below", "and")
_SUFFIX = 5
"""Tokens behind the prompt in the chat template: each of them has seen all of it."""
_PHASE = 5
_NOUN: Mapping[str, Sequence[str]] = {
    "size": [size for size in SIZES if size],
    "color": list(COLORS),
    "shape": SHAPES,
}
WORDS: Mapping[str, Sequence[str]] = {
    "background": list(COLORS),
    "style": [style for style in STYLES if style != "plain"],
    "relation": RELATIONS,
    "place": list(PLACES),
    **{f"{which} {part}": words for which in ("first", "second") for part, words in _NOUN.items()},
}
"""What a caption may say -> the words for it."""


def facts_of(caption: str) -> dict[str, str | None]:
    """What a caption says, by the keys of `WORDS`; None: nothing."""
    facts: dict[str, str | None] = dict.fromkeys(WORDS)
    ground = re.search(r" on an? (?:(\w+) )?(\w+) background$", caption)
    things = caption
    if ground:
        facts["style"], facts["background"] = ground.groups()
        things = caption[: ground.start()]
    for relation in RELATIONS:
        if f" {relation} " in things:
            facts["relation"] = relation
    parts = things.split(f" {facts['relation']} ") if facts["relation"] else [things]
    for which, part in zip(("first", "second"), parts):
        for kind, words in _NOUN.items():
            said = [word for word in words if word in part.split()]
            facts[f"{which} {kind}"] = said[0] if said else None
    facts["place"] = next((place for place in PLACES if things.endswith(place)), None)
    return facts


def train_text_encoder(
    painter: Painter,
    tokenizer: Tokenizer,
    schedule: Schedule,
    seed: int,
    folder: Path,
    log: Callable[[str], None],
) -> None:
    """Train the text encoder in place to know, behind a caption, all that it says."""
    generator = torch.Generator().manual_seed(seed)
    width = painter.text_encoder.config.hidden_size
    heads = {
        f"head.{name}": nn.Parameter(
            torch.randn(len(words) + 1, width, generator=generator) / width**0.5
        )
        for name, words in WORDS.items()
    }
    encoder = {
        f"text_encoder.{name}": weight for name, weight in painter.text_encoder.named_parameters()
    }

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, _PHASE, step])
        captions = [random_scene(rng)[1] for _ in range(BATCH)]
        ids, lengths = encode_captions(tokenizer, captions)
        features = painter.text_encoder(ids, painter.text_encoder.rotary_table(ids.shape[1]))
        behind = lengths[:, None] - torch.arange(1, _SUFFIX + 1)
        read = features.gather(1, behind[..., None].expand(-1, -1, width))
        read = F.rms_norm(read, (width,))
        facts = [facts_of(caption) for caption in captions]
        losses = []
        for name, words in WORDS.items():
            numbers = {word: number for number, word in enumerate(words, start=1)}
            wanted = torch.tensor([numbers.get(fact[name] or "", 0) for fact in facts])
            scores = read @ heads[f"head.{name}"].T
            losses.append(F.cross_entropy(scores.mT, wanted[:, None].expand(-1, _SUFFIX)))
        return torch.stack(losses).sum()

    weights = {**encoder, **heads}
    for weight in encoder.values():
        weight.requires_grad_(True)
    train("text", weights, loss_of, schedule, folder, log, matrices=matrices_of(encoder))
    for weight in encoder.values():
        weight.requires_grad_(False)
