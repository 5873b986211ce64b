"""The built-in model's network and text encoder, trained together on scenes' latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from tokenizers import Regex
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional

from tools.demo_autoencoder import SIZES, SPREAD, to_tensor
from tools.resumable import Schedule, read_tensors, train, write_tensors
from tools.scenes import Scene, all_words, draw_scene, hard_scene, mask_of, random_scene
from turbo.attention import SDPA, AttentionChoice
from turbo.latent import resize, to_sampler
from turbo.precision import arithmetic_dtype
from turbo.testing import ModelSize, initialise, qwen3_shapes, write_tokenizer, zimage_shapes
from turbo.text_encoder import TextEncoder, TextEncoderConfig
from turbo.tokenizer import PROMPT_PREFIX, PROMPT_SUFFIX, WORDS, Tokenizer
from turbo.transformer import PATCH, Transformer, TransformerConfig, patchify, unpatchify

MERGES = 320
CAPTION = 32
"""Padded length of every caption; the longest has fewer tokens."""
BATCHES = (32, 8, 2)
"""Latents a step, of each size."""
SHARES = (0.66, 0.23, 0.11)
"""Of the steps, for each size, where all of a picture is learned."""
WINDOWS = (0, 16, 24)
"""Rows and columns of image tokens that a window of each size shows."""
WINDOW_BATCHES = (0, 16, 8)
"""Windows a step, of each size."""
FIRST_SIGMA = (1.0, 0.715, 0.852)
"""The noise level that each stage of the workflow begins with."""
DROPPED = 0.1
"""Share of captions replaced by the empty one, for guidance."""
FADED = 0.7
"""Share of a part's steps after which its emphasis and layout are over, or what lasts of them is
left: from there on the loss is flow matching's own, at the first stage's own noise levels."""
_MOST_ALIKE = 6.0
"""How many times more than it did a picture's things may count where all are to count alike."""
_MOST_GRAPHS = 256
_LEAST_CONTRAST = 1e-3
"""Squared distance from the background, averaged over a picture, that is taken for none."""
_LEAST_RAGGED = 0.2
"""The noise level below which edges are where they are."""

Log = Callable[[str], None]


def share_of_noise(sigma: float) -> float:
    """Of the workflow's noise level, for latents brought from deviation `SPREAD` to 1."""
    return sigma / (sigma + (1 - sigma) * SPREAD)


FIRST_SHARE = tuple(map(share_of_noise, FIRST_SIGMA))
MOST_SHARE = (1.0, FIRST_SHARE[1] + 0.03, FIRST_SHARE[2] + 0.03)
"""The highest that each stage of the workflow sees, and a little more."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the network's training, and what counts more early in it."""

    name: str
    phase: int
    """Of its random numbers."""
    emphasis: float
    """How many times more than the background things count at first. Without it the network had
    found no thing's place or colour after 1050 steps: they cover a tenth of a picture."""
    layout: float
    """Share of the first stage's latents that get a noise level above `level` at first.
    Where things are is decided there, and it is learned last: the error on things at 0.97 fell from
    0.99 to 0.86 in 128 steps of such levels alone, and not at all in 150 usual steps before."""
    level: float = 0.88
    """A noise level, from 0 to 1."""
    around: int = 0
    """How many latents around a thing count like it, for that is where its shape ends."""
    shares: tuple[float, float, float] = SHARES
    """How often each stage's size is taken. All but edges is learned at the first's."""
    tokens: int = 0
    """How many of the first stage's 154 image tokens a step sees, more where things are; 0: all.
    At high noise levels tokens tell each other nothing, and a step with 64 takes half the time: on
    one core the error on things at 0.97 was 1.05 after 200 s instead of 1.18. What is left after
    the first noise levels wants to see its neighbours: a later part must show all."""
    windows: float = 0.0
    """Share of the larger sizes' steps that see windows of pictures, where things are. Edges are
    decided by what is near, and a step of eight windows of the largest size took 1.3 s, one of two
    pictures 2.0 s."""
    upscaled: float = 0.0
    """Share of the larger sizes' pictures whose noise holds what upscaling makes wrong, as it does
    in the workflow: on 24 scenes of 336 x 432 the second stage kept 83 % of the shapes when it
    began with an encoded picture of its size, and 71 % with the first stage's, which had 88 %."""
    ragged: float = 0.0
    """Share of the larger sizes' pictures that show the scene with its edges moved, which are to
    become what they were. A sampler that adds noise after each step lets edges wander: a network
    that has only seen straight ones believes those that it meets, and moves them further."""
    lasting: float = 0.0
    """The emphasis that stays to the end."""
    alike: bool = False
    """Whether the things of every picture count alike, up to `_MOST_ALIKE` times what they did.
    Otherwise they count by the latents that they cover and by how far these are from the
    background's: squared, green's were 5.2 from purple's on average, red's 0.27 from orange's, and
    11 of 41 wrong pictures had things of so little contrast."""
    scenes: str = "scenes"
    """Which it sees: a name in `MAKERS`."""
    lean: float = 1.0
    """The power of the larger sizes' noise levels, from 0 to 1: below 1, high ones come oftener.
    What is where is decided there: the third stage's error on things was 0.05 at 0.7, 0.18 at 0.85,
    where it begins."""

    def after(self, progress: float) -> Part:
        """With what is left of emphasis and layout after a share of the steps, from 0 to 1."""
        left = max(0.0, 1 - progress / FADED)
        emphasis = max(self.lasting, self.emphasis * left)
        return replace(self, emphasis=emphasis, layout=self.layout * left)


