"""The plan: which stages make a picture, with which numbers. Data only; YAML in and out.

A plan file holds what differs from `DEFAULT_PLAN`, under the keys people already have::

    model: {path: ComfyUI/models, torch_dtype: bfloat16}
    generation:
      stage1: {height: 224, width: 176, steps: 9, cfg: 2.0}
      stage3: {denoise: 0.5, easycache: false}

* A key that is left out takes its value from the default plan's stage of that number. A stage
  beyond the third has no such model: it must give `height`, `width` and `steps`.
* `generation.stages: 2` keeps only the first two stages. Stage numbers have no gaps.
* `easycache: false` (or null) switches the step cache off; a mapping may give a part of it.
* Unknown keys, keys given twice and impossible values are errors that name file and line.

Nothing heavy is imported here, so a mistaken plan is found before PyTorch is.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from turbo.errors import PlanError
from turbo.messages import one_line
from turbo.yaml_file import KeyPath, read_yaml, write_yaml

SAMPLERS: tuple[str, ...] = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpm_2_ancestral",
    "dpmpp_2m",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "lcm",
    "ddim",
    "uni_pc",
    "res_multistep",
    "deis",
)
"""Samplers by the names that ComfyUI gives them."""

SCHEDULERS: tuple[str, ...] = (
    "simple",
    "normal",
    "beta",
    "sgm_uniform",
    "ddim_uniform",
    "karras",
    "exponential",
    "linear_quadratic",
    "kl_optimal",
    "FlowMatchEulerDiscreteScheduler",
    "flowmatch_node",
)
"""Schedules by ComfyUI's names; `flowmatch_node` is the FlowMatchEulerDiscrete sigmas node."""

UPSCALE_METHODS: tuple[str, ...] = ("nearest-exact", "bilinear", "area", "bicubic", "bislerp")
"""How a stage enlarges the latent of the stage before it."""

NODES: tuple[str, ...] = ("ksampler", "custom")
"""Which ComfyUI node runs the stage: KSampler, or SamplerCustom fed by a sigmas node."""

DTYPES: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")
"""Precisions of the weights; `auto` is bfloat16 on a GPU and float32 on a CPU."""

SIZE_MULTIPLE = 16
SIZE_LIMIT = 4096
STEPS_LIMIT = 1000
SCHEDULE_LIMIT = 100_000
"""Most steps of the whole schedule of which a stage with denoise < 1 runs the last part."""
SHIFT_LIMIT = 100.0
STAGES_LIMIT = 16
SEED_LIMIT = 2**64

TAKEN_NAMES: tuple[str, ...] = ("load", "compile", "capture", "prompt", "encode", "decode", "total")
"""What timings, warm-up and memory counts call the other parts of a picture; no stage may."""

QUANTIZE: tuple[str, ...] = ("auto", "none", "fp8", "int8", "int8-weight-only")
"""How the network's large matrices are kept; `auto` is as the file has them."""

ATTENTION: tuple[str, ...] = (
    "auto",
    "sdpa",
    "cudnn",
    "flash",
    "efficient",
    "xformers",
    "flex",
)
"""What computes the network's attention; `auto` is the fastest on a GPU, `sdpa` on a CPU."""

MEMORY: tuple[str, ...] = ("auto", "fast", "balanced", "low")
"""Memory plans, each smaller and slower than the one before; `auto` is the first that fits."""

_DTYPE_ALIASES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "float": "float32",
    "half": "float16",
}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_STAGE_KEY = re.compile(r"stage([1-9]\d{0,8})")


class _FieldError(PlanError):
    """A value that cannot be; `path` leads to it, so that a reader of files can name the line."""

    def __init__(self, owner: str, path: tuple[str, ...], problem: str) -> None:
        super().__init__(".".join(part for part in (owner, *path) if part) + " " + problem)
        self.path = path
        self.problem = problem


