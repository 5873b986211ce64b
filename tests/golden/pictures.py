"""Cases that run the network many times: EasyCache, LoRA, whole pictures."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden.check import Case, Outcome, as_tensor, recorded_stride, thinned
from tests.golden.models import ModelStore, clean_name, pick
from tests.golden.parts import run_network
from turbo.autoencoder import to_pixels, to_uint8
from turbo.checkpoint import open_file
from turbo.denoiser import Caption
from turbo.easycache import StepCache
from turbo.fusing import LoraChoice, LoraFuser
from turbo.names import NETWORK, TEXT_ENCODER
from turbo.pipeline import (
    Drawing,
    Models,
    PreparedStage,
    StageNoise,
    draw_noise,
    encode_visible,
    make_cache,
    prepare_stage,
    refine,
    run_stage,
    run_stages,
)
from turbo.plan import EasyCache as CacheSettings
from turbo.plan import Stage

RECORDED_WORKFLOW = (
    Stage(
        name="stage1",
        height=224,
        width=176,
        steps=9,
        cfg=2.0,
        sampler="euler_ancestral",
        scheduler="flowmatch_node",
        shift=3.0,
    ),
    Stage(
        name="stage2",
        height=432,
        width=336,
        steps=16,
        sampler="euler_ancestral",
        scheduler="FlowMatchEulerDiscreteScheduler",
        node="ksampler",
        shift=3.0,
        denoise=0.7,
        seed_offset=1,
        easycache=CacheSettings(threshold=0.37, start=0.45, end=0.95),
    ),
    Stage(
        name="stage3",
        height=864,
        width=672,
        steps=16,
        sampler="dpmpp_sde",
        scheduler="beta",
        shift=3.0,
        denoise=0.6,
        seed_offset=2,
        easycache=CacheSettings(threshold=0.12, start=0.7, end=0.95),
    ),
)
"""The workflow that was recorded; a change of the default plan must not change what is proved."""

SMALL_MARGIN = 1e-3
"""Below it a decision may fall either way by rounding."""


def check_easycache(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """Decisions, their sums, and the final latent of runs with a step cache."""
    tensors = case.tensors()
    models = store.models(case.facts["weights"])
    captions: dict[str, Caption] = {}
    for name, value in tensors.items():
        if value.dim() == 3:
            captions[name] = refine(models, value.to(store.device))
    for facts in case.facts["runs"]:
        outcome = case.outcome(facts["key"])
        with outcome.catching():
            _check_cached_run(case, facts, models, captions, tensors, outcome)
        yield outcome


def _check_cached_run(
    case: Case,
    facts: dict[str, Any],
    models: Models,
    captions: dict[str, Caption],
    tensors: dict[str, Tensor],
    outcome: Outcome,
) -> None:
    batch, channels, rows, columns = case.facts["shape"]
    settings = None
    if facts["threshold"] is not None:
        start, end = facts["window"]
        settings = CacheSettings(threshold=facts["threshold"], start=start, end=end)
    stage = replace(
        RECORDED_WORKFLOW[0],
        node="custom",
        name=facts["key"],
        steps=case.facts["steps"],
        cfg=facts["cfg"],
        sampler=facts["sampler"],
        scheduler=case.facts["scheduler"],
        shift=case.facts["shift"],
        easycache=settings,
    )
    prepared = prepare_stage(models.transformer, stage, (rows, columns))
    cache = make_cache(stage, kernels=models.kernels)
    if cache is not None:
        cache.sums = []
    noise = draw_noise(
        prepared,
        facts["seed"],
        models.device,
        channels=channels,
        batch=batch,
        noise_device=torch.device("cpu"),
    )
    result = run_stage(
        models,
        prepared,
        captions[case.facts["positive"]],
        captions[facts["negative"]],
        noise,
        aliased=facts["aliased"],
        cache=cache,
    )
    decided = True
    if cache is not None:
        margin = facts.get("smallest_relative_margin")
        decided = _check_decisions(outcome, cache, facts["calls"], margin, "")
    final = f"{facts['key']}/final"
    if decided and final in tensors:
        outcome.compare("final", result.latent[:, ::2], tensors[final], *case.limits())


def _check_decisions(
    outcome: Outcome, cache: StepCache, calls: list[list[Any]], margin: float | None, where: str
) -> bool:
    """Compare decisions and sums; False if they differ where rounding decides."""
    want = [call[1] == "skip" for call in calls]
    outcome.require(len(want) == len(cache.skipped), f"calls {where}: {len(cache.skipped)}")
    pairs = list(zip(cache.skipped, want))
    agreed = next((k for k, (got, wanted) in enumerate(pairs) if got != wanted), len(pairs))
    sums = zip((cache.sums or [])[: agreed + 1], calls)
    compared = [(got, call[4]) for got, call in sums if got is not None and call[4] is not None]
    if compared:
        ours, recorded = as_tensor(compared).unbind(1)
        outcome.compare(f"sums {where}", ours, recorded, 0, 1e-4)
    else:
        outcome.share = max(outcome.share, 0.0)  # the decisions themselves were compared
    if agreed == len(pairs):
        return True
    sum_at = calls[agreed][4]
    near = sum_at is not None and abs(sum_at - cache.threshold) <= SMALL_MARGIN * cache.threshold
    if near and margin is not None and margin <= SMALL_MARGIN:
        outcome.note = f"call {agreed} {where} is within rounding of the threshold"
        return False
    got_pattern, pattern = ("".join("s" if k else "R" for k in row) for row in zip(*pairs))
    outcome.problems.append(f"decisions {where} {got_pattern}, recorded {pattern}")
    return False


def check_lora(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """Merged weights and what the models make of them, at each recorded strength."""
    tensors = case.tensors()
    file = case.path.with_suffix(".lora.safetensors")
    for strength in case.facts["merged"]:
        outcome = case.outcome(f"s{strength}")
        network_name = pick(case.facts["weights"], "dit")
        text_name = pick(case.facts["weights"], "te")
        models = store.models(network_name, text_name)
        modules: dict[str, Any] = {NETWORK: models.transformer, TEXT_ENCODER: models.text_encoder}
        names = {NETWORK: network_name, TEXT_ENCODER: text_name}
        ignored = set(case.facts.get("ignored_keys", ()))
        _fuse(store, modules, names, file, (float(strength),) * 2, ignored)
        short = {"dit": NETWORK, "te": TEXT_ENCODER}
        for entry in case.facts["merged"][strength]:
            part, name = entry.split(":", 1)
            merged = modules[short[part]].native_tensors()[name].float().cpu()
            prefix = f"s{strength}/merged/{entry}"
            limits = case.limits("merged")
            stored = [f"{prefix}/{kind}" in tensors for kind in ("sample", "probe")]
            outcome.require(any(stored), f"{entry}: nothing recorded to compare with")
            if f"{prefix}/sample" in tensors:
                sample = merged[::16, ::16] if merged.dim() > 1 else merged
                outcome.compare(f"{entry} sample", sample, tensors[f"{prefix}/sample"], *limits)
            if f"{prefix}/probe" in tensors:
                probe = merged @ tensors[f"probe{merged.shape[-1]}"]
                outcome.compare(f"{entry} probe", probe, tensors[f"{prefix}/probe"], *case.limits())
        if f"s{strength}/out" in tensors:
            latent, features = tensors["x"].to(store.device), tensors["ctx"].to(store.device)
            got = run_network(models, latent, features, 0.6)
            outcome.compare("out", got, tensors[f"s{strength}/out"], *case.limits())
        if f"s{strength}/cond" in tensors:
            cond = encode_visible(models, tensors["ids"].reshape(-1).tolist())
            outcome.compare("cond", cond, tensors[f"s{strength}/cond"], *case.limits())
        yield outcome


def _fuse(
    store: ModelStore,
    modules: dict[str, Any],
    names: dict[str, str],
    lora: Path,
    strengths: tuple[float, float],
    ignored: set[str],
) -> None:
    """Fuse a LoRA into modules, leaving out the keys that the reference ignores."""
    kept = {key: value for key, value in load_file(lora).items() if key not in ignored}
    if not kept:
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {}
        for component, name in names.items():
            path = Path(folder, f"{component}.safetensors")
            save_file(store.values(name), path)
            checkpoints[component] = open_file(component, path)
        filtered = Path(folder, lora.name)
        save_file(kept, filtered)
        choice = LoraChoice.parse((filtered, *strengths), None, 1.0)
        LoraFuser(modules, checkpoints).fuse([choice], strict=False)


def check_e2e(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """The whole workflow, stage by stage, to the 8-bit picture."""
    outcome = case.outcome()
    with outcome.catching():
        _check_workflow(case, store, outcome)
    yield outcome


def _check_workflow(case: Case, store: ModelStore, outcome: Outcome) -> None:
    facts, tensors = case.facts, case.tensors()
    names = [clean_name(entry) for entry in facts["weights"]]
    dit, te, vae = (pick(names, prefix) for prefix in ("dit", "te", "vae"))
    models = store.models(dit, te, vae)
    if facts.get("lora"):
        modules = {NETWORK: models.transformer, TEXT_ENCODER: models.text_encoder}
        strengths = facts["lora_strength_model"], facts["lora_strength_clip"]
        file = case.folder / facts["lora"]
        _fuse(store, modules, {NETWORK: dit, TEXT_ENCODER: te}, file, strengths, set())
    captions: list[Caption] = []
    for ids, name in ((facts["positive_ids"], "cond"), (facts["negative_ids"], "neg")):
        features = encode_visible(models, ids)
        if name in tensors:
            outcome.compare(name, features, tensors[name], *case.limits("cond"))
        captions.append(refine(models, features))
    stages = [
        stage if facts["easycache"] != "off" else replace(stage, easycache=None)
        for stage in RECORDED_WORKFLOW
    ]
    latent = _check_stages(case, outcome, models, stages, captions, tensors)
    pixels = to_pixels(models.autoencoder.decode(latent))[0].cpu()
    _check_picture(case, outcome, pixels, tensors)
    if models.decode is not None:
        (captured,), _ = models.decode(latent)
        apart = (captured.cpu().int() - to_uint8(pixels).int()).abs().max()
        outcome.require(bool(apart <= 1), f"the captured decoder is {apart} of 255 away")


def _check_stages(
    case: Case,
    outcome: Outcome,
    models: Models,
    stages: list[Stage],
    captions: list[Caption],
    tensors: dict[str, Tensor],
) -> Tensor:
    """Run the stages and compare everything recorded of them; returns the last latent."""
    facts = case.facts
    caches: dict[str, StepCache | None] = {}
    noises: dict[str, StageNoise] = {}

    def cache(stage: Stage) -> StepCache | None:
        caches[stage.name] = made = make_cache(stage, kernels=models.kernels)
        if made is not None:
            made.sums = []
        return made

    def noise(prepared: PreparedStage) -> StageNoise:
        seed = facts["seed"] + prepared.stage.seed_offset
        drawn = draw_noise(prepared, seed, models.device, noise_device=torch.device("cpu"))
        noises[prepared.stage.name] = drawn
        return drawn

    prepared = [prepare_stage(models.transformer, stage) for stage in stages]
    positive, negative = captions
    drawing = Drawing(positive=positive, negative=negative, noise=noise)
    aliased = facts["easycache"] == "aliased"
    results = list(run_stages(models, prepared, drawing, cache=cache, aliased=aliased))
    stored = facts.get("stored", "")
    for number, (ready, result) in enumerate(zip(prepared, results), start=1):
        name = ready.stage.name
        compared = {
            f"sigmas{number}": (as_tensor(ready.sigmas), (1e-6, 1e-5)),
            f"noise{number}": (noises[name].start.cpu(), (0.0, 0.0)),
            f"latent{number}": (result.latent.cpu(), case.limits(f"latent{number}")),
        }
        made = caches[name]
        if made is not None and name in facts.get("calls", {}):
            margin = facts.get("smallest_relative_margin", {}).get(name)
            _check_decisions(outcome, made, facts["calls"][name], margin, name)
        elif name in facts.get("calls", {}):
            wanted = len(facts["calls"][name])
            outcome.require(result.calls == wanted, f"{name}: {result.calls} network calls")
        for key, (got, limits) in compared.items():
            if key in tensors:
                stride = recorded_stride(stored, key)
                got = got if got.dim() == 1 else thinned(got, tensors[key], (2, 3), stride)
                outcome.compare(key, got, tensors[key], *limits)
    outcome.require("latent3" in tensors, "no last latent recorded")
    return results[-1].latent


_CROP = re.compile(r"(\w+)(?: \(float\))? = image\[(\d+):(\d+), (\d+):(\d+)\]")


def _check_picture(
    case: Case, outcome: Outcome, pixels: Tensor, tensors: dict[str, Tensor]
) -> None:
    facts = case.facts
    size = facts.get("image_size", list(pixels.shape[:2]))
    outcome.require(list(pixels.shape[:2]) == size, f"picture {list(pixels.shape)}, not {size}")
    for name, value in (("image_mean", pixels.mean()), ("image_std", pixels.std(correction=0))):
        if name in facts:
            outcome.require(abs(float(value) - facts[name]) < 1e-4, f"{name} {float(value):.6f}")
    outcome.require(any(name.startswith("image") for name in tensors), "no picture recorded")
    bytes_ = to_uint8(pixels)
    crops = {name: tuple(map(int, box)) for name, *box in _CROP.findall(facts.get("stored", ""))}
    for name, want in tensors.items():
        if not name.startswith("image"):
            continue
        full = bytes_ if want.dtype == torch.uint8 else pixels
        if name in crops:
            top, bottom, left, right = crops[name]
            got = full[top:bottom, left:right]
        else:
            got = thinned(full, want, (0, 1), recorded_stride(facts.get("stored", ""), name))
        if want.dtype == torch.uint8:
            difference = (got.int() - want.int()).abs()
            share = (difference == 0).float().mean().item()
            outcome.require(int(difference.max()) <= 1, f"{name}: off by {int(difference.max())}")
            outcome.require(share >= 0.999, f"{name}: only {share:.4%} of the values are equal")
        else:
            outcome.compare(name, got, want, *case.limits("image"))
