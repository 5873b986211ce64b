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

from tests.golden.check import Case, Outcome, as_tensor, thinned
from tests.golden.models import ModelStore, clean_name, pick
from tests.golden.parts import run_network
from turbo.autoencoder import to_pixels, to_uint8
from turbo.checkpoint import open_file
from turbo.denoiser import Caption
from turbo.easycache import EasyCache
from turbo.fusing import LoraChoice, LoraFuser
from turbo.latent import STRIDE
from turbo.names import NETWORK, TEXT_ENCODER
from turbo.pipeline import Models, draw_noise, make_cache, prepare_stage, refine, run_stage, upscale
from turbo.plan import DEFAULT_PLAN, Stage
from turbo.plan import EasyCache as CacheSettings

SMALL_MARGIN = 1e-3
"""Below it a decision may fall either way by rounding."""


def check_easycache(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """Decisions, their sums, and the final latent of runs with a step cache."""
    tensors = case.tensors()
    network = store.transformer(case.facts["weights"])
    models = Models(None, None, network, None, network, store.device)  # type: ignore[arg-type]
    captions: dict[str, Caption] = {}
    for name, value in tensors.items():
        if value.dim() == 3:
            captions[name] = refine(models, value.to(store.device))
    _, _, rows, columns = case.facts["shape"]
    for facts in case.facts["runs"]:
        outcome = case.outcome(facts["key"])
        stage = Stage(
            name=facts["key"],
            height=STRIDE * rows,
            width=STRIDE * columns,
            steps=case.facts["steps"],
            cfg=facts["cfg"],
            sampler=facts["sampler"],
            scheduler=case.facts["scheduler"],
            shift=case.facts["shift"],
        )
        prepared = prepare_stage(network, stage)
        cache = None
        if facts["threshold"] is not None:
            start, end = facts["window"]
            settings = CacheSettings(threshold=facts["threshold"], start=start, end=end)
            cache = make_cache(settings, stage.shift)
            cache.sums = []
        noise = draw_noise(prepared, facts["seed"], store.device, noise_device=torch.device("cpu"))
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
            decided = _check_decisions(outcome, cache, facts["calls"], facts, "")
        if decided and f"{facts['key']}/final" in tensors:
            final = result.latent[:, ::2]
            outcome.compare("final", final, tensors[f"{facts['key']}/final"], *case.limits())
        elif outcome.share < 0:
            outcome.note = "no final latent recorded and no decision compared"
        yield outcome


def _check_decisions(
    outcome: Outcome, cache: EasyCache, calls: list[list[Any]], facts: dict[str, Any], where: str
) -> bool:
    """Compare decisions and sums; False if they differ where rounding decides."""
    margin = facts["smallest_relative_margin"]
    margin = margin.get(where) if isinstance(margin, dict) else margin
    want = [call[1] == "skip" for call in calls]
    if cache.skipped != want:
        close = margin is not None and margin <= SMALL_MARGIN
        if not close:
            got = "".join("s" if skipped else "R" for skipped in cache.skipped)
            pattern = "".join("s" if skipped else "R" for skipped in want)
            outcome.problems.append(f"decisions {where} {got}, recorded {pattern}")
        outcome.note = "a decision within rounding of the threshold fell the other way"
        return False
    pairs = [
        (got, call[4])
        for got, call in zip(cache.sums or [], calls)
        if got is not None and call[4] is not None
    ]
    if pairs:
        ours, recorded = as_tensor(pairs).unbind(1)
        outcome.compare(f"sums {where}", ours, recorded, 0, 1e-4)
    else:
        outcome.note = outcome.note or "decisions equal"
    return True


def check_lora(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """Merged weights and what the models make of them, at each recorded strength."""
    tensors = case.tensors()
    file = case.path.with_suffix(".lora.safetensors")
    for strength in case.facts["merged"]:
        outcome = case.outcome(f"s{strength}")
        network_name = pick(case.facts["weights"], "dit")
        text_name = pick(case.facts["weights"], "te")
        network, text = store.transformer(network_name), store.text_encoder(text_name)
        modules: dict[str, Any] = {NETWORK: network, TEXT_ENCODER: text}
        names = {NETWORK: network_name, TEXT_ENCODER: text_name}
        ignored = set(case.facts.get("ignored_keys", ()))
        _fuse(store, modules, names, file, float(strength), ignored)
        short = {"dit": NETWORK, "te": TEXT_ENCODER}
        for entry in case.facts["merged"][strength]:
            part, name = entry.split(":", 1)
            merged = modules[short[part]].native_tensors()[name].float().cpu()
            prefix = f"s{strength}/merged/{entry}"
            limits = case.limits("merged")
            if f"{prefix}/sample" in tensors:
                sample = merged[::16, ::16] if merged.dim() > 1 else merged
                outcome.compare(f"{entry} sample", sample, tensors[f"{prefix}/sample"], *limits)
            if f"{prefix}/probe" in tensors:
                probe = merged @ tensors[f"probe{merged.shape[-1]}"]
                outcome.compare(f"{entry} probe", probe, tensors[f"{prefix}/probe"], *case.limits())
        if f"s{strength}/out" in tensors:
            latent, features = tensors["x"].to(store.device), tensors["ctx"].to(store.device)
            got = run_network(network, latent, features, 0.6)
            outcome.compare("out", got, tensors[f"s{strength}/out"], *case.limits())
        if f"s{strength}/cond" in tensors:
            cond = text.encode(tensors["ids"].reshape(1, -1))
            outcome.compare("cond", cond, tensors[f"s{strength}/cond"], *case.limits())
        yield outcome


def _fuse(
    store: ModelStore,
    modules: dict[str, Any],
    names: dict[str, str],
    lora: Path,
    strength: float,
    ignored: set[str],
    text_strength: float | None = None,
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
        text = strength if text_strength is None else text_strength
        choice = LoraChoice.parse((filtered, strength, text), None, 1.0)
        LoraFuser(modules, checkpoints).fuse([choice], strict=False)


def check_e2e(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """The whole workflow, stage by stage, to the 8-bit picture."""
    facts, tensors = case.facts, case.tensors()
    outcome = case.outcome()
    names = [clean_name(entry) for entry in facts["weights"]]
    dit, te, vae = (pick(names, prefix) for prefix in ("dit", "te", "vae"))
    models = store.models(dit, te, vae)
    if facts.get("lora"):
        modules = {NETWORK: models.transformer, TEXT_ENCODER: models.text_encoder}
        strengths = (facts["lora_strength_model"], facts["lora_strength_clip"])
        file = case.folder / facts["lora"]
        _fuse(
            store,
            modules,
            {NETWORK: dit, TEXT_ENCODER: te},
            file,
            strengths[0],
            set(),
            strengths[1],
        )
    captions: list[Caption] = []
    for ids, name in ((facts["positive_ids"], "cond"), (facts["negative_ids"], "neg")):
        features = models.text_encoder.encode(torch.tensor([ids]))
        if name in tensors:
            outcome.compare(name, features, tensors[name], *case.limits("cond"))
        captions.append(refine(models, features))
    latent: Tensor | None = None
    for number, stage in enumerate(DEFAULT_PLAN.stages, start=1):
        stage = stage if facts["easycache"] != "off" else replace(stage, easycache=None)
        latent = _run_stage(case, outcome, models, stage, captions, number, latent, tensors)
    assert latent is not None
    _check_picture(case, outcome, to_pixels(models.autoencoder.decode(latent))[0].cpu(), tensors)
    yield outcome


def _run_stage(
    case: Case,
    outcome: Outcome,
    models: Models,
    stage: Stage,
    captions: list[Caption],
    number: int,
    latent: Tensor | None,
    tensors: dict[str, Tensor],
) -> Tensor:
    facts = case.facts
    prepared = prepare_stage(models.transformer, stage)
    seed = facts["seed"] + stage.seed_offset
    noise = draw_noise(prepared, seed, models.device, noise_device=torch.device("cpu"))
    if f"sigmas{number}" in tensors:
        sigmas = as_tensor(prepared.sigmas)
        outcome.compare(f"sigmas{number}", sigmas, tensors[f"sigmas{number}"], 1e-6, 1e-5)
    if f"noise{number}" in tensors:
        want = tensors[f"noise{number}"]
        outcome.compare(f"noise{number}", thinned(noise.start.cpu(), want, (2, 3)), want, 0, 0)
    cache = None
    if stage.easycache is not None:
        cache = make_cache(stage.easycache, stage.shift)
        cache.sums = []
    start = None if latent is None else upscale(latent, stage)
    aliased = facts["easycache"] == "aliased"
    positive, negative = captions
    result = run_stage(
        models, prepared, positive, negative, noise, start, aliased=aliased, cache=cache
    )
    name = f"stage{number}"
    if cache is not None and name in facts.get("calls", {}):
        _check_decisions(outcome, cache, facts["calls"][name], facts, name)
    want = tensors[f"latent{number}"]
    got = thinned(result.latent.cpu(), want, (2, 3))
    outcome.compare(f"latent{number}", got, want, *case.limits(f"latent{number}"))
    return result.latent


_CROP = re.compile(r"(\w+)(?: \(float\))? = image\[(\d+):(\d+), (\d+):(\d+)\]")


def _check_picture(
    case: Case, outcome: Outcome, pixels: Tensor, tensors: dict[str, Tensor]
) -> None:
    bytes_ = to_uint8(pixels)
    crops = {name: tuple(map(int, box)) for name, *box in _CROP.findall(case.facts["stored"])}
    for name, want in tensors.items():
        if not name.startswith("image"):
            continue
        full = bytes_ if want.dtype == torch.uint8 else pixels
        if name in crops:
            top, bottom, left, right = crops[name]
            got = full[top:bottom, left:right]
        else:
            got = thinned(full, want, (0, 1))
        if want.dtype == torch.uint8:
            difference = (got.int() - want.int()).abs()
            share = (difference == 0).float().mean().item()
            outcome.require(int(difference.max()) <= 1, f"{name}: off by {int(difference.max())}")
            outcome.require(share >= 0.999, f"{name}: only {share:.4%} of the values are equal")
        else:
            outcome.compare(name, got, want, *case.limits("image"))
