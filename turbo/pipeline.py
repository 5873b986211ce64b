"""One picture's way: prompt, stages each larger than the one before, picture.

Functions over `Models`; `Engine` adds loading, LoRAs, caches and timing around them, no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from turbo import plan as plans
from turbo.autoencoder import Autoencoder, to_pixels, to_uint8
from turbo.denoiser import POSITIVE, Caption, Denoiser, ModulationTable, Network, is_unguided
from turbo.easycache import StepCache
from turbo.errors import BadInputError
from turbo.latent import SCALE, SHIFT, STRIDE, from_sampler, resize, start_latent, to_sampler
from turbo.noise import BrownianNoise, ancestral_noise, start_noise
from turbo.precision import whole_float32
from turbo.samplers import SAMPLERS, SamplerTrace, sampler_sigmas, trace_sampler
from turbo.sigmas import percent_to_sigma, require_falling, stage_sigmas
from turbo.text_encoder import TextEncoder
from turbo.tokenizer import Tokenizer, attention_mask
from turbo.transformer import Transformer, padded_length

OnStep = Callable[[plans.Stage, int, int], None]
"""Called with (stage, denoiser evaluations done, evaluations in all)."""


_CPU = torch.device("cpu")


@dataclass(slots=True)
class Models:
    """The parts that make a picture, and what runs each: the part itself or a faster stand-in."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    transformer: Transformer
    autoencoder: Autoencoder
    network: Network
    """What runs a network call, with the arguments of `Transformer.forward`."""
    device: torch.device = _CPU
    """Where the work is done; modules may be kept elsewhere while they rest."""
    encode: Callable[[Tensor, Tensor], Tensor] | None = None
    """What turns padded ids into features, as `TextEncoder.forward`; None: the encoder itself."""
    refine: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """What turns padded features into a caption, as `Transformer.refine_padded`."""
    decode: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """What turns a latent into a picture, as this module's `decode`."""
    kernels: bool = False
    """Whether the fused Triton kernels do the upscale and the step cache's check; needs a CUDA
    device or Triton's interpreter, see `require_kernels`."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network."""
        return self.transformer.dtype


@dataclass(slots=True)
class PreparedStage:
    """What a stage needs that depends on neither prompt nor seed, computed once."""

    stage: plans.Stage
    latent_size: tuple[int, int]
    """Rows and columns of its latent."""
    sigmas: tuple[float, ...]
    """The schedule as the scheduler made it."""
    followed: tuple[float, ...]
    """The schedule as the sampler walks it."""
    trace: SamplerTrace
    """The sampler's evaluations and noise draws."""
    modulation: ModulationTable
    """Factors for each evaluated sigma."""
    rotary: dict[int, Tensor] = field(default_factory=dict)
    """Padded caption length -> rotary table, filled as lengths come."""

    def rotary_for(self, transformer: Transformer, caption_tokens: int) -> Tensor:
        """The rotary table for a caption length, made at first use."""
        if caption_tokens not in self.rotary:
            self.rotary[caption_tokens] = transformer.rotary_table(
                *self.latent_size, caption_tokens
            )
        return self.rotary[caption_tokens]