@dataclass(frozen=True, slots=True, kw_only=True)
class EasyCache:
    """Skips network calls whose output would have changed little since the last one."""

    threshold: float
    """Accumulated relative change below which a call is skipped, at least 0."""
    start: float = 0.15
    """Share of the schedule, 0 to 1, after which calls may be skipped."""
    end: float = 0.95
    """Share of the schedule, 0 to 1, after which none is skipped any more."""

    def __post_init__(self) -> None:
        check = _Checker(self, "easycache")
        check.number("threshold", "a number, at least 0", at_least=0)
        check.number("start", "a number from 0 to 1", at_least=0, at_most=1)
        check.number("end", "a number from 0 to 1", at_least=0, at_most=1)
        if self.start > self.end:
            check.fail("start", f"must not be after end, got {self.start} and {self.end}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One denoising pass at one size; it starts from the enlarged latent of the stage before it."""

    name: str
    """What progress, timings and file names call it: letters, digits, `_` and `-`, none of
    `TAKEN_NAMES`."""
    height: int
    """Image height in pixels, a multiple of 16."""
    width: int
    """Image width in pixels, a multiple of 16."""
    steps: int
    """Sampler steps, 1 to 1000."""
    cfg: float = 1.0
    """Classifier-free guidance scale in ComfyUI's sense; 1 leaves out the negative prompt."""
    sampler: str = "euler_ancestral"
    """One of `SAMPLERS`."""
    scheduler: str = "simple"
    """One of `SCHEDULERS`."""
    node: str = "custom"
    """One of `NODES`; the two cut a schedule with denoise < 1 differently."""
    shift: float = 3.0
    """Moves the schedule towards noise; 1 is no shift."""
    denoise: float = 1.0
    """Share of the schedule that is run, above 0; 1 starts from pure noise."""
    seed_offset: int = 0
    """Added to the picture's seed for this stage's noise."""
    upscale: str = "nearest-exact"
    """One of `UPSCALE_METHODS`, for the way from the stage before to this size."""
    easycache: EasyCache | None = None
    """When to skip network calls; None never does."""

    def __post_init__(self) -> None:
        check = _Checker(self, self.name if isinstance(self.name, str) else "stage")
        check.text("name")
        if not _STAGE_NAME.fullmatch(self.name):
            check.fail("name", f"must be letters, digits, _ and -, got {self.name!r}")
        if self.name in TAKEN_NAMES:
            check.fail(
                "name",
                f"must not be one of {', '.join(TAKEN_NAMES)}, which name other parts of the "
                f"timings; got {self.name!r}",
            )
        check.size("height")
        check.size("width")
        check.whole("steps", 1, STEPS_LIMIT)
        check.number("cfg", "a number, at least 0", at_least=0)
        check.choice("sampler", SAMPLERS)
        check.choice("scheduler", SCHEDULERS)
        check.choice("node", NODES)
        check.number("shift", "a number above 0, at most 100", above=0, at_most=SHIFT_LIMIT)
        check.number("denoise", "a number above 0, at most 1", above=0, at_most=1)
        check.whole("seed_offset", 0, SEED_LIMIT - 1)
        check.choice("upscale", UPSCALE_METHODS)
        if self.easycache is not None and not isinstance(self.easycache, EasyCache):
            check.fail(
                "easycache",
                "must be an EasyCache (threshold, start, end), or none (false, null); "
                f"got {_shown(self.easycache)}",
            )
        self._check_schedule(check)

    def _check_schedule(self, check: _Checker) -> None:
        if self.scheduler == "flowmatch_node" and self.node != "custom":
            check.fail(
                "scheduler",
                "'flowmatch_node' is a sigmas node and needs node: custom, "
                f"got node {self.node!r}; for a KSampler use FlowMatchEulerDiscreteScheduler",
            )
        whole = self.steps / self.denoise
        if whole > SCHEDULE_LIMIT:
            check.fail(
                "denoise",
                f"{self.denoise:g} with {self.steps} steps needs a schedule of more than "
                f"{SCHEDULE_LIMIT} steps; use at least {self.steps / SCHEDULE_LIMIT:g}",
            )
        if self.scheduler == "kl_optimal" and whole < 2:
            check.fail("steps", "must be at least 2 with scheduler 'kl_optimal', got 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """What holds for every LoRA."""

    default_strength: float = 0.8
    """Strength of a LoRA that is given without one."""
    cache_models: bool = True
    """Keep LoRA files that were read in memory."""

    def __post_init__(self) -> None:
        check = _Checker(self, "lora")
        check.number("default_strength", "a finite number")
        check.flag("cache_models")


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """Trades time for memory. Only tiling changes the picture, by little; attention changes its
    last bits, and so does `memory` where parts are compiled, for those that move are not.

    `fast` keeps everything on the device. `balanced` has the text encoder there only while it works
    and decodes in tiles. `low` has each part there only while it works, block by block where the
    part alone is too large, and decodes in tiles; what GGUF or 8-bit files hold stays as it is
    there, and is made into floats layer by layer. Parts rest in host memory; beside a CPU they are
    read from their files again. `auto` is the first of these that fits a GPU, on a CPU `fast`.
    """

    memory: str = "auto"
    """One of `MEMORY`."""
    allow_fallback: bool = False
    """When memory runs out in loading or in a request, try once more as the next smaller memory
    plan has it; the request after that one is as before."""
    enable_model_cpu_offload: bool = False
    """`low` without tiles: keep the parts that are not at work off the device."""
    enable_vae_slicing: bool = False
    """Decode several pictures one after the other."""
    enable_vae_tiling: bool = False
    """Decode a large picture in tiles."""
    attention: str = "auto"
    """One of `ATTENTION`."""

    def __post_init__(self) -> None:
        check = _Checker(self, "performance")
        check.choice("attention", ATTENTION)
        check.choice("memory", MEMORY)
        for item in fields(self):
            if item.name not in ("memory", "attention"):
                check.flag(item.name)
        if self.enable_model_cpu_offload and self.memory in ("fast", "balanced"):
            check.fail(
                "memory",
                f"{self.memory!r} does not go with enable_model_cpu_offload, which moves every "
                "part as 'low' does; use memory 'low', or turn the offload off",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Where the model is and how it is held. Relative paths start at the current folder."""

    path: str | None = None
    """A folder (ComfyUI's `models`, or a diffusers one) or the network's file."""
    vae_path: str | None = None
    """The autoencoder's file, if not found through `path`."""
    clip_path: str | None = None
    """The text encoder's file, if not found through `path`."""
    tokenizer_path: str | None = None
    """The tokenizer's folder or file, if not found through `path`."""
    torch_dtype: str = "auto"
    """One of `DTYPES`; `torch.bfloat16` and short names such as `bf16` are understood."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    quantize: str = "auto"
    """One of `QUANTIZE`."""

    def __post_init__(self) -> None:
        check = _Checker(self, "model")
        for name in ("path", "vae_path", "clip_path", "tokenizer_path"):
            check.optional_text(name)
        for name in ("torch_dtype", "device", "quantize"):
            if getattr(self, name) is None:
                check.put(name, "auto")
            check.text(name)
        check.choice("quantize", QUANTIZE)
        dtype = self.torch_dtype.removeprefix("torch.")
        check.put("torch_dtype", _DTYPE_ALIASES.get(dtype, dtype))
        check.choice("torch_dtype", DTYPES)
        if not _DEVICE.fullmatch(self.device):
            check.fail("device", f"must be auto, cpu, cuda or cuda:N, got {self.device!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that makes one picture out of a prompt and a seed."""

    stages: tuple[Stage, ...]
    """The passes in order, each usually larger than the one before."""
    progressive: bool = True
    """False makes the picture in one stage: see `single_stage`."""
    num_inference_steps: int = 9
    """Steps of the single stage."""
    guidance_scale: float = 2.0
    """cfg of the single stage, in ComfyUI's sense."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """Where the model is and how it is held."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """What holds for every LoRA."""
    performance: Performance = field(default_factory=Performance)
    """Trades time for memory."""

    def __post_init__(self) -> None:
        check = _Checker(self, "")
        _check_stages(check, self)
        generation = _Checker(self, "", ("generation",))
        generation.flag("progressive")
        generation.whole("num_inference_steps", 1, STEPS_LIMIT)
        generation.number("guidance_scale", "a number, at least 0", at_least=0)
        check.instance("model", ModelSettings)
        check.instance("lora", LoraSettings)
        check.instance("performance", Performance)

    def resolved(
        self,
        progressive: bool | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Plan:
        """The plan that a request asks for, its stages those that will run.

        Args:
            progressive: False for one stage; None does what the plan says.
            num_inference_steps: Steps of the first stage, or of the only one.
            guidance_scale: cfg of the first stage, or of the only one.

        Raises:
            PlanError: A number is impossible.
        """
        if not (self.progressive if progressive is None else progressive):
            return self.single_stage(num_inference_steps, guidance_scale)
        wanted = {"steps": num_inference_steps, "cfg": guidance_scale}
        changes: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
        first, *rest = self.stages
        return replace(self, progressive=True, stages=(replace(first, **changes), *rest))

    def single_stage(
        self, num_inference_steps: int | None = None, guidance_scale: float | None = None
    ) -> Plan:
        """The same picture size in one pass: first stage's sampler and schedule, last stage's size.

        Args:
            num_inference_steps: Steps; None takes the plan's `num_inference_steps`.
            guidance_scale: cfg; None takes the plan's `guidance_scale`.

        Returns:
            A plan of one stage that starts from noise, without EasyCache. Asking it again for its
            single stage gives the same plan.

        Raises:
            PlanError: A number is impossible.
        """
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        cfg = self.guidance_scale if guidance_scale is None else guidance_scale
        # Checks the two under the names that the caller used, before they become steps and cfg.
        plan = replace(self, progressive=False, num_inference_steps=steps, guidance_scale=cfg)
        last = plan.stages[-1]
        stage = replace(
            plan.stages[0],
            height=last.height,
            width=last.width,
            steps=plan.num_inference_steps,
            cfg=plan.guidance_scale,
            denoise=1.0,
            easycache=None,
        )
        return replace(plan, stages=(stage,))


def _check_stages(check: _Checker, plan: Plan) -> None:
    stages = check.value("stages")
    if isinstance(stages, list):
        stages = tuple(stages)
        check.put("stages", stages)
    if not isinstance(stages, tuple) or not all(isinstance(stage, Stage) for stage in stages):
        check.fail("stages", f"must be Stage objects in a tuple, got {_shown(stages)}")
    if not 1 <= len(stages) <= STAGES_LIMIT:
        check.fail("stages", f"must be 1 to {STAGES_LIMIT} stages, got {len(stages)}")
    names = [stage.name for stage in stages]
    for number, name in enumerate(names, start=1):
        if name in names[: number - 1]:
            check.fail_at(
                ("generation", f"stage{number}", "name"), f"{name!r} is taken by an earlier stage"
            )
    if stages[0].denoise != 1:
        check.fail_at(
            ("generation", "stage1", "denoise"),
            "must be 1 in the first stage, which has no picture to start from; "
            f"got {stages[0].denoise:g}",
        )


class _Checker:
    """Checks one dataclass's fields and stores them in their plain Python type."""

    def __init__(self, item: object, owner: str, path: tuple[str, ...] = ()) -> None:
        self.item = item
        self.owner = owner
        self.path = path

    def put(self, name: str, value: object) -> None:
        object.__setattr__(self.item, name, value)

    def fail(self, name: str, problem: str) -> NoReturn:
        self.fail_at((*self.path, name), problem)

    def fail_at(self, path: tuple[str, ...], problem: str) -> NoReturn:
        raise _FieldError(self.owner, path, problem)

    def value(self, name: str) -> Any:
        return getattr(self.item, name)

    def whole(self, name: str, low: int, high: int) -> None:
        value = self.value(name)
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            self.fail(name, f"must be a whole number from {low} to {high}, got {_shown(value)}")
        if not low <= number <= high:
            self.fail(name, f"must be a whole number from {low} to {high}, got {_shown(number)}")
        self.put(name, number)

    def size(self, name: str) -> None:
        value = self.value(name)
        allowed = f"must be a multiple of {SIZE_MULTIPLE} pixels"
        whole = hasattr(value, "__index__") and not isinstance(value, bool)
        number = operator.index(value) if whole else 0
        if not SIZE_MULTIPLE <= number <= SIZE_LIMIT:
            allowed += f" from {SIZE_MULTIPLE} to {SIZE_LIMIT}"
            nearest = SIZE_LIMIT if number > SIZE_LIMIT else SIZE_MULTIPLE
            hint = f"; use {nearest}" if whole else ""
            self.fail(name, f"{allowed}, got {_shown(value)}{hint}")
        below = number // SIZE_MULTIPLE * SIZE_MULTIPLE
        if below != number:
            self.fail(name, f"{allowed}, got {number}; use {below} or {below + SIZE_MULTIPLE}")
        self.put(name, number)

    def number(
        self,
        name: str,
        allowed: str,
        *,
        at_least: float = -math.inf,
        above: float = -math.inf,
        at_most: float = math.inf,
    ) -> None:
        value = self.value(name)
        if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
            self.fail(name, f"must be {allowed}, got {_shown(value)}")
        try:
            number = float(value)
        except (OverflowError, TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and at_least <= number <= at_most and above < number):
            self.fail(name, f"must be {allowed}, got {_shown(value)}")
        self.put(name, number)

    def flag(self, name: str) -> None:
        value = self.value(name)
        if not isinstance(value, bool):
            self.fail(name, f"must be true or false, got {_shown(value)}")

    def text(self, name: str) -> None:
        value = self.value(name)
        if not isinstance(value, str):
            self.fail(name, f"must be text, got {_shown(value)}; put it in quotes")

    def optional_text(self, name: str) -> None:
        value = self.value(name)
        if hasattr(value, "__fspath__"):
            self.put(name, str(value))
        elif value is not None:
            self.text(name)
            if not value or "\0" in value:
                self.fail(name, f"must be a path or null, got {value!r}")

    def choice(self, name: str, allowed: Sequence[str]) -> None:
        value = self.value(name)
        if value not in allowed:
            hint = _did_you_mean(value, allowed)
            self.fail(name, f"must be one of {', '.join(allowed)}; got {_shown(value)}{hint}")

    def instance(self, name: str, kind: type) -> None:
        value = self.value(name)
        if not isinstance(value, kind):
            self.fail(name, f"must be a {kind.__name__}, got {_shown(value)}")


def _shown(value: object) -> str:
    """`value` as an error line can hold it: one line, not long, in YAML's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return one_line(repr(value), 80)
    except ValueError:  # Python refuses to print an integer of more than 4300 digits
        return "a number too long to print"


def _did_you_mean(given: object, allowed: Sequence[str]) -> str:
    if not isinstance(given, str):
        return ""
    from difflib import get_close_matches  # only on the way to an error

    by_lower = {name.lower(): name for name in allowed}
    close = [name for name in by_lower if len(given) > 3 and name.startswith(given.lower())]
    close += get_close_matches(given.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


DEFAULT_PLAN = Plan(
    stages=(
        Stage(
            name="stage1",
            height=224,
            width=176,
            steps=9,
            cfg=2.0,
            sampler="euler_ancestral",
            scheduler="flowmatch_node",
            node="custom",
        ),
        Stage(
            name="stage2",
            height=432,
            width=336,
            steps=16,
            sampler="euler_ancestral",
            scheduler="FlowMatchEulerDiscreteScheduler",
            node="ksampler",
            denoise=0.7,
            seed_offset=1,
            easycache=EasyCache(threshold=0.37, start=0.45, end=0.95),
        ),
        Stage(
            name="stage3",
            height=864,
            width=672,
            steps=16,
            sampler="dpmpp_sde",
            scheduler="beta",
            node="custom",
            denoise=0.6,
            seed_offset=2,
            easycache=EasyCache(threshold=0.12, start=0.7, end=0.95),
        ),
    )
)
"""The progressive workflow: 176 x 224, 336 x 432, then 672 x 864 pixels (width x height)."""


# Reading.


def load_plan(path: str | Path) -> Plan:
    """Read a YAML plan file; what it leaves out is as in `DEFAULT_PLAN`.

    Raises:
        PlanError: The file cannot be read, is not YAML, or holds an unknown or repeated key or an
            impossible value; the message names file and line.
    """
    data, lines = read_yaml(Path(path))
    return _Reader(lines, str(path)).plan(data)


def plan_from_dict(data: Mapping[str, Any]) -> Plan:
    """Build a plan from nested mappings with the keys of a plan file.

    Raises:
        PlanError: There is an unknown key or an impossible value.
    """
    return _Reader({}, "").plan(data)


_Item = TypeVar("_Item")
_SECTIONS: tuple[str, ...] = ("model", "generation", "lora", "performance")
_GENERATION: tuple[str, ...] = ("progressive", "num_inference_steps", "guidance_scale", "stages")


class _Reader:
    """Turns nested mappings into a plan; errors name the line of the value, where it has one."""

    def __init__(self, lines: Mapping[KeyPath, int], source: str) -> None:
        self.lines = lines
        self.source = source

    def error(self, path: KeyPath, problem: str) -> PlanError:
        dotted = ".".join(path) or "a plan"
        if not self.source:
            return PlanError(f"{dotted} {problem}")
        # A value that the file lacks is missing in the section around it.
        line = next(
            self.lines[p]
            for n in range(len(path) + 1)
            if (p := path[: len(path) - n]) in self.lines
        )
        return PlanError(f"{self.source}, line {line}: {dotted} {problem}")

    def plan(self, data: object) -> Plan:
        sections = self.mapping(data, ())
        self.check_keys(sections, _SECTIONS, ())
        generation = self.mapping(sections.get("generation"), ("generation",))
        values = {key: value for key, value in generation.items() if key in _GENERATION}
        values["stages"] = tuple(self.stages(generation))
        values["model"] = self.section(ModelSettings, sections, "model")
        values["lora"] = self.section(LoraSettings, sections, "lora")
        values["performance"] = self.section(Performance, sections, "performance")
        return self.build(Plan, (), values)

    def section(self, kind: type[_Item], sections: Mapping[str, Any], name: str) -> _Item:
        return self.build(kind, (name,), self.mapping(sections.get(name), (name,)))

    def stages(self, generation: Mapping[str, Any]) -> Iterator[Stage]:
        path = ("generation",)
        given = {key for key in generation if _STAGE_KEY.fullmatch(str(key))}
        self.check_keys(
            {key: None for key in generation if key not in given},
            (*_GENERATION, "stage1", "stage2", "stage3", "stage4"),
            path,
            shown=(*_GENERATION, "stage1", "stage2", "stage3, ..."),
        )
        highest = max((int(key.removeprefix("stage")) for key in given), default=0)
        count = self.stage_count(generation, max(highest, len(DEFAULT_PLAN.stages)))
        if highest > count:
            raise self.error(
                (*path, f"stage{highest}"), f"is given, but generation.stages is {count}"
            )
        for number in range(1, count + 1):
            name = f"stage{number}"
            if number > len(DEFAULT_PLAN.stages) and name not in given:
                raise self.error((*path, name), "is missing; stage numbers have no gaps")
            yield self.stage(number, generation.get(name, {}))

    def stage_count(self, generation: Mapping[str, Any], otherwise: int) -> int:
        count = generation.get("stages", otherwise)
        whole = isinstance(count, int) and not isinstance(count, bool)
        if whole and 1 <= count <= STAGES_LIMIT:
            return int(count)
        if "stages" not in generation:
            raise self.error(
                ("generation", f"stage{otherwise}"), f"is beyond the limit of {STAGES_LIMIT} stages"
            )
        raise self.error(
            ("generation", "stages"),
            f"must be a number of stages from 1 to {STAGES_LIMIT}, got {_shown(count)}",
        )

    def stage(self, number: int, data: object) -> Stage:
        name = f"stage{number}"
        path = ("generation", name)
        if data is None:
            raise self.error(
                path,
                f"is empty; delete the line to keep the defaults, or write stages: {number - 1} "
                "to end before this stage",
            )
        given = dict(self.mapping(data, path))
        default = dict(enumerate(DEFAULT_PLAN.stages, start=1)).get(number)
        values = _field_values(default) if default else {"name": name, "seed_offset": number - 1}
        if "easycache" in given:
            given["easycache"] = self.easycache(
                given["easycache"], default.easycache if default else None, (*path, "easycache")
            )
        return self.build(Stage, path, given, values)

    def easycache(self, data: object, default: EasyCache | None, path: KeyPath) -> object:
        if data is None or data is False:
            return None
        if not isinstance(data, Mapping):
            return data  # Stage says what is allowed
        return self.build(EasyCache, path, data, _field_values(default) if default else {})

    def build(
        self,
        kind: type[_Item],
        path: KeyPath,
        given: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
    ) -> _Item:
        items = fields(kind)  # type: ignore[arg-type]  # every kind here is a dataclass
        self.check_keys(given, [item.name for item in items], path)
        values = {**(defaults or {}), **given}
        for item in items:
            required = item.default is MISSING and item.default_factory is MISSING
            if required and item.name not in values:
                raise self.error((*path, item.name), "is missing")
        try:
            return kind(**values)
        except _FieldError as error:
            raise self.error((*path, *error.path), error.problem) from None

    def mapping(self, data: object, path: KeyPath) -> Mapping[str, Any]:
        if data is None:
            return {}
        if not isinstance(data, Mapping):
            raise self.error(path, f"must be a mapping of keys to values, got {_shown(data)}")
        return data

    def check_keys(
        self,
        given: Mapping[str, Any],
        allowed: Sequence[str],
        path: KeyPath,
        shown: Sequence[str] | None = None,
    ) -> None:
        for key in given:
            if key not in allowed:
                hint = _did_you_mean(key, allowed)
                listed = ", ".join(shown or allowed)
                raise self.error(
                    (*path, str(key)), f"is not a key of a plan; allowed: {listed}{hint}"
                )


def _field_values(
    item: EasyCache | Stage | ModelSettings | LoraSettings | Performance,
) -> dict[str, Any]:
    return {entry.name: getattr(item, entry.name) for entry in fields(item)}


# Writing.


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """All of a plan as nested dicts of JSON's types, with the keys of a plan file."""
    generation: dict[str, Any] = {
        "progressive": plan.progressive,
        "num_inference_steps": plan.num_inference_steps,
        "guidance_scale": plan.guidance_scale,
        "stages": len(plan.stages),
    }
    for number, stage in enumerate(plan.stages, start=1):
        values = _field_values(stage)
        if stage.name == f"stage{number}":
            del values["name"]
        if stage.easycache is not None:
            values["easycache"] = _field_values(stage.easycache)
        generation[f"stage{number}"] = values
    return {
        "model": _field_values(plan.model),
        "generation": generation,
        "lora": _field_values(plan.lora),
        "performance": _field_values(plan.performance),
    }


def dump_plan(plan: Plan) -> str:
    """A plan as YAML with every key in it; `load_plan` of that text gives the same plan."""
    return write_yaml(plan_to_dict(plan))
