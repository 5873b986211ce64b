"""Picture generators with one signature: the native engine, or a ComfyUI server.

`create_image_generator` picks one by name; both take the same request and return a `PIL.Image`.
"""

from __future__ import annotations

import inspect
import os
import secrets
import threading
import uuid
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbo.errors import BackendError, BadInputError, CheckpointError
from turbo.plan import DEFAULT_PLAN, Plan, load_plan

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from turbo.engine import Engine

StageProgress = Callable[[str, int, int], None]
"""Called with a stage's name and how much of it is done: (done, in all).

The native engine counts evaluations of the model, a ComfyUI server counts sampler steps.
"""

StrPath = str | os.PathLike[str]

NEW_SEEDS = 2**32
"""Seeds that are drawn lie below this, so that they are short to write down."""


class NativeImageGenerator:
    """The engine behind the signature that many programs use for image generators.

    Making one is cheap: it checks that the files exist. The weights are loaded by `load`, or by the
    first `generate`, and stay. Several threads may call it; one
    picture is made at a time, and `last_seed` is that of the last one.

    Args:
        model_path: A models folder (ComfyUI's or diffusers'), an all-in-one checkpoint, or, beside
            the two other files, the diffusion model's file. Without any of the three the plan's
            files, and if it names none the built-in model.
        vae_path: The autoencoder's file, if not found through `model_path`.
        clip_path: The text encoder's file, if not found through `model_path`.
        device: "auto", "cpu", "cuda" or "cuda:N"; "auto" takes the plan's.
        torch_dtype: "auto", "float32", "bfloat16", "float16", a short name of these or a
            `torch.dtype`; "auto" takes the plan's.
        tokenizer_path: The tokenizer's folder or file, if not found through `model_path`.
        plan: The stages; a `Plan` or a plan file. None is the three-stage workflow.
        strict_loras: Refuse a LoRA of which a part fits nothing; one of which all does always is.
        compile: As `Engine.from_pretrained` has it; so are the others, checked by `load`.
        capture: How parts are captured and replayed.
        kernels: Whether fused Triton kernels run.
        cache_dir: Where compiled code is kept; None keeps none.
        strict_speed: Raise where something cannot be made fast.

    Raises:
        CheckpointError: A path does not exist.
        PlanError: The plan file cannot be used.
    """

    def __init__(
        self,
        model_path: StrPath | None = None,
        vae_path: StrPath | None = None,
        clip_path: StrPath | None = None,
        device: str = "auto",
        torch_dtype: str | torch.dtype = "auto",
        *,
        tokenizer_path: StrPath | None = None,
        plan: Plan | StrPath | None = None,
        strict_loras: bool = True,
        compile: bool | str = "auto",
        capture: str = "auto",
        kernels: bool | str = "auto",
        cache_dir: StrPath | None = "auto",
        strict_speed: bool = False,
    ) -> None:
        self.plan = _as_plan(plan)
        self.model_path = _existing("model_path", model_path)
        self.vae_path = _existing("vae_path", vae_path)
        self.clip_path = _existing("clip_path", clip_path)
        self.tokenizer_path = _existing("tokenizer_path", tokenizer_path)
        self.device = device
        self.torch_dtype = torch_dtype
        self.strict_loras = strict_loras
        self._speed: dict[str, Any] = {
            "compile": compile,
            "capture": capture,
            "kernels": kernels,
            "cache_dir": None if cache_dir is None else os.fspath(cache_dir),
            "strict_speed": strict_speed,
        }
        self.last_seed: int | None = None
        """Seed of the last picture: the one given, or the one drawn."""
        self._engine: Engine | None = None
        self._loading = threading.Lock()

    def load(self) -> Engine:
        """Load the weights if they are not loaded yet; returns the engine."""
        from turbo.engine import Engine

        with self._loading:
            if self._engine is None:
                self._engine = Engine.from_pretrained(
                    self.model_path,
                    text_encoder=self.clip_path,
                    vae=self.vae_path,
                    tokenizer=self.tokenizer_path,
                    device=self.device,
                    dtype=self.torch_dtype,
                    plan=self.plan,
                    **self._speed,
                )
        return self._engine

    def generate(
        self,
        prompt: str,
        negative_prompt: str = "",
        lora_path: StrPath | None = None,
        lora_strength: float | None = None,
        trigger_word: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        progressive: bool | None = None,
        *,
        on_progress: StageProgress | None = None,
    ) -> Image:
        """Make one picture.

        Args:
            prompt: What to show.
            negative_prompt: What not to show; used where cfg is not 1.
            lora_path: A LoRA file for this picture only; the weights are restored afterwards, also
                when the picture fails.
            lora_strength: Its strength; None is the plan's default, 0.8.
            trigger_word: Put before the prompt, with a comma.
            num_inference_steps: Steps of the first stage, or of the only one; None is the plan's
                number, 9.
            guidance_scale: cfg of the first stage, or of the only one, in ComfyUI's sense (1 is
                off); None is the plan's, 2.0.
            seed: None draws one; `last_seed` tells which.
            progressive: All stages of the plan (True), or one stage at the last stage's size
                (False); None is the plan's choice, True.
            on_progress: Told how far each stage is.

        Raises:
            BadInputError: A value, the LoRA or the model cannot be used.
            FailureError: The picture could not be made.
        """
        engine = self.load()
        loras: list[object] = []
        if lora_path is not None:
            name = os.fspath(lora_path)
            loras.append(name if lora_strength is None else (name, lora_strength))
        try:
            result = engine.generate(
                prompt,
                negative_prompt=negative_prompt,
                trigger_word=trigger_word,
                seed=seed,
                progressive=progressive,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                on_progress=on_progress,
                loras=loras,
                strict_loras=self.strict_loras,
            )
        finally:
            if loras:
                engine.set_loras([])
        self.last_seed = result.seed
        return result.image


