"""``python -m bench.network``: one network call and a whole picture beside diffusers, same weights.

Both sides run in one process, alternating, so that a busy machine slows both. A number is printed
only after the sides' outputs were found to agree. Weights are random: speed does not depend on
their values. Compiling is not timed. EasyCache, which leaves out network calls, is timed as a side
of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import describe_machine
from turbo.acceleration import Accelerator, SpeedUps
from turbo.autoencoder import Autoencoder, AutoencoderConfig, to_pixels
from turbo.latent import from_sampler, resize, start_latent, to_sampler
from turbo.names import AUTOENCODER, NETWORK, diffusers_names, is_plain_matrix
from turbo.pipeline import (
    Drawing,
    Models,
    PreparedStage,
    StageNoise,
    draw_noise,
    prepare_stage,
    refine,
    run_stages,
)
from turbo.plan import DEFAULT_PLAN
from turbo.precision import arithmetic_dtype
from turbo.samplers import SAMPLERS
from turbo.testing import TINY_AUTOENCODER, autoencoder_shapes, initialise, zimage_shapes
from turbo.transformer import Transformer, TransformerConfig

CAPTION_TOKENS, NEGATIVE_TOKENS, CAPTION_DIM = 40, 40, 64
NETWORK_CONFIG = {
    "dim": 512,
    "n_layers": 8,
    "n_refiner_layers": 2,
    "n_heads": 8,
    "cap_feat_dim": CAPTION_DIM,
    "ffn_hidden": 1365,  # diffusers fixes it at 8/3 of the width
    "time_hidden": 1024,
}
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Between the two sides' outputs, relative to the largest value. bfloat16 has three digits, and the
two sides round in different places; turbo's distance to float32 is what the tests bound."""


class Rivals:
    """The same weights in our modules and in diffusers'."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        network = initialise(zimage_shapes(NETWORK_CONFIG), seed=1)
        picture = initialise(autoencoder_shapes(TINY_AUTOENCODER), seed=2)
        self.transformer = _ours(
            Transformer,
            TransformerConfig,
            network,
            dtype,
            compute_dtype=arithmetic_dtype(dtype, "cpu"),
        )
        self.autoencoder = _ours(Autoencoder, AutoencoderConfig, picture, dtype)
        self.models = Models(
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            self.transformer,
            self.autoencoder,
            self.transformer,
        )
        self.fast = replace(self.models)
        speed_ups = SpeedUps(compile=True, capture="replay", strict=True)
        Accelerator(self.fast, speed_ups).install(self.fast)
        self.their_network = _their_network(network, dtype)
        self.their_autoencoder = _their_autoencoder(picture, dtype)
        generator = torch.Generator().manual_seed(0)
        self.positive = torch.randn(1, CAPTION_TOKENS, CAPTION_DIM, generator=generator)
        self.negative = torch.randn(1, NEGATIVE_TOKENS, CAPTION_DIM, generator=generator)

    def forward(self, prepared: PreparedStage) -> dict[str, Callable[[], Tensor]]:
        """One network call at a stage's size, by side."""
        generator = torch.Generator().manual_seed(1)
        latent = torch.randn(1, 16, *prepared.latent_size, generator=generator).to(self.dtype)
        sigma = prepared.trace.evaluations[0]
        caption = self.transformer.refine_caption(self.positive)
        rotary = prepared.rotary_for(self.transformer, caption.shape[1])
        modulation = self.transformer.modulation_table([sigma])[0]

        inputs = latent, caption, modulation, rotary
        return {
            "turbo": lambda: self.models.network(*inputs),
            "turbo, compiled": lambda: self.fast.network(*inputs),
            "diffusers": lambda: self.their_velocity(latent, sigma, [self.positive]),
        }

    def their_velocity(self, latent: Tensor, sigma: float, captions: Sequence[Tensor]) -> Tensor:
        """diffusers' network, its sign turned to ours."""
        rows = [row.unsqueeze(1) for row in latent.to(self.dtype)]
        time_ = torch.full((len(rows),), 1 - sigma)
        features = [caption[0].to(self.dtype) for caption in captions]
        outputs = self.their_network(rows, time_, features, return_dict=False)[0]
        return -torch.stack([output.squeeze(1) for output in outputs])

    def our_picture(self, models: Models, stages: Sequence[PreparedStage]) -> Tensor:
        """Three stages and the decoder, from caption features, as the engine does it."""
        positive, negative = (refine(models, c) for c in (self.positive, self.negative))
        drawing = Drawing(positive=positive, negative=negative, noise=_noise)
        *_, last = run_stages(models, stages, drawing)
        return to_pixels(self.autoencoder.decode(last.latent))

    def warm_up(self, stages: Sequence[PreparedStage]) -> None:
        """Compile whatever a picture needs, by one step of each stage."""
        once = {"node": "custom", "scheduler": "simple", "steps": 1, "denoise": 1.0}
        steps = [replace(ready.stage, **once) for ready in stages]  # type: ignore[arg-type]
        self.our_picture(self.fast, [prepare_stage(self.transformer, step) for step in steps])

    def their_picture(self, stages: Sequence[PreparedStage]) -> Tensor:
        """The same schedules and noise around diffusers' network and autoencoder."""
        latent: Tensor | None = None
        for prepared in stages:
            stage = prepared.stage
            noise = _noise(prepared)
            draws = iter(noise.steps)
            guided = stage.cfg != 1

            def denoise(
                x: Tensor, sigma: float, guided: bool = guided, cfg: float = stage.cfg
            ) -> Tensor:
                if not guided:
                    return x - sigma * self.their_velocity(x, sigma, [self.positive]).float()
                both = torch.cat([x, x])
                velocity = self.their_velocity(both, sigma, [self.negative, self.positive]).float()
                negative, positive = (both - sigma * velocity).chunk(2)
                return negative + (positive - negative) * cfg

            start = None
            if latent is not None:
                start = to_sampler(resize(latent, *prepared.latent_size, stage.upscale))
            latent = from_sampler(
                SAMPLERS[stage.sampler].sample(
                    denoise,
                    start_latent(start, noise.start, prepared.sigmas[0]),
                    prepared.followed,
                    lambda sigma, sigma_next, draws=draws: next(draws),  # type: ignore[misc]
                )
            )
        assert latent is not None
        raw = self.their_autoencoder.decode(latent.to(self.dtype), return_dict=False)[0]
        return to_pixels(raw)