def prepare_stage(
    transformer: Transformer, stage: plans.Stage, latent_size: tuple[int, int] | None = None
) -> PreparedStage:
    """Compute a stage's schedule, its sampler's trace and the modulation of every sigma in it.

    Args:
        transformer: Makes the modulation.
        stage: The stage.
        latent_size: Rows and columns in place of the stage's own.

    Raises:
        BadInputError: The schedule has no such number of different steps.
    """
    sigmas = stage_sigmas(stage)
    followed = sampler_sigmas(stage.sampler, sigmas, stage.shift)
    require_falling(stage, followed)
    trace = trace_sampler(stage.sampler, followed)
    modulation = ModulationTable.make(transformer, trace.evaluations)
    size = latent_size or (stage.height // STRIDE, stage.width // STRIDE)
    return PreparedStage(stage, size, sigmas, followed, trace, modulation)


@dataclass(frozen=True, slots=True)
class StageNoise:
    """All random numbers of one stage of one picture, float32."""

    start: Tensor
    """[batch, channels, rows, columns]."""
    steps: tuple[Tensor, ...]
    """What the sampler asks for, in order."""


def draw_noise(
    prepared: PreparedStage,
    seed: int,
    device: torch.device,
    *,
    channels: int = 16,
    batch: int = 1,
    noise_device: torch.device | None = None,
) -> StageNoise:
    """Draw a stage's random numbers and bring them to `device`.

    Args:
        prepared: The stage.
        seed: The stage's own seed.
        device: Where the sampler works.
        channels: Latent channels.
        batch: Latents.
        noise_device: Where ancestral noise is drawn; `device` is the reference's way.
    """
    shape = (batch, channels, *prepared.latent_size)
    asked = prepared.trace.noises
    kind = SAMPLERS[prepared.stage.sampler].noise
    steps: list[Tensor] = []
    if kind == "ancestral":
        steps = ancestral_noise(shape, seed, len(asked), noise_device or device)
    elif kind == "brownian":
        path = BrownianNoise(shape, seed, prepared.sigmas)
        steps = [path(sigma, sigma_next) for sigma, sigma_next in asked]
    start = start_noise(shape, seed)
    return StageNoise(start.to(device), tuple(step.to(device) for step in steps))


@dataclass(frozen=True, slots=True)
class StageResult:
    """A stage's outcome."""

    latent: Tensor
    """Outside latent, [batch, channels, rows, columns], float32."""
    skipped: int
    """Network calls that the step cache saved."""
    calls: int
    """Network calls wanted, skipped ones included."""


def encode_prompt(models: Models, prompt: str, *, max_tokens: int | None = None) -> Tensor:
    """Tokenize a prompt and run the text encoder: features, [1, tokens, caption_dim]."""
    return encode_ids(models, models.tokenizer.encode_prompt(prompt, max_tokens=max_tokens))


def encode_ids(models: Models, ids: Sequence[int]) -> Tensor:
    """Run the text encoder on a prompt's token ids: features, [1, tokens, caption_dim]."""
    mask = attention_mask(ids, models.tokenizer.pad_id)
    if all(mask):
        return encode_visible(models, ids)
    return models.text_encoder.encode(torch.tensor([list(ids)]), torch.tensor([mask]))


def encode_visible(models: Models, ids: Sequence[int]) -> Tensor:
    """`encode_ids` of a prompt without the pad token.

    The ids are padded to a multiple of 32, so that prompts have few different shapes; no token sees
    those after it.
    """
    encoder = models.text_encoder
    padded = torch.zeros(1, padded_length(len(ids)), dtype=torch.int64)
    padded[0, : len(ids)] = torch.tensor(list(ids))
    encoder.check_ids(padded)
    rotary = encoder.rotary_table(padded.shape[1])
    features: Tensor = (models.encode or encoder)(padded.to(rotary.device), rotary)
    return features[:, : len(ids)]


def refine(models: Models, features: Tensor) -> Caption:
    """Turn `encode_prompt`'s features into the network's caption: once a prompt."""
    transformer = models.transformer
    run = models.refine or transformer.refine_padded
    return Caption(transformer.refine_caption(features, run), features.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One picture's inputs to its stages."""

    positive: Caption
    """The caption to follow."""
    negative: Caption | None = None
    """The caption to avoid, needed only where cfg is not 1."""
    noise: Callable[[PreparedStage], StageNoise]
    """Gives each stage's random numbers when it begins."""
    latent: Tensor | None = None
    """Outside latent of any size that the first stage starts from; None for none."""


def run_stages(
    models: Models,
    stages: Sequence[PreparedStage],
    drawing: Drawing,
    *,
    on_step: OnStep | None = None,
    cache: Callable[[plans.Stage], StepCache | None] | None = None,
    aliased: bool = False,
) -> Iterator[StageResult]:
    """Denoise through the stages, each starting from the latent of the one before, resized.

    Args:
        models: The parts.
        stages: In order.
        drawing: Captions, noise and the latent to start from.
        on_step: Called with (stage, denoiser evaluations done, evaluations in all), at a stage's
            start and after each evaluation.
        cache: Makes a stage's step cache, for those who want to look into it.
        aliased: See `Denoiser`.

    Yields:
        The result of each stage.
    """
    latent = drawing.latent
    for prepared in stages:
        stage = prepared.stage
        total = len(prepared.trace.evaluations)

        def report(done: int, stage: plans.Stage = stage, total: int = total) -> None:
            if on_step is not None:
                on_step(stage, done, total)

        report(0)
        result = run_stage(
            models,
            prepared,
            drawing.positive,
            drawing.negative,
            drawing.noise(prepared),
            latent,
            on_step=report,
            cache=cache(stage) if cache else make_cache(stage, kernels=models.kernels),
            aliased=aliased,
        )
        latent = result.latent
        yield result


def run_stage(
    models: Models,
    prepared: PreparedStage,
    positive: Caption,
    negative: Caption | None,
    noise: StageNoise,
    latent: Tensor | None = None,
    *,
    on_step: Callable[[int], None] | None = None,
    cache: StepCache | None = None,
    aliased: bool = False,
) -> StageResult:
    """Denoise once, at one size.

    Args:
        models: The parts.
        prepared: The stage.
        positive: The caption to follow.
        negative: The caption to avoid, needed only for cfg other than 1.
        noise: From `draw_noise`.
        latent: Outside latent of any size to start from; None for none.
        on_step: Called after each denoiser evaluation with how many are done.
        cache: The step cache of this run, None for none.
        aliased: See `Denoiser`.

    Raises:
        BadInputError: cfg needs a negative caption and there is none.
    """
    stage = prepared.stage
    if not is_unguided(stage.cfg) and negative is None:
        raise BadInputError(f"{stage.name} has cfg {stage.cfg:g}, which needs a negative prompt")
    denoiser = Denoiser(
        models.network,
        prepared.modulation,
        lambda tokens: prepared.rotary_for(models.transformer, tokens),
        positive,
        negative,
        cfg=stage.cfg,
        cache=cache,
        aliased=aliased,
    )
    draws = iter(noise.steps)
    done = 0

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal done
        denoised = denoiser(x, sigma)
        done += 1
        if on_step is not None:
            on_step(done)
        return denoised

    x = SAMPLERS[stage.sampler].sample(
        denoise,
        stage_start(prepared, noise.start, latent, kernels=models.kernels),
        prepared.followed,
        lambda sigma, sigma_next: next(draws),
    )
    calls = len(prepared.trace.evaluations) * denoiser.calls
    return StageResult(from_sampler(x), sum(cache.skipped) if cache else 0, calls)


def stage_start(
    prepared: PreparedStage, noise: Tensor, latent: Tensor | None, *, kernels: bool = False
) -> Tensor:
    """The noisy latent that a stage's sampler starts from.

    Args:
        prepared: The stage.
        noise: Its start noise.
        latent: Outside latent of any size; None for none.
        kernels: Resize by the fused kernel where there is one, for nearest-exact. On a CUDA device
            not a bit changes; see `latent_upscale` about CPUs.
    """
    sigma, size, method = prepared.sigmas[0], prepared.latent_size, prepared.stage.upscale
    if latent is None:
        return start_latent(None, noise, sigma)
    if kernels and method == "nearest-exact":
        from turbo.kernels.latent_upscale import latent_upscale  # needs Triton

        start: Tensor = latent_upscale(
            latent, noise, sigma, *size, scale=SCALE, shift=SHIFT, dtype=noise.dtype
        )
        return start
    return start_latent(to_sampler(resize(latent, *size, method)), noise, sigma)


def make_cache(stage: plans.Stage, *, kernels: bool = False) -> StepCache | None:
    """A fresh step cache as the stage's plan has it, its percentages turned into sigmas."""
    settings = stage.easycache
    if settings is None:
        return None
    return StepCache(
        settings.threshold,
        percent_to_sigma(settings.start, stage.shift),
        percent_to_sigma(settings.end, stage.shift),
        kernels=kernels,
    )


def warm_cache(models: Models, prepared: PreparedStage) -> None:
    """Let a stage's step cache compare and read once, so that its kernels are compiled."""
    stage = prepared.stage
    if stage.easycache is None:
        return
    always = replace(stage, easycache=replace(stage.easycache, start=0.0, end=1.0))
    cache = make_cache(always, kernels=models.kernels)
    assert cache is not None
    shape = (1, models.transformer.config.channels, *prepared.latent_size)
    seen = torch.zeros(shape, device=models.device, dtype=models.dtype)
    for _ in range(3):  # the first has nothing to compare with, the second no rate of change
        cache.begin_evaluation()
        cache.call(lambda: seen, seen, 0.5, (POSITIVE,))


def decode(autoencoder: Autoencoder, latent: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`decode_as_set`, with convolutions in float32 where the autoencoder is."""
    with whole_float32(latent.device):
        return decode_as_set(autoencoder, latent, **options)


def decode_as_set(
    autoencoder: Autoencoder, latent: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Decode an outside latent, in the precision that PyTorch is set to.

    Returns:
        8-bit pictures, [batch, height, width, 3], and whether all of the decoder's output was
        finite, a scalar; both still on the latent's device.
    """
    raw = autoencoder.decode(latent, **options)
    return to_uint8(to_pixels(raw)), raw.isfinite().all()
