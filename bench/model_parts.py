"""The parts of ``bench device`` that measure the model: each stage, prompt, decoder, pictures."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import arithmetic
from bench.random_model import PROMPT_TOKENS
from bench.results import Found, recorded
from bench.setting import (
    FP8,
    UNCAPTURED,
    VARIANTS,
    Judge,
    Setting,
    Variant,
    distance,
    require_near,
)
from bench.timing import Meter, summarise, synchronise, time_runs
from turbo import pipeline
from turbo.denoiser import is_unguided
from turbo.engine import Result
from turbo.latent import STRIDE
from turbo.plan import Plan, Stage

SEED = 7
PICTURE_FLOOR = 0.02
"""Relative distance always allowed between 8-bit pictures: one level of rounding here and there."""
PROFILED_KERNELS = 15


class NetworkCall:
    """One network call of a stage, with guidance both captions in one batch."""

    def __init__(self, setting: Setting, stage: Stage) -> None:
        network = setting.model.models.transformer
        config = network.config
        self.latent_size = stage.height // STRIDE, stage.width // STRIDE
        self.batch = 1 if is_unguided(stage.cfg) else 2
        features = setting.draw(self.batch, PROMPT_TOKENS, config.caption_dim, seed=1)
        self.caption = network.refine_caption(features)
        prepared = pipeline.prepare_stage(network, stage)
        self.modulation = prepared.modulation.rows[len(prepared.modulation.rows) // 2]
        self.rotary = prepared.rotary_for(network, self.caption.shape[1])
        shape = (self.batch, config.channels, *self.latent_size)
        self.first, self.second = (setting.draw(*shape, seed=seed) for seed in (2, 3))
        self.operations = arithmetic.network_call(
            config, self.latent_size, self.caption.shape[1], self.batch
        )

    def run(self, network: Callable[..., Tensor], latent: Tensor) -> Tensor:
        return network(latent, self.caption, self.modulation, self.rotary)


@torch.inference_mode()
def network(setting: Setting, found: Found, seconds: float) -> None:
    """A network call's time at each stage, in every variant."""
    begin = time.perf_counter()
    weights = setting.model.models.transformer.parameters()
    found["parameters"] = sum(weight.numel() for weight in weights)
    synchronise(setting.device)
    found["weights_s"] = time.perf_counter() - begin
    for stage in reversed(setting.stages):  # the longest first: it matters most
        call = NetworkCall(setting, stage)
        entry = found[stage.name] = {
            "latent": list(call.latent_size),
            "batch": call.batch,
            "tokens": call.rotary.shape[0],
        }
        may_compile = not setting.small or stage is setting.stages[-1]
        _network_variants(setting, entry, call, VARIANTS if may_compile else VARIANTS[:2])


def _network_variants(
    setting: Setting, found: Found, call: NetworkCall, variants: Sequence[str]
) -> None:
    plain = setting.model.models.transformer
    with setting.in_float32():
        reference = call.run(plain, call.second.float())
    results = {"eager": call.run(plain, call.second)}
    judge = Judge(reference, results["eager"])

    def measure(variant: str, numbers: Found) -> None:
        run = setting.side(variant).models.network
        # Other values than the check's: what a capture keeps of them would show.
        numbers["first_call_s"] = _first_call(setting, lambda: call.run(run, call.first))
        results[variant] = call.run(run, call.second).clone()
        numbers |= judge.check(results[variant], results.get(UNCAPTURED.get(variant, "")))
        timed = time_runs(
            lambda: call.run(run, call.second), setting.device, seconds=setting.seconds
        )
        numbers |= timed | setting.share(call.operations, timed)

    for variant in variants:
        with recorded(found, variant) as numbers:
            measure(variant, numbers)


