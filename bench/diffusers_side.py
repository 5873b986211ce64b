"""diffusers as a side: the three stages as calls of ``ZImagePipeline``, over turbo's own weights.

Text encoding, guidance, network calls and the decoder are diffusers' and transformers' code;
schedules, samplers and noise are the plan's, because diffusers has neither ancestral Euler nor
DPM-Solver++ SDE for flow models, and no EasyCache.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bench.side import Request, Round, SideError
from bench.timing import Meter, Span
from bench.turbo_side import LoadedModel
from turbo import pipeline
from turbo.autoencoder import to_pixels, to_uint8
from turbo.noise import MAX_SEED
from turbo.plan import Plan, Stage

RECOMPILE_LIMIT = 64
"""Compiled versions of one block: stages, batches and block kinds share its code object."""


class DiffusersSide:
    """diffusers' pipeline on a loaded model.

    Args:
        loaded: The model, whose weights it shares.
        plan: What it follows; EasyCache is left out.
        compiled: Compile the network's repeated blocks, as diffusers recommends.
        warm_up: Made before the first picture if it compiles: a request for every pair of padded
            prompt lengths that the first picture does not have and a later one will.
        backend: PyTorch's compiler.
        approximate: Whether the model's dtype is lower than that of the others; it is named then.
    """

    in_process = True

    def __init__(
        self,
        loaded: LoadedModel,
        plan: Plan,
        *,
        compiled: bool = False,
        warm_up: Sequence[Request] = (),
        backend: str = "inductor",
        approximate: bool = False,
    ) -> None:
        self.name = "diffusers, compiled" if compiled else "diffusers"
        if approximate:
            self.name += f", {str(loaded.engine.models.dtype).removeprefix('torch.')}"
        self.best = compiled
        self.approximate = approximate
        self.part = ""
        self._loaded = loaded
        self._stages = tuple(replace(s, easycache=None) for s in plan.resolved().stages)
        self._compiled = compiled
        self._warm_up = tuple(warm_up) if compiled else ()
        self._backend = backend
        self._has_painted = False
        self._pipe: Any = None
        self._prepared: dict[str, pipeline.PreparedStage] = {}
        self._meter = Meter(loaded.engine.models.device)
        self._calls: list[tuple[str, Span]] = []

    def settings(self) -> dict[str, Any]:
        """Versions and switches."""
        return {
            "program": "diffusers",
            "diffusers": metadata.version("diffusers"),
            "transformers": metadata.version("transformers"),
            "dtype": str(self._loaded.engine.models.dtype).removeprefix("torch."),
            "compile_repeated_blocks": self._compiled,
        }

    def start(self) -> dict[str, float]:
        """Put the pipeline together and warm it up; the first picture compiles the rest."""
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

        from bench.diffusers_modules import (
            diffusers_autoencoder,
            diffusers_network,
            transformers_text_encoder,
            transformers_tokenizer,
        )

        begin = time.perf_counter()
        engine = self._loaded.engine
        models = engine.models
        pipe = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=diffusers_autoencoder(models.autoencoder),
            text_encoder=transformers_text_encoder(models.text_encoder),
            tokenizer=transformers_tokenizer(engine.files.require_tokenizer()),
            transformer=diffusers_network(models.transformer),
        )
        pipe.set_progress_bar_config(disable=True)
        if self._compiled:
            pipe.transformer.compile_repeated_blocks(
                fullgraph=True, dynamic=False, backend=self._backend
            )
        pipe.transformer.register_forward_pre_hook(self._call_begins)
        pipe.transformer.register_forward_hook(self._call_ends)
        self._pipe = pipe
        with torch.inference_mode():  # schedules are made once on both sides
            self._prepared = {
                stage.name: pipeline.prepare_stage(models.transformer, stage)
                for stage in self._stages
            }
        built = time.perf_counter()
        for request in self._warm_up:
            self._make(request)
        warm_up = {"warm-up": time.perf_counter() - built} if self._warm_up else {}
        return {"build": built - begin, **warm_up}

    def check(self) -> dict[str, Any]:
        """Nothing alone: turbo's check compares its network's output with this one's."""
        return {"compared_with": "turbo, by network calls and by pictures"}

    def paint(self, request: Request) -> Round:
        """A picture through one pipeline call a stage.

        Raises:
            SideError: Something was compiled beside it, except in the first picture.
        """
        if self._pipe is None:
            raise SideError(f"{self.name}: start comes first")
        before = _graphs_compiled()
        made = self._make(request)
        added = _graphs_compiled() - before
        if self._has_painted and added:
            raise SideError(
                f"{self.name}: {added} graphs were compiled in a picture that was timed"
            )
        self._has_painted = True
        return made

    @torch.inference_mode()
    def _make(self, request: Request) -> Round:
        self._calls.clear()
        with self._many_shapes(), self._meter_part("total"):
            with self._meter_part("prompt"):
                captions = self._captions(request)
            latent: Tensor | None = None
            for stage in self._stages:
                with self._meter_part(stage.name):
                    latent = self._denoise(stage, request.seed, captions, latent)
            assert latent is not None
            with self._meter_part("decode"):
                image = self._decode(latent)
        seconds = self._meter.read_s()
        calls: dict[str, list[float]] = {}
        for name, span in self._calls:
            calls.setdefault(name, []).append(span.ms() / 1000)
        return Round(
            seconds=seconds,
            image=image,
            latents={self._stages[-1].name: latent.float().cpu()},
            network_s={name: tuple(values) for name, values in calls.items()},
            skips={name: (0, len(values)) for name, values in calls.items()},
            spans=len(self._calls) + len(seconds),
        )

    def others(self) -> dict[str, dict[str, Any]]:
        """Nothing."""
        return {}

    def processes(self) -> tuple[int, ...]:
        """This one."""
        return (os.getpid(),)

    def device_memory_gib(self) -> dict[str, float] | None:
        """Unknown: the weights are shared with turbo."""
        return None

    def close(self) -> None:
        """Let the modules go."""
        self._pipe = None

    # ------------------------------------------------------------ inside

    def _captions(self, request: Request) -> tuple[list[Tensor], list[Tensor]]:
        guided = any(stage.cfg != 1 for stage in self._stages)
        positive, negative = self._pipe.encode_prompt(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            do_classifier_free_guidance=guided,
        )
        dtype = self._pipe.transformer.dtype
        return [one.to(dtype) for one in positive], [one.to(dtype) for one in negative]

    def _denoise(
        self,
        stage: Stage,
        seed: int,
        captions: tuple[list[Tensor], list[Tensor]],
        latent: Tensor | None,
    ) -> Tensor:
        from bench.stepped import SamplerScheduler

        models = self._loaded.engine.models
        prepared = self._prepared[stage.name]
        channels = models.transformer.config.channels
        number = (seed + stage.seed_offset) % (MAX_SEED + 1)
        noise = pipeline.draw_noise(prepared, number, models.device, channels=channels)
        start = pipeline.stage_start(prepared, noise.start, latent)
        scheduler = SamplerScheduler(prepared, noise, start)
        self._pipe.scheduler = scheduler
        positive, negative = captions
        try:
            result: Tensor = self._pipe(
                height=stage.height,
                width=stage.width,
                latents=scheduler.latent,
                prompt_embeds=list(positive),
                negative_prompt_embeds=list(negative),
                guidance_scale=stage.cfg - 1,  # 0 leaves the negative prompt out
                output_type="latent",
                return_dict=False,
            )[0]
            return result
        finally:
            scheduler.close()

    def _decode(self, latent: Tensor) -> Image.Image:
        vae = self._pipe.vae
        raw = vae.decode(latent.to(vae.dtype), return_dict=False)[0]
        # Truncated to 8 bits as ComfyUI and turbo do: diffusers' rounding would differ in half of
        # all values by one, and hide what differs for other reasons.
        return Image.fromarray(to_uint8(to_pixels(raw))[0].cpu().numpy())

    @contextlib.contextmanager
    def _meter_part(self, name: str) -> Iterator[None]:
        self.part = name if name != "total" else ""
        with self._meter.part(name):
            yield
        self.part = ""

    @contextlib.contextmanager
    def _many_shapes(self) -> Iterator[None]:
        if not self._compiled:
            yield
            return
        import torch._dynamo

        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            yield

    def _call_begins(self, *_: Any) -> None:
        span = Span(self._loaded.engine.models.device)
        span.begin()
        self._calls.append((self.part, span))

    def _call_ends(self, *_: Any) -> None:
        self._calls[-1][1].end()


def _graphs_compiled() -> int:
    """How many PyTorch's compiler has traced in this process: nothing is compiled without."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
