"""A plan as a ComfyUI workflow in API format: ``{node id: {"class_type": ..., "inputs": {...}}}``.

The three-stage workflow that this project reproduces comes out node for node, with the ids and the
node packs it has in the field. Any other plan is written with ComfyUI's own nodes wherever they
mean the same, so that a server without those packs runs it.

Reading a workflow back into a plan is in `turbo.comfyui_reader`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from turbo.errors import BadInputError, WorkflowError
from turbo.plan import DEFAULT_PLAN, SEED_LIMIT, Plan, Stage

Workflow = dict[str, dict[str, Any]]
Link = list[Any]  # [node id, index of the output]

FLOWMATCH_NODE = "FlowMatchEulerDiscreteScheduler (Custom)"
FLOWMATCH_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SEED_NODE = "Seed (rgthree)"
FLOWMATCH_INPUTS: Mapping[str, Any] = {
    "start_at_step": 0,
    "end_at_step": 9999,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": "disable",
    "max_image_seq_len": 8192,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift_terminal": 0.0,
    "stochastic_sampling": "disable",
    "time_shift_type": "exponential",
    "use_beta_sigmas": "disable",
    "use_dynamic_shifting": "disable",
    "use_exponential_sigmas": "disable",
    "use_karras_sigmas": "disable",
    "device": "auto",
}
"""Inputs of the flow-match sigmas node besides `steps` and `shift`, as the original sets them."""

NODE_PACKS: Mapping[str, str] = {
    FLOWMATCH_NODE: "ComfyUI-EulerDiscreteScheduler",
    FLOWMATCH_SCHEDULER: "ComfyUI-EulerDiscreteScheduler",
    SEED_NODE: "rgthree-comfy",
    "CLIPLoaderGGUF": "ComfyUI-GGUF",
    "UnetLoaderGGUF": "ComfyUI-GGUF",
    "LorapathLoader": "a pack with a LoRA loader that takes a folder",
}
"""Nodes (and one scheduler name) that ComfyUI itself does not have, with the pack that has them."""

STANDARD_NODES = frozenset(
    {
        "BasicScheduler",
        "CLIPLoader",
        "CLIPTextEncode",
        "CheckpointLoaderSimple",
        "ConditioningZeroOut",
        "EasyCache",
        "EmptyLatentImage",
        "EmptySD3LatentImage",
        "KSampler",
        "KSamplerSelect",
        "LatentUpscale",
        "LatentUpscaleBy",
        "LoraLoader",
        "LoraLoaderModelOnly",
        "ModelSamplingAuraFlow",
        "PreviewImage",
        "SamplerCustom",
        "SamplerDPMPP_2M_SDE",
        "SamplerDPMPP_3M_SDE",
        "SamplerDPMPP_SDE",
        "SamplerEulerAncestral",
        "SaveImage",
        "UNETLoader",
        "VAEDecode",
        "VAELoader",
    }
)
"""ComfyUI's own nodes among those that plans are written with and read from."""

SEED_NODE_LIMIT = 2**50  # the seed node refuses more; a sampler takes any unsigned 64-bit number
SMALLEST_UPSCALE = 64  # pixels; LatentUpscale makes nothing smaller
LARGEST_FACTOR = 8  # of LatentUpscaleBy