def measure(dtype: torch.dtype, rounds: int, pictures: int) -> dict[str, Any]:
    """Check, then time, forwards at the three stage sizes and whole pictures.

    What our side has ready beforehand: rotary tables, modulation tables and, for the forwards, the
    refined caption. diffusers makes them in each call. The picture includes our refining.
    """
    rivals = Rivals(dtype)
    cached = [prepare_stage(rivals.transformer, stage) for stage in DEFAULT_PLAN.stages]
    stages = [replace(ready, stage=replace(ready.stage, easycache=None)) for ready in cached]
    results: dict[str, Any] = {"forward": {}, "picture": {}}
    for prepared in stages:
        sides = rivals.forward(prepared)
        differences = _differences(f"forward {prepared.stage.name}", sides, dtype)
        timed = _alternate(sides, rounds)
        results["forward"][prepared.stage.name] = timed | {"difference": differences}
        _print(f"{_name(dtype)} forward {prepared.stage.name}", timed)
    if pictures:
        exact: dict[str, Callable[[], Tensor]] = {
            "turbo": lambda: rivals.our_picture(rivals.models, stages),
            "turbo, compiled": lambda: rivals.our_picture(rivals.fast, stages),
            "diffusers": lambda: rivals.their_picture(stages),
        }
        approximate: dict[str, Callable[[], Tensor]] = {
            "turbo, EasyCache": lambda: rivals.our_picture(rivals.models, cached),
            "turbo, compiled, EasyCache": lambda: rivals.our_picture(rivals.fast, cached),
        }
        rivals.warm_up(stages)
        # A check of whole pictures takes as long as a round, so the last round is checked.
        timed, outputs = _alternate_keeping(exact | approximate, pictures)
        results["picture"] = timed | {
            "difference": {
                name: _require_equal(f"picture, {name}", outputs[name], outputs["diffusers"], dtype)
                for name in exact
                if name != "diffusers"
            }
        }
        _print(f"{_name(dtype)} picture", timed)
    return results


