"""The engine: loads a model once, then makes pictures, each the same for the same seed.

It adds loading, LoRAs, caches and timing around `turbo.pipeline`, never meaning: what a picture
looks like depends on the request and the weights, and in its last bits on what compiles them.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn

from turbo._version import __version__
from turbo.acceleration import (
    AUTO,
    USUAL_BUCKETS,
    Accelerator,
    Counters,
    SpeedUps,
    check_buckets,
    open_cache,
)
from turbo.attention import AttentionChoice, AttentionTimes, measure_attention, pick_attention
from turbo.builtin import builtin_model
from turbo.cache_folder import default_cache_dir
from turbo.checkpoint import Checkpoint
from turbo.compile import CaptureReport
from turbo.components import Components, component_dtypes, keep_stored
from turbo.denoiser import Caption, is_unguided
from turbo.devices import free_bytes
from turbo.devices import pick_device as pick_device
from turbo.devices import pick_dtype as pick_dtype
from turbo.errors import BadInputError, LoraError, NonFiniteLatentError, OutOfMemoryError
from turbo.fusing import LoraChoice, LoraFuser
from turbo.image_input import latent_of_image, require_picture
from turbo.latent import STRIDE
from turbo.memory import VAE_TILE as VAE_TILE
from turbo.memory import choose_memory, count_outline, lower_plan, memory_plans
from turbo.memory_errors import drop_frames, out_of_memory, phase, tried_again
from turbo.model_files import ModelFiles, find_model_files, shown_name
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.noise import MAX_SEED, check_seed
from turbo.pipeline import (
    Drawing,
    Models,
    PreparedStage,
    StageNoise,
    decode,
    draw_noise,
    encode_ids,
    prepare_stage,
    refine,
    run_stages,
    warm_cache,
)
from turbo.placement import RESIDENT, RESIDENT_PLAN, WHOLE, MemoryPlan, Placement
from turbo.plan import (
    DEFAULT_PLAN,
    ModelSettings,
    Performance,
    Plan,
    Stage,
    load_plan,
    plan_to_dict,
)
from turbo.precision import arithmetic_dtype
from turbo.quantize import pick_quantization
from turbo.tensor_cache import TensorCache
from turbo.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

OnProgress = Callable[[str, int, int], None]
"""Called with (stage name, steps done, steps in all)."""

CACHE_BYTES = 256 << 20
"""Of captions, and as many of modulation tables (31 MiB for the full-size third stage)."""
SMALL_CACHE_BYTES = 64 << 20
"""The same where weights move because there is little room."""
WARMUP_PROMPT = "a picture that is long enough to have more tokens than the empty prompt"
MAX_IMAGES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One request's pictures and what is known about them."""

    images: list[Image.Image]
    """8-bit RGB pictures; number i is the one that seed + i alone gives."""
    seeds: list[int]
    """The seed of each picture."""
    timings: dict[str, float]
    """Seconds: `prompt`, `encode` of a given picture, each stage by its name, `decode`, `total`;
    over all pictures."""
    skips: dict[str, tuple[int, int]]
    """Stage name -> (network calls the step cache saved, network calls wanted), all pictures."""
    stage_images: list[dict[str, Image.Image]]
    """Each picture's stages by name; empty unless they were asked for."""
    metadata: list[dict[str, Any]]
    """For each picture, all that made it, ready for JSON."""

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]

    @property
    def seed(self) -> int:
        """The first picture's seed."""
        return self.seeds[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupReport:
    """What a warm-up did."""

    seconds: dict[str, float]
    """`load` (of the model, before), `attention` (measuring it), `compile` (or load compiled code),
    `capture`, then `prompt`, stage names and `decode` -> seconds of their first run."""
    captures: tuple[CaptureReport, ...] = ()
    """Each part and shape that is captured, with its seconds and its memory."""
    built: int = 0
    """Binaries that a compiler built because the cache on disk did not hold them."""
    attention: tuple[AttentionTimes, ...] = ()
    """What the backends of the network's attention took, and which was chosen, for each shape
    that `attention="auto"` measured."""


class _Meter:
    """Times parts of a request; on a GPU with events, so that nothing waits for the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block; parts of the same name add up."""
        if self._device.type == "cuda":
            begin, end = (_event() for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        start = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - start)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Wait for the block's work at its end, so that `read` need not later.

        Waiting for a device is forbidden while another thread records a graph on it.
        """
        yield
        self.read()

    def read(self) -> dict[str, float]:
        """Seconds by part; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1000)
        self._events.clear()
        return self._seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


