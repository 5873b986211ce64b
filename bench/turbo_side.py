"""turbo as a side of a comparison: one loaded model, run by one setting of the speed-ups."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.diffusers_modules import diffusers_network
from bench.setting import Judge, in_float32
from bench.side import Request, Round, SideError
from bench.timing import Span, synchronise, time_runs
from turbo import pipeline
from turbo.acceleration import AUTO, Accelerator, Counters, SpeedUps, open_cache
from turbo.cache_folder import default_cache_dir
from turbo.engine import Engine, Result
from turbo.errors import OutOfMemoryError, TurboError
from turbo.fusing import LoraFuser
from turbo.image_file import save_png
from turbo.latent import STRIDE
from turbo.pipeline import Models
from turbo.plan import Plan, Stage

LARGEST_DISTANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Of a network call's output to diffusers' over the same weights, relative, L2."""
UPSCALE_SECONDS = 0.2
"""How long the upscaling is repeated for, about."""
CHECK_SEED = 11


@dataclass
class LoadedModel:
    """A model that several sides share: its weights are in memory once."""

    engine: Engine
    """Runs nothing faster than plain PyTorch."""
    load_s: float

    @classmethod
    def load(cls, path: str | Path | None, **options: Any) -> LoadedModel:
        """Load as `Engine.from_pretrained` does, with no speed-up installed."""
        begin = time.perf_counter()
        plain: dict[str, Any] = {
            "compile": False,
            "capture": "eager",
            "kernels": False,
            "cache_dir": None,
        }
        engine = Engine.from_pretrained(path, **plain, **options)
        synchronise(engine.models.device)
        return cls(engine, time.perf_counter() - begin)


