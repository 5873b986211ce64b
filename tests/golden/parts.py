"""Cases of single parts: schedules, samplers, noise, resizing and the three models."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tests.golden.check import Case, Outcome, as_tensor
from tests.golden.models import ModelStore
from turbo.autoencoder import to_pixels
from turbo.latent import from_sampler, resize, start_latent, target_size, to_sampler
from turbo.noise import BrownianNoise, ancestral_noise, indexed_noise, start_noise
from turbo.pipeline import Models, refine
from turbo.samplers import SAMPLERS, sampler_sigmas, trace_sampler
from turbo.sigmas import (
    DROP_PENULTIMATE,
    as_float32,
    basic_sigmas,
    flowmatch_node_sigmas,
    ksampler_sigmas,
    percent_to_sigma,
    sigma_table,
)
from turbo.tokenizer import Tokenizer, attention_mask
from turbo.transformer import Block

_SIGMA_KEY = re.compile(
    r"(?P<how>\w+)/(?:(?P<scheduler>\w+)/)?shift(?P<shift>[\d.]+)"
    r"(?:/steps(?P<steps>\d+))?(?:/denoise(?P<denoise>[\d.]+))?$"
)


def check_sigmas(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """Schedules, the sigma tables, and percentages of the schedule."""
    outcomes: dict[str, Outcome] = {}
    absolute, relative = case.limits()
    for key, want in case.tensors().items():
        match = _SIGMA_KEY.match(key)
        part = f"{match['how']}/{match['scheduler']}" if match and match["scheduler"] else key
        part = part.split("/shift")[0]
        outcome = outcomes.setdefault(part, case.outcome(part))
        got = _sigmas(match) if match else None
        if got is None:
            outcome.require(False, f"{key}: unknown way to make sigmas")
        else:
            outcome.compare(key, got, want, absolute, relative)
    for name, pairs in case.facts.get("percent_to_sigma", {}).items():
        outcome = outcomes.setdefault("percent_to_sigma", case.outcome("percent_to_sigma"))
        shift = float(name.removeprefix("shift"))
        for percent, sigma in pairs:
            got = torch.tensor(percent_to_sigma(percent, shift), dtype=torch.float64)
            want = torch.tensor(sigma, dtype=torch.float64)
            outcome.compare(f"{percent}", got, want, 1e-12, 0)
    yield from outcomes.values()


def _sigmas(match: re.Match[str]) -> Tensor | None:
    how, scheduler, shift = match["how"], match["scheduler"], float(match["shift"])
    steps, denoise = int(match["steps"] or 0), float(match["denoise"] or 1)
    if how == "table":
        return sigma_table(shift)
    if how == "basic":
        return as_tensor(basic_sigmas(scheduler, steps, denoise, shift))
    if how.startswith("ksampler"):
        drop = how != "ksampler"
        return as_tensor(ksampler_sigmas(scheduler, steps, denoise, shift, drop_penultimate=drop))
    if how.startswith("flowmatch_node"):
        # The node's dynamic shifting cancels out: the line stays as it is.
        return as_tensor(flowmatch_node_sigmas(steps, 1.0 if how.endswith("dynamic") else shift))
    return None


def check_samplers(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """Every sampler on a closed-form model."""
    tensors = case.tensors()
    runs = sorted({key.rsplit("/", 1)[0] for key in tensors if key.endswith("/final")})
    for run in runs:
        outcome = case.outcome(run)
        with outcome.catching():
            _check_sampler(case, run, tensors, outcome)
        yield outcome


def _check_sampler(case: Case, run: str, tensors: dict[str, Tensor], outcome: Outcome) -> None:
    facts = case.facts
    sampler, name = run.split("/")
    kind, seed = name.split("_seed")
    want = {key.rsplit("/")[-1]: tensors[key] for key in tensors if key.startswith(f"{run}/")}
    sigmas = ksampler_sigmas(
        facts["scheduler"],
        facts["steps"],
        0.6 if kind == "img" else 1.0,
        facts["shift"],
        drop_penultimate=sampler in DROP_PENULTIMATE,
    )
    limits = case.limits(sampler)
    if "sigmas" in want:
        outcome.compare("sigmas", as_tensor(sigmas), want["sigmas"], 1e-6, 1e-5)
    sizes = list(want["final"].shape)
    if kind == "big" and "eval_x" in want:
        sizes = _whole_sizes(sizes, int(seed), sigmas[0], want["eval_x"][0])
    elif kind == "big":
        sizes[2:] = [2 * size for size in sizes[2:]]
    latent = to_sampler(tensors["img_latent"]) if kind == "img" else None
    final, evaluations, seen = _sample_closed_form(
        sampler, sigmas, facts["shift"], sizes, int(seed), latent
    )
    thin = {
        "big": lambda x: x[..., ::4, ::4],
        "small": lambda x: x[:, ::2],
        "img": lambda x: x[:1, ::2],
    }[kind]
    if "eval_sigma" in want:
        outcome.compare("eval_sigma", as_tensor(evaluations), want["eval_sigma"], *limits)
    if "eval_x" in want:
        outcome.compare("eval_x", torch.stack([thin(x) for x in seen]), want["eval_x"], *limits)
    final = final[..., ::2, ::2] if kind == "big" else final
    outcome.compare("final", final, want["final"], *limits)


def _whole_sizes(thinned: list[int], seed: int, sigma: float, first: Tensor) -> list[int]:
    """Sizes before every 2nd row and column was kept: those whose noise was the first input."""
    for rows, columns in itertools.product((2 * thinned[2], 2 * thinned[2] - 1), (0, 1)):
        sizes = [*thinned[:2], rows, 2 * thinned[3] - columns]
        seen = sigma * start_noise(sizes, seed)[..., ::4, ::4]
        if seen.shape == first.shape and torch.allclose(seen, first, atol=1e-4):
            return sizes
    raise AssertionError("no latent size gives the recorded first input")


def _sample_closed_form(
    sampler: str,
    sigmas: tuple[float, ...],
    shift: float,
    sizes: list[int],
    seed: int,
    latent: Tensor | None,
) -> tuple[Tensor, list[float], list[Tensor]]:
    seen: list[Tensor] = []
    evaluations: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        sigma = as_float32(sigma)
        evaluations.append(sigma)
        seen.append(x)
        model = 0.7 * x * (1 - sigma) + 0.2 * torch.sin(3 * x)
        return x - sigma * ((x - model) / sigma)

    followed = sampler_sigmas(sampler, sigmas, shift)
    trace = trace_sampler(sampler, followed)
    if SAMPLERS[sampler].noise == "brownian":
        path = BrownianNoise(sizes, seed, sigmas)
        drawn = [path(*pair) for pair in trace.noises]
    else:
        drawn = ancestral_noise(sizes, seed, len(trace.noises))
    draws = iter(drawn)

    def noise(sigma: float, sigma_next: float) -> Tensor:
        return next(draws)

    start = start_latent(latent, start_noise(sizes, seed), sigmas[0])
    final = from_sampler(SAMPLERS[sampler].sample(denoise, start, followed, noise))
    assert [as_float32(sigma) for sigma in trace.evaluations] == evaluations
    return final, evaluations, seen


def check_noise(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """Start noise, noise by batch index, ancestral draws, Brownian increments."""
    tensors = case.tensors()
    for key, want in tensors.items():
        kind, seed, *rest = key.split("/")
        number = int(seed.removeprefix("seed"))
        if kind == "brownian" and not key.endswith("/pairs"):
            facts = case.facts["brownian"][key]
            path = (facts["sigma_max"], facts["sigma_min"])
            noise = BrownianNoise(want.shape[1:], number, path)
            pairs = tensors[f"{key}/pairs"].tolist()
            got = torch.stack([noise(a, b) for a, b in pairs]).reshape(want.shape)
        elif kind == "prepare":
            got = start_noise(want.shape, number)
        elif kind == "batch_index":
            got = indexed_noise(want.shape, number, case.facts["batch_index"][key])
        elif kind == "ancestral":
            index = int(rest[-1].removeprefix("draw"))
            got = ancestral_noise(want.shape, number, index + 1)[index]
        else:
            continue
        outcome = case.outcome(key)
        outcome.compare(key, got, want, *case.limits(kind))
        yield outcome


def check_latent_resize(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """The two resizing nodes."""
    tensors = case.tensors()
    for facts in case.facts["cases"]:
        outcome = case.outcome(facts["out"])
        latent = tensors[facts["input"]]
        if facts["node"] == "LatentUpscaleBy":
            rows, columns = (round(size * facts["scale_by"]) for size in latent.shape[-2:])
        else:
            rows, columns = target_size(latent, facts["height"], facts["width"])
        method = facts["method"]
        got = resize(latent, rows, columns, method, facts.get("crop", "disabled"))
        limits = case.limits(method)
        if method == "nearest-exact":
            limits = float(case.tolerance.get("nearest", 0.0)), 0.0
        outcome.compare(facts["out"], got, tensors[facts["out"]], *limits)
        yield outcome


def run_network(models: Models, latent: Tensor, features: Tensor, sigma: float) -> Tensor:
    """One forward of a network with everything it needs made on the spot."""
    transformer = models.transformer
    caption = refine(models, features).tokens
    rotary = transformer.rotary_table(latent.shape[-2], latent.shape[-1], caption.shape[1])
    table = transformer.modulation_table([sigma])
    return models.network(latent, caption, table[0], rotary).clone()  # a graph's is overwritten


def check_dit(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """The network's output; rows of a batch that differ in sigma go one by one."""
    tensors = {key: value.to(store.device) for key, value in case.tensors().items()}
    models = store.models(case.facts["weights"])
    for facts in case.facts["cases"]:
        key = facts["key"]
        latent, features = tensors[f"{key}/x"], tensors[f"{key}/ctx"]
        sigmas = tensors[f"{key}/sigma"].tolist()
        if len(set(sigmas)) == 1:
            got = run_network(models, latent, features, sigmas[0])
        else:
            rows = zip(latent.split(1), features.split(1), sigmas)
            got = torch.cat([run_network(models, x, ctx, sigma) for x, ctx, sigma in rows])
        outcome = case.outcome(key)
        outcome.compare("out", got, tensors[f"{key}/out"].cpu(), *case.limits())
        yield outcome


