"""The fast way to run each part: compiled by Inductor, captured over static buffers.

An `Accelerator` stands in for the parts of `Models`, with their arguments and results, so nothing
else knows of it. What it keeps is keyed by role and exact shape: a network call by latent size,
caption bucket and batch, a prompt by its bucket (a multiple of 32: a caption is never padded
further, which would change the picture), the decoder by latent size.

Inside a captured call, single blocks are compiled, one callable for each role and number of tokens:
34 blocks of one make compile as one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from turbo import pipeline
from turbo._version import __version__
from turbo.compile import (
    BACKENDS,
    CaptureError,
    CaptureReport,
    Captures,
    CompileCache,
    CompileError,
    InputError,
    Wanted,
    compiled,
)
from turbo.errors import AccelerationError, BadInputError
from turbo.kernel_support import require_kernels
from turbo.precision import whole_float32
from turbo.text_encoder import RunLayer, run_layer
from turbo.transformer import PAD_MULTIPLE, RunBlock, run_block

if TYPE_CHECKING:
    from turbo.compile import Captured, Compiled
    from turbo.pipeline import Models, PreparedStage

logger = logging.getLogger(__name__)

AUTO = "auto"
MOST_CAPTURED_TOKENS = 512
"""Longer prompts run uncaptured: they are rare, and each new length would cost a capture."""
MOST_CAPTURES = 64
"""Captured callables kept at a time; the least recently used one goes."""
USUAL_BUCKETS = (32, 64, 96, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedUps:
    """Which speed-ups are on.

    Capturing changes no bit. Compiling and kernels change roundings, which in bfloat16 can turn a
    decision of the step cache that was about to fall either way.
    """

    compile: bool = False
    """Blocks and layers are compiled by Inductor."""
    capture: str = "eager"
    """"cuda-graph", "replay" (the same contract without a graph) or "eager" (none)."""
    kernels: bool = False
    """The fused Triton kernels do the upscale and the step cache's check."""
    strict: bool = False
    """A speed-up that cannot be had is an error, not a line in the log."""

    @classmethod
    def choose(
        cls,
        device: torch.device,
        *,
        compile: bool | str = AUTO,
        capture: str = AUTO,
        kernels: bool | str = AUTO,
        strict: bool = False,
        offload: bool = False,
    ) -> SpeedUps:
        """Turn what was asked for into what is done.

        Args:
            device: Where the work is done.
            compile: True, False or "auto": on for CUDA; on a CPU it pays only in a process that
                makes many pictures.
            capture: A backend or "auto": CUDA graphs on CUDA, on a CPU replay if compiled.
            kernels: True, False or "auto": on for CUDA where Triton is installed.
            strict: See the field.
            offload: Whether weights move between requests, which no captured graph bears.

        Raises:
            BadInputError: A value is none of these, or cannot be had on this device.
        """
        on_cuda = device.type == "cuda"
        for name, value in (("compile", compile), ("kernels", kernels)):
            if not isinstance(value, bool) and value != AUTO:
                raise BadInputError(f"{name} must be True, False or 'auto', got {value!r}")
        if capture not in (*BACKENDS, AUTO):
            raise BadInputError(
                f"capture must be one of auto, {', '.join(BACKENDS)}, got {capture!r}"
            )
        if capture == "cuda-graph" and not on_cuda:
            raise BadInputError(
                f"capture='cuda-graph' needs a CUDA device, the engine is on {device}; use "
                "'replay', 'eager' or 'auto'"
            )
        if offload and capture not in (AUTO, "eager"):
            raise BadInputError(
                f"capture={capture!r} does not go with enable_model_cpu_offload or memory 'low', "
                "which move the weights; use 'eager' or 'auto', or another memory plan"
            )
        wanted = on_cuda if compile == AUTO else bool(compile)
        if capture == AUTO:
            capture = "eager" if offload or not (on_cuda or wanted) else "replay"
            capture = "cuda-graph" if on_cuda and not offload else capture
        has_kernels = False
        if kernels is True or (kernels == AUTO and on_cuda):
            has_kernels = _kernels_run(device, required=strict or kernels is True)
        return cls(compile=wanted, capture=capture, kernels=has_kernels, strict=strict)

    @property
    def any_stand_in(self) -> bool:
        """Whether parts need a stand-in at all."""
        return self.compile or self.capture != "eager"


