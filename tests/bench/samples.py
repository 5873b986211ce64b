"""Invented results files of every kind, for tests of what reads them; nothing in them was measured.

They follow `bench/schema.md`. The processor's name says that they are samples, so that a page made
of them cannot be taken for a measurement.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image

from bench.pictures import save_picture
from bench.results import FORMAT
from bench.timing import ratio, summarise

STAGES = ("stage1", "stage2", "stage3")
PARTS = ("prompt", *STAGES, "decode")
SECONDS = {
    "turbo": (0.4, 1.9, 2.6, 41.0, 2.1),
    "turbo, compiled": (0.31, 1.4, 1.9, 33.0, 1.9),
    "diffusers": (0.42, 2.9, 4.1, 58.0, 2.2),
    "diffusers, compiled": (0.42, 2.1, 3.5, 49.0, 2.2),
    "turbo, EasyCache": (0.31, 1.0, 1.3, 23.0, 1.9),
}
"""Side -> seconds of its parts, in the order of PARTS."""
ROUNDS = 5
CALLS = {"stage1": 9, "stage2": 5, "stage3": 5}
"""Stage -> network calls."""


def machine(commit: str = "1234567890ab", **other: Any) -> dict[str, Any]:
    """A machine that does not exist."""
    return {
        "id": "5a3b1ec0ffee",
        "time": "2026-11-20T10:00:00+00:00",
        "commit": commit,
        "dirty": commit.endswith("-dirty"),
        "turbo": "0.1.0",
        "torch": "2.13.0",
        "triton": "3.9.0",
        "diffusers": "0.42.1",
        "python": "3.11.7",
        "processor": "Sample Processor (invented)",
        "cores": 2,
        "vector_instructions": "AVX2",
        "memory_gib": 23.5,
        "threads": 2,
        **other,
    }


GPU = {
    "name": "Sample GPU (invented)",
    "memory_gib": 79.2,
    "multiprocessors": 132,
    "cuda": "13.0",
    "nvidia_smi": {
        "driver_version": "580.1",
        "power.limit": "700.00 W",
        "clocks.max.sm": "1980 MHz",
    },
}


def configuration() -> dict[str, Any]:
    return {
        "model": {"name": "sample-512", "fingerprint": "f00dfeed", "parameters": 61_000_000},
        "plan": {"generation": {"stage1": {"height": 224, "width": 176, "steps": 9}}},
        "prompt": "a lighthouse",
        "negative_prompt": "",
        "seed": 7,
        "dtype": "float32",
        "device": "cpu",
        "rounds": ROUNDS,
        "warm_up_rounds": 1,
        "order": "alternating",
    }


def header(kind: str, **other: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": kind,
        "command": [kind, "--rounds", str(ROUNDS), "-o", f"{kind}.json"],
        "machine": machine(),
        "partial": False,
        "configuration": configuration(),
        **other,
    }


def rounds_of(values_ms: list[float]) -> dict[str, Any]:
    """A summary with every value."""
    return summarise(values_ms) | {"all_ms": values_ms}


def side(name: str, *, slower: float = 1.0, gpu: bool = False) -> dict[str, Any]:
    """A side's figures, the same at each call."""
    chance = random.Random(name)
    rounds = [
        [slower * 1000 * value * chance.uniform(0.97, 1.05) for value in SECONDS[name]]
        for _ in range(ROUNDS)
    ]
    times = {part: rounds_of(list(values)) for part, values in zip(PARTS, zip(*rounds))}
    times["total"] = rounds_of([sum(values) * 1.01 for values in rounds])
    times["png"] = rounds_of([45.0] * ROUNDS)
    times["upscale to stage2"] = summarise([0.8, 0.9, 1.0])
    seconds = dict(zip(PARTS, SECONDS[name]))
    rate = {"diffusers": 0.31, "turbo": 0.44, "diffusers, compiled": 0.37}.get(name, 0.55)
    shares = {"prompt": 0.3, "stage1": rate * 0.8, "stage2": rate * 0.9, "stage3": rate}
    fast = name not in ("turbo", "diffusers")
    return {
        "settings": settings(name),
        "approximate": "EasyCache" in name,
        "best": "compiled" in name,
        "start": {
            "load": 3.1,
            "warm-up": 31.0 if fast else 12.5,
            "first picture": seconds["stage3"],
        },
        "check": {"distance": 1.2e-6, "allowed": 1e-3},
        "times": times,
        "network": {
            stage: summarise([1000 * seconds[stage] / count * f for f in (0.97, 1.0, 1.0, 1.06)])
            | {"calls_per_picture": count}
            for stage, count in CALLS.items()
        },
        "skips": {"stage1": [3, 9], "stage3": [2, 5]} if "EasyCache" in name else {},
        "tflop": {"stage1": 0.2, "stage2": 0.3, "stage3": 4.1, "total": 5.0},
        "share_of_limit": shares | {"total": rate * 0.95},
        "memory": {
            "host_peak_gib": 3.4 if name == "diffusers" else 2.2,
            "device": {stage: {"allocated_gib": 14.2, "reserved_gib": 15.0} for stage in STAGES}
            if gpu
            else {},
            "timeline": timeline(seconds, gpu),
        },
        "overhead_share": 0.0004,
        "pictures": [],
    }