class ComfyUIImageGenerator:
    """The same plan and the same signature, computed by a running ComfyUI server.

    The workflow is written with ComfyUI's own nodes wherever they do the same; the default plan
    still needs the node pack ComfyUI-EulerDiscreteScheduler on the server.

    Args:
        url: Address of the server.
        diffusion_model: File name under which the server lists the diffusion model.
        text_encoder: File name of the text encoder.
        vae: File name of the autoencoder.
        checkpoint: File name of a checkpoint with all three, used in place of them.
        plan: The stages; a `Plan` or a plan file. None is the three-stage workflow.
        timeout: Seconds one HTTP request may take.
        run_timeout: Seconds a picture may take, waiting in the queue included; None is no limit.

    Raises:
        BadInputError: The address or a number cannot be used.
        PlanError: The plan file cannot be used.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8188",
        *,
        diffusion_model: str = "z_image_turbo_bf16.safetensors",
        text_encoder: str = "qwen_3_4b.safetensors",
        vae: str = "ae.safetensors",
        checkpoint: str | None = None,
        plan: Plan | StrPath | None = None,
        timeout: float = 30.0,
        run_timeout: float | None = 3600.0,
    ) -> None:
        from turbo.comfyui_client import ComfyUIClient
        from turbo.comfyui_workflow import ModelNames

        self.plan = _as_plan(plan)
        self.models = ModelNames(
            diffusion_model=diffusion_model,
            text_encoder=text_encoder,
            vae=vae,
            checkpoint=checkpoint,
        )
        self.client = ComfyUIClient(url, timeout=timeout, run_timeout=run_timeout)
        self.last_seed: int | None = None
        """Seed of the last picture: the one given, or the one drawn."""

    def generate(
        self,
        prompt: str,
        negative_prompt: str = "",
        lora_path: StrPath | None = None,
        lora_strength: float | None = None,
        trigger_word: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        progressive: bool | None = None,
        *,
        on_progress: StageProgress | None = None,
    ) -> Image:
        """Make one picture; arguments as `NativeImageGenerator.generate` has them.

        Args:
            lora_path: Here a name on the server, as its `loras/` folder lists it.

        Raises:
            BadInputError: A value cannot be used.
            BackendError: The server is away, refuses or fails.
        """
        from turbo.comfyui_workflow import picture_node, sampler_nodes, workflow_from_plan

        plan = self.plan.resolved(progressive, num_inference_steps, guidance_scale)
        strength = plan.lora.default_strength if lora_strength is None else lora_strength
        seed = secrets.randbelow(NEW_SEEDS) if seed is None else seed
        workflow = workflow_from_plan(
            plan,
            prompt=f"{trigger_word}, {prompt}" if trigger_word else prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            loras=[] if lora_path is None else [(os.fspath(lora_path), strength)],
            models=self.models,
            # A name of its own: otherwise a server that has the picture in its cache names the old
            # file, which may be gone.
            filename_prefix=f"turbo_{uuid.uuid4().hex[:8]}",
            standard_nodes=True,
            save_stages=False,
        )
        names = {node: stage.name for node, stage in sampler_nodes(plan).items()}

        def report(node: str, step: int, total: int) -> None:
            if on_progress is not None and node in names:
                on_progress(names[node], step, total)

        pictures = self.client.run(workflow, report).get(picture_node(plan))
        if not pictures:
            raise BackendError(f"ComfyUI at {self.client.url} finished without a picture")
        self.last_seed = seed
        return _open_picture(pictures[0])


_BACKENDS: Mapping[str, type[NativeImageGenerator] | type[ComfyUIImageGenerator]] = {
    "native": NativeImageGenerator,
    "comfyui": ComfyUIImageGenerator,
}


def create_image_generator(
    backend: str = "native", **options: Any
) -> NativeImageGenerator | ComfyUIImageGenerator:
    """Make an image generator by the name of what computes its pictures.

    Args:
        backend: "native" is the engine in this process, "comfyui" a ComfyUI server.
        options: Arguments of `NativeImageGenerator` or `ComfyUIImageGenerator`.

    Raises:
        BadInputError: The backend or an option is unknown, or an option cannot be used.
    """
    if backend not in _BACKENDS:
        raise BadInputError(f"backend must be one of {', '.join(_BACKENDS)}; got {backend!r}")
    for name in options:
        if name not in _option_names(backend):
            others = [other for other in _BACKENDS if name in _option_names(other)]
            whose = f" (it belongs to {others[0]})" if others else ""
            raise BadInputError(
                f"{name} is no option of the {backend} backend{whose}; "
                f"it has {', '.join(_option_names(backend))}"
            )
    return _BACKENDS[backend](**options)


def _option_names(backend: str) -> list[str]:
    return list(inspect.signature(_BACKENDS[backend]).parameters)


def _as_plan(plan: Plan | StrPath | None) -> Plan:
    if plan is None:
        return DEFAULT_PLAN
    return plan if isinstance(plan, Plan) else load_plan(os.fspath(plan))


def _existing(name: str, path: StrPath | None) -> Path | None:
    if path is None:
        return None
    found = Path(path)
    if not found.exists():
        raise CheckpointError(f"{name} {found} does not exist; give an existing file or folder")
    return found


def _open_picture(data: bytes) -> Image:
    from PIL import Image

    with Image.open(BytesIO(data), formats=["PNG"]) as picture:
        return picture.convert("RGB")