def _noise(prepared: PreparedStage) -> StageNoise:
    return draw_noise(prepared, prepared.stage.seed_offset, torch.device("cpu"))


def _alternate(sides: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, Any]:
    """Time the sides in turn; the check before it was their warm-up."""
    return _alternate_keeping(sides, rounds)[0]


def _alternate_keeping(
    sides: dict[str, Callable[[], Tensor]], rounds: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Time the sides in turn, and give their last outputs."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    outputs: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            outputs[name] = run()
            seconds[name].append(time.perf_counter() - start)
    timed: dict[str, Any] = {
        name: {"median_s": statistics.median(values), "all_s": values}
        for name, values in seconds.items()
    }
    timed["ratio"] = {
        name: statistics.median(a / b for a, b in zip(values, seconds["diffusers"], strict=True))
        for name, values in seconds.items()
        if name != "diffusers"
    }
    return timed, outputs


def _differences(
    what: str, sides: dict[str, Callable[[], Tensor]], dtype: torch.dtype
) -> dict[str, float]:
    theirs = sides["diffusers"]()
    return {
        name: _require_equal(f"{what}, {name}", run(), theirs, dtype)
        for name, run in sides.items()
        if name != "diffusers"
    }


def _require_equal(what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    """The largest difference relative to the largest value; ends the run if it is too large."""
    difference = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    allowed = LARGEST_DIFFERENCE[dtype]
    if not difference <= allowed:
        raise SystemExit(f"{what}: the two sides differ by {difference:.3g}, allowed {allowed}")
    return difference


def _print(what: str, timed: dict[str, Any]) -> None:
    sides = [name for name in timed if isinstance(timed[name], dict) and "median_s" in timed[name]]
    medians = ", ".join(f"{name} {timed[name]['median_s']:.4g} s" for name in sides)
    ratios = ", ".join(f"{name} / diffusers {r:.3f}" for name, r in timed["ratio"].items())
    print(f"{what}: {medians}; {ratios}", flush=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ours(
    module_type: Any, config_type: Any, values: dict[str, Tensor], dtype: Any, **options: Any
) -> Any:
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    module = module_type(config_type.from_shapes(shapes), "cpu", dtype, **options)
    for name, tensor in module.native_tensors().items():
        tensor.copy_(values[name])
    return module


def _their_network(values: dict[str, Tensor], dtype: torch.dtype) -> Any:
    from diffusers import ZImageTransformer2DModel

    network = ZImageTransformer2DModel(
        in_channels=16,
        dim=NETWORK_CONFIG["dim"],
        n_layers=NETWORK_CONFIG["n_layers"],
        n_refiner_layers=NETWORK_CONFIG["n_refiner_layers"],
        n_heads=NETWORK_CONFIG["n_heads"],
        n_kv_heads=NETWORK_CONFIG["n_heads"],
        cap_feat_dim=CAPTION_DIM,
        axes_dims=[16, 24, 24],
    )
    state: dict[str, Tensor] = {}
    for name, parts in diffusers_names(NETWORK, values).items():
        state |= dict(zip(parts, values[name].chunk(len(parts)), strict=True))
    network.load_state_dict(state)
    return network.to(dtype).eval()


def _their_autoencoder(values: dict[str, Tensor], dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    channels = [TINY_AUTOENCODER["ch"] * factor for factor in TINY_AUTOENCODER["ch_mult"]]
    autoencoder = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        layers_per_block=TINY_AUTOENCODER["num_res_blocks"],
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    names = diffusers_names(AUTOENCODER, values)
    state: dict[str, Tensor] = {}
    for name, (theirs,) in names.items():
        state[theirs] = values[name].flatten(1) if is_plain_matrix(name) else values[name]
    autoencoder.load_state_dict(state)
    return autoencoder.to(dtype).eval()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.network", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="forwards a side (default: 9)")
    parser.add_argument("--pictures", type=int, default=3, help="pictures a side (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("-o", "--output", type=Path, help="write a JSON results file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"machine": describe_machine(), "network": NETWORK_CONFIG}
    with torch.inference_mode():
        for name in options.dtypes.split(","):
            dtype = getattr(torch, name)
            results[name] = measure(dtype, options.rounds, options.pictures)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