def check_dit_trace(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """Inner values of one forward, each at the place in our network that means the same.

    Only the plain network has such places.
    """
    tensors = case.tensors()
    network = store.transformer(case.facts["weights"])
    models = Models(cast("Any", None), cast("Any", None), network, cast("Any", None), network)
    latent, features = tensors["x"].to(store.device), tensors["ctx"].to(store.device)
    sigma = tensors["sigma"].tolist()[0]
    got: dict[str, Tensor] = {}
    first = cast("Block", network.layers[0])
    assert first.adaLN is not None
    watched: dict[str, nn.Module] = {
        "x_embedder": network.x_embedder,
        "cap_embedder": network.cap_embedder,
        "final_layer": network.final_linear,
        "layers.0.attention": first.attention,
        "layers.0.feed_forward": first.feed_forward,
    }
    for group in ("context_refiner", "noise_refiner", "layers"):
        watched |= {f"{group}.{k}": block for k, block in enumerate(getattr(network, group))}
    for name, module in watched.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: got.__setitem__(name, out))
    got["out"] = run_network(models, latent, features, sigma)
    time = network.embed_time([sigma])
    got["t_embedder"] = time
    got["layers.0.adaLN"] = first.adaLN(time)
    padded = got["context_refiner.0"].shape[1]
    cos, sin = network.rotary_table(latent.shape[-2], latent.shape[-1], padded).squeeze(2).unbind(1)
    got["rope"] = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))[None, None]
    for name, want in tensors.items():
        if name in ("x", "ctx", "sigma"):
            continue
        outcome = case.outcome(name)
        if name not in got:
            outcome.require(False, "no such place in the network")
        else:
            if name == "final_layer":  # ours is taken of the image's tokens alone
                want = want[:, padded : padded + got[name].shape[1]]
            if name == "cap_embedder":  # ours embeds the padding too, and replaces it afterwards
                got[name] = got[name][:, : want.shape[1]]
            outcome.compare(name, got[name], want, *case.limits())
        yield outcome