@dataclass(frozen=True, slots=True)
class Role:
    """A part in one shape: the key of what is compiled and captured for it."""

    part: str
    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, part: str, **sizes: int) -> Role:
        return cls(part, tuple(sizes.items()))

    def __str__(self) -> str:
        return f"{self.part} ({', '.join(f'{name} {size}' for name, size in self.sizes)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What the speed-ups have done; between two equal warm requests only `replays` grows."""

    compilations: int = 0
    """Graphs that PyTorch's compiler traced in this process since the engine was made."""
    captures: int = 0
    """Parts captured."""
    first_uses: int = 0
    """Captures made during a request because no warm-up had asked for their shape."""
    replays: int = 0
    """Runs of captured parts."""
    evictions: int = 0
    """Captures dropped for newer ones."""
    uncaptured: int = 0
    """Runs of parts for a prompt that is too long to be captured."""


class Accelerator:
    """Compiles and captures the parts of `models` as they are needed.

    Args:
        models: Their weights are used in place, so LoRAs may be fused into them at any time.
        speed_ups: What to do.
        cache: Where compiled code is kept for the next process; None keeps none.
        poison: Tests only: spoil results that the next call would overwrite; see `capture`.
    """

    def __init__(
        self,
        models: Models,
        speed_ups: SpeedUps,
        cache: CompileCache | None = None,
        *,
        poison: bool = False,
    ) -> None:
        self.speed_ups = speed_ups
        self.cache = cache
        # What is installed refers to this, so this may not refer back: a loop would keep the
        # weights of an engine that nobody uses until the garbage collector runs.
        self._models = replace(models)
        self._built: set[str] = set()
        self._saved_compilations = 0
        self._captures = Captures(
            backend=speed_ups.capture,
            limit=MOST_CAPTURES,
            strict=speed_ups.strict,
            poison=poison,
            # Only CUDA needs the search for host reads, which costs a run.
            allow_host_reads=speed_ups.capture != "cuda-graph",
        )
        # A compiled callable lives as long as a capture that uses it.
        self._compiled: WeakValueDictionary[str, Compiled] = WeakValueDictionary()
        self._first_uses = self._uncaptured = 0

    def install(self, models: Models, only: Collection[nn.Module] | None = None) -> None:
        """Make the parts of `models` run through this.

        Args:
            models: Its parts are replaced.
            only: The modules whose parts are meant, the others run as they are; None: all.
        """

        def is_meant(module: nn.Module) -> bool:
            return only is None or module in only

        network = is_meant(models.transformer)
        models.network = self.network if network else models.transformer
        models.refine = self.refine if network else None
        models.encode = self.encode if is_meant(models.text_encoder) else None
        models.decode = self.decode if is_meant(models.autoencoder) else None

    def clear(self) -> None:
        """Drop what is captured; it is captured again where it is next used."""
        self._captures.clear()

    @property
    def compile_seconds(self) -> float:
        """Time of the first calls of what is compiled, which compile or load it, and run it."""
        return float(sum(each.seconds for each in self._compiled.values()))

    @property
    def capture_seconds(self) -> float:
        """Time that making the captures held now took, compilation included."""
        return float(sum(report.seconds for report in self._captures.report()))

    @property
    def built(self) -> int:
        """Binaries that a compiler built because the cache did not hold them."""
        return len(self._built)

    @property
    def counters(self) -> Counters:
        counted = self._captures.counters
        return Counters(
            compilations=counted.compilations,
            captures=counted.captures,
            first_uses=self._first_uses,
            replays=counted.replays,
            evictions=counted.evictions,
            uncaptured=self._uncaptured,
        )

    # The parts; each has the arguments and the result of what it stands in for.

    def network(
        self, latent: Tensor, caption: Tensor, modulation: Tensor, rotary: Tensor
    ) -> Tensor:
        """`Transformer.forward`; the result is overwritten by the next call of this shape."""
        if caption.shape[1] > MOST_CAPTURED_TOKENS:
            self._uncaptured += 1
            return cast(Tensor, self._models.transformer(latent, caption, modulation, rotary))
        wanted = self._network(latent.contiguous(), caption, modulation, rotary)
        return cast(Tensor, self._run(wanted))

    def encode(self, ids: Tensor, rotary: Tensor) -> Tensor:
        """`TextEncoder.forward` without a mask."""
        if ids.shape[1] > MOST_CAPTURED_TOKENS:
            self._uncaptured += 1
            return cast(Tensor, self._models.text_encoder(ids, rotary))
        wanted = self._encode(ids, rotary.contiguous())
        return cast(Tensor, self._run(wanted, fresh=True))

    def refine(self, features: Tensor, length: Tensor, rotary: Tensor) -> Tensor:
        """`Transformer.refine_padded`."""
        if features.shape[1] > MOST_CAPTURED_TOKENS:
            self._uncaptured += 1
            return self._models.transformer.refine_padded(features, length, rotary)
        wanted = self._refine(features, length, rotary)
        return cast(Tensor, self._run(wanted, fresh=True))

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """`pipeline.decode`; the result is overwritten by the next call of this shape."""
        wanted = self._decode(latent.contiguous())
        return cast("tuple[Tensor, Tensor]", self._run(wanted))

    def warm_up(
        self,
        stages: Sequence[PreparedStage],
        buckets: Sequence[int],
        on_progress: Callable[[str, int, int], None] | None = None,
        *,
        only: Sequence[nn.Module] | None = None,
        decoder: bool = True,
    ) -> tuple[CaptureReport, ...]:
        """Compile and capture all parts for these stages and padded prompt lengths.

        Args:
            stages: Of the plan; their latent sizes count.
            buckets: Multiples of 32.
            on_progress: Called with (role, done, total) before each.
            only: The modules whose parts are meant, which must be on the device; None: all.
            decoder: Whether the decoder is, which tiling does without.

        Returns:
            A line for each capture, with its time and memory.

        Raises:
            BadInputError: The buckets are not usable, or make more captures than are kept.
            AccelerationError: A part could not be compiled or captured.
        """
        models, buckets = self._models, check_buckets(buckets)
        sizes = len({stage.latent_size for stage in stages})
        count = (sizes + 2) * len(buckets) + decoder
        if count > self._captures.limit:
            raise BadInputError(
                f"{len(buckets)} buckets at {sizes} picture sizes make {count} captures, at most "
                f"{self._captures.limit} are kept; give fewer buckets"
            )
        parts: dict[nn.Module, Iterator[Wanted]] = {
            models.transformer: self._usual_of_network(stages, buckets),
            models.text_encoder: self._usual_of_encoder(buckets),
            models.autoencoder: self._usual_of_decoder(stages[-1] if decoder else None),
        }
        wanted = [each for module in only or parts for each in parts[module]]

        def report(role: Hashable, done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(str(role), done, total)

        try:
            with _as_our_errors():
                return cast("tuple[CaptureReport, ...]", self._captures.warm_up(wanted, report))
        finally:
            self.save()

    def save(self) -> None:
        """Keep what was compiled since for the next process."""
        compilations = self._captures.counters.compilations
        if self.cache is None or compilations == self._saved_compilations:
            return  # looking through the folder would cost every request a while
        self._saved_compilations = compilations
        self._built.update(self.cache.report().new_binaries)
        self.cache.save()

    # What each part needs to be captured.

    def _usual_of_network(
        self, stages: Sequence[PreparedStage], buckets: Sequence[int]
    ) -> Iterator[Wanted]:
        models, device, dtype = self._models, self._models.device, self._models.dtype
        config = models.transformer.config
        for stage in {stage.latent_size: stage for stage in stages}.values():
            for bucket in buckets:
                yield self._network(
                    torch.zeros(1, config.channels, *stage.latent_size, device=device, dtype=dtype),
                    torch.zeros(1, bucket, config.dim, device=device, dtype=dtype),
                    stage.modulation.rows[0],
                    stage.rotary_for(models.transformer, bucket),
                )
        features = models.text_encoder.compute_dtype
        for bucket in buckets:
            yield self._refine(
                torch.zeros(1, bucket, config.caption_dim, device=device, dtype=features),
                torch.tensor(bucket, device=device),
                models.transformer.rotary_table(0, 0, bucket),
            )

    def _usual_of_encoder(self, buckets: Sequence[int]) -> Iterator[Wanted]:
        for bucket in buckets:
            ids = torch.zeros(1, bucket, dtype=torch.int64, device=self._models.device)
            yield self._encode(ids, self._models.text_encoder.rotary_table(bucket).contiguous())

    def _usual_of_decoder(self, stage: PreparedStage | None) -> Iterator[Wanted]:
        if stage is not None:
            shape = (1, self._models.transformer.config.channels, *stage.latent_size)
            yield self._decode(torch.zeros(shape, device=self._models.device))

    def _network(
        self, latent: Tensor, caption: Tensor, modulation: Tensor, rotary: Tensor
    ) -> Wanted:
        batch, _, height, width = latent.shape
        role = Role.of("network", height=height, width=width, caption=caption.shape[1], batch=batch)

        def make() -> Callable[..., Tensor]:
            transformer = self._models.transformer
            image, both = transformer.token_counts(height, width, [caption.shape[1]])
            refine = self._block("noise refiner", batch, image)
            join = self._block("layer", batch, both)
            return lambda *inputs: transformer(*inputs, refine=refine, join=join)

        return Wanted(role, _Lazy(make), (latent, caption, modulation, rotary))

    def _encode(self, ids: Tensor, rotary: Tensor) -> Wanted:
        batch, tokens = ids.shape

        def make() -> Callable[..., Tensor]:
            encoder = self._models.text_encoder
            run: RunLayer = self._compile(f"text layer, {batch} x {tokens} tokens", run_layer)
            return lambda *inputs: encoder(*inputs, run=run)

        role = Role.of("text encoder", tokens=tokens, batch=batch)
        return Wanted(role, _Lazy(make), (ids, rotary))

    def _refine(self, features: Tensor, length: Tensor, rotary: Tensor) -> Wanted:
        batch, tokens, _ = features.shape

        def make() -> Callable[..., Tensor]:
            transformer = self._models.transformer
            run = self._block("context refiner", batch, tokens)
            return lambda *inputs: transformer.refine_padded(*inputs, run=run)

        role = Role.of("caption refiner", tokens=tokens, batch=batch)
        return Wanted(role, _Lazy(make), (features, length, rotary))

    def _decode(self, latent: Tensor) -> Wanted:
        batch, _, height, width = latent.shape
        role = Role.of("decoder", height=height, width=width, batch=batch)

        def make() -> Callable[..., tuple[Tensor, Tensor]]:
            autoencoder = self._models.autoencoder

            def as_set(latent: Tensor) -> tuple[Tensor, Tensor]:
                return pipeline.decode_as_set(autoencoder, latent)

            # On a CPU its norms work in place, strip by strip, which compiled code would not.
            on_cpu = self._models.device.type == "cpu"
            run = as_set if on_cpu else self._compile(str(role), as_set)

            def decode(latent: Tensor) -> tuple[Tensor, Tensor]:
                with whole_float32(latent.device):
                    found: tuple[Tensor, Tensor] = run(latent)
                    return found

            return decode

        return Wanted(role, _Lazy(make), (latent,))

    def _block(self, kind: str, batch: int, tokens: int) -> RunBlock:
        return self._compile(f"{kind}, {batch} x {tokens} tokens", run_block)

    # The machinery.

    def _compile(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        if not self.speed_ups.compile:
            return fn
        found = self._compiled.get(name)
        if found is None:
            found = compiled(fn, name=name, cache=self.cache, strict=self.speed_ups.strict)
            self._compiled[name] = found
        return cast("Callable[..., Any]", found)

    def _run(self, wanted: Wanted, *, fresh: bool = False) -> object:
        """Run the capture of a role, made at its first use."""
        with _as_our_errors():
            captured: Captured[Any] | None = self._captures.get(wanted.key)
            if captured is None:
                captured = self._captures.capture(wanted.key, wanted.fn, wanted.inputs)
                self._first_uses += 1
            return captured.fresh(*wanted.inputs) if fresh else captured(*wanted.inputs)


class _Lazy:
    """A callable that is made at its first call."""

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self._make: Callable[[], Callable[..., Any]] | None = make
        self._fn: Callable[..., Any] | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self._fn is None:
            assert self._make is not None
            # What made it holds the first caller's tensors.
            self._fn, self._make = self._make(), None
        return self._fn(*inputs)


@contextlib.contextmanager
def _as_our_errors() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise BadInputError(str(error)) from error
    except (CaptureError, CompileError) as error:
        raise AccelerationError(str(error)) from error


def _kernels_run(device: torch.device, *, required: bool) -> bool:
    try:
        require_kernels(device)
    except BadInputError as error:
        if required:
            raise
        logger.warning("%s; the plain operations run", error)
        return False
    return True


def check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    """Padded prompt lengths to warm up for, without repeats.

    Raises:
        BadInputError: One is no multiple of 32 from 32 to 512.
    """
    if not isinstance(buckets, Iterable):
        raise BadInputError(f"buckets must be a list of numbers of tokens, got {buckets!r}")
    buckets = tuple(buckets)
    if not buckets:
        raise BadInputError("buckets must hold at least one number of tokens, got none")
    for bucket in buckets:
        is_whole = isinstance(bucket, int) and not isinstance(bucket, bool)
        if not is_whole or bucket % PAD_MULTIPLE or not 0 < bucket <= MOST_CAPTURED_TOKENS:
            raise BadInputError(
                f"buckets must be multiples of {PAD_MULTIPLE} from {PAD_MULTIPLE} to "
                f"{MOST_CAPTURED_TOKENS} tokens, got {bucket!r}"
            )
    return tuple(dict.fromkeys(buckets))


def open_cache(
    folder: str | Path, models: Models, sizes: Sequence[tuple[int, int]], speed_ups: SpeedUps
) -> CompileCache:
    """The compiled code for a model and a plan.

    Args:
        folder: Where entries are kept; it need not exist nor be writable.
        models: Their dimensions and dtypes are part of the key.
        sizes: Height and width in pixels of each stage of the plan, part of it too.
        speed_ups: The backend is part of it.
    """
    modules = (models.transformer, models.text_encoder, models.autoencoder)
    facts = {
        "models": [asdict(module.config) for module in modules],
        "dtypes": [str(next(module.parameters()).dtype) for module in modules],
        "compute": [str(models.transformer.compute_dtype), str(models.text_encoder.compute_dtype)],
        "stages": [list(size) for size in sizes],
        "quantize": models.transformer.quantize,
        "attention": models.transformer.attention.asked,
        "capture": speed_ups.capture,
    }
    return CompileCache(folder, facts=facts, version=__version__, device=models.device)