def settings(name: str) -> dict[str, Any]:
    if "diffusers" in name:
        return {
            "program": "diffusers",
            "diffusers": "0.42.1",
            "dtype": "float32",
            "compile_repeated_blocks": "compiled" in name,
        }
    fast = name != "turbo"
    return {
        "program": "turbo",
        "dtype": "float32",
        "compile": fast,
        "capture": "replay" if fast else "eager",
        "easycache": ["stage1", "stage3"] if "EasyCache" in name else [],
    }


def timeline(seconds: dict[str, float], gpu: bool) -> list[list[Any]]:
    """Memory that swells towards the middle of each part."""
    found: list[list[Any]] = [[0.0, 1.5, 11.0 if gpu else None, ""]]
    begin = 0.0
    for at, (part, length) in enumerate(seconds.items()):
        for step in range(12):
            bump = math.sin(math.pi * step / 11)
            device = 12 + 0.6 * at + bump if gpu else None
            found.append([begin + length * step / 12, 1.6 + 0.1 * at + 0.3 * bump, device, part])
        begin += length
    return found


def compare(folder: Path, *, pictures: bool = True, gpu: bool = False) -> dict[str, Any]:
    """A comparison of five sides, one of them approximate, and one that failed its check."""
    sides = {name: side(name, gpu=gpu) for name in SECONDS}
    if pictures:
        for at, name in enumerate(sides):
            sides[name]["pictures"] = [
                picture(folder, f"{at}-{round_}", round_, 6 * at) for round_ in range(2)
            ]
    all_ms = {name: entry["times"]["total"]["all_ms"] for name, entry in sides.items()}
    sides["turbo, int8"] = {
        "settings": {"quantize": "int8"},
        "approximate": True,
        "best": False,
        "check": {"withheld": "SideError: relative distance 0.31, allowed 0.1"},
    }
    others = [name for name in all_ms if name != "turbo"]
    pairs = [("turbo", name) for name in others] + [("turbo, compiled", "diffusers, compiled")]
    return header(
        "compare",
        machine=machine() | ({"gpu": GPU} if gpu else {}),
        limit={"tflop_per_s": 0.11, "median_ms": 2440.0},
        sides=sides,
        ratios={
            f"{one} / {other}": {"total": ratio(all_ms[one], all_ms[other])} for one, other in pairs
        },
        pictures={
            f"{name} / turbo": [
                {"round": number, "identical": False, "largest": 4, "psnr_db": 61.2 - 9 * at,
                 "ssim": 0.9998 - 0.02 * at, "latent": {"stage3": 1e-4}}
                for number in range(2)
            ]
            for at, name in enumerate(others)
        } | {"another seed": [{"identical": False, "psnr_db": 9.8, "ssim": 0.21}]},
        cold_start={"turbo": {"process to picture": 61.0}},
    )  # fmt: skip


def run(commit: str, time: str, slower: float, **of_machine: Any) -> dict[str, Any]:
    """A run of one side, for the history."""
    return header(
        "run",
        machine=machine(commit, time=time, **of_machine),
        sides={"turbo": side("turbo", slower=slower)},
        limit={"withheld": "OutOfTimeError: "},
    )


def load() -> dict[str, Any]:
    """A queue that fills now and then, with two failed requests."""
    chance = random.Random(1)
    arrival = free = 0.0
    requests: list[list[Any]] = []
    for at in range(240):
        arrival += chance.expovariate(2.0)
        begin = max(arrival, free)
        free = begin + chance.uniform(0.3, 0.45)
        queue, latency = 1000 * (begin - arrival), 1000 * (free - arrival)
        requests.append([arrival, queue, latency, at not in (77, 78)])
    good = [request for request in requests if request[3]]
    made = header(
        "load",
        offered={"rate_per_s": 2.0, "duration_s": 120.0, "seed": 1},
        latency=summarise([request[2] for request in good]),
        queue=summarise([request[1] for request in good]),
        service=summarise([request[2] - request[1] for request in good]),
        throughput_per_s=len(good) / free,
        completed=len(good),
        errors={"HTTP 500: out of memory": 2},
        late={"share": 0.012, "worst_ms": 14.0},
        requests=requests,
    )
    made["configuration"] = {"timeout_s": 60.0, "seed": 1}
    return made