def check_text_encoder(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """Features, masks, hidden states, and the tokenizer's ids."""
    tensors = case.tensors()
    encoder = store.text_encoder(case.facts["weights"])
    pad = re.search(r"pad token id (\d+)", str(case.facts.get("pad", "")))
    for key in sorted({name.split("/")[0] for name in tensors}):
        outcome = case.outcome(key)
        ids = tensors[f"{key}/ids"].reshape(1, -1)
        mask = torch.ones_like(ids)
        if key.startswith("pad") and pad:
            mask = torch.tensor([attention_mask(ids[0].tolist(), int(pad[1]))])
        if f"{key}/mask" in tensors:
            outcome.compare("mask", mask, tensors[f"{key}/mask"], 0, 0)
        hidden: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _m, _i, out, states=hidden: states.append(out))
            for layer in encoder.layers
        ]
        cond = encoder.encode(ids, None if bool(mask.all()) else mask)
        for hook in hooks:
            hook.remove()
        if f"{key}/cond" in tensors:
            outcome.compare("cond", cond, tensors[f"{key}/cond"], *case.limits())
        if f"{key}/all_hidden" in tensors:
            # The last recorded state comes from the last layer, which is never loaded.
            table = encoder.native_tensors()["model.embed_tokens.weight"]
            embedded = table[ids.to(store.device)]
            states = torch.stack([embedded, *hidden], dim=1)
            want = tensors[f"{key}/all_hidden"][:, : states.shape[1]]
            outcome.compare("all_hidden", states, want, *case.limits())
        yield outcome
    yield _check_ids(case, tokenizer)


def _check_ids(case: Case, tokenizer: Path | None) -> Outcome:
    outcome = case.outcome("tokenizer")
    if tokenizer is None:
        outcome.note = "skipped: no tokenizer folder beside the cases; name one with --tokenizer"
        outcome.skipped = True
        return outcome
    words = Tokenizer.from_path(tokenizer)
    for entry in case.facts.get("tokenizer", []):
        got, want = words.encode_prompt(entry["text"]), entry["ids"][0]
        outcome.compare(repr(entry["text"]), torch.tensor(got), torch.tensor(want), 0, 0)
    return outcome


def check_vae(case: Case, store: ModelStore, tokenizer: Path | None) -> Iterator[Outcome]:
    """Decoding and encoding."""
    tensors = {key: value.to(store.device) for key, value in case.tensors().items()}
    autoencoder = store.autoencoder(case.facts["weights"])
    for key in case.facts["cases"]:
        outcome = case.outcome(key)
        latent, image = tensors[f"{key}/latent"], tensors[f"{key}/image"]
        if key.startswith("dec"):
            got, want = to_pixels(autoencoder.decode(latent)), image
        else:
            got, want = autoencoder.encode(image), latent
        outcome.compare(key, got, want.cpu(), *case.limits())
        yield outcome