class TurboSide:
    """An engine around a loaded model.

    Args:
        name: Its name in the comparison.
        loaded: The model.
        plan: What it follows.
        speed_ups: What makes it faster.
        approximate: Whether the plan or the speed-ups change the picture by more than rounding.
        best: Whether this is turbo's fastest setting.
        buckets: Padded prompt lengths to warm up for.
        cache_dir: Where compiled code is kept; None keeps none.
    """

    in_process = True

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        plan: Plan,
        speed_ups: SpeedUps,
        *,
        approximate: bool = False,
        best: bool = False,
        buckets: Sequence[int] = (32,),
        cache_dir: str | Path | None = AUTO,
    ) -> None:
        self.name = name
        self.approximate = approximate
        self.best = best
        self.part = ""
        self.plan = plan
        self._loaded = loaded
        self._speed_ups = speed_ups
        self._buckets = buckets
        self._cache_dir = cache_dir
        self._has_painted = False
        self._plain = loaded.engine.models
        self._models = replace(self._plain, kernels=speed_ups.kernels)
        self._calls: list[tuple[str, Span]] = []
        self._peaks: dict[str, dict[str, float]] = {}
        self._last_latents: list[Tensor] = []
        self._engine: Engine | None = None

    def settings(self) -> dict[str, Any]:
        """Switches and dtypes."""
        cached = [stage.name for stage in self.plan.resolved().stages if stage.easycache]
        return {
            "program": "turbo",
            "dtype": str(self._plain.dtype).removeprefix("torch."),
            "compile": self._speed_ups.compile,
            "capture": self._speed_ups.capture,
            "kernels": self._speed_ups.kernels,
            "easycache": cached,
        }

    def start(self) -> dict[str, float]:
        """Install the speed-ups and warm them up."""
        begin = time.perf_counter()
        engine = self._make_engine()
        if self._speed_ups.any_stand_in:
            engine.warmup(buckets=self._buckets)
            synchronise(self._models.device)
        self._engine = engine
        return {"load": self._loaded.load_s, "warm-up": time.perf_counter() - begin}

    @torch.inference_mode()
    def check(self) -> dict[str, Any]:
        """One network call of each stage, against diffusers' network and our own in float32.

        Low precision may lie at most twice as far from float32 as diffusers does, compiled or
        captured code as well.
        """
        theirs = diffusers_network(self._plain.transformer)
        found: dict[str, Any] = {}
        for stage in self.plan.resolved().stages:
            call = _Call(self._plain, stage, self._buckets[0])
            with in_float32(self._plain.transformer):
                reference = call.ours(self._plain.network)
            rival = call.theirs(theirs)
            try:
                distances = Judge(reference, rival).check(call.ours(self._models.network))
                apart = LARGEST_DISTANCE[self._plain.dtype]
                if not distances["eager_distance"] <= apart:
                    raise ValueError(
                        f"diffusers' result is {distances['eager_distance']:.3g} from ours in "
                        f"float32, allowed {apart}"
                    )
            except ValueError as error:
                raise SideError(f"a network call of {stage.name}: {error}") from error
            found[stage.name] = {
                "distance_to_float32": distances["distance"],
                "diffusers_distance_to_float32": distances["eager_distance"],
            }
        return found

    def paint(self, request: Request) -> Round:
        """A picture, with the time of every network call.

        Raises:
            SideError: It failed, or something was compiled or captured beside it, except in the
                first picture.
        """
        assert self._engine is not None, "start comes first"
        self._calls.clear()
        self._last_latents.clear()
        self._peaks = {}
        self._begin("prompt")
        before = self._engine.counters
        try:
            result = self._engine.generate(
                request.prompt,
                negative_prompt=request.negative_prompt,
                seed=request.seed,
                plan=self.plan,
                on_progress=self._on_progress,
            )
        except OutOfMemoryError:
            raise  # says itself what to do, and ends a command with its own code
        except TurboError as error:
            raise SideError(str(error)) from error
        synchronise(self._models.device)
        self._end_part()
        self.part = ""
        self._require_settled(before)
        return self._round(result)

    def others(self) -> dict[str, dict[str, Any]]:
        """Upscaling between stages, which is part of the larger stage's time."""
        stages = self.plan.resolved().stages
        return {
            f"upscale to {stage.name}": self._time_upscale(before, stage)
            for before, stage in pairwise(stages)
        }

    @torch.inference_mode()
    def _time_upscale(self, before: Stage, stage: Stage) -> dict[str, Any]:
        prepared = pipeline.prepare_stage(self._plain.transformer, stage)
        latent, noise = (_drawn(self._plain, one, torch.float32) for one in (before, stage))
        return time_runs(
            lambda: pipeline.stage_start(prepared, noise, latent, kernels=self._models.kernels),
            self._models.device,
            seconds=UPSCALE_SECONDS,
        )

    def processes(self) -> tuple[int, ...]:
        """This one."""
        return (os.getpid(),)

    def device_memory_gib(self) -> dict[str, float] | None:
        """What PyTorch has allocated."""
        device = self._models.device
        if device.type != "cuda":
            return None
        return {
            "allocated": torch.cuda.memory_allocated(device) / 2**30,
            "reserved": torch.cuda.memory_reserved(device) / 2**30,
        }

    def close(self) -> None:
        """Forget what was compiled and captured; the model belongs to all sides."""
        self._engine = None

    # ------------------------------------------------------------ inside

    def _make_engine(self) -> Engine:
        models, speed_ups = self._models, self._speed_ups
        cache = None
        if speed_ups.compile and self._cache_dir is not None:
            folder = default_cache_dir() if self._cache_dir == AUTO else Path(self._cache_dir)
            sizes = [(stage.height, stage.width) for stage in self.plan.resolved().stages]
            cache = open_cache(folder, models, sizes, speed_ups)
        accelerator = Accelerator(models, speed_ups, cache)
        if speed_ups.any_stand_in:
            accelerator.install(models)
        metered = replace(models)
        metered.network = self._timed(models.network)
        decode = models.decode or (lambda latent: pipeline.decode(models.autoencoder, latent))
        metered.decode = self._watched(decode)
        files = self._loaded.engine.files
        return Engine(metered, files, self.plan, LoraFuser({}, {}), accelerator=accelerator)

    def _timed(self, run: Any) -> Any:
        def network(*inputs: Any, **options: Any) -> Tensor:
            span = Span(self._models.device)
            span.begin()
            result: Tensor = run(*inputs, **options)
            span.end()
            self._calls.append((self.part, span))
            return result

        return network

    def _watched(self, run: Any) -> Any:
        def decode(latent: Tensor) -> Any:
            self._begin("decode")
            self._last_latents.append(latent)
            return run(latent)

        return decode

    def _on_progress(self, stage: str, done: int, total: int) -> None:
        if done == 0:
            self._begin(stage)

    def _begin(self, part: str) -> None:
        """A part begins. The allocator counts when memory is asked for, so nothing need wait."""
        self._end_part()
        self.part = part
        if self._models.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._models.device)

    def _end_part(self) -> None:
        device = self._models.device
        if device.type == "cuda" and self.part:
            self._peaks[self.part] = {
                "allocated": torch.cuda.max_memory_allocated(device) / 2**30,
                "reserved": torch.cuda.max_memory_reserved(device) / 2**30,
            }

    def _require_settled(self, before: Counters) -> None:
        assert self._engine is not None
        now = self._engine.counters
        added = now.compilations - before.compilations, now.captures - before.captures
        if self._has_painted and any(added):
            raise SideError(
                f"{added[0]} graphs were compiled and {added[1]} parts captured in a "
                "picture that was timed"
            )
        self._has_painted = True

    def _round(self, result: Result) -> Round:
        calls: dict[str, list[float]] = {}
        for stage, span in self._calls:
            calls.setdefault(stage, []).append(span.ms() / 1000)
        last = self.plan.resolved().stages[-1].name
        return Round(
            seconds={**result.timings, "png": _png_seconds(result)},
            image=result.image,
            latents={last: self._last_latents[-1].float().cpu()} if self._last_latents else {},
            network_s={stage: tuple(seconds) for stage, seconds in calls.items()},
            skips=result.skips,
            memory_gib=self._peaks,
            spans=len(self._calls),
        )


