"""Pictures made with an option against those of the exact run, and how far they lie apart."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bench.picture_grid import WIDTH, Cell, Row
from bench.pictures import (
    compare_latents,
    compare_pictures,
    save_picture,
    shown,
    shown_difference,
    summary_of_values,
)
from bench.results import Found, Results
from bench.side import SideError
from bench.timing import Span, ratio, synchronise
from turbo import pipeline
from turbo.acceleration import MOST_CAPTURED_TOKENS, USUAL_BUCKETS
from turbo.engine import VAE_TILE, Engine
from turbo.errors import NonFiniteLatentError
from turbo.messages import one_line
from turbo.noise import MAX_SEED
from turbo.plan import Plan
from turbo.transformer import padded_length

EXACT = {"compile": False, "capture": "eager", "kernels": False}
"""How `Engine.from_pretrained` makes the exact engine."""
ANOTHER_SEED = "another seed"


Judge = Callable[[int, Image.Image], Mapping[str, bool]]
"""Number of a prompt and its picture -> what of it is as the prompt says."""


class FailedCheckError(SideError):
    """The exact run is not repeatable, so there is nothing to measure by."""


def without_easycache(plan: Plan) -> Plan:
    """The plan with every network call made."""
    return replace(plan, stages=tuple(replace(stage, easycache=None) for stage in plan.stages))


def with_easycache(factor: float = 1.0) -> Callable[[Plan], Plan]:
    """What gives the plan with the thresholds of its EasyCache multiplied."""

    def scale(plan: Plan) -> Plan:
        stages = (
            stage
            if (cache := stage.easycache) is None
            else replace(stage, easycache=replace(cache, threshold=cache.threshold * factor))
            for stage in plan.stages
        )
        return replace(plan, stages=tuple(stages))

    return scale


def without_middle_stages(plan: Plan) -> Plan:
    """The first stage and the last."""
    return without_easycache(replace(plan, stages=(plan.stages[0], *plan.stages[1:][-1:])))


def last_stage_alone(plan: Plan) -> Plan:
    """The last stage from pure noise, with the guidance of the first."""
    last = replace(plan.stages[-1], denoise=1.0, cfg=plan.stages[0].cfg)
    return without_easycache(replace(plan, stages=(last,)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to make a picture that is not the exact one."""

    name: str
    switch: str
    """How a user has it."""
    plan: Callable[[Plan], Plan] = without_easycache
    """Makes its plan from the one that was given."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `Engine.from_pretrained` in which its engine differs from the exact one; without
    any it runs on the exact engine."""
    approximate: bool = True
    """Whether the picture may differ by more than rounding."""

    def differs(self, plan: Plan, dtype: str) -> bool:
        """Whether it is anything but the exact run with this plan and dtype."""
        exact = {**EXACT, "dtype": dtype}
        return self.plan(plan) != without_easycache(plan) or any(
            exact.get(name) != value for name, value in self.engine.items()
        )


OPTIONS = (
    Option(name="easycache", switch="easycache in the plan", plan=with_easycache()),
    Option(name="easycache x0.5", switch="thresholds x 0.5", plan=with_easycache(0.5)),
    Option(name="easycache x2", switch="thresholds x 2", plan=with_easycache(2)),
    Option(
        name="no middle stage", switch="stages left out of the plan", plan=without_middle_stages
    ),
    Option(name="last stage alone", switch="one stage in the plan", plan=last_stage_alone),
    Option(name="bfloat16", switch="--dtype bfloat16", engine={"dtype": "bfloat16"}),
    Option(name="float16", switch="--dtype float16", engine={"dtype": "float16"}),
    Option(name="fp8", switch="--quantize fp8", engine={"quantize": "fp8"}),
    Option(name="int8", switch="--quantize int8", engine={"quantize": "int8"}),
    Option(
        name="int8-weight-only",
        switch="--quantize int8-weight-only",
        engine={"quantize": "int8-weight-only"},
    ),
    Option(
        name="compile",
        switch="--compile on",
        engine={"compile": True, "capture": "auto"},
        approximate=False,
    ),
)