class Engine:
    """A loaded model that makes pictures; safe to call from several threads, one at a time runs.

    Make one with `Engine.from_pretrained`.
    """

    def __init__(
        self,
        models: Models,
        files: ModelFiles,
        plan: Plan,
        fuser: LoraFuser,
        *,
        strict_loras: bool = True,
        accelerator: Accelerator | None = None,
        holding: _Holding | None = None,
    ) -> None:
        self.models = models
        self.files = files
        self.plan = plan
        self.accelerator = accelerator or Accelerator(models, SpeedUps())
        self.start_seconds: dict[str, float] = {}
        """Parts of loading -> seconds: `find files`, `plan memory`, `read network` and so on for
        each component that was read (side by side), `open compiled code`, `fuse LoRAs`; and `load`,
        all of it."""
        self._holding = holding
        self._fuser = fuser
        self._loras: tuple[LoraChoice, ...] = ()
        self._strict = strict_loras
        small = holding is not None and holding.made.moves
        cache_bytes = SMALL_CACHE_BYTES if small else CACHE_BYTES
        self._captions = TensorCache[tuple[str, int | None], Caption](
            cache_bytes, lambda caption: caption.tokens.nbytes
        )
        self._stages = TensorCache[Stage, PreparedStage](
            cache_bytes, lambda prepared: prepared.modulation.rows.nbytes
        )
        self._noise_pool = ThreadPoolExecutor(1, "turbo-noise")
        self._lock = _lock_of(models.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        diffusion_model: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        tokenizer: str | Path | None = None,
        loras: Sequence[Any] = (),
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantize: str | None = None,
        plan: Plan | str | Path | None = None,
        strict_loras: bool = True,
        compile: bool | str = AUTO,
        capture: str = AUTO,
        kernels: bool | str = AUTO,
        attention: str | None = None,
        cache_dir: str | Path | None = AUTO,
        strict_speed: bool = False,
        memory: str | None = None,
        allow_fallback: bool | None = None,
        on_progress: OnProgress | None = None,
    ) -> Engine:
        """Load a model.

        Args:
            path: A ComfyUI or diffusers folder or an all-in-one checkpoint; see `find_model_files`.
                Without it and without files, the plan's, and if that has none the built-in
                model, which paints simple scenes; see `turbo.builtin`.
            diffusion_model: The network's file; wins over what `path` holds.
            text_encoder: The text encoder's file.
            vae: The autoencoder's file.
            tokenizer: The tokenizer's folder.
            loras: LoRAs to fuse at once, as `set_loras` takes them.
            device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:1"…
            dtype: "float32", "bfloat16", "float16" or "auto": bfloat16 on CUDA, float32 on a CPU.
                With float16 the autoencoder works in float32, which float16 overflows.
            quantize: Keep the network's large matrices in 8 bits: "fp8", "int8" or
                "int8-weight-only"; "none" not to; None: as the plan says, and as a file that
                `turbo quantize` wrote has them. LoRAs are fused before. With None, a GGUF or 8-bit
                file is made into floats: layer by layer in the memory plan "low", which keeps it
                as it is, and at loading in the others, to the same bits.
            plan: A plan or a plan file; None is the workflow's plan.
            strict_loras: Refuse a LoRA of which some keys fit nothing; one of which none fits
                always is.
            compile: Whether Inductor compiles the parts; "auto": on CUDA.
            capture: "cuda-graph", "replay" (its rules without a graph), "eager" (none) or "auto":
                CUDA graphs on CUDA.
            kernels: Whether fused Triton kernels run; "auto": on CUDA.
            attention: What computes the network's attention, one of `turbo.plan.ATTENTION`: "auto"
                is what `warmup` measures to be fastest on CUDA, "sdpa" on a CPU; None: as the plan
                says.
            cache_dir: Where compiled code is kept, so that the next process compiles nothing;
                "auto" is `default_cache_dir`, None keeps none.
            strict_speed: Raise where something cannot be compiled or captured; otherwise a line is
                logged and the plain way taken.
            memory: "fast", "balanced", "low" or "auto", as `Performance` explains them; None: as
                the plan says. Which one it became is logged.
            allow_fallback: When memory runs out, try once more as the next smaller memory plan has
                it: in loading, which then holds for the engine, and in a request, for that one
                alone; not in `warmup` and `set_loras`. None: as the plan says.
            on_progress: Called with (component, tensors read, tensors in all), from the threads
                that read, one call at a time and a component after the other.

        Raises:
            BadInputError: A file, a setting or a device is not usable, or the model does not fit
                the device as `memory` says; says what would do.
            OutOfMemoryError: Memory ran out in loading.
        """
        begin = time.perf_counter()
        _require_list(loras)
        plan = _with_memory(_as_plan(plan, DEFAULT_PLAN), memory, allow_fallback)
        settings = plan.model
        device = pick_device(settings.device if device == "auto" else device)
        if cache_dir is not None and not isinstance(cache_dir, str | Path):
            raise BadInputError(f"cache_dir must be a folder, 'auto' or None, got {cache_dir!r}")
        speed_ups = SpeedUps.choose(
            device,
            compile=compile,
            capture=capture,
            kernels=kernels,
            strict=strict_speed,
            offload=_asks_low(plan.performance),
        )
        dtype = pick_dtype(settings.torch_dtype if dtype == "auto" else dtype, device)
        if not any((path, diffusion_model, text_encoder, vae)):
            path, vae, text_encoder = settings.path, settings.vae_path, settings.clip_path
            if not any((path, vae, text_encoder)):
                path = builtin_model()
        # A plan file may name the network's own file as its model path, beside two other files.
        if diffusion_model is None and path and text_encoder and vae and Path(path).is_file():
            path, diffusion_model = None, path
        files = find_model_files(
            path,
            diffusion_model=diffusion_model,
            text_encoder=text_encoder,
            vae=vae,
            tokenizer=tokenizer or settings.tokenizer_path,
        )
        words = Tokenizer.from_path(files.require_tokenizer())
        strength = plan.lora.default_strength
        choices = [LoraChoice.parse(item, files.loras_dir, strength) for item in loras]
        asked = settings.quantize if quantize is None else quantize
        checkpoints = files.open()
        kept = pick_quantization(asked, checkpoints[NETWORK].quantization, device)
        loader = _Loader(
            checkpoints,
            words,
            plan,
            device,
            dtype,
            kept,
            keep=keep_stored(asked, kept),
            attention=plan.performance.attention if attention is None else attention,
        )
        loader.seconds["find files"] = time.perf_counter() - begin
        loader.check(choices, strict_loras)
        holding = loader.load(may_move_network=capture in (AUTO, "eager"), report=on_progress)
        if holding.made.modes[NETWORK] != RESIDENT:
            speed_ups = replace(speed_ups, capture="eager")
        loaded = time.perf_counter()
        accelerator = _accelerate(loader.models, speed_ups, plan, cache_dir)
        engine = cls(
            loader.models,
            files,
            plan,
            loader.fuser,
            strict_loras=strict_loras,
            accelerator=accelerator,
            holding=holding,
        )
        engine._install()
        loader.seconds["open compiled code"] = time.perf_counter() - loaded
        if loras:
            with loader.part("fuse LoRAs"):
                engine.set_loras(loras, strict=strict_loras)
        engine.start_seconds = {**loader.seconds, "load": time.perf_counter() - begin}
        return engine

    @property
    def counters(self) -> Counters:
        """What was compiled and captured so far; a warm request adds `replays` alone."""
        return self.accelerator.counters

    @property
    def loras(self) -> tuple[LoraChoice, ...]:
        """The LoRAs that hold for requests that name none."""
        return self._loras

    def set_loras(self, loras: Sequence[Any] = (), *, strict: bool = True) -> None:
        """Fuse LoRAs into the weights, replacing those fused before; none restores every bit.

        Args:
            loras: Each a path or name, a (path or name, strength) pair, or a triple with the text
                encoder's own strength last. A name is looked up in the model's `loras` folder.
            strict: Refuse a file of which some keys fit nothing in the model; one of which none
                fits always is.

        Raises:
            LoraError: A file is missing, damaged or not for this model; the weights are as before.
            OutOfMemoryError: Memory ran out; the weights are those without any LoRA.
        """
        with self._lock, self._current_device(), phase("loading"):
            choices = self._choose(loras, self.plan.lora.default_strength)
            self._fuse(choices, strict)
            self._loras, self._strict = choices, strict

    @torch.inference_mode()
    def warmup(
        self,
        on_progress: OnProgress | None = None,
        *,
        buckets: Sequence[int] = USUAL_BUCKETS,
    ) -> WarmupReport:
        """Compile, capture and run every part at the plan's sizes, so that no request has to.

        Args:
            on_progress: Called with (part, done, in all).
            buckets: Prompt lengths in tokens, the template's 8 included, padded to multiples of 32,
                to compile and capture for. Others are captured when they first come.

        Raises:
            BadInputError: A bucket is no multiple of 32 from 32 to 512.
            AccelerationError: A part could not be compiled or captured, with `strict_speed`.
            OutOfMemoryError: Memory ran out; says in which phase.
        """
        buckets = check_buckets(buckets)

        def warm() -> WarmupReport:
            return self._warm_up(_Meter(self.models.device), buckets, on_progress)

        with self._lock, self._current_device():
            return self._within_memory(warm, allow_fallback=None)

    def _warm_up(
        self, meter: _Meter, buckets: Sequence[int], on_progress: OnProgress | None
    ) -> WarmupReport:
        plan = self.plan.resolved()
        captures: tuple[CaptureReport, ...] = ()
        seconds = {"load": self.start_seconds.get("load", 0.0)}

        @contextlib.contextmanager
        def part(name: str) -> Iterator[None]:
            if on_progress:
                on_progress(name, 0, 1)
            with meter.part(name):
                yield
            if on_progress:
                on_progress(name, 1, 1)

        with meter.settled():
            attention = self._measure_attention(plan, buckets, seconds)
            if self.accelerator.speed_ups.any_stand_in:
                begin, before = time.perf_counter(), self.accelerator.compile_seconds
                with phase("capture"):
                    captures = self._capture_usual(plan, buckets, on_progress)
                # What is dropped to make room takes its seconds along.
                seconds["compile"] = max(0.0, self.accelerator.compile_seconds - before)
                seconds["capture"] = time.perf_counter() - begin - seconds["compile"]
            with part("prompt"):
                pairs = self._warmup_captions(buckets)
            latent: Tensor | None = None
            for stage in plan.stages:
                with part(stage.name), phase("sampling"), self._on_device(self.models.transformer):
                    latent = self._warm_stage(stage, pairs, latent)
            assert latent is not None
            with part("decode"):
                self._decode(latent, plan.performance)
        return WarmupReport(
            seconds=seconds | meter.read(),
            captures=captures,
            built=self.accelerator.built,
            attention=attention,
        )

    def _warm_stage(
        self, stage: Stage, pairs: Sequence[tuple[Caption, Caption]], latent: Tensor | None
    ) -> Tensor:
        """Run a stage for one step, in each way that captions may come."""
        self._prepared(stage)
        once = replace(stage, node="custom", scheduler="simple", steps=1, denoise=1.0)
        step = prepare_stage(self.models.transformer, once)
        warm_cache(self.models, step)
        for positive, negative in pairs:
            drawing = Drawing(
                positive=positive, negative=negative, noise=self._noise([step], 0), latent=latent
            )
            (result,) = run_stages(self.models, [step], drawing)
        return result.latent

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        trigger_word: str = "",
        seed: int | None = None,
        loras: Sequence[Any] | None = None,
        progressive: bool | None = None,
        plan: Plan | str | Path | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images: int = 1,
        image: Image.Image | None = None,
        strength: float | None = None,
        max_tokens: int | None = None,
        on_progress: OnProgress | None = None,
        keep_stages: bool = False,
        strict_loras: bool | None = None,
    ) -> Result:
        """Make pictures of a prompt.

        Args:
            prompt: Any text. Weights such as ``(word:1.3)`` are kept as text, like the reference.
            negative_prompt: What to move away from; stages whose cfg is 1 do not look at it.
            trigger_word: Put before the prompt as ``f"{trigger_word}, {prompt}"``.
            seed: 0 to 2**64 - 1; None draws one.
            loras: For this request alone, in place of `set_loras`' (an empty list: none).
            progressive: False makes the picture in one stage at the last stage's size; None does
                what the plan says.
            plan: A plan or plan file for this request; None is the engine's. Where the model is and
                whether it is offloaded stays as the engine was made.
            num_inference_steps: Steps of the first stage (of the only one, if not progressive).
            guidance_scale: cfg of the first stage, in ComfyUI's sense: 1 is off.
            num_images: How many; picture i is the one that seed + i alone gives.
            image: Start from a picture: the first stage whose denoise is at most `strength` (the
                last one, if none is) begins with it, cut to the stage's aspect.
            strength: How much of `image` to make anew, in (0, 1]: that stage's denoise; 0.6 if
                not given.
            max_tokens: Cut longer prompts to so many tokens; None never cuts.
            on_progress: Called with (stage name, denoiser evaluations done, evaluations in all),
                at the start of each stage and after each evaluation.
            keep_stages: Also decode every stage's latent.
            strict_loras: Refuse LoRAs of which some keys fit nothing; None as `set_loras` had it.

        Returns:
            Pictures, seeds, timings, step-cache counts and metadata.

        Raises:
            BadInputError: A value is impossible; nothing was computed.
            NonFiniteLatentError: The arithmetic overflowed; says in which stage and dtype.
            OutOfMemoryError: Memory ran out; says in which phase. The next request is as any other.
        """
        _check_texts(prompt=prompt, negative_prompt=negative_prompt, trigger_word=trigger_word)
        if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
            raise BadInputError(f"num_images must be an integer of at least 1, got {num_images!r}")
        if max_tokens is not None and type(max_tokens) is not int:
            raise BadInputError(f"max_tokens must be an integer or None, got {max_tokens!r}")
        if num_images > MAX_IMAGES:
            raise BadInputError(f"num_images must be at most {MAX_IMAGES}, got {num_images}")
        first_seed = secrets.randbits(48) if seed is None else check_seed(seed)
        chosen = _as_plan(plan, self.plan)
        resolved = chosen.resolved(progressive, num_inference_steps, guidance_scale)
        stages = _stages_from_image(resolved.stages, image, strength)
        seeds = [(first_seed + index) % (MAX_SEED + 1) for index in range(num_images)]
        text = f"{trigger_word}, {prompt}" if trigger_word else prompt

        def make() -> _Made:
            meter = _Meter(self.models.device)
            with meter.settled(), meter.part("total"):
                default = resolved.lora.default_strength
                choices = self._loras if loras is None else self._choose(loras, default)
                with phase("loading"):
                    self._fuse(choices, self._strict if strict_loras is None else strict_loras)
                with meter.part("prompt"):
                    guided = not all(is_unguided(stage.cfg) for stage in stages)
                    positive, *others = self._encode(
                        [text, *[negative_prompt] * guided], max_tokens
                    )
                request = _Request(
                    stages=stages,
                    positive=positive,
                    negative=others[0] if others else None,
                    latent=None if image is None else self._encode_image(image, stages[0], meter),
                    performance=resolved.performance,
                    on_progress=on_progress,
                    keep_stages=keep_stages,
                    meter=meter,
                )
                pictures = [self._picture(request, one) for one in seeds]
                used_loras = self._fuser.describe()
                self.accelerator.save()
            return _Made(pictures, used_loras, self.memory.name, meter)

        with self._lock, self._current_device():
            made = self._within_memory(make, resolved.performance.allow_fallback)
            pictures, timings = made.pictures, made.meter.read()
        description: dict[str, Any] = {
            "version": __version__,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "trigger_word": trigger_word,
            "plan": plan_to_dict(replace(resolved, model=ModelSettings())),  # no local paths
            "loras": made.loras,
            "models": {
                "network": shown_name(self.files.network),
                "text_encoder": shown_name(self.files.text_encoder),
                "vae": shown_name(self.files.vae),
            },
            "device": self.models.device.type,
            "dtype": _name(self.models.dtype),
            "quantize": self.models.transformer.quantize,
            "attention": self.models.transformer.attention.asked,
            "memory": made.memory,
        }
        if image is not None:
            description |= {"first_stage": stages[0].name, "strength": stages[0].denoise}
        return Result(
            images=[picture.image for picture in pictures],
            seeds=seeds,
            timings=timings,
            skips=_sum_skips(pictures),
            stage_images=[picture.stages for picture in pictures] if keep_stages else [],
            metadata=[{**description, "seed": one} for one in seeds],
        )

    def _measure_attention(
        self, plan: Plan, buckets: Sequence[int], seconds: dict[str, float]
    ) -> tuple[AttentionTimes, ...]:
        """Give each shape of the plan's requests its attention, before anything is compiled."""
        begin, network = time.perf_counter(), self.models.transformer
        sizes = [(stage.height // STRIDE, stage.width // STRIDE) for stage in plan.stages]
        tokens = [count for size in sizes for count in network.token_counts(*size, buckets)]
        times = measure_attention(
            network.attention,
            [(1, count) for count in (*tokens, *buckets)],
            heads=network.config.heads,
            head_dim=network.config.head_dim,
            device=self.models.device,
            dtype=network.compute_dtype,
            memory=self.accelerator.cache,
        )
        if times:
            seconds["attention"] = time.perf_counter() - begin
        return times

    def _capture_usual(
        self, plan: Plan, buckets: Sequence[int], on_progress: OnProgress | None
    ) -> tuple[CaptureReport, ...]:
        """Compile and capture what the plan's requests will use."""
        models = self.models
        stand_ins = {
            models.text_encoder: models.encode,
            models.transformer: models.refine,
            models.autoencoder: models.decode,
        }
        modules = [module for module, stand_in in stand_ins.items() if stand_in is not None]
        captures: tuple[CaptureReport, ...] = ()
        with self._on_device(models.transformer):
            prepared = [self._prepared(stage) for stage in plan.stages]
        # Where modules rest elsewhere, the device may not have room for all at once.
        for only in [[module] for module in modules] if self.memory.moves else [modules]:
            with contextlib.ExitStack() as stack:
                for module in only:
                    stack.enter_context(self._on_device(module))
                captures = self.accelerator.warm_up(
                    prepared,
                    buckets,
                    on_progress,
                    only=only,
                    decoder=not self._is_tiled(plan.performance),
                )
        return captures

    def _warmup_captions(self, buckets: Sequence[int]) -> list[tuple[Caption, Caption]]:
        """Captions to warm up with, (positive, negative).

        Captions of one length share a network call with guidance, those of two do not. The first
        is rare, so nothing is captured for it beforehand.
        """
        if not self.accelerator.speed_ups.any_stand_in:
            short, long = self._encode(["", WARMUP_PROMPT], None)
            return [(short, short), (long, short)]
        dim, bucket = self.models.transformer.config.dim, buckets[0]
        tokens = torch.zeros(1, bucket, dim, device=self.models.device, dtype=self.models.dtype)
        return [(Caption(tokens, bucket), Caption(tokens, bucket - 1))]

    def _picture(self, request: _Request, seed: int) -> _Picture:
        finite: dict[str, Tensor] = {}
        skips: dict[str, tuple[int, int]] = {}
        latents: dict[str, Tensor] = {}

        def on_step(stage: Stage, done: int, total: int) -> None:
            if request.on_progress is not None:
                request.on_progress(stage.name, done, total)

        with self._on_device(self.models.transformer):
            prepared = [self._prepared(stage) for stage in request.stages]
            drawing = Drawing(
                positive=request.positive,
                negative=request.negative,
                noise=self._noise(prepared, seed),
                latent=request.latent,
            )
            results = run_stages(self.models, prepared, drawing, on_step=on_step)
            for stage in request.stages:
                with request.meter.part(stage.name), phase("sampling"):
                    result = next(results)
                latents[stage.name] = result.latent
                finite[stage.name] = result.latent.isfinite().all()
                skips[stage.name] = (result.skipped, result.calls)
        self._require_finite(finite)
        last = request.stages[-1].name
        shown = request.stages if request.keep_stages else request.stages[-1:]
        with request.meter.part("decode"):
            pictures = {
                stage.name: self._decode(latents[stage.name], request.performance)
                for stage in shown
            }
        return _Picture(pictures[last], pictures, skips)

    def _noise(
        self, stages: Sequence[PreparedStage], seed: int
    ) -> Callable[[PreparedStage], StageNoise]:
        """Every stage's random numbers; beside a GPU they are drawn ahead, while it works."""

        def draw(prepared: PreparedStage) -> StageNoise:
            return draw_noise(
                prepared,
                (seed + prepared.stage.seed_offset) % (MAX_SEED + 1),
                self.models.device,
                channels=self.models.transformer.config.channels,
            )

        if self.models.device.type == "cpu":
            return draw
        stream = torch.cuda.current_stream(self.models.device)  # its order is what makes it safe

        def draw_ahead(prepared: PreparedStage) -> StageNoise:
            with torch.cuda.stream(stream):
                return draw(prepared)

        drawn = {one.stage: self._noise_pool.submit(draw_ahead, one) for one in stages}
        return lambda prepared: drawn[prepared.stage].result()

    def _current_device(self) -> contextlib.AbstractContextManager[Any]:
        """Make the engine's device the current one, on which Triton launches and events count."""
        device = self.models.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    def _encode_image(self, image: Image.Image, stage: Stage, meter: _Meter) -> Tensor:
        with meter.part("encode"), phase("encoding"), self._on_device(self.models.autoencoder):
            return latent_of_image(self.models.autoencoder, image, stage, self.models.device)

    def _decode(self, latent: Tensor, performance: Performance) -> Image.Image:
        autoencoder = self.models.autoencoder
        is_tiled = self._is_tiled(performance)
        with phase("decoding"), self._on_device(autoencoder):
            if is_tiled or self.models.decode is None:
                tile = VAE_TILE if is_tiled else None
                pixels, finite = decode(
                    autoencoder, latent, slicing=performance.enable_vae_slicing, tile=tile
                )
            else:
                pixels, finite = self.models.decode(latent)
        if not finite:
            dtype = _name(next(autoencoder.parameters()).dtype)
            raise NonFiniteLatentError(
                f"the decoder's picture is not finite in {dtype}, no picture was made; use dtype "
                "float32, or another autoencoder file"
            )
        return Image.fromarray(pixels[0].cpu().numpy())

    def _encode(self, texts: Sequence[str], max_tokens: int | None) -> list[Caption]:
        """Captions of prompts; each model part is needed once for all of them."""
        known = {text: self._captions.find((text, max_tokens)) for text in texts}
        missing = [text for text, caption in known.items() if caption is None]
        if missing:
            tokenizer = self.models.tokenizer
            ids = [tokenizer.encode_prompt(text, max_tokens=max_tokens) for text in missing]
            with phase("encoding"), self._on_device(self.models.text_encoder):
                features = [encode_ids(self.models, one) for one in ids]
            with phase("encoding"), self._on_device(self.models.transformer):
                made = [refine(self.models, feature) for feature in features]
            for text, caption in zip(missing, made):
                self._captions.put((text, max_tokens), caption)
            known |= zip(missing, made)
        return [cast("Caption", known[text]) for text in texts]

    def _prepared(self, stage: Stage) -> PreparedStage:
        """A stage with its tables, which depend on its schedule and size alone."""
        same = replace(
            stage, name="any", cfg=1.0, seed_offset=0, upscale="nearest-exact", easycache=None
        )
        prepared = self._stages.find(same)
        if prepared is None:
            prepared = prepare_stage(self.models.transformer, same)
            self._stages.put(same, prepared)
        return replace(prepared, stage=stage)

    @contextlib.contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[None]:
        """Have a module's weights on the device while it is used."""
        with contextlib.ExitStack() as stack:
            if self._holding is not None:
                with phase("loading"):
                    stack.enter_context(self._holding.placement.at_work(module))
            yield

    @property
    def memory(self) -> MemoryPlan:
        """How the weights are held now."""
        holding = self._holding
        return RESIDENT_PLAN if holding is None else holding.now or holding.made

    @property
    def _modes(self) -> Mapping[str, str | None]:
        holding = self._holding
        return RESIDENT_PLAN.modes if holding is None else holding.placement.modes

    def _is_tiled(self, performance: Performance) -> bool:
        return performance.enable_vae_tiling or self.memory.is_tiled

    def _install(self) -> None:
        """Have the accelerator stand in for parts; no graph bears weights that move."""
        if not self.accelerator.speed_ups.any_stand_in:
            return
        bears = {RESIDENT, WHOLE} if self.accelerator.speed_ups.capture == "eager" else {RESIDENT}
        modules = {
            NETWORK: self.models.transformer,
            TEXT_ENCODER: self.models.text_encoder,
            AUTOENCODER: self.models.autoencoder,
        }
        still = [modules[part] for part, mode in self._modes.items() if mode in bears]
        self.accelerator.install(self.models, still)

    def _hold(self, plan: MemoryPlan) -> None:
        """Hold the parts as a memory plan says."""
        if self._holding is None or self._holding.now is plan:
            return
        self.accelerator.clear()
        with phase("loading"):
            self._holding.use(plan)
        self._install()

    def _within_memory(self, make: Callable[[], _Result], allow_fallback: bool | None) -> _Result:
        """Make pictures as the engine's memory plan says; if memory runs out, as the next does.

        `allow_fallback` is None where no other plan is tried in any case.
        """
        plan = RESIDENT_PLAN if self._holding is None else self._holding.made
        lower = None if self._holding is None else lower_plan(plan.name)
        result = self._attempt(make, plan)
        if isinstance(result, OutOfMemoryError) and allow_fallback and lower is not None:
            assert self._holding is not None
            logger.warning("%s", tried_again(result, plan.name, lower))
            plan = self._holding.named(lower)
            lower = lower_plan(plan.name)
            result = self._attempt(make, plan)
        if isinstance(result, OutOfMemoryError):
            may_allow = allow_fallback is False
            raise out_of_memory(result, plan.name, lower, may_allow_fallback=may_allow)
        return result

    def _attempt(self, make: Callable[[], _Result], plan: MemoryPlan) -> _Result | OutOfMemoryError:
        """What was made, or what happened; by then nothing holds what filled the memory."""
        try:
            self._hold(plan)
            with phase("sampling"):
                return make()
        except OutOfMemoryError as error:
            self._captions.clear()
            self._stages.clear()
            self.accelerator.clear()
            drop_frames(error)
            return OutOfMemoryError(str(error), error.phase)

    def _choose(self, loras: Sequence[Any], default_strength: float) -> tuple[LoraChoice, ...]:
        _require_list(loras)
        folder = self.files.loras_dir
        return tuple(LoraChoice.parse(item, folder, default_strength) for item in loras)

    def _fuse(self, choices: tuple[LoraChoice, ...], strict: bool) -> None:
        written = True  # as far as is known, should it fail
        make_room = None if self._holding is None else self._holding.placement.loosen
        modes = self._modes
        try:
            written = self._fuser.fuse(choices, strict=strict, make_room=make_room)
        except BaseException:
            if self._holding is not None and None in self._modes.values():
                self._holding.now = None  # the next request reads what is absent
            raise
        finally:
            if written:
                self._captions.clear()
                self._stages.clear()
            if self._modes != modes:
                self.accelerator.clear()
                self._install()

    def _require_finite(self, finite: dict[str, Tensor]) -> None:
        """One read-back for all stages; the first bad one is named."""
        if torch.stack(list(finite.values())).all():
            return
        stage = next(name for name, flag in finite.items() if not flag)
        dtype = _name(self.models.dtype)
        raise NonFiniteLatentError(
            f"the latent of {stage} is not finite in {dtype}, no picture was made; use "
            f"{'bfloat16 or float32' if dtype == 'float16' else 'float32'}, or weaker LoRAs"
        )


_DEVICE_LOCKS: defaultdict[int, threading.RLock] = defaultdict(threading.RLock)


def _lock_of(device: torch.device) -> threading.RLock:
    """An engine's own lock, or on a GPU that of all its engines.

    While one of them records a CUDA graph, another must not wait for the device.
    """
    if device.type != "cuda":
        return threading.RLock()
    return _DEVICE_LOCKS[torch.cuda.current_device() if device.index is None else device.index]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    stages: Sequence[Stage]
    positive: Caption
    negative: Caption | None
    latent: Tensor | None
    performance: Performance
    on_progress: OnProgress | None
    keep_stages: bool
    meter: _Meter


@dataclass(frozen=True, slots=True)
class _Made:
    """What a request made."""

    pictures: list[_Picture]
    loras: list[dict[str, Any]]
    memory: str
    """The memory plan that held."""
    meter: _Meter


@dataclass(frozen=True, slots=True)
class _Picture:
    image: Image.Image
    stages: dict[str, Image.Image]
    skips: dict[str, tuple[int, int]]


@dataclass(slots=True)
class _Holding:
    """How the parts are held in memory now, and how else they could be."""

    placement: Placement
    made: MemoryPlan
    """As the engine was made."""
    now: MemoryPlan | None
    """As they are held; None after a change that failed, which the next request makes anew."""
    named: Callable[[str], MemoryPlan]
    """Works out another memory plan by its name."""

    def use(self, plan: MemoryPlan) -> None:
        """Hold the parts in another way."""
        self.now = None
        self.placement.use(plan)
        self.now = plan


class _Loader:
    """Loads the modules of a model: compares everything, then places weights."""

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        tokenizer: Tokenizer,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        quantize: str | None,
        *,
        keep: Collection[str],
        attention: str,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._plan, self._device = plan, device
        self._report: _Reports | None = None
        dtypes = component_dtypes(dtype, device)
        compute_dtype = arithmetic_dtype(dtype, device)

        def outline() -> Components:
            made = Components.outline(checkpoints, dtypes, quantize, keep=keep)
            made.network.compute_dtype = compute_dtype
            return made

        # All is compared before anything is allocated: a foreign file may want terabytes.
        self._outline = outline
        self._made = made = outline()
        chosen = pick_attention(attention, device, compute_dtype, made.network.config.head_dim)
        made.network.attention = AttentionChoice(chosen)
        self.fuser = LoraFuser(made.by_name(), checkpoints, keep_files=plan.lora.cache_models)
        self.models = Models(
            tokenizer, made.text_encoder, made.network, made.autoencoder, made.network, device
        )

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block; blocks of one name add up."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def check(self, loras: Sequence[LoraChoice], strict: bool) -> None:
        """Refuse parts that do not belong together, before a weight is read."""
        models = self.models
        stride, known = models.autoencoder.config.stride, models.tokenizer.vocabulary_size
        vocabulary = models.text_encoder.config.vocab_size
        if stride != STRIDE:
            raise BadInputError(
                f"the autoencoder makes {stride} pixels of a latent cell, Z-Image needs {STRIDE}: "
                "it is of another model"
            )
        if known > vocabulary:
            raise BadInputError(
                f"the tokenizer knows {known} ids, the text encoder only {vocabulary}: they are of "
                "different models; give the tokenizer that belongs to the text encoder"
            )
        self.fuser.check(loras, strict=strict)

    def load(self, *, may_move_network: bool, report: OnProgress | None) -> _Holding:
        """Place the weights as the plan's memory says, or as the next smaller plan does."""
        with self.part("plan memory"):
            plan = choose_memory(
                self._made, self._plan, self._device, may_move_network=may_move_network
            )
        made = self._made
        placement = Placement(
            made.by_name(), self._device, self._fill, made.keepings, self.fuser.reading
        )
        self._report = None if report is None else _Reports(report)
        try:
            plan = self._place(placement, plan)
        finally:
            self._report = None
        return _Holding(placement, plan, plan, lambda name: self._named(placement, name))

    def _place(self, placement: Placement, plan: MemoryPlan) -> MemoryPlan:
        lower, allowed = lower_plan(plan.name), self._plan.performance.allow_fallback
        failed = _place(placement, plan)
        if failed is not None and lower is not None and allowed:
            logger.warning("%s", tried_again(failed, plan.name, lower))
            plan = self._named(placement, lower)
            lower = lower_plan(plan.name)
            failed = _place(placement, plan)
        if failed is not None:
            raise out_of_memory(failed, plan.name, lower, may_allow_fallback=not allowed)
        return plan

    def _named(self, placement: Placement, name: str) -> MemoryPlan:
        """A memory plan for what is free where none of the weights is there."""
        free = free_bytes(self._device)
        if free is not None:
            free += placement.held_bytes
        need = count_outline(self._outline(), self._plan, self._device)
        plan, _ = memory_plans(need, self._plan.performance, self._device, free)[name]
        return plan

    def _fill(self, component: str, names: Collection[str]) -> None:
        report = self._report
        with self.part(f"read {component.replace('_', ' ')}"):
            self.fuser.fill(component, names, None if report is None else report.of(component))


class _Reports:
    """Passes on the progress of parts that load side by side as if one came after the other."""

    def __init__(self, report: OnProgress) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._waiting: dict[str, list[tuple[int, int]]] = {}

    def of(self, component: str) -> Callable[[int, int], None]:
        """What to call with (tensors read, tensors in all)."""

        def told(done: int, total: int) -> None:
            with self._lock:
                self._waiting.setdefault(component, []).append((done, total))
                self._pass_on()

        return told

    def _pass_on(self) -> None:
        for component, waiting in tuple(self._waiting.items()):
            while waiting:
                done, total = waiting.pop(0)
                self._report(component, done, total)
                if done == total:
                    del self._waiting[component]
            if component in self._waiting:
                return  # its next report comes before those of others


def _place(placement: Placement, plan: MemoryPlan) -> OutOfMemoryError | None:
    """Place the weights; what happened if memory ran out, and then none of them is there."""
    try:
        with phase("loading"):
            placement.use(plan)
    except OutOfMemoryError as error:
        placement.clear()
        drop_frames(error)
        return OutOfMemoryError(str(error), error.phase)
    return None


def _asks_low(performance: Performance) -> bool:
    return performance.enable_model_cpu_offload or performance.memory == "low"


def _with_memory(plan: Plan, memory: str | None, allow_fallback: bool | None) -> Plan:
    """A plan with what was given beside it."""
    given = {"memory": memory, "allow_fallback": allow_fallback}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(plan, performance=replace(plan.performance, **changes))


def _accelerate(
    models: Models, speed_ups: SpeedUps, plan: Plan, cache_dir: str | Path | None
) -> Accelerator:
    cache = None
    if speed_ups.compile and cache_dir is not None:
        folder = default_cache_dir() if cache_dir == AUTO else Path(cache_dir).expanduser()
        sizes = [(stage.height, stage.width) for stage in plan.resolved().stages]
        cache = open_cache(folder, models, sizes, speed_ups)
    models.kernels = speed_ups.kernels
    return Accelerator(models, speed_ups, cache)


def _as_plan(plan: Plan | str | Path | None, default: Plan) -> Plan:
    if plan is None:
        return default
    if not isinstance(plan, Plan | str | Path):
        raise BadInputError(f"plan must be a Plan or a plan file, got {type(plan).__name__}")
    return plan if isinstance(plan, Plan) else load_plan(plan)


def _stages_from_image(
    stages: Sequence[Stage], image: Image.Image | None, strength: float | None
) -> list[Stage]:
    """The stages that a request runs: all, or those from where a given picture enters."""
    if image is None:
        if strength is not None:
            raise BadInputError("strength needs an image to start from; give image, or no strength")
        return list(stages)
    require_picture(image)
    strength = 0.6 if strength is None else strength
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not is_number or not 0 < strength <= 1:
        raise BadInputError(f"strength must be above 0 and at most 1, got {strength!r}")
    enters = [number for number, stage in enumerate(stages) if stage.denoise <= strength]
    start = enters[0] if enters else len(stages) - 1
    return [replace(stages[start], denoise=strength), *stages[start + 1 :]]


def _require_list(loras: Sequence[Any]) -> None:
    if isinstance(loras, str | Path):  # a string would be taken letter by letter
        raise LoraError(f"loras must be a list, got {str(loras)!r}; put it in brackets")


def _check_texts(**texts: str) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise BadInputError(f"{name} must be a string, got {type(text).__name__}")


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sum_skips(pictures: Sequence[_Picture]) -> dict[str, tuple[int, int]]:
    total: dict[str, tuple[int, int]] = {}
    for picture in pictures:
        for name, (skipped, calls) in picture.skips.items():
            before = total.get(name, (0, 0))
            total[name] = (before[0] + skipped, before[1] + calls)
    return total