# Ids of the original workflow; what it has no node for gets 1000 * stage + the role's number.
_ROLES = (
    "seed",
    "latent",
    "shift",
    "cache",
    "sampler",
    "sigmas",
    "sample",
    "decode",
    "save",
)
_ORIGINAL_IDS: Mapping[tuple[int, str], str] = {
    (1, "seed"): "322",
    (1, "latent"): "317",
    (1, "shift"): "11",
    (1, "sigmas"): "339",
    (1, "sampler"): "315",
    (1, "sample"): "316",
    (1, "decode"): "336",
    (1, "save"): "337",
    (2, "seed"): "226",
    (2, "latent"): "321",
    (2, "cache"): "320",
    (2, "sample"): "276",
    (2, "decode"): "209",
    (2, "save"): "210",
    (3, "seed"): "305",
    (3, "latent"): "303",
    (3, "cache"): "304",
    (3, "sampler"): "323",
    (3, "sigmas"): "324",
    (3, "sample"): "325",
    (3, "decode"): "328",
    (3, "save"): "307",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNames:
    """The model files by the names under which the server lists them."""

    diffusion_model: str = "z_image_turbo_bf16.safetensors"
    """In `diffusion_models/` or `unet/`."""
    text_encoder: str = "qwen_3_4b.safetensors"
    """In `text_encoders/` or `clip/`."""
    vae: str = "ae.safetensors"
    """In `vae/`."""
    checkpoint: str | None = None
    """In `checkpoints/`: one file with all three, used in place of them."""


@dataclass(frozen=True, slots=True)
class LoraUse:
    """One LoRA on a server, with its strengths."""

    name: str
    """File name below the server's `loras/`, or below `folder`."""
    strength: float = 0.8
    """Strength on the diffusion model."""
    text_encoder_strength: float | None = None
    """Strength on the text encoder; None is the same as `strength`."""
    folder: str = ""
    """Folder on the server's machine, when the file is not below `loras/`."""

    @property
    def strength_clip(self) -> float:
        """Strength on the text encoder as a number."""
        own = self.text_encoder_strength
        return self.strength if own is None else own


LoraInput = LoraUse | tuple[str, float] | str


@dataclass(slots=True)
class _Nodes:
    """The workflow while it is being written."""

    standard: bool
    workflow: Workflow = field(default_factory=dict)

    def add(self, name: str, class_type: str, **inputs: Any) -> str:
        self.workflow[name] = {"class_type": class_type, "inputs": inputs}
        return name


@dataclass(frozen=True, slots=True)
class _Sources:
    """What every stage is connected to."""

    model: Link
    positive: Link
    negative: Link
    vae: Link


def workflow_from_plan(
    plan: Plan,
    *,
    prompt: str,
    negative_prompt: str = "",
    seed: int = 0,
    loras: Sequence[LoraInput] = (),
    models: ModelNames | None = None,
    filename_prefix: str = "",
    standard_nodes: bool | None = None,
    save_stages: bool = True,
) -> Workflow:
    """Write a plan as a ComfyUI workflow in API format.

    Args:
        plan: What to run; a plan that is not progressive is written as its single stage.
        prompt: The text as the text encoder gets it, trigger word included.
        negative_prompt: Used by stages whose cfg is not 1.
        seed: Seed of the first stage; each stage adds its own offset. 0 to 2**64 - 1.
        loras: Applied in this order: `LoraUse`, (name, strength) or a name at the plan's strength.
        models: Names of the model files on the server; None takes the usual ones.
        filename_prefix: Put before the stage's name in the names of the saved pictures.
        standard_nodes: True avoids node packs where ComfyUI's own nodes do the same; False keeps
            the original's; None keeps them for the original's stages only.
        save_stages: Also decode and save the pictures of the stages before the last.

    Raises:
        WorkflowError: ComfyUI's nodes cannot express the plan.
        BadInputError: A text, the seed or a LoRA cannot be used.
    """
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str):
            raise BadInputError(f"{name} must be a string, got {type(text).__name__}")
    if not 0 <= seed < SEED_LIMIT:
        raise BadInputError(f"seed must be 0 to {SEED_LIMIT - 1}, got {seed}")
    if not plan.progressive and len(plan.stages) > 1:
        plan = plan.single_stage()
    if standard_nodes is None:
        standard_nodes = plan.stages != DEFAULT_PLAN.stages
    nodes = _Nodes(standard_nodes)
    default_strength = plan.lora.default_strength
    uses = [as_lora_use(lora, default_strength) for lora in loras]
    sources = _add_sources(
        nodes, models or ModelNames(), uses, default_strength, prompt, negative_prompt
    )
    latent: Link | None = None
    shifts: dict[float, Link] = {}
    for number, stage in enumerate(plan.stages, start=1):
        before = plan.stages[number - 2] if number > 1 else None
        start = _add_start(nodes, number, stage, before, latent)
        model = _add_model(nodes, number, stage, sources.model, shifts)
        latent = _add_sampler(nodes, number, stage, sources, model, start, seed)
        if save_stages or stage is plan.stages[-1]:
            prefix = f"{filename_prefix}_{stage.name}" if filename_prefix else stage.name
            _add_picture(nodes, number, sources.vae, latent, prefix)
    return nodes.workflow


def sampler_nodes(plan: Plan) -> dict[str, Stage]:
    """Id of each sampler node in `workflow_from_plan` -> the stage that it runs."""
    return {_node_id(number, "sample"): stage for number, stage in enumerate(plan.stages, start=1)}


def picture_node(plan: Plan) -> str:
    """Id of the node in `workflow_from_plan` that saves the last stage's picture."""
    return _node_id(len(plan.stages), "save")