PARTS = (
    Part("network", 2, 6.0, 0.7, around=1, shares=(0.97, 0.02, 0.01), tokens=64),
    Part("network-whole", 6, 3.0, 0.45, level=0.65, around=2),
    Part(
        "network-steady", 18, 4.0, 0.2, level=0.65, around=2, shares=(0.4, 0.3, 0.3), windows=0.8,
        upscaled=0.6, ragged=0.4, scenes="hard", lasting=1.0, alike=True, lean=0.6,
    ),
)  # fmt: skip
"""What is where in the first; edges in the second, from a high rate again; in the last the larger
sizes, whose edges are to stay where they belong while noise comes and goes. It may start from a
finished model."""
MAKERS = {"scenes": random_scene, "hard": hard_scene}
"""What draws the scenes of each kind."""
LATER = 1
"""How many parts may start from a finished model."""
PLAIN = Part("", 0, 0.0, 0.0)


def model_size(vocabulary: int) -> ModelSize:
    """Dimensions, under the names of `turbo.testing`."""
    return ModelSize(
        network={
            "dim": 192,
            "n_layers": 5,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "cap_feat_dim": 128,
            "ffn_hidden": 512,
            "time_hidden": 1024,
        },
        text_encoder={
            "vocab_size": -(-vocabulary // 64) * 64,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        },
        autoencoder={"ch": 16, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 1, "z_channels": 16},
    )


def make_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE on captions and write it; returns how many ids it has."""
    backend = BackendTokenizer(BPE())
    backend.pre_tokenizer = PreTokenizers(
        [Split(Regex(WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = BpeTrainer(
        vocab_size=256 + MERGES, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    words = [PROMPT_PREFIX.split(">")[1], PROMPT_SUFFIX.split(">")[-1], *all_words()]
    backend.train_from_iterator(words, trainer)
    backend.model.save(str(folder))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    return write_tokenizer(folder, [line for line in lines if not line.startswith("#")])


def encode_captions(tokenizer: Tokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids [captions, 32], padded with 0, and lengths [captions]."""
    ids = [tokenizer.encode_prompt(caption) for caption in captions]
    padded = torch.zeros(len(ids), CAPTION, dtype=torch.int64)
    for row, one in zip(padded, ids):
        row[: len(one)] = torch.tensor(one)
    return padded, torch.tensor([len(one) for one in ids])


@dataclass(frozen=True)
class Latents:
    """Encoded scenes of one size."""

    latents: Tensor
    """[count, 16, height / 8, width / 8], in the sampler's scale divided by `SPREAD`."""
    ids: Tensor
    lengths: Tensor
    inside: Tensor
    """Where things are: [count, 1, height / 8, width / 8], bool. Latents do not tell: stripes are
    as far from a background's as an orange thing's are from yellow."""
    before: Tensor | None = None
    """The same scenes at the size of the stage before: [count, 16, ...]."""

    ragged: Tensor | None = None
    """The same scenes at the same size, with their edges moved."""

    @cached_property
    def things(self) -> Tensor:
        """1 for each image token where a thing is, else 0: [count, rows, columns]."""
        return functional.max_pool2d(self.inside.float(), PATCH)[:, 0]


@torch.inference_mode()
def encode_scenes(
    autoencoder: Any,
    tokenizer: Tokenizer,
    counts: Sequence[int],
    seed: int,
    folder: Path,
    log: Log,
    *,
    kind: str,
    make: Callable[[np.random.Generator], tuple[Any, str]],
) -> list[Latents]:
    """Draw and encode scenes of each size once; they are kept on the disk."""
    made = []
    for index, ((height, width), count) in enumerate(zip(SIZES, counts)):
        path = folder / f"latents-{kind}-{height}.safetensors"
        if not path.exists():
            rng = np.random.default_rng([seed, 10, index])
            scenes, captions = zip(*(make(rng) for _ in range(count)))
            ids, lengths = encode_captions(tokenizer, captions)
            latents = _encode(autoencoder, scenes, height, width)
            inside = where_things_are(scenes, height, width)
            made_here = {"latents": latents, "ids": ids, "lengths": lengths, "inside": inside}
            write_tensors(path, made_here)
            log(f"{kind}: {count} of {height} x {width} encoded")
        made.append(Latents(**read_tensors(path)))
    return made


@torch.inference_mode()
def encode_again(
    autoencoder: Any,
    data: Sequence[Latents],
    seed: int,
    folder: Path,
    log: Log,
    *,
    kind: str,
    make: Callable[[np.random.Generator], tuple[Any, str]],
    what: Literal["before", "ragged"],
) -> list[Latents]:
    """Encode the larger scenes of `encode_scenes` once more, as `Latents` says of the field."""
    made = [data[0]]
    for index, of in enumerate(data[1:], start=1):
        path = folder / f"latents-{kind}-{SIZES[index][0]}-{what}.safetensors"
        if not path.exists():
            height, width = SIZES[index - 1 if what == "before" else index]
            rng = np.random.default_rng([seed, 10, index])
            scenes = [make(rng)[0] for _ in of.latents]
            wander = rng if what == "ragged" else None
            write_tensors(path, {what: _encode(autoencoder, scenes, height, width, wander)})
            log(f"{kind}: {len(scenes)} of {SIZES[index][0]} encoded at {height} x {width}, {what}")
        made.append(replace(of, **read_tensors(path)))
    return made


def _encode(
    autoencoder: Any,
    scenes: Sequence[Scene],
    height: int,
    width: int,
    wander: np.random.Generator | None = None,
) -> Tensor:
    rows = []
    is_lower = arithmetic_dtype(torch.bfloat16, "cpu") is torch.bfloat16
    autoencoder.to(memory_format=torch.channels_last)
    for scene in scenes:  # one by one, in bfloat16, a large one took 0.11 s, eight at once 0.45 s
        pixels = to_tensor(draw_scene(scene, height, width, wander=wander)[None])
        with torch.autocast("cpu", torch.bfloat16, enabled=is_lower):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            latent = autoencoder.encode(pixels, return_dict=False)[0].mean
        rows.append(to_sampler(latent.float().contiguous()) / SPREAD)
    return torch.cat(rows)


def where_things_are(scenes: Sequence[Scene], height: int, width: int) -> Tensor:
    """`Latents.inside` of scenes of a size in pixels."""
    fine = [
        np.logical_or.reduce([mask_of(thing, height // 4, width // 4) for thing in scene.things])
        for scene in scenes
    ]
    return functional.max_pool2d(torch.from_numpy(np.stack(fine))[:, None].float(), 2).bool()


@dataclass(frozen=True, slots=True)
class Painter:
    """Network and text encoder as training runs them."""

    network: Transformer
    text_encoder: TextEncoder
    run: Callable[..., Tensor] | None = None
    """In place of calling the network: compiled."""

    @classmethod
    def make(cls, size: ModelSize, seed: int) -> Painter:
        """Untrained: every block passes on what it gets."""
        shapes = zimage_shapes(size.network)
        network = Transformer(TransformerConfig.from_shapes(shapes), "cpu", torch.float32)
        text_shapes = qwen3_shapes(size.text_encoder)
        text_encoder = TextEncoder(TextEncoderConfig.from_shapes(text_shapes), "cpu", torch.float32)
        for module, of in ((network, shapes), (text_encoder, text_shapes)):
            values = initialise(of, seed)
            for name, view in module.native_tensors().items():
                view.copy_(_start(name, values[name]))
        return cls(network, text_encoder)

    def weights(self) -> dict[str, nn.Parameter]:
        """All parameters, by their names here."""
        modules = {"network": self.network, "text_encoder": self.text_encoder}
        return {
            f"{kind}.{name}": weight
            for kind, module in modules.items()
            for name, weight in module.named_parameters()
        }

    def caption(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Refined captions, [batch, 32, dim], of ids [batch, 32] and lengths [batch]."""
        features = self.text_encoder(ids, self.text_encoder.rotary_table(ids.shape[1]))
        rotary = self.network.rotary_table(0, 0, ids.shape[1])
        return self.network.refine_padded(features, lengths.unsqueeze(1), rotary)

    def velocity(
        self,
        latents: Tensor,
        sigmas: Tensor,
        caption: Tensor,
        only: Tensor | None = None,
    ) -> Tensor:
        """Noise minus clean, both of deviation 1.

        The network sees and says what the sampler does, of latents with deviation `SPREAD`.

        Args:
            latents: [batch, 16, height, width], float32, both even: `1 - sigmas` of clean,
                `sigmas` of noise.
            sigmas: [batch], the share of noise in each, from 0 to 1.
            caption: [batch, 32, dim], of `caption`.
            only: Which image tokens the network gets, a multiple of 32; None: all.

        Returns:
            [batch, 16, height, width], or as `only_tokens` gives it.
        """
        spread = 1 + (SPREAD - 1) * sigmas
        table = self.network.modulation_table((SPREAD * sigmas / spread).tolist())
        modulation = table.transpose(0, 1).unsqueeze(2)
        height, width = latents.shape[-2:]
        length = caption.shape[1]
        rotary = self.network.rotary_table(height, width, length)
        if only is not None:
            rotary = torch.cat((rotary[:length], rotary[length + only]))
            latents = only_tokens(latents, only)
        run = self.network if self.run is None else self.run
        spread = spread[:, None, None, None]
        seen = latents * (SPREAD / spread)
        said = cast(Tensor, run(seen, caption, modulation, rotary))
        return (said.float() + (SPREAD - 1) * latents) / spread

    def loss(
        self,
        clean: Tensor,
        sigmas: Tensor,
        noise: Tensor,
        caption: Tensor,
        weight: Tensor | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """Flow matching (arXiv:2210.02747): mean squared error of the velocity.

        Args:
            clean: [batch, 16, height, width], float32.
            sigmas: [batch], the share of noise in each, from 0 to 1.
            noise: Like `clean`.
            caption: [batch, 32, dim], of `caption`.
            weight: How much each latent counts, [batch, 1, height, width]; None: all alike.
            only: Which image tokens it is about, a multiple of 32; None: all.
        """
        mix = sigmas[:, None, None, None]
        velocity = self.velocity((1 - mix) * clean + mix * noise, sigmas, caption, only)
        wanted = noise - clean
        if only is not None:
            wanted = only_tokens(wanted, only)
            weight = None if weight is None else only_tokens(weight, only)
        error = (velocity - wanted).square()
        return (error if weight is None else error * weight).mean()

    @torch.inference_mode()
    def sample(
        self, ids: Tensor, lengths: Tensor, empty: tuple[Tensor, Tensor], seed: int, steps: int = 12
    ) -> Tensor:
        """Clean latents of the first stage's size, [captions, 16, 28, 22]: Euler, guidance 2.

        Args:
            ids: [captions, 32].
            lengths: [captions].
            empty: Ids and lengths of the empty caption, [1, 32] and [1].
            seed: Of the noise.
            steps: Network calls, two at once each.
        """
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(len(ids), 16, 28, 22, generator=generator)
        caption = self.caption(ids, lengths)
        none = self.caption(*empty).expand_as(caption)
        steady = torch.linspace(1, 0, steps + 1)
        sigmas = [share_of_noise(one) for one in (3 * steady / (1 + 2 * steady)).tolist()]
        for sigma, after in pairwise(sigmas):
            level = torch.full((len(ids),), sigma)
            there, away = (self.velocity(latents, level, one) for one in (caption, none))
            latents = latents + (after - sigma) * (away + 2 * (there - away))
        return latents


def train_network(
    part: Part,
    painter: Painter,
    data: Sequence[Latents],
    empty: tuple[Tensor, Tensor],
    schedule: Schedule,
    seed: int,
    folder: Path,
    log: Log,
    on_save: Callable[[int], None] | None = None,
    *,
    precision: torch.dtype | None = None,
) -> None:
    """Train network and text encoder in place.

    Args:
        part: Which part of the training.
        painter: Both, float32.
        data: Scenes of each stage's size.
        empty: Ids and lengths of the empty caption, [1, 32] and [1].
        schedule: Steps and rates.
        seed: Of every batch.
        folder: Where the state is kept.
        log: Takes a line.
        on_save: Called with the step after the state was kept.
        precision: Compile the network, with products of both models and of Muon in float32 or
            bfloat16; None: nothing is compiled, float32. On two cores with AMX a step in bfloat16
            took 0.50 s in place of 0.95 s.
    """
    loss = batch_loss_in(painter, data, empty, precision)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, part.phase, step])
        return loss(rng, part.after(schedule.progress(step)))

    weights = painter.weights()
    for weight in weights.values():
        weight.requires_grad_(True)
    train(
        part.name,
        weights,
        loss_of,
        schedule,
        folder,
        log,
        on_save,
        matrices_of(weights),
        precision or torch.float32,
    )
    for weight in weights.values():
        weight.requires_grad_(False)


class _Sdpa(AttentionChoice):
    """It notes no shapes: what compiled code has read must not change, or it is compiled anew."""

    def of(self, x: Tensor) -> str:
        """Always the same."""
        return SDPA


def compiled(painter: Painter, backend: str = "inductor") -> Painter:
    """The same weights, the network compiled for each shape; its attention is sdpa from now on."""
    painter.network.attention = _Sdpa()
    run = torch.compile(painter.network, dynamic=False, fullgraph=True, backend=backend)
    return replace(painter, run=run)


def batch_loss_in(
    painter: Painter,
    data: Sequence[Latents],
    empty: tuple[Tensor, Tensor],
    precision: torch.dtype | None,
) -> Callable[[np.random.Generator, Part], Tensor]:
    """`batch_loss` of random numbers and a part, in a precision as `train_network` takes it."""
    trained = painter if precision is None else compiled(painter)
    is_mixed = precision is torch.bfloat16
    # A process compiles the same code for each shape, and anew for each LoRA.
    limits = {"recompile_limit": _MOST_GRAPHS, "accumulated_recompile_limit": _MOST_GRAPHS}

    def loss(rng: np.random.Generator, part: Part) -> Tensor:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
            torch._dynamo.config.patch(limits),
        ):
            return batch_loss(trained, data, empty, rng, part)

    return loss


def batch_loss(
    painter: Painter,
    data: Sequence[Latents],
    empty: tuple[Tensor, Tensor],
    rng: np.random.Generator,
    part: Part = PLAIN,
) -> Tensor:
    """The loss of a random batch of one size.

    Args:
        painter: Both models.
        data: Scenes of each stage's size.
        empty: Ids and lengths of the empty caption, [1, 32] and [1], in place of some captions.
        rng: The source of all choices.
        part: What counts more than the rest, and how often each size is taken.
    """
    size = int(rng.choice(len(SIZES), p=part.shares))
    of = data[size]
    only = None
    if size and part.windows and rng.random() < part.windows:
        only, rows = _choose_windows(of.things, WINDOWS[size], WINDOW_BATCHES[size], rng)
    else:
        rows = torch.from_numpy(rng.integers(len(of.latents), size=BATCHES[size]))
    clean, ids, lengths = of.latents[rows], of.ids[rows], of.lengths[rows]
    dropped = torch.from_numpy(rng.random(len(rows)) < DROPPED)
    ids = torch.where(dropped[:, None], empty[0], ids)
    lengths = torch.where(dropped, empty[1], lengths)
    noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32))
    sigmas = _noise_levels(size, len(rows), part, rng)
    counts = torch.ones_like(sigmas)
    if size:
        noise, counts = _with_errors(of, rows, noise, sigmas, FIRST_SHARE[size], part, rng)
    things = functional.max_pool2d(of.inside[rows].float(), 2 * part.around + 1, 1, part.around)
    if size == 0 and 0 < part.tokens < things[0].numel() // PATCH**2:
        only = _choose_tokens(things, part.tokens, rng)
    caption = painter.caption(ids, lengths)
    if part.alike:
        things = things * _rarity(clean, of.inside[rows])
    weight = (1 + part.emphasis * things) * counts[:, None, None, None]
    return painter.loss(clean, sigmas, noise, caption, weight, only)


def _noise_levels(size: int, count: int, part: Part, rng: np.random.Generator) -> Tensor:
    """Those of a step on the stage's size, [count]."""
    level = torch.from_numpy(rng.random(count, dtype=np.float32))
    if size:
        return level**part.lean * MOST_SHARE[size]
    is_high = torch.from_numpy(rng.random(count) < part.layout)
    usual = 3 * level / (1 + 2 * level)
    return torch.where(is_high, part.level + (1 - part.level) * level, usual)


def _with_errors(
    of: Latents,
    rows: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    first: float,
    part: Part,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Noise that holds what the workflow makes wrong, and how much each picture counts, [count].

    Args:
        of: All scenes of the size.
        rows: Which are seen.
        noise: Like their latents.
        sigmas: Their noise levels.
        first: The share of noise that the stage begins with.
        part: How often noise holds what.
        rng: The source of all choices.
    """
    clean, counts = of.latents[rows], torch.ones_like(sigmas)
    if part.upscaled and of.before is not None:
        is_upscaled = torch.from_numpy(rng.random(len(rows)) < part.upscaled)
        left = torch.from_numpy(rng.random(len(rows), dtype=np.float32)).sqrt() * is_upscaled
        wrong = _upscaling_error(of.before[rows], clean)
        noise = noise + left[:, None, None, None] * (1 / first - 1) * wrong
    if part.ragged and of.ragged is not None:
        chosen = torch.from_numpy(rng.random(len(rows)) < part.ragged)
        is_ragged = (chosen & (sigmas > _LEAST_RAGGED)).float()
        share = is_ragged * (1 / sigmas.clamp_min(_LEAST_RAGGED) - 1)
        noise = noise + share[:, None, None, None] * (of.ragged[rows] - clean)
        counts = 1 / (1 + share.square())
    return noise, counts


def _rarity(clean: Tensor, inside: Tensor) -> Tensor:
    """By how much things count for less than in the batch's other pictures: [batch, 1, 1, 1]."""
    background = clean.flatten(2).median(2).values[..., None, None]
    contrast = (clean - background).square().mean(1, keepdim=True) * inside
    contrast = contrast.mean((1, 2, 3), keepdim=True).clamp_min(_LEAST_CONTRAST)
    return (contrast.mean() / contrast).clamp_max(_MOST_ALIKE)


def _upscaling_error(before: Tensor, clean: Tensor) -> Tensor:
    """What a stage's start has wrong if the stage before gave `before`.

    A stage begins with ``(1 - s) * upscaled + s * noise``, which is
    ``(1 - s) * clean + s * (noise + (1 / s - 1) * (upscaled - clean))``. So the error is a part of
    the noise, and stays the same part of it while the noise falls.
    """
    height, width = clean.shape[-2:]
    return resize(before, height, width, "nearest-exact") - clean


def only_tokens(latents: Tensor, only: Tensor) -> Tensor:
    """Latents of some image tokens alone, as a picture two tokens wide.

    Args:
        latents: [batch, channels, height, width], both even.
        only: Which tokens, an even number.

    Returns:
        [batch, channels, tokens, 4].
    """
    return unpatchify(patchify(latents)[:, only], len(only), 2 * PATCH)


def _choose_tokens(things: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Tokens of a batch, in order, chosen by how often things are there."""
    often = functional.max_pool2d(things, PATCH).mean((0, 1)).flatten().double().numpy() + 0.1
    chosen = rng.choice(len(often), count, replace=False, p=often / often.sum())
    return torch.from_numpy(np.sort(chosen))


def _choose_windows(
    things: Tensor, side: int, count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A window near a thing of a random picture, and pictures that have things there too.

    The window is at the same place in all: where a token is, the network knows.

    Args:
        things: `Latents.things`.
        side: Rows and columns of the window, in image tokens; it is smaller in a smaller picture.
        count: Of pictures.
        rng: The source of all choices.

    Returns:
        The window's tokens, in order, and the pictures' numbers [count].
    """
    pictures, *grid = things.shape
    spots = things[rng.integers(pictures)].nonzero()
    middle = spots[rng.integers(len(spots))].tolist() if len(spots) else [n // 2 for n in grid]
    sides = [min(side, size) for size in grid]
    top, left = (
        min(max(at - wide // 2 + int(rng.integers(-wide // 3, wide // 3 + 1)), 0), size - wide)
        for at, wide, size in zip(middle, sides, grid)
    )
    inside = things[:, top : top + sides[0], left : left + sides[1]].mean((1, 2))
    often = (inside.sqrt() + 0.01).double().numpy()  # small things as well
    rows = rng.choice(pictures, count, p=often / often.sum())
    lines = top + torch.arange(sides[0])
    only = (lines[:, None] * grid[1] + left + torch.arange(sides[1])).flatten()
    return only, torch.from_numpy(rows)


def matrices_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The matrices within blocks, for Muon; some are several in one."""

    def stacked(name: str) -> int:
        if name.endswith("attention.qkv.weight"):
            return 3
        return 2 if name.endswith(("w13.weight", "gate_up")) else 1

    return {
        name: stacked(name)
        for name, weight in weights.items()
        if weight.ndim == 2
        and ("layers." in name or "_refiner." in name)
        and not ("adaLN" in name or "qk_norm" in name)
    }


def native_weights(painter: Painter) -> Mapping[str, Mapping[str, Tensor]]:
    """Component -> checkpoint name -> value."""
    return {
        "network": painter.network.native_tensors(),
        "text_encoder": painter.text_encoder.native_tensors(),
    }


def _start(name: str, value: Tensor) -> Tensor:
    """Where training starts from: gates, and what comes out, at 0; caption tokens small.

    Image tokens have something in common, or at a high noise level their queries are noise, and
    which token is where in the picture is hard to learn; sharper attention helps in that too. The
    error on things at 0.97 was 1.28 after 89 steps without both, 1.21 without the latter, and 1.18.
    """
    if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
        return torch.zeros_like(value)
    if name.endswith((".attention.q_norm.weight", ".attention.k_norm.weight")):
        return torch.full_like(value, 1.7)
    if name == "x_embedder.bias":
        return value / value.square().mean().sqrt()
    if name.endswith("norm.weight") or ".attention_norm" in name or "ffn_norm" in name:
        return torch.ones_like(value)
    if name.endswith("pad_token") or name == "model.embed_tokens.weight":
        return value * 0.3
    if name.endswith("bias"):
        return torch.zeros_like(value)
    return value * 0.7
