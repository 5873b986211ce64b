"""A ComfyUI workflow in API format, read as a plan.

The graph is walked from its pictures back through the samplers to the loaders; nodes are known by
their class, never by their id. A node that would change the picture in a way a plan cannot express
is an error that names it: a workflow is read whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo.comfyui_graph import Graph, Node
from turbo.comfyui_workflow import (
    FLOWMATCH_INPUTS,
    FLOWMATCH_NODE,
    LARGEST_FACTOR,
    SMALLEST_UPSCALE,
    LoraUse,
    ModelNames,
)
from turbo.errors import PlanError, WorkflowError
from turbo.plan import EasyCache, Plan, Stage

MODEL_SHIFT = 3.0
"""Shift of a Z-Image model to which no sampling node was applied."""

WORKFLOW_FILE_LIMIT = 16 * 2**20  # bytes; real ones have a few thousand

# Sampler nodes that are one of our samplers if these inputs have these values.
_SAMPLER_NODES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "SamplerEulerAncestral": ("euler_ancestral", {"eta": 1.0, "s_noise": 1.0}),
    "SamplerDPMPP_SDE": (
        "dpmpp_sde",
        {"eta": 1.0, "s_noise": 1.0, "r": 0.5, "noise_device": "cpu"},
    ),
    "SamplerDPMPP_2M_SDE": (
        "dpmpp_2m_sde",
        {"eta": 1.0, "s_noise": 1.0, "solver_type": "midpoint", "noise_device": "cpu"},
    ),
    "SamplerDPMPP_3M_SDE": (
        "dpmpp_3m_sde",
        {"eta": 1.0, "s_noise": 1.0, "noise_device": "cpu"},
    ),
}

# Samplers that ask the model for its shift, apart from the schedule they are given.
_SHIFT_SAMPLERS = frozenset({"dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"})

_SAMPLERS = frozenset({"KSampler", "SamplerCustom"})
_EMPTY_LATENTS = frozenset({"EmptySD3LatentImage", "EmptyLatentImage"})
_UPSCALES = frozenset({"LatentUpscale", "LatentUpscaleBy"})
_LORA_LOADERS = frozenset({"LoraLoader", "LoraLoaderModelOnly", "LorapathLoader"})
_SHIFT_NODE = "ModelSamplingAuraFlow"
_MODEL_NODES = _LORA_LOADERS | {"EasyCache", _SHIFT_NODE}
_CLIP_NODES = _LORA_LOADERS - {"LoraLoaderModelOnly"}
_NETWORK_LOADERS = frozenset({"UNETLoader", "UnetLoaderGGUF", "CheckpointLoaderSimple"})
_CLIP_LOADERS = frozenset({"CLIPLoader", "CLIPLoaderGGUF", "CheckpointLoaderSimple"})
_VAE_LOADERS = frozenset({"VAELoader", "CheckpointLoaderSimple"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowContents:
    """Everything a workflow says: the plan, and the request that was in it."""

    plan: Plan
    prompt: str
    negative_prompt: str
    """Empty if there is none, which only happens where no stage uses it (every cfg is 1)."""
    seed: int
    """The smallest seed of all stages, usually the first's; the plan has the rest as offsets."""
    loras: tuple[LoraUse, ...]
    models: ModelNames


def plan_from_workflow(workflow: Mapping[str, Any]) -> WorkflowContents:
    """Read a workflow in ComfyUI's API format.

    Raises:
        WorkflowError: It is in the editor's format, damaged, or holds a node or a setting that a
            plan cannot express; the message names the node.
    """
    graph = Graph(workflow)
    passes = _find_passes(graph)
    samplers = [item.sampler for item in passes]
    seed = min(_stage_seed(graph, sampler) for sampler in samplers)
    stages = tuple(
        _read_stage(graph, number, item, seed) for number, item in enumerate(passes, start=1)
    )
    try:
        plan = Plan(
            stages=stages, num_inference_steps=stages[0].steps, guidance_scale=stages[0].cfg
        )
    except PlanError as error:
        raise WorkflowError(f"{samplers[0]}: {error}") from error
    prompt, negative_prompt = _read_prompts(graph, samplers, stages)
    clip, clip_loras = _read_same_clip(graph, samplers, stages)
    model = _read_same_model(graph, samplers)
    return WorkflowContents(
        plan=plan,
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        loras=_lora_uses(graph, model.loras, clip_loras),
        models=_model_names(graph, model.loader, clip),
    )