class _Call:
    """One network call of a stage, the same for both programs, with features of random values."""

    def __init__(self, models: Models, stage: Stage, tokens: int) -> None:
        transformer = models.transformer
        prepared = pipeline.prepare_stage(transformer, stage)
        middle = len(prepared.trace.evaluations) // 2
        self._sigma = prepared.trace.evaluations[middle]
        self._latent = _drawn(models, stage, models.dtype)
        shape = (1, tokens, transformer.config.caption_dim)
        self._features = _random(shape, models, torch.float32)
        self._inputs = (
            pipeline.refine(models, self._features).tokens,
            prepared.modulation.rows[middle],
            prepared.rotary_for(transformer, tokens),
        )

    def ours(self, network: Any) -> Tensor:
        result: Tensor = network(self._latent, *self._inputs)
        return result.clone()

    def theirs(self, network: Any) -> Tensor:
        dtype = next(network.parameters()).dtype
        rows = [self._latent[0].unsqueeze(1).to(dtype)]
        time_ = torch.full((1,), 1 - self._sigma, device=self._latent.device)
        features = [self._features[0].to(dtype)]
        output: Tensor = network(rows, time_, features, return_dict=False)[0][0]
        return -output.squeeze(1).unsqueeze(0)


def _drawn(models: Models, stage: Stage, dtype: torch.dtype) -> Tensor:
    rows, columns = stage.height // STRIDE, stage.width // STRIDE
    return _random((1, models.transformer.config.channels, rows, columns), models, dtype)


def _random(shape: tuple[int, ...], models: Models, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(CHECK_SEED))
    return values.to(models.device, dtype)


def _png_seconds(result: Result) -> float:
    with tempfile.TemporaryDirectory(prefix="turbo-bench-") as folder:
        begin = time.perf_counter()
        save_png(result.image, Path(folder, "picture.png"), metadata=result.metadata[0])
        return time.perf_counter() - begin