def required_nodes(workflow: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What a workflow needs that ComfyUI lacks: name of a node or scheduler -> pack that has it."""
    needed: dict[str, str] = {}
    for node in workflow.values():
        class_type = str(node.get("class_type"))
        if class_type not in STANDARD_NODES:
            needed[class_type] = NODE_PACKS.get(class_type, "a pack that is not known here")
        if node.get("inputs", {}).get("scheduler") == FLOWMATCH_SCHEDULER:
            needed[FLOWMATCH_SCHEDULER] = NODE_PACKS[FLOWMATCH_SCHEDULER]
    return needed


def as_lora_use(lora: LoraInput, default_strength: float) -> LoraUse:
    """A LoRA given as `LoraUse`, (name, strength) or name alone, as `LoraUse`."""
    if isinstance(lora, str):
        lora = LoraUse(lora, default_strength)
    elif isinstance(lora, tuple):
        lora = LoraUse(*lora)
    if not lora.name:
        raise BadInputError("a LoRA needs the file name under which the ComfyUI server lists it")
    for strength in (lora.strength, lora.strength_clip):
        if not math.isfinite(strength):
            raise BadInputError(f"strength of {lora.name} must be a finite number, got {strength}")
    return lora


def _node_id(stage: int, role: str) -> str:
    return _ORIGINAL_IDS.get((stage, role)) or str(1000 * stage + _ROLES.index(role))


def _add_sources(
    nodes: _Nodes,
    models: ModelNames,
    loras: Sequence[LoraUse],
    default_strength: float,
    prompt: str,
    negative_prompt: str,
) -> _Sources:
    model, clip, vae = _add_loaders(nodes, models)
    model, clip = _add_loras(nodes, loras, default_strength, model, clip)
    nodes.add("6", "CLIPTextEncode", text=prompt, clip=clip)
    nodes.add("7", "CLIPTextEncode", text=negative_prompt, clip=clip)
    return _Sources(model, ["6", 0], ["7", 0], vae)


def _add_loaders(nodes: _Nodes, models: ModelNames) -> tuple[Link, Link, Link]:
    if models.checkpoint is not None:
        nodes.add("1", "CheckpointLoaderSimple", ckpt_name=models.checkpoint)
        return ["1", 0], ["1", 1], ["1", 2]
    if _is_gguf(models.diffusion_model):
        nodes.add("1", "UnetLoaderGGUF", unet_name=models.diffusion_model)
    else:
        nodes.add("1", "UNETLoader", unet_name=models.diffusion_model, weight_dtype="default")
    plain = nodes.standard and not _is_gguf(models.text_encoder)
    loader = "CLIPLoader" if plain else "CLIPLoaderGGUF"
    nodes.add("2", loader, clip_name=models.text_encoder, type="lumina2")
    nodes.add("3", "VAELoader", vae_name=models.vae)
    return ["1", 0], ["2", 0], ["3", 0]


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _add_loras(
    nodes: _Nodes, loras: Sequence[LoraUse], default_strength: float, model: Link, clip: Link
) -> tuple[Link, Link]:
    if not loras and not nodes.standard:
        # The original has a loader even without a LoRA; with empty names it changes nothing.
        loras = [LoraUse("", default_strength)]
    for number, lora in enumerate(loras, start=343):
        inputs: dict[str, Any] = {
            "lora_name": lora.name,
            "strength_model": lora.strength,
            "strength_clip": lora.strength_clip,
            "model": model,
            "clip": clip,
        }
        if lora.folder or not lora.name:
            nodes.add(str(number), "LorapathLoader", lora_path=lora.folder, **inputs)
        else:
            nodes.add(str(number), "LoraLoader", **inputs)
        model, clip = [str(number), 0], [str(number), 1]
    return model, clip


def _add_start(
    nodes: _Nodes, number: int, stage: Stage, before: Stage | None, latent: Link | None
) -> Link:
    """The latent a stage starts from: nothing, or the stage before resized to this one's size."""
    name = _node_id(number, "latent")
    if before is None or latent is None:
        size = {"width": stage.width, "height": stage.height}
        return [nodes.add(name, "EmptySD3LatentImage", **size, batch_size=1), 0]
    method: dict[str, Any] = {"upscale_method": stage.upscale, "samples": latent}
    factor = _uniform_factor(before, stage)
    if factor is not None:
        return [nodes.add(name, "LatentUpscaleBy", scale_by=factor, **method), 0]
    if min(stage.width, stage.height) < SMALLEST_UPSCALE:
        raise WorkflowError(
            f"{stage.name} is {stage.width}x{stage.height} pixels (width x height), but ComfyUI's "
            f"LatentUpscale makes nothing below {SMALLEST_UPSCALE}; use a larger stage"
        )
    size = {"width": stage.width, "height": stage.height}
    return [nodes.add(name, "LatentUpscale", **size, crop="disabled", **method), 0]


def _uniform_factor(before: Stage, stage: Stage) -> float | None:
    """The one factor that takes both sides to the next size exactly, if there is one."""
    factor = stage.width / before.width
    exact = stage.width * before.height == stage.height * before.width
    lands = (
        round(before.width // 8 * factor) == stage.width // 8
        and round(before.height // 8 * factor) == stage.height // 8
    )
    return factor if exact and lands and 0.01 <= factor <= LARGEST_FACTOR else None


def _add_model(
    nodes: _Nodes, number: int, stage: Stage, model: Link, shifts: dict[float, Link]
) -> Link:
    if stage.shift not in shifts:
        name = _node_id(number, "shift")
        nodes.add(name, "ModelSamplingAuraFlow", shift=stage.shift, model=model)
        shifts[stage.shift] = [name, 0]
    model = shifts[stage.shift]
    if stage.easycache is None:
        return model
    cache = stage.easycache
    name = nodes.add(
        _node_id(number, "cache"),
        "EasyCache",
        reuse_threshold=cache.threshold,
        start_percent=cache.start,
        end_percent=cache.end,
        verbose=False,
        model=model,
    )
    return [name, 0]


def _add_sampler(
    nodes: _Nodes,
    number: int,
    stage: Stage,
    sources: _Sources,
    model: Link,
    latent: Link,
    seed: int,
) -> Link:
    common: dict[str, Any] = {
        "cfg": stage.cfg,
        "model": model,
        "positive": sources.positive,
        "negative": sources.negative,
        "latent_image": latent,
    }
    stage_seed = _add_seed(nodes, number, (seed + stage.seed_offset) % SEED_LIMIT)
    name = _node_id(number, "sample")
    if stage.node == "ksampler":
        common |= {"sampler_name": stage.sampler, "scheduler": stage.scheduler}
        common |= {"steps": stage.steps, "denoise": stage.denoise}
        return [nodes.add(name, "KSampler", seed=stage_seed, **common), 0]
    common["sampler"] = _add_sampler_choice(nodes, number, stage)
    common["sigmas"] = _add_sigmas(nodes, number, stage, model)
    return [nodes.add(name, "SamplerCustom", add_noise=True, noise_seed=stage_seed, **common), 0]


def _add_seed(nodes: _Nodes, number: int, seed: int) -> int | Link:
    if nodes.standard or seed > SEED_NODE_LIMIT:
        return seed
    return [nodes.add(_node_id(number, "seed"), SEED_NODE, seed=seed), 0]


def _add_sampler_choice(nodes: _Nodes, number: int, stage: Stage) -> Link:
    name = _node_id(number, "sampler")
    if stage.sampler == "euler_ancestral":
        return [nodes.add(name, "SamplerEulerAncestral", eta=1.0, s_noise=1.0), 0]
    return [nodes.add(name, "KSamplerSelect", sampler_name=stage.sampler), 0]


def _add_sigmas(nodes: _Nodes, number: int, stage: Stage, model: Link) -> Link:
    name = _node_id(number, "sigmas")
    if stage.scheduler != "flowmatch_node":
        inputs = {"scheduler": stage.scheduler, "steps": stage.steps, "denoise": stage.denoise}
        return [nodes.add(name, "BasicScheduler", **inputs, model=model), 0]
    # The node has no denoise input; its start_at_step cuts a longer schedule in the same way.
    total = stage.steps if stage.denoise >= 1 else int(stage.steps / stage.denoise)
    inputs = dict(FLOWMATCH_INPUTS, steps=total, start_at_step=total - stage.steps)
    return [nodes.add(name, FLOWMATCH_NODE, **inputs, shift=stage.shift), 0]


def _add_picture(nodes: _Nodes, number: int, vae: Link, latent: Link, prefix: str) -> None:
    picture = nodes.add(_node_id(number, "decode"), "VAEDecode", samples=latent, vae=vae)
    name = _node_id(number, "save")
    nodes.add(name, "SaveImage", filename_prefix=prefix, images=[picture, 0])