def load_workflow(path: str | Path) -> WorkflowContents:
    """`plan_from_workflow` of a JSON file.

    Raises:
        WorkflowError: The file cannot be read, is no JSON, or is not such a workflow.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(WORKFLOW_FILE_LIMIT + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise WorkflowError(f"cannot read the workflow {path}: {error}") from error
    if len(data) > WORKFLOW_FILE_LIMIT:
        raise WorkflowError(f"{path} is larger than any workflow; give a JSON file in API format")
    try:
        workflow = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{path} is not JSON; give a workflow in API format") from error
    return plan_from_workflow(workflow)


# ---------------------------------------------------------------- the chain of samplers


@dataclass(frozen=True, slots=True)
class _Pass:
    """One sampler, the node that resized its latent, and the latent's size in pixels."""

    sampler: Node
    upscale: Node | None
    height: int
    width: int


def _find_passes(graph: Graph) -> list[_Pass]:
    """The samplers in the order in which they run, ending with the one of the last picture."""
    chains = [_chain(graph, _sampler_of(graph, node)) for node in _picture_nodes(graph)]
    longest = max(chains, key=len)
    order = [sampler.name for sampler, _, _ in longest]
    for chain in chains:
        if [sampler.name for sampler, _, _ in chain] != order[: len(chain)]:
            raise WorkflowError(
                f"{chain[-1][0]} and {longest[-1][0]} make pictures that do not build on each "
                "other; keep one chain of samplers"
            )
    passes: list[_Pass] = []
    for sampler, upscale, empty in longest:
        height, width = _size(graph, upscale or empty, passes[-1] if passes else None)
        passes.append(_Pass(sampler, upscale, height, width))
    return passes


def _picture_nodes(graph: Graph) -> list[Node]:
    for class_type in ("SaveImage", "PreviewImage", "VAEDecode"):
        found = [node for node in graph.nodes.values() if node.class_type == class_type]
        if found:
            return found
    raise WorkflowError("the workflow makes no picture: it has no SaveImage node")


def _sampler_of(graph: Graph, picture: Node) -> Node:
    decode = picture
    if picture.class_type != "VAEDecode":
        decode, _ = graph.link(picture, "images")
        if decode.class_type != "VAEDecode":
            decode.refuse("a plan saves pictures as VAEDecode makes them; remove this node")
    sampler, output = graph.link(decode, "samples")
    _check_sampler(sampler, output)
    return sampler


def _check_sampler(node: Node, output: int) -> None:
    if node.class_type not in _SAMPLERS:
        node.refuse("this node is not known as a sampler; use KSampler or SamplerCustom")
    if output != 0:
        node.refuse("only its first output can be used, not denoised_output")


_Chain = list[tuple[Node, Node | None, Node | None]]  # sampler, upscale before it, empty latent


def _chain(graph: Graph, sampler: Node) -> _Chain:
    """The samplers up to this one, each with the node that resized or made its latent."""
    chain: _Chain = []
    while True:
        if any(sampler is seen for seen, _, _ in chain):
            sampler.refuse("its latent depends on itself")
        source, output = graph.link(sampler, "latent_image")
        upscale = None
        if source.class_type in _UPSCALES:
            upscale = source
            source, output = graph.link(upscale, "samples")
        if source.class_type in _EMPTY_LATENTS:
            if upscale is not None:
                upscale.refuse("it resizes an empty latent; set the size in that node")
            chain.append((sampler, None, source))
            return chain[::-1]
        _check_sampler(source, output)
        chain.append((sampler, upscale, None))
        sampler = source


