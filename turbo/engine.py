"""The engine: loads a model once, then makes pictures, each the same for the same seed.

It adds loading, LoRAs, caches and timing around `turbo.pipeline`, never meaning: what a picture
looks like depends on the request and the weights, and in its last bits on what compiles them.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

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
from turbo.cache_folder import default_cache_dir
from turbo.checkpoint import Checkpoint, load_weights
from turbo.compile import CaptureReport
from turbo.components import Components, component_dtypes
from turbo.denoiser import Caption, is_unguided
from turbo.errors import BadInputError, LoraError, NonFiniteLatentError
from turbo.fusing import LoraChoice, LoraFuser
from turbo.image_input import latent_of_image, require_picture
from turbo.latent import STRIDE
from turbo.model_files import ModelFiles, find_model_files
from turbo.names import NETWORK
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

OnProgress = Callable[[str, int, int], None]
"""Called with (stage name, steps done, steps in all)."""

CACHE_BYTES = 256 << 20
"""Of captions, and as many of modulation tables (31 MiB for the full-size third stage)."""
WARMUP_PROMPT = "a picture that is long enough to have more tokens than the empty prompt"
VAE_TILE = 64
"""Latent positions a side of a tile when the plan asks for a tiled decode."""
MAX_IMAGES = 1000

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


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
    """`load` (of the model, before), `compile` (or load compiled code), `capture`, then `prompt`,
    stage names and `decode` -> seconds of their first run."""
    captures: tuple[CaptureReport, ...] = ()
    """Each part and shape that is captured, with its seconds and its memory."""
    built: int = 0
    """Binaries that a compiler built because the cache on disk did not hold them."""


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
    ) -> None:
        self.models = models
        self.files = files
        self.plan = plan
        self.accelerator = accelerator or Accelerator(models, SpeedUps())
        self._load_seconds = 0.0
        self._fuser = fuser
        self._loras: tuple[LoraChoice, ...] = ()
        self._strict = strict_loras
        self._captions = TensorCache[tuple[str, int | None], Caption](
            CACHE_BYTES, lambda caption: caption.tokens.nbytes
        )
        self._stages = TensorCache[Stage, PreparedStage](
            CACHE_BYTES, lambda prepared: prepared.modulation.rows.nbytes
        )
        self._noise_pool = ThreadPoolExecutor(1, "turbo-noise")
        self._lock = threading.RLock()

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
        cache_dir: str | Path | None = AUTO,
        strict_speed: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Engine:
        """Load a model.

        Args:
            path: A ComfyUI or diffusers folder or an all-in-one checkpoint; see `find_model_files`.
                Without it and without files, the plan's, and if that has none the built-in small
                model of random weights.
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
                `turbo quantize` wrote has them. LoRAs are fused before.
            plan: A plan or a plan file; None is the workflow's plan.
            strict_loras: Refuse a LoRA of which some keys fit nothing; one of which none fits
                always is.
            compile: Whether Inductor compiles the parts; "auto": on CUDA.
            capture: "cuda-graph", "replay" (its rules without a graph), "eager" (none) or "auto":
                CUDA graphs on CUDA.
            kernels: Whether fused Triton kernels run; "auto": on CUDA.
            cache_dir: Where compiled code is kept, so that the next process compiles nothing;
                "auto" is `default_cache_dir`, None keeps none.
            strict_speed: Raise where something cannot be compiled or captured; otherwise a line is
                logged and the plain way taken.
            on_progress: Called with (component, tensors read, tensors in all).

        Raises:
            BadInputError: A file, a setting or a device is not usable; says what would be.
        """
        begin = time.perf_counter()
        _require_list(loras)
        plan = _as_plan(plan, DEFAULT_PLAN)
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
            offload=plan.performance.enable_model_cpu_offload,
        )
        dtype = pick_dtype(settings.torch_dtype if dtype == "auto" else dtype, device)
        if not any((path, diffusion_model, text_encoder, vae)):
            path, vae, text_encoder = settings.path, settings.vae_path, settings.clip_path
            if not any((path, vae, text_encoder)):
                from turbo.testing import builtin_model

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
        models, fuser = _load(
            checkpoints, words, plan, device, dtype, kept, on_progress, choices, strict_loras
        )
        accelerator = _accelerate(models, speed_ups, plan, cache_dir)
        engine = cls(models, files, plan, fuser, strict_loras=strict_loras, accelerator=accelerator)
        if loras:
            engine.set_loras(loras, strict=strict_loras)
        engine._load_seconds = time.perf_counter() - begin
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
        """
        with self._lock:
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
        """
        buckets = check_buckets(buckets)
        meter = _Meter(self.models.device)
        plan = self.plan.resolved()
        captures: tuple[CaptureReport, ...] = ()
        seconds = {"load": self._load_seconds}

        @contextlib.contextmanager
        def part(name: str) -> Iterator[None]:
            if on_progress:
                on_progress(name, 0, 1)
            with meter.part(name):
                yield
            if on_progress:
                on_progress(name, 1, 1)

        with self._lock, self._current_device(), meter.settled():
            if self.accelerator.speed_ups.any_stand_in:
                begin, before = time.perf_counter(), self.accelerator.compile_seconds
                captures = self._capture_usual(plan, buckets, on_progress)
                # What is dropped to make room takes its seconds along.
                seconds["compile"] = max(0.0, self.accelerator.compile_seconds - before)
                seconds["capture"] = time.perf_counter() - begin - seconds["compile"]
            with part("prompt"):
                pairs = self._warmup_captions(buckets)
            latent: Tensor | None = None
            for stage in plan.stages:
                with part(stage.name), self._on_device(self.models.transformer):
                    self._prepared(stage)
                    once = replace(stage, node="custom", scheduler="simple", steps=1, denoise=1.0)
                    step = prepare_stage(self.models.transformer, once)
                    warm_cache(self.models, step)
                    for positive, negative in pairs:
                        drawing = Drawing(
                            positive=positive,
                            negative=negative,
                            noise=self._noise([step], 0),
                            latent=latent,
                        )
                        (result,) = run_stages(self.models, [step], drawing)
                    latent = result.latent
            assert latent is not None
            with part("decode"):
                self._decode(latent, plan.performance)
        return WarmupReport(
            seconds=seconds | meter.read(), captures=captures, built=self.accelerator.built
        )

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
        meter = _Meter(self.models.device)
        with self._lock, self._current_device(), meter.settled(), meter.part("total"):
            default = resolved.lora.default_strength
            choices = self._loras if loras is None else self._choose(loras, default)
            self._fuse(choices, self._strict if strict_loras is None else strict_loras)
            with meter.part("prompt"):
                guided = not all(is_unguided(stage.cfg) for stage in stages)
                positive, *others = self._encode([text, *[negative_prompt] * guided], max_tokens)
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
        description: dict[str, Any] = {
            "version": __version__,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "trigger_word": trigger_word,
            "plan": plan_to_dict(replace(resolved, model=ModelSettings())),  # no local paths
            "loras": used_loras,
            "models": {
                "network": self.files.network.name,
                "text_encoder": self.files.text_encoder.name,
                "vae": self.files.vae.name,
            },
            "device": self.models.device.type,
            "dtype": _name(self.models.dtype),
            "quantize": self.models.transformer.quantize,
        }
        if image is not None:
            description |= {"first_stage": stages[0].name, "strength": stages[0].denoise}
        return Result(
            images=[picture.image for picture in pictures],
            seeds=seeds,
            timings=meter.read(),
            skips=_sum_skips(pictures),
            stage_images=[picture.stages for picture in pictures] if keep_stages else [],
            metadata=[{**description, "seed": one} for one in seeds],
        )

    def _capture_usual(
        self, plan: Plan, buckets: Sequence[int], on_progress: OnProgress | None
    ) -> tuple[CaptureReport, ...]:
        """Compile and capture what the plan's requests will use."""
        models, performance = self.models, plan.performance
        modules = (models.text_encoder, models.transformer, models.autoencoder)
        captures: tuple[CaptureReport, ...] = ()
        with self._on_device(models.transformer):
            prepared = [self._prepared(stage) for stage in plan.stages]
        # Where modules rest elsewhere, the device may not have room for all at once.
        offloads = performance.enable_model_cpu_offload
        for only in [(module,) for module in modules] if offloads else [modules]:
            with contextlib.ExitStack() as stack:
                for module in only:
                    stack.enter_context(self._on_device(module))
                captures = self.accelerator.warm_up(
                    prepared,
                    buckets,
                    on_progress,
                    only=only,
                    decoder=not performance.enable_vae_tiling,
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
                with request.meter.part(stage.name):
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
        with meter.part("encode"), self._on_device(self.models.autoencoder):
            return latent_of_image(self.models.autoencoder, image, stage, self.models.device)

    def _decode(self, latent: Tensor, performance: Performance) -> Image.Image:
        autoencoder = self.models.autoencoder
        with self._on_device(autoencoder):
            if performance.enable_vae_tiling or self.models.decode is None:
                tile = VAE_TILE if performance.enable_vae_tiling else None
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
            with self._on_device(self.models.text_encoder):
                features = [encode_ids(self.models, one) for one in ids]
            with self._on_device(self.models.transformer):
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
        """Have a module's weights on the device while it is used.

        Only an offloaded module needs it. Its weights stay where they rest, a copy goes to the
        device and is dropped afterwards: nothing is copied back.
        """
        if next(module.parameters()).device.type == self.models.device.type:
            yield
            return
        resting = [(parameter, parameter.data) for parameter in module.parameters()]
        try:
            for parameter, weight in resting:
                parameter.data = weight.to(self.models.device)
            yield
        finally:
            for parameter, weight in resting:
                parameter.data = weight

    def _choose(self, loras: Sequence[Any], default_strength: float) -> tuple[LoraChoice, ...]:
        _require_list(loras)
        folder = self.files.loras_dir
        return tuple(LoraChoice.parse(item, folder, default_strength) for item in loras)

    def _fuse(self, choices: tuple[LoraChoice, ...], strict: bool) -> None:
        written = True  # as far as is known, should it fail
        try:
            written = self._fuser.fuse(choices, strict=strict)
        finally:
            if written:
                self._captions.clear()
                self._stages.clear()

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
class _Picture:
    image: Image.Image
    stages: dict[str, Image.Image]
    skips: dict[str, tuple[int, int]]


def pick_device(device: str | torch.device) -> torch.device:
    """The device to work on.

    Raises:
        BadInputError: It does not exist here; says which do.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise BadInputError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise BadInputError(
            f"device {chosen} is not there: PyTorch sees {count} CUDA device(s); use auto or cpu"
        )
    if chosen.type not in ("cpu", "cuda"):
        raise BadInputError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if str(chosen) == "cuda":  # without a number; every thread has a current device of its own
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The network's dtype.

    Raises:
        BadInputError: It is none of float32, bfloat16, float16 and auto.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise BadInputError(f"dtype must be auto, float32, bfloat16 or float16, got {name!r}")
    return _DTYPES[name]


def _load(
    checkpoints: Mapping[str, Checkpoint],
    tokenizer: Tokenizer,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None,
    on_progress: OnProgress | None,
    loras: Sequence[LoraChoice],
    strict_loras: bool,
) -> tuple[Models, LoraFuser]:
    dtypes = component_dtypes(dtype, device)
    # All is compared before anything is allocated: a foreign file may want terabytes.
    outline = Components.outline(checkpoints, dtypes, quantize)
    stride, vocabulary = outline.autoencoder.config.stride, outline.text_encoder.config.vocab_size
    if stride != STRIDE:
        raise BadInputError(
            f"the autoencoder makes {stride} pixels of a latent cell, Z-Image needs {STRIDE}: "
            "it is of another model"
        )
    if tokenizer.vocabulary_size > vocabulary:
        raise BadInputError(
            f"the tokenizer knows {tokenizer.vocabulary_size} ids, the text encoder only "
            f"{vocabulary}: they are of different models; give the tokenizer that belongs to the "
            "text encoder"
        )
    LoraFuser(outline.by_name(), checkpoints).check(loras, strict=strict_loras)
    home = torch.device("cpu") if plan.performance.enable_model_cpu_offload else device
    made = Components.build(checkpoints, home, dtypes, quantize)
    made.network.compute_dtype = arithmetic_dtype(dtype, device)
    for component, module in made.by_name().items():

        def report(done: int, total: int, component: str = component) -> None:
            if on_progress is not None:
                on_progress(component, done, total)

        load_weights(module, checkpoints[component], on_progress=report)
    models = Models(
        tokenizer, made.text_encoder, made.network, made.autoencoder, made.network, device
    )
    fuser = LoraFuser(made.by_name(), checkpoints, keep_files=plan.lora.cache_models)
    return models, fuser


def _accelerate(
    models: Models, speed_ups: SpeedUps, plan: Plan, cache_dir: str | Path | None
) -> Accelerator:
    cache = None
    if speed_ups.compile and cache_dir is not None:
        folder = default_cache_dir() if cache_dir == AUTO else Path(cache_dir).expanduser()
        sizes = [(stage.height, stage.width) for stage in plan.resolved().stages]
        cache = open_cache(folder, models, sizes, speed_ups)
    models.kernels = speed_ups.kernels
    accelerator = Accelerator(models, speed_ups, cache)
    if speed_ups.any_stand_in:
        accelerator.install(models)
    return accelerator


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