@torch.inference_mode()
def prompt(setting: Setting, found: Found, seconds: float) -> None:
    """From a prompt's ids to its refined caption, and the two halves of that way."""
    model = setting.model
    ids = model.models.tokenizer.encode_prompt(model.prompt("q"))
    counts = {
        "encoder": arithmetic.text_encoder(model.models.text_encoder.config, PROMPT_TOKENS),
        "refiner": arithmetic.caption_refiner(model.models.transformer.config, PROMPT_TOKENS),
    }
    counts["prompt to caption"] = sum(counts.values())
    features = pipeline.encode_visible(model.models, ids)  # always calculated in float32
    eager = pipeline.refine(model.models, features).tokens
    with setting.in_float32():
        reference = pipeline.refine(model.models, features).tokens
    caption = Judge(reference, eager)
    judges = {
        "encoder": Judge(features, features),
        "refiner": caption,
        "prompt to caption": caption,
    }
    found |= {"tokens": len(ids)} | {name: {} for name in counts}

    def measure(variant: str) -> None:
        models = setting.side(variant).models
        ways: dict[str, Callable[[], Tensor]] = {
            "encoder": lambda: pipeline.encode_visible(models, ids),
            "refiner": lambda: pipeline.refine(models, features).tokens,
            "prompt to caption": lambda: (
                pipeline.refine(models, pipeline.encode_visible(models, ids)).tokens
            ),
        }
        for name, way in ways.items():
            with recorded(found[name], variant) as numbers:
                numbers["first_call_s"] = _first_call(setting, way)
                numbers |= judges[name].check(way())
                timed = time_runs(way, setting.device, seconds=setting.seconds / 2)
                numbers |= timed | setting.share(counts[name], timed)

    for variant in dict.fromkeys(("eager", "captured", setting.fastest)):
        measure(variant)


@torch.inference_mode()
def decode(setting: Setting, found: Found, seconds: float) -> None:
    """The last stage's latent to 8-bit pixels."""
    last = setting.stages[-1]
    autoencoder = setting.model.models.autoencoder
    size = last.height // STRIDE, last.width // STRIDE
    shape = (1, autoencoder.config.latent_channels, *size)
    first, second = (setting.draw(*shape, seed=seed, dtype=torch.float32) for seed in (4, 5))
    exact, _ = pipeline.decode(copy.deepcopy(autoencoder).float(), second)
    judge = Judge(exact, pipeline.decode(autoencoder, second)[0], PICTURE_FLOOR)
    operations = arithmetic.decoder(autoencoder.config, size)
    found["pixels"] = [last.height, last.width]

    def measure(variant: str, numbers: Found) -> None:
        run = _decoder(setting.side(variant))
        numbers["first_call_s"] = _first_call(setting, lambda: run(first))
        numbers |= judge.check(run(second)[0])
        timed = time_runs(lambda: run(second), setting.device, seconds=setting.seconds / 2)
        numbers |= timed | setting.share(operations, timed)

    for variant in dict.fromkeys(("eager", "captured", setting.fastest)):
        with recorded(found, variant) as numbers:
            measure(variant, numbers)


def _first_call(setting: Setting, run: Callable[[], object]) -> float:
    """Seconds of a first call, in which a part is compiled and captured if it is to be."""
    begin = time.perf_counter()
    run()
    synchronise(setting.device)
    return time.perf_counter() - begin


@torch.inference_mode()
def picture(setting: Setting, found: Found, seconds: float) -> None:
    """Whole pictures through `Engine.generate`, without and with the plan's EasyCache."""
    for name, chosen in _plans(setting).items():
        with setting.in_float32():
            exact = Painter(setting, setting.side("eager")).paint(chosen, "q")
        eager = Painter(setting, setting.side("eager")).paint(chosen, "q")
        judge = Judge(_pixels(exact.image), _pixels(eager.image), PICTURE_FLOOR)
        entry = found[name] = {"float32_skipped": exact.skips}
        for variant in (setting.fastest, "eager"):
            with recorded(entry, variant) as numbers:
                painter = Painter(setting, setting.side(variant))
                painter.paint(chosen, "z")  # compiles and captures
                numbers |= judge.check(_pixels(painter.paint(chosen, "q").image))
                numbers |= painter.measure(chosen)