def quality(folder: Path) -> dict[str, Any]:
    """Three approximate options, one of them withheld, and what another picture gives."""

    def spread(value: float) -> dict[str, float]:
        return {"median": value, "p20": value * 0.93, "p80": value * 1.05}

    def stages(level: float, ssim: float) -> dict[str, Any]:
        return {
            stage: {
                "psnr_db": spread(level - 2 * at),
                "ssim": {"median": ssim, "p20": ssim - 0.04, "p80": min(1.0, ssim + 0.04)},
                "latent_l2": spread(0.05 + 0.02 * at),
            }
            for at, stage in enumerate(STAGES)
        }

    def pictures(at: int, psnr_db: float, ssim: float) -> list[dict[str, Any]]:
        distance = {"psnr_db": psnr_db, "ssim": ssim, "identical": False}
        return [
            {"prompt": prompt, "stages": {"stage3": distance},
             **picture(folder, f"q{at}-{prompt}", prompt, 5 * at)}
            for prompt in range(2)
        ]  # fmt: skip

    options = {"easycache 0.05": (0.81, 38.0, 0.96), "easycache 0.12": (0.64, 29.5, 0.9)}
    return header(
        "quality",
        exact={"settings": {}, "pictures": pictures(0, 0.0, 0.0)},
        options={
            name: {
                "approximate": True,
                "settings": {"switch": name},
                "time_ratio": {**spread(quotient), "pairs": 4},
                "stages": stages(level, ssim),
                "pictures": pictures(at, level - 4, ssim),
            }
            for at, (name, (quotient, level, ssim)) in enumerate(options.items(), start=1)
        }
        | {"int8": {"approximate": True, "settings": {}, "withheld": "BadInputError: not here"}},
        another_seed={"stages": stages(14.1, 0.2), "pictures": pictures(9, 10.1, 0.2)},
    )


def device() -> dict[str, Any]:
    """A part of what ``bench device`` writes."""

    def timed(ms: float, **other: Any) -> dict[str, Any]:
        return summarise([ms * 0.99, ms, ms * 1.02]) | {"first_call_s": 0.4, **other}

    made = header(
        "device",
        machine=machine(id="900d900d900d", gpu=GPU),
        size="full",
        parts={
            "matmul": {"limit": timed(1.6, tflop_per_s=690.0)},
            "network": {
                stage: {
                    "batch": 1,
                    "eager": timed(ms, share_of_limit=0.42, tflop=ms / 3),
                    "compiled, captured": timed(ms * 0.7, share_of_limit=0.6, tflop=ms / 3),
                    "captured": {"withheld": "ValueError: check failed"},
                }
                for stage, ms in zip(STAGES, (21.0, 31.0, 95.0))
            },
            "start": {
                "cold": {"steps": [{"step": s, "seconds": t} for s, t in
                                   (("python", 0.1), ("imports", 4.0), ("weights", 9.0),
                                    ("engine", 9.5), ("first picture", 80.0))]},
                "warm": {"withheld": "ChildProcessError: code 1"},
            },
            "kernels": {"error": {"type": "OutOfTimeError", "message": "stopped after 60 s"}},
        },
    )  # fmt: skip
    del made["configuration"]  # its sizes are its own
    return made


def picture(folder: Path, name: str, round_: int, shift: int) -> dict[str, Any]:
    """A small PNG beside the results file; `shift` moves its colours a little."""
    width, height = 168, 216
    image = Image.new("RGB", (width, height))
    image.putdata(
        [
            ((x + 40 * round_) % 256, (y + shift) % 256, 120 + (shift * (x // 24 + y // 24)) % 32)
            for y in range(height)
            for x in range(width)
        ]
    )
    return {"round": round_, "seed": 7 + round_, **save_picture(image, folder / "pictures", name)}


def write(folder: Path, name: str, data: dict[str, Any]) -> Path:
    """A results file."""
    path = folder / name
    path.write_text(json.dumps(data))
    return path


def write_all(folder: Path) -> list[Path]:
    """One file of each kind, and a history over two machines."""
    runs = [
        run("aaaaaaaaaaaa", "2026-11-18T10:00:00+00:00", 1.3),
        run("bbbbbbbbbbbb", "2026-11-19T10:00:00+00:00", 1.1),
        run("cccccccccccc-dirty", "2026-11-19T18:00:00+00:00", 1.16),
        run("aaaaaaaaaaaa", "2026-11-18T11:00:00+00:00", 0.4, id="0ther0000000"),
        run("bbbbbbbbbbbb", "2026-11-19T11:00:00+00:00", 0.35, id="0ther0000000"),
    ]
    named = {
        "compare.json": compare(folder),
        "load.json": load(),
        "quality.json": quality(folder),
        "device.json": device(),
        **{f"run-{at}.json": data for at, data in enumerate(runs)},
    }
    return [write(folder, name, data) for name, data in named.items()]