@dataclass(frozen=True, slots=True)
class Painting:
    """A picture with all its stages."""

    pictures: Mapping[str, Image.Image]
    latents: Mapping[str, Tensor]
    seconds: Mapping[str, float]
    """Each stage by its name, and `decode` of the last stage alone."""
    skips: Mapping[str, tuple[int, int]]

    @property
    def total_s(self) -> float:
        """All stages and the last decode: what an option can change, whichever it is."""
        return sum(self.seconds.values())

    def same_as(self, other: Painting) -> bool:
        """Whether all stages are equal bit for bit."""
        return all(
            torch.equal(latent, other.latents[name])
            and self.pictures[name].tobytes() == other.pictures[name].tobytes()
            for name, latent in self.latents.items()
        )


class Painter:
    """An engine whose every stage's latent is looked at as it is decoded."""

    def __init__(self, engine: Engine, prompts: Sequence[str]) -> None:
        self._engine = engine
        self._decoded: list[tuple[Tensor, Span]] = []
        self._warm_up(prompts)
        models = engine.models
        # The engine tiles only what no stand-in decodes.
        tiles = engine.plan.performance.enable_vae_tiling
        plain = functools.partial(
            pipeline.decode, models.autoencoder, tile=VAE_TILE if tiles else None
        )
        self._decode = plain if tiles or models.decode is None else models.decode
        models.decode = self._watched

    @property
    def device(self) -> torch.device:
        return self._engine.models.device

    def settings(self) -> Found:
        """What it runs with."""
        models, speed_ups = self._engine.models, asdict(self._engine.accelerator.speed_ups)
        arithmetic = models.transformer.compute_dtype or models.dtype
        return {
            "dtype": dtype_name(models.dtype),
            "arithmetic": dtype_name(arithmetic),
            "quantize": models.transformer.quantize,
            **{name: speed_ups[name] for name in EXACT},
        }

    def paint(self, plan: Plan, prompt: str, seed: int) -> Painting:
        """Make a picture and keep its stages."""
        self._decoded.clear()
        whole = replace(plan, performance=replace(plan.performance, enable_vae_tiling=False))
        result = self._engine.generate(prompt, seed=seed, plan=whole, keep_stages=True)
        synchronise(self._engine.models.device)
        names = [stage.name for stage in plan.stages]
        _, last_decode = self._decoded[-1]
        return Painting(
            pictures=result.stage_images[0],
            latents={name: latent.cpu() for name, (latent, _) in zip(names, self._decoded)},
            seconds={name: result.timings[name] for name in names}
            | {"decode": last_decode.ms() / 1000},
            skips=result.skips,
        )

    def _warm_up(self, prompts: Sequence[str]) -> None:
        """Compile and capture whatever these prompts will need."""
        encode = self._engine.models.tokenizer.encode_prompt
        buckets = sorted({padded_length(len(encode(text))) for text in ["", *prompts]})
        usual = [bucket for bucket in buckets if bucket <= MOST_CAPTURED_TOKENS]
        # A picture tells where it is not finite, a warm-up does not.
        with contextlib.suppress(NonFiniteLatentError):
            self._engine.warmup(buckets=usual or USUAL_BUCKETS)

    def _watched(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        span = Span(latent.device)
        span.begin()
        decoded = self._decode(latent)
        span.end()
        self._decoded.append((latent, span))
        return decoded


def dtype_name(dtype: torch.dtype) -> str:
    """As the command line takes it."""
    return str(dtype).removeprefix("torch.")


# The comparison.


class Study:
    """Runs prompts through the exact engine and all options, and fills a results file.

    In memory are the exact engine and at most one other: all prompts go through one option's
    engine, each beside the exact run of the same prompt, before the next engine is loaded.

    Args:
        plan: As it was given, its stages those that will run.
        options: What to compare.
        prompts: All of them, so that each engine can be made ready.
        seed: Of all pictures.
        exact: Made with `EXACT`.
        make_engine: Makes one with other arguments of `Engine.from_pretrained`.
        results: Where figures go.
        folder: Where pictures are saved; None saves none.
        judge: Tells what is right about the picture of a prompt's number; None: nobody judges.
        say: Told what happens, a line at a time.
    """

    def __init__(
        self,
        plan: Plan,
        options: Sequence[Option],
        prompts: Sequence[str],
        seed: int,
        exact: Engine,
        make_engine: Callable[..., Engine],
        results: Results,
        folder: Path | None,
        *,
        judge: Judge | None = None,
        say: Callable[[str], None] = lambda line: print(f"--- {line}", flush=True),
    ) -> None:
        self._plan, self._exact_plan = plan, without_easycache(plan)
        self._options, self._prompts, self._seed = options, prompts, seed
        self._results, self._folder = results, folder
        self._make_engine, self._say, self._judge = make_engine, say, judge
        self._exact = Painter(exact, prompts)
        self._firsts: list[Painting] = []
        self._cells: dict[tuple[int, str], Cell] = {}
        self._found: dict[str, Found] = {option.name: self._describe(option) for option in options}
        data = self._results.data
        data["exact"] = {
            "settings": self._exact.settings(),
            "check": {"repeated": 0, "identical": 0},
            "pictures": [],
        }
        data["options"] = self._found
        self._other: Found = {"pictures": []}
        data["another_seed"] = self._other

    @property
    def columns(self) -> list[str]:
        """Headings of the grid."""
        return ["exact", *self._found, ANOTHER_SEED]

    @property
    def rows(self) -> list[Row]:
        """Of the grid: what has been made so far."""
        made = range(len(self._results.data["exact"]["pictures"]))
        return [
            Row(self._prompts[number], [self._cell(number, name) for name in self.columns])
            for number in made
        ]

    def run(self) -> Iterator[None]:
        """Do all prompts, engine by engine; stops after each prompt, when the file is written.

        Raises:
            FailedCheckError: The exact run gave another picture the second time.
            TurboError: The exact run failed.
        """
        shared = [option for option in self._options if not option.engine]
        for option in shared:
            self._found[option.name]["settings"] |= self._exact.settings()
        for number in range(len(self._prompts)):
            self._announce("the exact run", number)
            self._run_exact(number, shared)
            self._results.write()
            yield
        for option in self._options:
            if option.engine:
                yield from self._run_engine(option)

    def _run_exact(self, number: int, options: Sequence[Option]) -> None:
        """A prompt through the exact engine: exact, the options that run on it, exact again."""
        prompt = self._prompts[number]
        first = self._paint_exact(prompt, self._seed)
        turn = number % max(1, len(options))  # each prompt begins with another option
        paintings = {
            option.name: painting
            for option in [*options[turn:], *options[:turn]]
            if (painting := self._paint(option, self._exact, prompt)) is not None
        }
        other = self._paint_exact(prompt, (self._seed + 1) % (MAX_SEED + 1))
        again = self._paint_exact(prompt, self._seed)
        self._require_same(first, again, prompt)
        exact_s = (first.total_s + again.total_s) / 2
        self._firsts.append(first)
        self._keep_exact(number, first, other, exact_s)
        for option in options:
            if option.name in paintings:
                self._keep(option, number, paintings[option.name], exact_s)

    def _run_engine(self, option: Option) -> Iterator[None]:
        """All prompts through an option's own engine, which is gone afterwards."""
        painter = self._make_painter(option)
        for number, prompt in enumerate(self._prompts):
            if painter is None or "withheld" in self._found[option.name]:
                break
            self._announce(option.name, number)
            # Which of the two comes first changes, so that a drift of the clock is no one's.
            beside = self._paint_exact(prompt, self._seed) if number % 2 == 0 else None
            painting = self._paint(option, painter, prompt)
            beside = beside or self._paint_exact(prompt, self._seed)
            self._require_same(self._firsts[number], beside, prompt)
            if painting is not None:
                self._keep(option, number, painting, beside.total_s)
            self._results.write()
            yield
        del painter
        _give_back(self._exact.device)

    def _make_painter(self, option: Option) -> Painter | None:
        """Load an option's engine, while nothing is timed."""
        self._say(f"loading and warming up: {option.name}")
        painter: Painter | None = None
        with self._withheld_if_it_fails(option):
            arguments = {**EXACT, **option.engine, "strict_speed": True}
            painter = Painter(self._make_engine(**arguments), self._prompts)
            self._found[option.name]["settings"] |= painter.settings()
        return painter

    def _paint(self, option: Option, painter: Painter, prompt: str) -> Painting | None:
        """An option's picture; None if it is withheld, now or since an earlier prompt."""
        painting: Painting | None = None
        if "withheld" not in self._found[option.name]:
            with self._withheld_if_it_fails(option):
                painting = painter.paint(option.plan(self._plan), prompt, self._seed)
        return painting

    def _announce(self, what: str, number: int) -> None:
        prompt = one_line(self._prompts[number])
        self._say(f"{what}, prompt {number + 1} of {len(self._prompts)}: {prompt}")

    def withhold(self, why: str) -> None:
        """Take every figure back."""
        for option in self._options:
            self._withhold(option, why)
        self._other.clear()
        self._other["withheld"] = why

    def _describe(self, option: Option) -> Found:
        plan = option.plan(self._plan)
        caches = {stage.name: asdict(stage.easycache) for stage in plan.stages if stage.easycache}
        return {
            "approximate": option.approximate,
            "settings": {"switch": option.switch, "easycache": caches},
        }

    def _paint_exact(self, prompt: str, seed: int) -> Painting:
        return self._exact.paint(self._exact_plan, prompt, seed)

    @contextlib.contextmanager
    def _withheld_if_it_fails(self, option: Option) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._withhold(option, f"{type(error).__name__}: {one_line(error)}")

    def _withhold(self, option: Option, why: str) -> None:
        described = self._found[option.name]
        kept = {name: described[name] for name in ("approximate", "settings")}
        described.clear()
        described |= {**kept, "withheld": why}

    def _require_same(self, first: Painting, again: Painting, prompt: str) -> None:
        check = self._results.data["exact"]["check"]
        check["repeated"] += 1
        if first.same_as(again):
            check["identical"] += 1
            return
        apart = {
            name: compare_pictures(again.pictures[name], picture)["largest"]
            for name, picture in first.pictures.items()
        }
        shown_apart = ", ".join(f"{name} {largest} of 255" for name, largest in apart.items())
        raise FailedCheckError(
            f"the exact run of {prompt!r}, repeated, gave another picture ({shown_apart} at the "
            "most), so nothing can be measured by it"
        )

    def _compare(self, ours: Painting, theirs: Painting) -> Found:
        """Every stage that both have: an option may leave some out."""
        return {
            name: {
                **compare_pictures(picture, theirs.pictures[name]),
                "latent_l2": compare_latents(ours.latents[name], theirs.latents[name]),
            }
            for name, picture in ours.pictures.items()
        }

    def _keep_exact(self, number: int, exact: Painting, other: Painting, exact_s: float) -> None:
        made = self._results.data["exact"]
        made["pictures"].append(
            {"prompt": number, **self._judged(exact, number), **self._save(exact, number, "exact")}
        )
        _summarise_verdicts(made)
        pictures = self._other["pictures"]
        pictures.append(
            {
                "prompt": number,
                "seconds": other.total_s,
                "exact_seconds": exact_s,
                "stages": self._compare(other, exact),
                **self._judged(other, number),
                **self._save(other, number, ANOTHER_SEED),
            }
        )
        last = self._plan.stages[-1].name
        reference, distances = exact.pictures[last], pictures[-1]["stages"][last]
        self._cells[number, "exact"] = Cell(shown(reference, WIDTH))
        self._cells[number, ANOTHER_SEED] = _cell(other.pictures[last], reference, distances)
        self._other["time_ratio"] = _time_ratio(pictures)  # 1 but for what disturbs the clock
        self._other["stages"] = _summary_of_stages(pictures)
        _summarise_verdicts(self._other)

    def _keep(self, option: Option, number: int, painting: Painting, exact_s: float) -> None:
        with self._withheld_if_it_fails(option):
            self._keep_figures(option, number, painting, exact_s)

    def _keep_figures(
        self, option: Option, number: int, painting: Painting, exact_s: float
    ) -> None:
        exact, yardstick = self._firsts[number], self._other["pictures"][number]["stages"]
        described, stages = self._found[option.name], self._compare(painting, exact)
        for name, distances in stages.items():
            distances["of_another_seed"] = _shares(distances, yardstick[name])
        pictures = described.setdefault("pictures", [])
        pictures.append(
            {
                "prompt": number,
                "seconds": painting.total_s,
                "exact_seconds": exact_s,
                "skips": {name: list(counts) for name, counts in painting.skips.items()},
                "stages": stages,
                **self._judged(painting, number),
                **self._save(painting, number, option.name),
            }
        )
        described["time_ratio"] = _time_ratio(pictures)
        described["skips"] = {
            name: [sum(one["skips"][name][place] for one in pictures) for place in (0, 1)]
            for name in painting.skips
        }
        described["stages"] = _summary_of_stages(pictures)
        _summarise_verdicts(described)
        last = self._plan.stages[-1].name
        cell = _cell(painting.pictures[last], exact.pictures[last], stages[last])
        self._cells[number, option.name] = cell

    def _judged(self, painting: Painting, number: int) -> dict[str, dict[str, bool]]:
        if self._judge is None:
            return {}
        last = self._plan.stages[-1].name
        return {"judged": dict(self._judge(number, painting.pictures[last]))}

    def _save(self, painting: Painting, number: int, name: str) -> dict[str, str]:
        if self._folder is None:
            return {}
        last = self._plan.stages[-1].name
        return save_picture(painting.pictures[last], self._folder, f"{number:03} {name}")

    def _cell(self, number: int, column: str) -> Cell:
        withheld = self._found.get(column, {}).get("withheld")
        if withheld is not None:
            return Cell(None, note=f"withheld: {withheld}")
        return self._cells.get((number, column), Cell(None, note="not made"))


def _summarise_verdicts(described: Found) -> None:
    """Share of the pictures of which each thing is right, if they were judged."""
    verdicts = [one["judged"] for one in described["pictures"] if "judged" in one]
    if verdicts:
        described["judged"] = {
            name: sum(verdict[name] for verdict in verdicts) / len(verdicts) for name in verdicts[0]
        }


def _give_back(device: torch.device) -> None:
    """Have the memory of what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _cell(picture: Image.Image, reference: Image.Image, distances: Found) -> Cell:
    psnr = "identical" if distances["identical"] else f"{distances['psnr_db']:.1f} dB"
    note = f"{psnr}, SSIM {distances['ssim']:.3f}"
    return Cell(shown(picture, WIDTH), shown_difference(picture, reference, WIDTH), note)


def _shares(ours: Found, other: Found) -> dict[str, float | None]:
    """How far a picture lies on the way from the exact one, 0, to another seed's, 1."""
    return {
        "rmse": _share(_rmse(ours["psnr_db"]), _rmse(other["psnr_db"])),
        "ssim": _share(1 - ours["ssim"], 1 - other["ssim"]),
        "latent_l2": _share(ours["latent_l2"], other["latent_l2"]),
    }


def _share(ours: float, other: float) -> float | None:
    return ours / other if other else 0.0 if ours == 0 else None


def _rmse(psnr_db: float | None) -> float:
    return 0.0 if psnr_db is None else float(255 / 10 ** (psnr_db / 20))


def _time_ratio(pictures: Sequence[Found]) -> Found:
    return ratio([one["seconds"] for one in pictures], [one["exact_seconds"] for one in pictures])


def _summary_of_stages(pictures: Sequence[Found]) -> Found:
    """For each stage the median and spread of every distance over the prompts."""
    first = pictures[0]["stages"]
    summary: Found = {}
    for stage, distances in first.items():
        entries = [picture["stages"][stage] for picture in pictures]
        measures = [name for name in ("psnr_db", "ssim", "flip", "latent_l2") if name in distances]
        summary[stage] = {
            name: summary_of_values([entry[name] for entry in entries]) for name in measures
        }
        summary[stage]["identical"] = sum(entry["identical"] for entry in entries)
        if "of_another_seed" in distances:
            summary[stage]["of_another_seed"] = {
                name: summary_of_values([entry["of_another_seed"][name] for entry in entries])
                for name in distances["of_another_seed"]
            }
    return summary