def _plans(setting: Setting) -> dict[str, Plan]:
    plan = setting.size.plan
    bare = tuple(replace(stage, easycache=None) for stage in plan.stages)
    return {"no cache": replace(plan, stages=bare), "EasyCache": plan}


@torch.inference_mode()
def fp8(setting: Setting, found: Found, seconds: float) -> None:
    """The same with the network's large matrices in fp8, an approximation.

    Its picture must lie nearer to the eager one than half the distance of another seed's.
    """
    for name, chosen in _plans(setting).items():
        with recorded(found, name) as numbers:
            plain = Painter(setting, setting.side("eager"))
            exact, other = (_pixels(plain.paint(chosen, "q", s).image) for s in (SEED, SEED + 1))
            painter = Painter(setting, setting.side(f"{FP8}, {setting.fastest}"))
            painter.paint(chosen, "z")  # compiles and captures
            made = _pixels(painter.paint(chosen, "q").image)
            numbers["another_seed_distance"] = far = distance(other, exact)
            numbers["distance"] = require_near(made, exact, far / 2)
            numbers |= painter.measure(chosen)


class Painter:
    """An engine over one side of the model, the time of whose parts is taken."""

    def __init__(self, setting: Setting, side: Variant) -> None:
        self._meter = meter = Meter(setting.device)
        self._model = setting.model
        models = replace(side.models)
        models.network = meter.metered("network", models.network)
        models.encode = meter.metered("text encoder", models.encode or models.text_encoder)
        models.refine = meter.metered("refiner", models.refine or models.transformer.refine_padded)
        models.decode = meter.metered("decoder", _decoder(side))
        self._engine = self._model.engine(models, accelerator=side.accelerator)

    def paint(self, plan: Plan, letter: str, seed: int = SEED) -> Result:
        """A picture of its own prompt and negative prompt: the engine keeps those it knows."""
        return self._engine.generate(
            self._model.prompt(letter),
            negative_prompt=self._model.prompt(letter.upper()),
            seed=seed,
            plan=plan,
        )

    def measure(self, plan: Plan) -> Found:
        """Three pictures; what is not a time of them all is of the one in the middle."""
        self._meter.read_s()
        rounds = [(self.paint(plan, letter), self._meter.read_s()) for letter in "xjk"]
        rounds.sort(key=lambda one: one[0].timings["total"])
        result, parts = rounds[1]
        total = result.timings["total"]
        outside = total - sum(parts.values())
        return summarise([1000 * one.timings["total"] for one, _ in rounds]) | {
            "timings_s": result.timings,
            "parts_s": parts,
            "outside_s": outside,
            "outside_share": outside / total,
            "skipped_of_calls": result.skips,
        }


def _decoder(side: Variant) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    autoencoder = side.models.autoencoder
    return side.models.decode or (lambda latent: pipeline.decode(autoencoder, latent))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy())


@torch.inference_mode()
def profile(setting: Setting, found: Found, seconds: float) -> None:
    """The kernels that the time of one call of the last stage goes to."""
    call = NetworkCall(setting, setting.stages[-1])
    for variant in ("eager", "compiled"):
        with recorded(found, variant) as numbers:
            run = partial(call.run, setting.side(variant).models.network, call.first)
            for _ in range(2):
                run()
            synchronise(setting.device)
            numbers |= _kernels_of(run, setting.device)


def _kernels_of(run: Callable[[], object], device: torch.device) -> Found:
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profiler(activities=activities) as profiled:
        run()
        synchronise(device)
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    spent = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    rows = [
        (row.key, row.count, float(getattr(row, spent)))
        for row in profiled.key_averages()
        if row.device_type == wanted and not getattr(row, "is_user_annotation", False)
    ]
    return _most_expensive(rows)


def _most_expensive(rows: Sequence[tuple[str, int, float]]) -> Found:
    total = sum(microseconds for _, _, microseconds in rows)
    ordered = sorted(rows, key=lambda row: row[2], reverse=True)[:PROFILED_KERNELS]
    return {
        "total_us": total,
        "kernels": [
            {"name": name[:160], "calls": calls, "us": us, "share": us / total}
            for name, calls, us in ordered
        ],
    }
