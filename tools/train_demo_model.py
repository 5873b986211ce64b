"""``python -m tools.train_demo_model``: make the built-in model from nothing.

An autoencoder, a text encoder, then it and a network together, then two LoRAs, on scenes that are
drawn here; with ``--start``, the last part of the network's training and the LoRAs alone, from a
finished model. All of it depends on ``--seed`` alone, on one machine with one number of threads; it
may be stopped at any point and goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

import turbo
from tools import demo_autoencoder as autoencoders
from tools.demo_loras import LESSONS, train_lora, write_lora
from tools.demo_network import (
    CAPTION,
    LATER,
    MAKERS,
    PARTS,
    Latents,
    Painter,
    Part,
    encode_again,
    encode_captions,
    encode_scenes,
    make_tokenizer,
    model_size,
    native_weights,
    train_network,
)
from tools.demo_text import train_text_encoder
from tools.resumable import Schedule, read_tensors, write_tensors
from turbo.attention import missing_compiler
from turbo.checkpoint import load_weights, open_folder
from turbo.devices import free_bytes
from turbo.diffusers_folder import (
    DIFFUSERS_FILES,
    network_config,
    text_encoder_config,
    to_diffusers,
    write_pipeline,
)
from turbo.errors import BadInputError, TurboError
from turbo.latent import from_sampler
from turbo.memory_errors import chain, is_out_of_memory
from turbo.messages import one_line
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.precision import arithmetic_dtype
from turbo.testing import initialise, qwen3_shapes
from turbo.text_encoder import TextEncoderConfig
from turbo.tokenizer import Tokenizer
from turbo.transformer import TransformerConfig
from turbo.whole_file import require_writable_folder, write_whole

_SETTINGS = "settings.json"
_SUMS = "SHA256SUMS"
_JUDGES = ("judging.py", "judge_demo_model.py")
"""Code that no bit depends on."""
_LIBRARIES = ("torch", "numpy", "diffusers", "tokenizers", "pillow", "turbo")
_MODULES = {"pillow": "PIL"}
"""Library -> the name that it is imported by, where that is another."""
_MEMORY_BYTES = 6 << 30
"""That the training takes at most, rounded up."""
_STATE_BYTES = 70 << 20
"""Of a phase: weights, their average and the optimiser's moments, of the largest one."""
SHEET_PROMPTS = (
    "a red circle on a blue background",
    "a large yellow star in the centre on a purple background",
    "a small green square on the left on a white background",
    "a black triangle at the top on an orange background",
    "a white cross on the right on a red background",
    "an orange diamond at the bottom on a green background",
    "a purple circle on a striped yellow background",
    "a blue star on a shaded black background",
    "a red square left of a blue circle on a white background",
    "a yellow circle above a green triangle on a black background",
    "a large white circle",
    "a blue shape on a yellow background",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """How much of everything."""

    autoencoder: Schedule
    decoder: Schedule
    text: Schedule
    network: tuple[Schedule, ...]
    lora: Schedule
    scenes: Mapping[str, tuple[int, int, int]]
    """How many of each stage's size, of each kind in `MAKERS`."""
    lora_scenes: tuple[int, int, int]
    """Likewise, for each LoRA."""


WHOLE = Amounts(
    autoencoder=Schedule(steps=800, rate=2e-3, ema=0.99),
    decoder=Schedule(steps=250, rate=1e-3, ema=0.98),
    text=Schedule(steps=300, rate=3e-3, warm_up=20, ema=0.98),
    network=(
        Schedule(steps=3000, rate=3e-3, warm_up=60, ema=0.995, horizon=4200),
        Schedule(steps=1100, rate=2.5e-3, warm_up=30, ema=0.99),
        Schedule(steps=4200, rate=2.5e-3, warm_up=50, ema=0.997),
    ),
    lora=Schedule(steps=600, rate=6e-3, warm_up=20, ema=0.98),
    scenes={
        "scenes": (5400, 520, 136),
        "hard": (5400, 2600, 800),
    },
    lora_scenes=(640, 120, 32),
)
QUICK = Amounts(
    autoencoder=Schedule(steps=3, rate=2e-3),
    decoder=Schedule(steps=2, rate=1e-3),
    text=Schedule(steps=2, rate=1e-3),
    network=(Schedule(steps=3, rate=1e-3),) * len(PARTS),
    lora=Schedule(steps=2, rate=1e-3),
    scenes=dict.fromkeys(MAKERS, (8, 8, 2)),
    lora_scenes=(8, 8, 2),
)
"""Enough to see that all of it works, and for tests."""


class _Trainer:
    def __init__(
        self,
        amounts: Amounts,
        seed: int,
        work: Path,
        log: Callable[[str], None],
        start: Path | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        self.start, self.precision = start, precision
        self.amounts, self.seed, self.work, self.log = amounts, seed, work, log
        self.ids = make_tokenizer(_made(work / "tokenizer"))
        self.tokenizer = Tokenizer.from_path(work / "tokenizer")
        self.size = model_size(self.ids)
        self.empty = encode_captions(self.tokenizer, [""])
        self.autoencoder = autoencoders.make_autoencoder(seed)
        self.painter = Painter.make(self.size, seed)

    def run(self) -> dict[str, dict[str, Tensor]]:
        """All phases; returns the LoRAs' tensors by name."""
        first = 0
        if self.start is None:
            self._train_before_network()
        else:
            self._load(self.start)
            first = len(PARTS) - LATER
        for index in range(first, len(PARTS)):
            self._train_part(index)
        self._write_sheet("last", 0)
        return {lesson.name: self._train_lora(lesson) for lesson in LESSONS}

    def _train_before_network(self) -> None:
        self._train_autoencoder()
        train_text_encoder(
            self.painter, self.tokenizer, self.amounts.text, self.seed, self.work, self.log
        )

    def _train_part(self, index: int) -> None:
        part = PARTS[index]
        train_network(
            part,
            self.painter,
            self._scenes_of(part),
            self.empty,
            self.amounts.network[index],
            self.seed,
            self.work,
            self.log,
            partial(self._write_sheet, part.name),
            precision=self.precision,
        )

    def _scenes_of(self, part: Part) -> list[Latents]:
        make = MAKERS[part.scenes]
        data = self._encode(part.scenes, self.amounts.scenes[part.scenes], make)
        more: list[Literal["before", "ragged"]] = []
        more += ["before"] if part.upscaled else []
        more += ["ragged"] if part.ragged else []
        for what in more:
            data = encode_again(
                self.autoencoder, data, self.seed, self.work, self.log,
                kind=part.scenes, make=make, what=what,
            )  # fmt: skip
        return data

    def _load(self, model: Path) -> None:
        for name in ("vocab.json", "merges.txt"):
            if (model / "tokenizer" / name).read_bytes() != (
                self.work / "tokenizer" / name
            ).read_bytes():
                raise BadInputError(
                    f"{model / 'tokenizer' / name} is not the tokenizer that the scenes' captions "
                    "give now, so the model's words would mean others; train from nothing"
                )
        for component, module in (
            (NETWORK, self.painter.network),
            (TEXT_ENCODER, self.painter.text_encoder),
        ):
            load_weights(module, open_folder(component, _component(model, component).parent))
        self.autoencoder.load_state_dict(read_tensors(_component(model, AUTOENCODER)))

    def _train_autoencoder(self) -> None:
        autoencoders.train_autoencoder(
            self.autoencoder,
            self.amounts.autoencoder,
            self.amounts.decoder,
            self.seed,
            self.work,
            self.log,
        )
        with torch.inference_mode():
            decibels = autoencoders.psnr_on_scenes(self.autoencoder, self.seed)
        self.log(f"autoencoder: {decibels:.2f} dB on scenes of 672 x 864")

    def _train_lora(self, lesson: Any) -> dict[str, Tensor]:
        data = self._encode(lesson.name, self.amounts.lora_scenes, lesson.make)
        return train_lora(
            lesson,
            self.painter,
            data,
            self.empty,
            self.amounts.lora,
            self.seed,
            self.work,
            self.log,
            self.precision,
        )

    def _encode(self, kind: str, counts: Sequence[int], make: Any) -> list[Latents]:
        return encode_scenes(
            self.autoencoder, self.tokenizer, counts, self.seed, self.work, self.log,
            kind=kind, make=make,
        )  # fmt: skip

    @torch.inference_mode()
    def _write_sheet(self, name: str, step: int) -> None:
        ids, lengths = encode_captions(self.tokenizer, SHEET_PROMPTS)
        latents = self.painter.sample(ids, lengths, self.empty, seed=self.seed)
        outside = from_sampler(latents * autoencoders.SPREAD)
        decoded = self.autoencoder.decode(outside, return_dict=False)[0]
        pictures = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        starts = range(0, len(pictures), 6)
        rows = [np.concatenate(list(pictures[start : start + 6]), 1) for start in starts]
        Image.fromarray(np.concatenate(rows, 0)).save(self.work / f"sheet-{name}-{step:05}.png")


def write_model(trainer: Any, loras: dict[str, dict[str, Tensor]], out: Path) -> None:
    """Write the model in diffusers' layout, bfloat16, its LoRAs beside it."""
    native = {name: dict(of) for name, of in native_weights(trainer.painter).items()}
    last = initialise(qwen3_shapes(trainer.size.text_encoder), trainer.seed)
    native[TEXT_ENCODER] = last | native[TEXT_ENCODER]  # the last layer is there and never read
    end = trainer.tokenizer.encode("<|im_end|>")[0]
    shapes = {kind: {name: x.shape for name, x in of.items()} for kind, of in native.items()}
    configs = {
        NETWORK: network_config(TransformerConfig.from_shapes(shapes[NETWORK])),
        TEXT_ENCODER: text_encoder_config(
            TextEncoderConfig.from_shapes(shapes[TEXT_ENCODER]), torch.bfloat16, end
        ),
    }
    for component, config in configs.items():
        weights = to_diffusers(component, native[component])
        _write_component(_component(out, component), weights, config)
    _write_component(
        _component(out, AUTOENCODER),
        trainer.autoencoder.state_dict(),
        {"_class_name": "AutoencoderKL", **autoencoders.CONFIG},
    )
    shutil.copytree(trainer.work / "tokenizer", out / "tokenizer")
    write_pipeline(out)
    for name, tensors in loras.items():
        write_lora(out / "loras" / f"{name}.safetensors", tensors)


def _component(model: Path, component: str) -> Path:
    return model / DIFFUSERS_FILES[component]


def _write_component(path: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    write_tensors(path, {name: value.bfloat16() for name, value in weights.items()})
    text = json.dumps(config, indent=2) + "\n"
    path.with_name("config.json").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parse(arguments)
    try:
        return _run(options)
    except TurboError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}; lower the rates", file=sys.stderr)
        return 1
    except (OSError, MemoryError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_shortage(error):
            raise
        needed, memory = (size >> 20 for size in (_needed_bytes(_amounts(options)), _MEMORY_BYTES))
        print(f"error: {one_line(error)}; what was trained is kept in {options.work}, the same "
              f"command goes on from there ({needed} MiB of disk and {memory} MiB of memory are "
              "needed)", file=sys.stderr)  # fmt: skip
        return 1


def _run(options: argparse.Namespace) -> int:
    problem = _problem(options)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    work: Path = _made(options.work)
    command = ["python -m tools.train_demo_model", f"--seed {options.seed}"]
    command += [f"--threads {options.threads}", *["--quick"] * options.quick]
    command += [] if options.start is None else [f"--start {options.start}"]
    amounts = _amounts(options)
    if not (work / _SETTINGS).exists():
        if options.start is not None and not (work / "log.txt").exists():  # its log goes on
            write_whole(work / "log.txt", (options.start / "training.log").read_bytes())
        write_whole(work / _SETTINGS, _settings(options, amounts).encode())
    with (work / "log.txt").open("a", encoding="utf-8") as file:

        def log(line: str) -> None:
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
            file.write(f"{line}\n")
            file.flush()

        log(f"command: {' '.join(command)}, torch {torch.__version__}")
        begin = time.time()
        trainer = _Trainer(amounts, options.seed, work, log, options.start, _precision(options))
        with _compiling_in(work):
            loras = trainer.run()
        log(f"this run took {time.time() - begin:.0f} s")
    unfinished = options.out.with_name(f".{options.out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_model(trainer, loras, unfinished)
    shutil.copyfile(work / "log.txt", unfinished / "training.log")
    _write_sums(unfinished)
    if options.out.exists() and not options.force:
        raise BadInputError(f"{options.out} was made meanwhile; the model is in {unfinished}")
    replaced = options.out.with_name(f".{options.out.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if options.out.exists():
        os.replace(options.out, replaced)
    os.replace(unfinished, options.out)
    shutil.rmtree(replaced, ignore_errors=True)
    print(f"wrote {options.out}")
    return 0


def _is_shortage(error: RuntimeError) -> bool:
    """Whether memory or disk ran out, also while the network was compiled."""
    of_system = any(isinstance(one, (OSError, MemoryError)) for one in chain(error))
    return of_system or is_out_of_memory(error)


@contextlib.contextmanager
def _compiling_in(work: Path) -> Iterator[None]:
    """Compiled code lies in `work`, and none is read that another run has left: it is pickled."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    folder = work.absolute() / "compiled"
    shutil.rmtree(folder, ignore_errors=True)
    os.environ[name] = str(folder)
    try:
        with (
            torch._inductor.config.patch(fx_graph_cache=False),
            torch._functorch.config.patch(enable_autograd_cache=False),
            torch._dynamo.config.patch(automatic_dynamic_local_pgo=False),
        ):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _problem(options: argparse.Namespace) -> str | None:
    if options.out.name in ("", ".."):
        return f"--out must name a folder, got {options.out}"
    if options.out.exists() and not options.force:
        return f"{options.out} exists; give --force to replace it, or another --out"
    if options.out.exists() and not _is_replaceable(options.out):
        return (
            f"{options.out} is no model that this tool has made, so it is not replaced; give "
            "another --out"
        )
    out, work = options.out.absolute().resolve(), options.work.absolute().resolve()
    if out == work or out in work.parents:
        return f"--work {options.work} must not lie in --out {options.out}, which is replaced"
    for name, value, least, most in (
        ("threads", options.threads, 1, 4096),
        ("seed", options.seed, 0, 2**63 - 1),
    ):
        if not least <= value <= most:
            return f"--{name} must be from {least} to {most}, got {value}"
    missing_packages = [name for name in _LIBRARIES if find_spec(_MODULES.get(name, name)) is None]
    if missing_packages:
        return f"{' and '.join(missing_packages)} must be installed; pip install -e '.[all]' does"
    free = free_bytes(torch.device("cpu"))
    if not options.quick and free is not None and free < _MEMORY_BYTES:
        return (
            f"{free >> 20} MiB of memory are free, {_MEMORY_BYTES >> 20} MiB are needed; end other "
            "programs, or add swap space"
        )
    if not options.quick and (missing := missing_compiler(torch.device("cpu"))) is not None:
        return f"compiling the network {missing}"
    if options.start is not None and not (options.start / _SUMS).is_file():
        return f"--start must be a folder that this tool has made, got {options.start}"
    for path in (options.out.absolute().parent, options.work):
        require_writable_folder(_existing(path))
    settings = options.work / _SETTINGS
    if not settings.exists() and any(options.work.glob("*.safetensors")):
        return (
            f"{options.work} holds the state of a run whose settings are lost ({settings} is not "
            "there); give another --work, or delete the folder"
        )
    if settings.exists() and settings.read_text(encoding="utf-8") != _settings(
        options, _amounts(options)
    ):
        return (
            f"{options.work} holds the state of a run with other settings, or of other code or "
            f"libraries ({settings}); give another --work, or delete the folder"
        )
    kept = sum(path.stat().st_size for path in options.work.rglob("*") if path.is_file())
    room = shutil.disk_usage(_existing(options.work)).free
    missing_bytes = _needed_bytes(_amounts(options)) - kept - room
    if missing_bytes > 0 and not kept:
        return (
            f"{options.work} has {room >> 20} MiB free, {(missing_bytes + room) >> 20} MiB are "
            "needed; give another --work"
        )
    if missing_bytes > 0:
        return (
            f"{options.work} has {room >> 20} MiB free beside the {kept >> 20} MiB that are kept "
            f"there, {missing_bytes >> 20} MiB more are needed; make room on that disk"
        )
    return None


def _is_replaceable(out: Path) -> bool:
    return out.is_dir() and ((out / _SUMS).is_file() or not any(out.iterdir()))


def _needed_bytes(amounts: Amounts) -> int:
    """What a run from nothing keeps on the disk at most, and its model."""
    sizes = [
        (16 * 4 + 1) * height * width // 64 + 8 * (CAPTION + 1)
        for height, width in autoencoders.SIZES
    ]
    total = 0
    for kind, counts in amounts.scenes.items():
        total += sum(count * size for count, size in zip(counts, sizes))
        if any(part.upscaled for part in PARTS if part.scenes == kind):
            total += sum(count * size for count, size in zip(counts[1:], sizes))
        if any(part.ragged for part in PARTS if part.scenes == kind):
            total += sum(count * size for count, size in zip(counts[1:], sizes[1:]))
    of_lora = sum(count * size for count, size in zip(amounts.lora_scenes, sizes))
    phases = 3 + len(PARTS) + len(LESSONS)
    return total + len(LESSONS) * of_lora + (phases + 2) * _STATE_BYTES


def _amounts(options: argparse.Namespace) -> Amounts:
    return QUICK if options.quick else WHOLE


def _precision(options: argparse.Namespace) -> torch.dtype | None:
    """That of the network's and the LoRAs' training; None: nothing is compiled, for a few steps."""
    if options.quick:
        return None
    return arithmetic_dtype(torch.bfloat16, "cpu")


def _settings(options: argparse.Namespace, amounts: Amounts) -> str:
    """What the bits depend on, but for the compiler and the processor's model."""
    of = {
        "seed": options.seed,
        "threads": options.threads,
        "start": None if options.start is None else _sum(options.start / _SUMS),
        "precision": str(_precision(options)),
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "code": {
            f"{path.parent.name}/{path.name}": _sum(path)
            for folder in (Path(__file__).parent, Path(turbo.__file__).parent)
            for path in sorted(folder.glob("*.py"))
            if path.name not in _JUDGES
        },
        "amounts": asdict(amounts),
    }
    return json.dumps(of, indent=1) + "\n"


def _existing(path: Path) -> Path:
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write_sums(folder: Path) -> None:
    """``SHA256SUMS`` of all files, as ``sha256sum -c`` reads it."""
    lines = [
        f"{_sum(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    (folder / _SUMS).write_text("".join(lines), encoding="utf-8")


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_demo_model", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("demo_model"), help="folder of the model")
    parser.add_argument("--work", type=Path, default=Path(".demo-work"), help="state and sheets")
    parser.add_argument(
        "--start", type=Path, metavar="MODEL", help="go on from a finished model's weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few steps of each phase")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