def _size(graph: Graph, node: Node | None, before: _Pass | None) -> tuple[int, int]:
    """Height and width in pixels of a stage that starts from `node`; None keeps the size."""
    if node is None:
        assert before is not None
        return before.height, before.width
    if node.class_type == "LatentUpscaleBy":
        assert before is not None
        factor = graph.number(node, "scale_by")
        if not 0 < factor <= LARGEST_FACTOR:
            node.refuse(f"scale_by must be above 0 and at most {LARGEST_FACTOR}, got {factor:g}")
        return round(before.height // 8 * factor) * 8, round(before.width // 8 * factor) * 8
    height, width = graph.integer(node, "height"), graph.integer(node, "width")
    if node.class_type == "LatentUpscale":
        graph.expect(node, {"crop": "disabled"})
        if min(height, width) < SMALLEST_UPSCALE:
            node.refuse(f"height and width must be at least {SMALLEST_UPSCALE}")
    else:
        graph.expect(node, {"batch_size": 1})
    return height, width


# ---------------------------------------------------------------- one stage


def _read_stage(graph: Graph, number: int, item: _Pass, base_seed: int) -> Stage:
    sampler = item.sampler
    model = _read_model(graph, sampler)
    settings = _read_sampling(graph, sampler, model)
    method = "nearest-exact"
    if item.upscale is not None:
        method = graph.text(item.upscale, "upscale_method")
    try:
        return Stage(
            name=f"stage{number}",
            height=item.height,
            width=item.width,
            cfg=graph.number(sampler, "cfg"),
            seed_offset=_stage_seed(graph, sampler) - base_seed,
            upscale=method,
            easycache=model.easycache,
            **settings,
        )
    except PlanError as error:
        raise WorkflowError(f"{sampler}: {error}") from error


def _stage_seed(graph: Graph, sampler: Node) -> int:
    name = "seed" if sampler.class_type == "KSampler" else "noise_seed"
    seed = graph.integer(sampler, name)
    if seed < 0:
        sampler.refuse(f"{name} is {seed}, which means a random one; set a number from 0 up")
    return seed


def _read_sampling(graph: Graph, node: Node, model: _Model) -> dict[str, Any]:
    """Sampler, schedule, steps, denoise and shift of a sampler node, as fields of a `Stage`."""
    if node.class_type == "KSampler":
        return {
            "node": "ksampler",
            "sampler": graph.text(node, "sampler_name"),
            "scheduler": graph.text(node, "scheduler"),
            "steps": graph.integer(node, "steps"),
            "denoise": graph.number(node, "denoise"),
            "shift": model.shift,
        }
    if graph.value(node, "add_noise") is not True:
        node.refuse("add_noise must be true")
    chosen, _ = graph.link(node, "sampler")
    sampler = _read_sampler_choice(graph, chosen)
    sigmas, _ = graph.link(node, "sigmas")
    if sigmas.class_type == "BasicScheduler":
        schedule = _read_basic_scheduler(graph, sigmas, model)
    elif sigmas.class_type == FLOWMATCH_NODE:
        schedule = _read_flowmatch_node(graph, sigmas)
        used = model.easycache is not None or sampler in _SHIFT_SAMPLERS
        if used and schedule["shift"] != model.shift:
            sigmas.refuse(
                f"its shift is {schedule['shift']} and the model's {model.shift}; a stage has one"
            )
    else:
        sigmas.refuse(f"use BasicScheduler or {FLOWMATCH_NODE} for sigmas")
    return {"node": "custom", "sampler": sampler, **schedule}


def _read_sampler_choice(graph: Graph, node: Node) -> str:
    if node.class_type == "KSamplerSelect":
        return graph.text(node, "sampler_name")
    if node.class_type not in _SAMPLER_NODES:
        node.refuse("this sampler node is not known; use KSamplerSelect")
    sampler, values = _SAMPLER_NODES[node.class_type]
    graph.expect(node, values)
    return sampler


def _read_basic_scheduler(graph: Graph, node: Node, model: _Model) -> dict[str, Any]:
    shift = _read_model(graph, node).shift
    if shift != model.shift:
        node.refuse(f"its model has shift {shift} and the sampler's {model.shift}; a stage has one")
    return {
        "scheduler": graph.text(node, "scheduler"),
        "steps": graph.integer(node, "steps"),
        "denoise": graph.number(node, "denoise"),
        "shift": shift,
    }


def _read_flowmatch_node(graph: Graph, node: Node) -> dict[str, Any]:
    cuts = ("start_at_step", "end_at_step", "device")
    # These only have a meaning with dynamic shifting, which is refused.
    dynamic = ("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift")
    unused = (*cuts, *dynamic, "time_shift_type")
    graph.expect(node, {k: v for k, v in FLOWMATCH_INPUTS.items() if k not in unused})
    total = graph.integer(node, "steps")
    start, end = graph.integer(node, "start_at_step"), graph.integer(node, "end_at_step")
    if end < total:
        node.refuse(f"end_at_step must be at least {total}, so that the schedule ends in 0")
    if not 0 <= start < total:
        node.refuse(f"start_at_step must be 0 to {total - 1}, got {start}")
    return {
        "scheduler": "flowmatch_node",
        "steps": total - start,
        "denoise": _denoise(total - start, total),
        "shift": graph.number(node, "shift"),
    }


def _denoise(steps: int, total: int) -> float:
    """The roundest d with int(steps / d) == total, which is how a denoise cuts a schedule."""
    for digits in range(1, 16):
        denoise = round(steps / total, digits)
        if 0 < denoise <= 1 and int(steps / denoise) == total:
            return denoise
    return steps / total


# ---------------------------------------------------------------- models, LoRAs, prompts


@dataclass(slots=True)
class _Model:
    """What lies between a loader and an input that takes a model."""

    loader: Node
    loras: list[Node]
    shift: float = MODEL_SHIFT
    easycache: EasyCache | None = None


def _upstream(
    graph: Graph, user: Node, name: str, between: frozenset[str], ends: frozenset[str]
) -> list[Node]:
    """The nodes behind the input `name`, nearest first, up to one whose class is in `ends`."""
    nodes: list[Node] = []
    node = user
    while node is user or node.class_type not in ends:
        node, _ = graph.link(node, name)
        if any(node is seen for seen in nodes):
            node.refuse(f"its {name} depends on itself")
        if node.class_type not in between | ends:
            node.refuse(f"{user} takes its {name} from here, and this node is not known")
        nodes.append(node)
    return nodes


def _read_model(graph: Graph, user: Node) -> _Model:
    nodes = _upstream(graph, user, "model", _MODEL_NODES, _NETWORK_LOADERS)
    graph.expect(nodes[-1], {"weight_dtype": "default"})
    model = _Model(nodes[-1], [node for node in nodes[::-1] if node.class_type in _LORA_LOADERS])
    shifts = [node for node in nodes if node.class_type == _SHIFT_NODE]
    if shifts:  # the one nearest to the sampler was applied last and replaces the others
        model.shift = graph.number(shifts[0], "shift")
    caches = [node for node in nodes if node.class_type == "EasyCache"]
    if len(caches) > 1:
        caches[1].refuse("there is a second EasyCache before the same sampler")
    if caches:
        model.easycache = _read_easycache(graph, caches[0])
    return model


def _read_easycache(graph: Graph, node: Node) -> EasyCache:
    try:
        return EasyCache(
            threshold=graph.number(node, "reuse_threshold"),
            start=graph.number(node, "start_percent"),
            end=graph.number(node, "end_percent"),
        )
    except PlanError as error:
        raise WorkflowError(f"{node}: {error}") from error


def _read_clip(graph: Graph, user: Node) -> tuple[Node, list[Node]]:
    """The loader of the text encoder that a node uses, and the LoRAs on it in order."""
    *loras, loader = _upstream(graph, user, "clip", _CLIP_NODES, _CLIP_LOADERS)
    return loader, loras[::-1]


def _read_same_model(graph: Graph, samplers: Sequence[Node]) -> _Model:
    models = [_read_model(graph, sampler) for sampler in samplers]
    for sampler, model in zip(samplers, models, strict=True):
        if model.loader is not models[0].loader or model.loras != models[0].loras:
            sampler.refuse("all samplers must use the same model file and LoRAs")
    return models[0]


def _read_same_clip(
    graph: Graph, samplers: Sequence[Node], stages: Sequence[Stage]
) -> tuple[Node, list[Node]]:
    positives, negatives = _encoders(graph, samplers, stages)
    first = _read_clip(graph, positives[0])
    for node in [*positives, *negatives]:
        if _read_clip(graph, node) != first:
            node.refuse("all prompts must use the same text encoder and LoRAs")
    return first


def _read_prompts(
    graph: Graph, samplers: Sequence[Node], stages: Sequence[Stage]
) -> tuple[str, str]:
    positives, negatives = _encoders(graph, samplers, stages)
    if negatives:
        return _same_text(graph, positives), _same_text(graph, negatives)
    return _same_text(graph, positives), _unused_negative(graph, samplers[0])


def _encoders(
    graph: Graph, samplers: Sequence[Node], stages: Sequence[Stage]
) -> tuple[list[Node], list[Node]]:
    """Prompt nodes of all samplers, and negative ones of those that evaluate them."""
    guided = [node for node, stage in zip(samplers, stages, strict=True) if stage.cfg != 1]
    return (
        [_encoder(graph, sampler, "positive") for sampler in samplers],
        [_encoder(graph, sampler, "negative") for sampler in guided],
    )


def _encoder(graph: Graph, sampler: Node, name: str) -> Node:
    node, _ = graph.link(sampler, name)
    if node.class_type != "CLIPTextEncode":
        node.refuse(f"{sampler} takes its {name} prompt from here; use CLIPTextEncode")
    return node


def _same_text(graph: Graph, encoders: Sequence[Node]) -> str:
    text = graph.text(encoders[0], "text")
    for node in encoders:
        if graph.text(node, "text") != text:
            node.refuse(f"its text differs from that of {encoders[0]}; a plan has one prompt")
    return text


def _unused_negative(graph: Graph, sampler: Node) -> str:
    """With cfg 1 the negative prompt is never evaluated, so anything may stand there."""
    node, _ = graph.link(sampler, "negative")
    return graph.text(node, "text") if node.class_type == "CLIPTextEncode" else ""


def _lora_uses(
    graph: Graph, on_model: Sequence[Node], on_clip: Sequence[Node]
) -> tuple[LoraUse, ...]:
    order = [node.name for node in on_model]
    both = [node.name for node in on_clip if node.name in order]
    if both != [name for name in order if name in both]:
        on_clip[0].refuse("the LoRAs are applied to model and text encoder in different orders")
    rest = [node for node in on_clip if node.name not in order]
    uses = [
        _lora_use(graph, node, on_model=node.name in order, on_clip=node in on_clip)
        for node in [*on_model, *rest]
    ]
    return tuple(use for use in uses if use.name)


def _lora_use(graph: Graph, node: Node, *, on_model: bool, on_clip: bool) -> LoraUse:
    strength = graph.number(node, "strength_model") if on_model else 0.0
    clip = graph.number(node, "strength_clip") if on_clip else 0.0
    folder = graph.text(node, "lora_path") if node.class_type == "LorapathLoader" else ""
    name = graph.text(node, "lora_name")
    return LoraUse(name, strength, None if clip == strength else clip, folder)


def _model_names(graph: Graph, network: Node, clip: Node) -> ModelNames:
    vae = _read_vae(graph)
    loaders = (network, clip, vae)
    if all(node.class_type == "CheckpointLoaderSimple" for node in loaders):
        return ModelNames(checkpoint=graph.text(network, "ckpt_name"))

    def name(node: Node, key: str) -> str:
        whole = node.class_type == "CheckpointLoaderSimple"
        return graph.text(node, "ckpt_name" if whole else key)

    return ModelNames(
        diffusion_model=name(network, "unet_name"),
        text_encoder=name(clip, "clip_name"),
        vae=name(vae, "vae_name"),
    )


def _read_vae(graph: Graph) -> Node:
    decoders = [node for node in graph.nodes.values() if node.class_type == "VAEDecode"]
    loaders = [graph.link(node, "vae")[0] for node in decoders]
    for loader in loaders:
        if loader.class_type not in _VAE_LOADERS:
            loader.refuse("this node is not known as a VAE loader; use VAELoader")
        if loader is not loaders[0]:
            loader.refuse("all pictures must be decoded by the same VAE")
    return loaders[0]
