"""What each command does, in the order in which it checks:

flags, plan, output names and folder, input picture; then PyTorch is imported and the model loaded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbo.builtin import builtin_model
from turbo.errors import BadInputError, FailureError
from turbo.messages import one_line, reason
from turbo.outputs import Outputs, Saved
from turbo.plan import DEFAULT_PLAN, SEED_LIMIT, Plan, dump_plan, load_plan, plan_to_dict
from turbo.whole_file import require_writable_folder, write_whole

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from turbo.checkpoint import Checkpoint
    from turbo.compile import CacheEntry
    from turbo.components import Components
    from turbo.engine import Engine, Result
    from turbo.memory import MemoryNeed
    from turbo.model_files import ModelFiles
    from turbo.placement import MemoryPlan
    from turbo.progress import ProgressBar

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf|infinity)", re.I)
_BUILT_IN_NOTICE = (
    "turbo: no model given: the built-in one paints simple scenes, such as 'a red circle on a "
    "blue background'; for Z-Image-Turbo give --model (or TURBO_MODEL) a folder that holds it, "
    "such as ComfyUI/models"
)
_UNUSED_NEGATIVE = "turbo: --negative has no effect: cfg is 1 in every stage of the plan"


# Shared by the commands.


def resolve_plan(args: Namespace) -> Plan:
    """The plan that the flags ask for.

    `--steps` and `--cfg` are the first stage's, as in `Engine.generate`.

    Raises:
        PlanError: The file or a number is wrong.
    """
    plan = DEFAULT_PLAN if args.plan is None else load_plan(args.plan)
    plan = plan.resolved(False if args.single_stage else None, args.steps, args.cfg)
    memory = {"memory": args.memory, "allow_fallback": getattr(args, "allow_fallback", False)}
    given: dict[str, Any] = {name: value for name, value in memory.items() if value}
    return replace(plan, performance=replace(plan.performance, **given))


def with_model(plan: Plan, args: Namespace) -> Plan:
    """`plan` with where the model is: flags win over the plan file, that over the environment."""
    flags = {
        "path": args.model,
        "vae_path": args.vae,
        "clip_path": args.text_encoder,
        "tokenizer_path": args.tokenizer,
        "torch_dtype": args.dtype,
        "device": args.device,
        "quantize": args.quantize,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    model = replace(plan.model, **given)
    files = (args.diffusion_model, model.vae_path, model.clip_path)
    if model.path is None and None in files and os.environ.get("TURBO_MODEL"):
        model = replace(model, path=os.environ["TURBO_MODEL"])
    return replace(plan, model=model)


@dataclass(frozen=True)
class ModelPaths:
    """What `Engine.from_pretrained` and `find_model_files` take, ``~`` expanded."""

    path: str | None
    files: dict[str, str | None]

    @classmethod
    def of(cls, plan: Plan, diffusion_model: str | None) -> ModelPaths:
        """The paths of a plan that `with_model` returned."""
        model = plan.model
        files = {
            "diffusion_model": diffusion_model,
            "text_encoder": model.clip_path,
            "vae": model.vae_path,
            "tokenizer": model.tokenizer_path,
        }
        return cls(_expand(model.path), {name: _expand(path) for name, path in files.items()})

    @property
    def is_built_in(self) -> bool:
        """Whether no weights were given, so that the built-in model is used."""
        weights = (path for name, path in self.files.items() if name != "tokenizer")
        return self.path is None and not any(weights)

    def find(self) -> ModelFiles:
        """The model's files.

        Raises:
            CheckpointError: They are not all there.
        """
        from turbo.model_files import find_model_files

        path: str | Path | None = self.path
        if self.is_built_in:
            path = builtin_model()
        return find_model_files(path, **self.files)


def _expand(path: str | None) -> str | None:
    return path if path is None else os.path.expanduser(path)


def _print_json(data: Any, indent: int | None = None) -> None:
    print(json.dumps(data, indent=indent), flush=True)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


# turbo plan, turbo info


def plan(args: Namespace) -> None:
    """``turbo plan``: print the resolved plan, or write it to a new file.

    Where a model is known, its need of memory follows as comments, which a plan file may have.
    """
    asked = resolve_plan(args)
    plan = with_model(asked, args)
    path = args.model or asked.model.path  # not the environment's, which holds here alone
    text = dump_plan(replace(plan, model=replace(plan.model, path=path)))
    paths = ModelPaths.of(plan, args.diffusion_model)
    if not paths.is_built_in:  # its files are read by PyTorch, and this command starts at once
        files = paths.find()
        need = _Need.of(plan, files.open())
        text += "".join(f"# {one_line(line, limit=None)}\n" for line in need.lines(files))
    if args.output is None:
        print(text, end="")
        return
    out = Path(os.path.expanduser(args.output))
    require_writable_folder(out.parent)
    try:
        write_whole(out, text.encode(), overwrite=False)
    except FileExistsError:
        raise BadInputError(f"{args.output!r} exists; give a name that is free") from None


def info(args: Namespace) -> None:
    """``turbo info``: print versions, devices and model files; a missing file is an error."""
    from turbo.info import collect_info

    paths = ModelPaths.of(with_model(DEFAULT_PLAN, args), args.diffusion_model)
    found = collect_info(paths.path, **paths.files)
    if args.json:
        _print_json(found, indent=2)
    else:
        print("\n".join(_info_lines(found)))
    if "problem" in found["model"]:
        raise BadInputError(found["model"]["problem"])


def _info_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"turbo {found['turbo']}, Python {found['python']}, {found['platform']}"
    yield "packages: " + ", ".join(f"{k} {v or '(none)'}" for k, v in found["packages"].items())
    for device in found["devices"]:
        memory = device["memory_bytes"]
        yield f"device: {device['device']}, {device['name']}" + (
            f", {_size(memory)}" * bool(memory)
        )
        yield f"  attention: {', '.join(device['attention'])}"
    for name, folder in found["caches"].items():
        yield f"cache: {folder} ({name})"
    yield from _model_lines(found["model"])


def _model_lines(model: dict[str, Any]) -> Iterator[str]:
    if "problem" not in model:
        built_in = "none given; turbo generate would use the built-in one, of simple scenes: "
        yield f"model: {built_in * model['built_in']}{model['layout']}"
        for component, part in model["components"].items():
            yield f"  {component}: {', '.join(part['files'])} ({_size(part['file_bytes'])})"
        yield f"  tokenizer: {model['tokenizer'] or 'not found'}"
        yield f"  loras: {', '.join(model['loras']) or 'none'}"


# turbo quantize


def quantize(args: Namespace) -> None:
    """``turbo quantize``: write a model with its network in 8 bits."""
    from turbo.model_files import find_model_files
    from turbo.progress import ProgressBar
    from turbo.quantized_files import write_quantized

    out = Path(os.path.expanduser(args.output))
    require_writable_folder(out.absolute().parent)
    files = find_model_files(
        _expand(args.model),
        diffusion_model=_expand(args.diffusion_model),
        text_encoder=_expand(args.text_encoder),
        vae=_expand(args.vae),
        tokenizer=_expand(args.tokenizer),
    )
    labels = {"network": "quantize network", "text_encoder": "copy text encoder"}
    with ProgressBar(sys.stderr, labels, quiet=args.quiet) as progress:
        write_quantized(files, out, args.quantize, progress)
    if not args.quiet:
        print(one_line(f"wrote {out}; turbo generate --model {out} uses it", limit=None))


# turbo convert


def convert(args: Namespace) -> None:
    """``turbo convert``: write a model in another layout of its files."""
    from turbo.checkpoint import COMFYUI_NORM_GROUPS, norm_groups
    from turbo.converted_files import write_converted
    from turbo.names import AUTOENCODER, COMPONENT_WORDS
    from turbo.progress import ProgressBar

    out = Path(os.path.expanduser(args.output))
    require_writable_folder(out.absolute().parent)
    given = {name: _expand(getattr(args, name)) for name in (
        "diffusion_model", "text_encoder", "vae", "tokenizer")}  # fmt: skip
    files = ModelPaths(_expand(args.model), given).find()
    labels = {name: f"write {words}" for name, words in COMPONENT_WORDS.items()}
    with ProgressBar(sys.stderr, labels, quiet=args.quiet) as progress:
        write_converted(files, out, args.layout, progress)
    if args.quiet:
        return
    groups = norm_groups(files.open()[AUTOENCODER])
    if args.layout == "comfyui" and groups != COMFYUI_NORM_GROUPS:
        print(f"ComfyUI itself cannot read this autoencoder: it has {groups} groups in its norms, "
              f"ComfyUI always {COMFYUI_NORM_GROUPS}")  # fmt: skip
    if files.loras_dir is not None and next(files.loras_dir.rglob("*.safetensors"), None):
        print(
            one_line(f"LoRAs are not copied: give those of {files.loras_dir} by path", limit=None)
        )
    print(one_line(f"wrote {out}; turbo generate --model {out} uses it", limit=None))


@dataclass(frozen=True)
class _Need:
    """What a model needs for a plan on a device."""

    outline: Components
    need: MemoryNeed
    plans: dict[str, tuple[MemoryPlan, int]]
    """Name -> how the parts are held, and the peak."""
    device: torch.device
    free: int | None
    """Bytes that the device has free; None where that cannot be told."""

    @classmethod
    def of(cls, plan: Plan, checkpoints: Mapping[str, Checkpoint]) -> _Need:
        from turbo.components import Components, keep_stored
        from turbo.devices import free_bytes, pick_device
        from turbo.memory import count_outline, memory_plans, weight_dtypes
        from turbo.names import NETWORK
        from turbo.precision import arithmetic_dtype
        from turbo.quantize import pick_quantization

        device = pick_device(plan.model.device)
        kept = pick_quantization(plan.model.quantize, checkpoints[NETWORK].quantization, device)
        dtypes = weight_dtypes(plan.model.torch_dtype, plan.model.device)
        keep = keep_stored(plan.model.quantize, kept)
        outline = Components.outline(checkpoints, dtypes, kept, keep=keep)
        outline.network.compute_dtype = arithmetic_dtype(dtypes[NETWORK], device)
        need = count_outline(outline, plan, device)
        free = free_bytes(device)
        plans = memory_plans(need, plan.performance, device, free)
        return cls(outline, need, plans, device, free)

    @property
    def nearest(self) -> tuple[str, int] | None:
        """Where no memory plan fits: the one that needs least, and how many bytes it lacks."""
        from turbo.memory import nearest_plan

        name = nearest_plan(self.plans)
        missing = 0 if self.free is None else self.plans[name][1] - self.free
        return (name, missing) if missing > 0 else None

    def lines(self, files: ModelFiles) -> Iterator[str]:
        """Each part's bytes, and each memory plan's peak."""
        from turbo.placement import RESIDENT

        held = {
            "network": files.network,
            "text_encoder": files.text_encoder,
            "autoencoder": files.vae,
        }
        for component, count in self.need.weights.items():
            yield f"weights of {component}: {_size(count)}, from {held[component]}"
            stored = self.need.of("low").weights[component]
            if stored != count:
                yield f"weights of {component} kept as in its file, memory low: {_size(stored)}"
        for stage, count in self.need.activations.items():
            yield f"largest activations of {stage}: {_size(count)}"
        yield f"largest activations of decode in tiles: {_size(self.need.tiled_decode)}"
        yield f"all weights and the largest activations: {_size(self.need.total)}"
        for name, (plan, peak) in self.plans.items():
            moved = [f"{part} {mode}" for part, mode in plan.modes.items() if mode != RESIDENT]
            how = ", ".join(moved or ["all resident"]) + ", decoded in tiles" * plan.is_tiled
            host = self.need.host_bytes(plan, self.device)
            beside = f", {_size(host)} of pinned host memory" * bool(host)
            yield f"memory {name}: {_size(peak)} at most on {self.device}{beside} ({how})"
        if self.free is not None:
            yield f"free on {self.device} now: {_size(self.free)}"
        if self.nearest is not None:
            name, missing = self.nearest
            yield f"no memory plan fits: {name} comes nearest, {_size(missing)} are missing for it"
        yield "activations are counted for 64 prompt tokens, without what libraries use themselves"

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        plans = {
            name: {
                "peak": peak,
                "host": self.need.host_bytes(plan, self.device),
                "parts": dict(plan.modes),
                "tiled": plan.is_tiled,
            }
            for name, (plan, peak) in self.plans.items()
        }
        return {
            "weights": self.need.weights,
            "stored_weights": self.need.of("low").weights,
            "activations": self.need.activations,
            "tiled_decode": self.need.tiled_decode,
            "total": self.need.total,
            "plans": plans,
            "free": self.free,
            "nearest": None if self.nearest is None else self.nearest[0],
            "missing": 0 if self.nearest is None else self.nearest[1],
        }


# turbo cache; PyTorch is not imported


def cache(args: Namespace) -> None:
    """``turbo cache list|clear``: what compiled code is kept, or that it was removed."""
    from turbo.cache_folder import default_cache_dir
    from turbo.compile import CacheError

    folder = default_cache_dir() if args.cache_dir is None else Path(_expand(args.cache_dir) or "")
    is_there = _is_listable(folder)
    try:
        (_list_cache if args.action == "list" else _clear_cache)(folder, is_there, args.json)
    except CacheError as error:
        raise FailureError(str(error)) from error


def _is_listable(folder: Path) -> bool:
    """Whether the folder exists."""
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BadInputError(
            f"cannot list the cache folder {str(folder)!r}: {reason(error)}; give another "
            "--cache-dir"
        ) from None
    return True


def _list_cache(folder: Path, is_there: bool, as_json: bool) -> None:
    from turbo.compile import list_entries

    entries = list_entries(folder)
    total = sum(entry.bytes for entry in entries)
    if as_json:
        listed = [{**asdict(entry), "path": str(entry.path)} for entry in entries]
        _print_json({"folder": str(folder), "entries": listed, "bytes": total}, indent=2)
        return
    print(one_line(f"folder: {folder}", limit=None))
    for entry in entries:
        print(one_line(_entry_line(entry), limit=None))
        if entry.problem:
            print(f"  not used: {one_line(entry.problem, limit=None)}")
    print(_cache_total(len(entries), total) if entries else _nothing_kept(is_there))


def _clear_cache(folder: Path, is_there: bool, as_json: bool) -> None:
    from turbo.compile import clear

    count, total = clear(folder)
    if as_json:
        _print_json({"folder": str(folder), "entries": count, "bytes": total}, indent=2)
        return
    print(one_line(f"folder: {folder}", limit=None))
    print(f"removed {_cache_total(count, total)}" if count else _nothing_kept(is_there))


def _cache_total(count: int, total: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}, {_size(total)}"


def _nothing_kept(is_there: bool) -> str:
    return "no compiled code is kept here" if is_there else "the folder does not exist yet"


def _entry_line(entry: CacheEntry) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.modified))
    made_for = ", ".join(_compiled_for(entry.facts))
    return f"{entry.path.name}: {_size(entry.bytes)}, {when}" + f", for {made_for}" * bool(made_for)


def _compiled_for(facts: Mapping[str, Any]) -> Iterator[str]:
    """The facts that tell entries apart; any of them may be absent or of another kind."""
    caller = facts.get("caller")
    told = caller if isinstance(caller, dict) else {}
    if "torch" in facts:
        yield f"torch {facts['torch']}"
    if "device" in facts:
        yield str(facts["device"])
    if dtypes := _list_of(told, "dtypes"):
        yield "/".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if stages := _list_of(told, "stages"):  # each is height and width; shown as sizes usually are
        sizes = ("x".join(map(str, size[::-1])) for size in stages if isinstance(size, list))
        yield f"stages {' '.join(sizes)}"


def _list_of(facts: Mapping[str, Any], name: str) -> list[Any]:
    value = facts.get(name)
    return value if isinstance(value, list) else []


# turbo generate


def generate(args: Namespace) -> None:
    """``turbo generate``: make pictures and save each as soon as it is done."""
    plan = with_model(resolve_plan(args), args)
    paths = ModelPaths.of(plan, args.diffusion_model)
    loras = [_weighted(text, plan.lora.default_strength) for text in args.lora]
    begin = time.perf_counter()
    outputs = Outputs.of(args)
    outputs.check([stage.name for stage in plan.stages[:-1]] if args.save_stages else [])
    image = _read_start(args)
    if args.dry_run:
        _dry_run(args, plan, paths, loras, outputs)
        return
    imports = _import_seconds() if args.timings else 0.0
    # Where the model lies on this machine is no part of what a picture says about itself.
    plan = replace(plan, model=replace(DEFAULT_PLAN.model, **_precision(plan)))
    with _progress(plan, args) as progress, _memory_plan_told(args.quiet):
        engine = load_engine(
            paths.path,
            **paths.files,
            loras=loras,
            device=plan.model.device,
            dtype=plan.model.torch_dtype,
            plan=plan,
            strict_loras=not args.no_strict_lora,
            **_speed_ups(args),
            attention=_attention(args, plan),
            cache_dir=_cache_dir(args),
            strict_speed=args.strict_speed,
            on_progress=progress,
        )
        progress.end_line()
        _print_notices(args, plan, paths)  # now that the model and the LoRAs are known to be there
        seed = args.seed
        for number in range(1, args.n + 1):
            progress.prefix = f"{number}/{args.n} " if args.n > 1 else ""
            started = time.perf_counter()
            result = engine.generate(
                args.prompt,
                negative_prompt=args.negative,
                trigger_word=args.trigger_word,
                seed=seed,
                plan=plan,
                image=image,
                strength=args.strength,
                on_progress=progress,
                keep_stages=args.save_stages,
            )
            saved = outputs.save(result, number, plan.stages[-1].name)
            progress.end_line()
            _print_result(args, result, saved, time.perf_counter() - started)
            if args.timings and number == 1:
                _print_timings(engine, result, imports, time.perf_counter() - begin)
            seed = (result.seed + 1) % SEED_LIMIT


class _MemoryPlanPrinter(logging.Handler):
    """Prints the memory plan as it is chosen, before a weight is read; not that all stays."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "keeps_all", True):
            print(f"turbo: {record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def _memory_plan_told(quiet: bool) -> Iterator[None]:
    logger, handler = logging.getLogger("turbo.memory"), _MemoryPlanPrinter(logging.INFO)
    before = logger.level
    if not quiet:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _precision(plan: Plan) -> dict[str, str]:
    names = ("torch_dtype", "device", "quantize")
    return {name: getattr(plan.model, name) for name in names}


def _speed_ups(args: Namespace) -> dict[str, Any]:
    switch = {"auto": "auto", "on": True, "off": False}
    return {
        "compile": switch[args.compile],
        "capture": args.capture,
        "kernels": switch[args.kernels],
    }


def _attention(args: Namespace, plan: Plan) -> str:
    chosen: str = args.attention or plan.performance.attention
    return chosen


def _cache_dir(args: Namespace) -> str | None:
    return None if args.no_cache else _expand(args.cache_dir) or "auto"


def load_engine(path: str | None, **options: Any) -> Engine:
    """`Engine.from_pretrained`, imported as late as can be."""
    from turbo.engine import Engine

    return Engine.from_pretrained(path, **options)


def parse_lora(text: str) -> tuple[str, float | None]:
    r"""Split ``FILE[:STRENGTH]`` at its last colon if a number follows it.

    So ``C:\style.safetensors`` is a path, ``C:\style.safetensors:0.8`` one with a strength, and a
    name that exists as it stands, such as ``style:2``, is that file.

    Returns:
        The file, and the strength or None.

    Raises:
        BadInputError: The strength is not finite, or nothing stands before or after the colon.
    """
    if os.path.exists(text):
        return text, None
    path, colon, tail = text.rpartition(":")
    if not text or (colon and not (path and tail)):
        raise BadInputError(
            f"--lora needs FILE or FILE:STRENGTH, such as style.safetensors:0.8; got {text!r}"
        )
    is_number = _NUMBER.fullmatch(tail) is not None
    if colon and (is_number or os.path.isfile(os.path.expanduser(path))):
        if not is_number or not math.isfinite(float(tail)):
            raise BadInputError(f"a LoRA's strength must be a finite number, got {tail!r}")
        return path, float(tail)
    return text, None


def _weighted(text: str, default_strength: float) -> tuple[str, float]:
    path, strength = parse_lora(text)
    return os.path.expanduser(path), default_strength if strength is None else strength


def _read_start(args: Namespace) -> Image | None:
    if args.image is None:
        if args.strength is not None:
            raise BadInputError("--strength needs --image, the picture to start from")
        return None
    from turbo.image_file import read_image

    return read_image(args.image)


def _print_notices(args: Namespace, plan: Plan, paths: ModelPaths) -> None:
    if args.quiet:
        return
    if paths.is_built_in:
        print(_BUILT_IN_NOTICE, file=sys.stderr)
    if args.negative and all(stage.cfg == 1 for stage in plan.stages):
        print(_UNUSED_NEGATIVE, file=sys.stderr)


def _progress(plan: Plan, args: Namespace) -> ProgressBar:
    from turbo.progress import ProgressBar

    parts = ("network", "text_encoder", "autoencoder")
    labels = {part: f"load {part.replace('_', ' ')}" for part in parts}
    labels |= {stage.name: f"{stage.name} {stage.width}x{stage.height}" for stage in plan.stages}
    return ProgressBar(sys.stderr, labels, quiet=args.quiet)


def _print_result(args: Namespace, result: Result, saved: Saved, seconds: float) -> None:
    if args.json:
        _print_json(
            {
                "file": str(saved.path),
                "stages": {name: str(path) for name, path in saved.stages.items()},
                "seed": result.seed,
                "seconds": round(seconds, 3),
                "timings": result.timings,
                "skips": {name: list(skips) for name, skips in result.skips.items()},
            }
        )
    elif not args.quiet:
        skips = [f"{name} {n} of {calls}" for name, (n, calls) in result.skips.items() if n]
        skipped = f", network calls skipped: {', '.join(skips)}" if skips else ""
        print(f"{saved.path}: seed {result.seed}, {seconds:.2f} s{skipped}", flush=True)


def _import_seconds() -> float:
    """Import the engine, and PyTorch with it; how long it took."""
    begin = time.perf_counter()
    import turbo.engine  # noqa: F401

    return time.perf_counter() - begin


def _print_timings(engine: Engine, result: Result, imports: float, total: float) -> None:
    """A table of the start's parts; what is indented is part of the line above it."""
    load = engine.start_seconds["load"]
    loading = {f"  {name}": value for name, value in engine.start_seconds.items() if name != "load"}
    made = result.timings["total"]
    compile_, capture = engine.accelerator.compile_seconds, engine.accelerator.capture_seconds
    picture = {f"  {name}": value for name, value in result.timings.items() if name != "total"}
    inside = {"  of these: compile": compile_, "  of these: capture": max(0.0, capture - compile_)}
    rows = {"import": imports, "load": load, **loading, "first picture": made, **picture, **inside}
    rows |= {"check and save": total - imports - load - made, "start to first file": total}
    for name, seconds in rows.items():
        print(f"{name:32}{seconds:9.3f} s", file=sys.stderr)


# turbo generate --dry-run


def _dry_run(
    args: Namespace,
    plan: Plan,
    paths: ModelPaths,
    loras: list[tuple[str, float]],
    outputs: Outputs,
) -> None:
    """Print the plan, files and memory need; standard output is YAML with comments, or JSON.

    Raises:
        BadInputError: Something is not usable. That memory is too small is said at the end.
    """
    from turbo.acceleration import SpeedUps
    from turbo.attention import pick_attention
    from turbo.devices import pick_device
    from turbo.fusing import LoraChoice, LoraFuser
    from turbo.memory import choose_memory
    from turbo.precision import arithmetic_dtype

    performance = plan.performance
    offload = performance.enable_model_cpu_offload or performance.memory == "low"
    device = pick_device(plan.model.device)
    SpeedUps.choose(device, **_speed_ups(args), strict=args.strict_speed, offload=offload)
    files = paths.find()
    choices = [LoraChoice.parse(item, files.loras_dir, item[1]) for item in loras]
    found = [(str(choice.path), choice.strength) for choice in choices]
    checkpoints = files.open()
    need = _Need.of(plan, checkpoints)
    chosen, misfit = None, None
    try:
        may_move = args.capture in ("auto", "eager")
        chosen = choose_memory(
            need.outline, plan, device, may_move_network=may_move, free=need.free
        ).name
    except BadInputError as error:
        misfit = error
    network = need.outline.network
    dtype = arithmetic_dtype(network.dtype, device)
    pick_attention(_attention(args, plan), device, dtype, network.config.head_dim)
    fuser = LoraFuser(need.outline.by_name(), checkpoints)
    fuser.check(choices, strict=not args.no_strict_lora)
    names = [_dry_name(args, outputs, number) for number in range(1, args.n + 1)]
    if args.json:
        memory = {**need.as_json(), "chosen": chosen}
        _print_json(
            {"plan": plan_to_dict(plan), "memory_bytes": memory, "loras": found, "files": names},
            indent=2,
        )
    else:
        print(dump_plan(plan), end="")
        for line in (*need.lines(files), *_dry_lines(chosen, files, found, names)):
            print(f"# {line}")
    if misfit is not None:
        raise misfit


def _dry_name(args: Namespace, outputs: Outputs, number: int) -> str:
    if outputs.given is None and args.seed is None:
        return "turbo-<seed>.png"
    seed = 0 if args.seed is None else (args.seed + number - 1) % SEED_LIMIT
    return str(outputs.path(seed, number))


def _dry_lines(
    memory: str | None, files: ModelFiles, loras: list[tuple[str, float]], names: list[str]
) -> Iterator[str]:
    yield f"memory: {memory or 'none that fits'}"
    yield f"tokenizer: {files.tokenizer or 'not found'}"
    for path, strength in loras:
        yield f"LoRA: {path} at {strength:g}"
    yield f"pictures: {', '.join(names[:4])}{', ...' * (len(names) > 4)}"
