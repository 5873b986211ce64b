"""Memory plans: the same picture however the parts are held, and little there at a time."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import turbo.engine
from tests.turbo.test_engine import PLAN, bits, load
from turbo import cli, pipeline, placement
from turbo.checkpoint import Checkpoint
from turbo.engine import Engine, Result
from turbo.errors import BadInputError, CheckpointError, OutOfMemoryError
from turbo.fusing import LoraFuser
from turbo.lora import read_lora
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.placement import (
    RESIDENT,
    RESIDENT_PLAN,
    STREAMED,
    WHOLE,
    MemoryPlan,
    _on_stream_of_caller,
    blocks_of,
)
from turbo.plan import Performance, dump_plan
from turbo.testing import make_tiny_model

ALL_STREAMED = MemoryPlan(
    "low", {NETWORK: STREAMED, TEXT_ENCODER: STREAMED, AUTOENCODER: WHOLE}, is_tiled=True
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("placement") / "model")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placement") / "both.safetensors"
    names = {
        "diffusion_model.layers.0.attention.out.diff": (192, 192),
        "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.o_proj.diff": (64, 64),
    }
    draws = torch.Generator().manual_seed(5)
    save_file({name: torch.randn(*size, generator=draws) for name, size in names.items()}, path)
    return path


@pytest.fixture(scope="module")
def plain(model: Path) -> Engine:
    return load(model)


@pytest.fixture
def want(plain: Engine) -> list[str]:
    return bits(plain.generate("a cat", seed=7))


def there(engine: Engine) -> set[str]:
    """Parts of which any weight is in memory."""
    models = engine.models
    parts = {
        "network": models.transformer.final_linear.weight,
        "text encoder": models.text_encoder.embed_tokens,
        "autoencoder": models.autoencoder.decoder.conv_in.weight,
    }
    return {name for name, weight in parts.items() if weight.device.type != "meta"}


# How parts are held.


@pytest.mark.parametrize(
    ("memory", "resting"),
    [
        ("fast", {"network", "text encoder", "autoencoder"}),
        ("balanced", {"network", "autoencoder"}),
        ("low", set()),
    ],
)
def test_a_memory_plan_changes_no_bit_and_keeps_what_it_says(
    memory: str, resting: set[str], model: Path, want: list[str]
):
    engine = load(model, memory=memory)
    for _ in range(2):
        assert there(engine) == resting
        result = engine.generate("a cat", seed=7)
        assert bits(result) == want
        assert result.metadata[0]["memory"] == memory
    assert there(engine) == resting


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_streamed_network_has_one_block_there_at_a_time(
    quantize: str | None, model: Path, plain: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turbo.engine, "choose_memory", lambda *_, **__: ALL_STREAMED)
    engine = load(model, quantize=quantize)
    rings = [*blocks_of(engine.models.transformer), *blocks_of(engine.models.text_encoder)]
    blocks = [block.module for ring in rings for block in ring]
    counts: set[int] = set()

    def count(*_: Any) -> None:
        counts.add(sum(is_there(block) for block in blocks))

    for block in blocks:
        block.register_forward_pre_hook(count)
    expected = plain if quantize is None else load(model, quantize=quantize)
    want = bits(expected.generate("a cat", seed=7))
    assert bits(engine.generate("a cat", seed=7)) == want
    assert counts == {1}
    assert not any(map(is_there, blocks))


def is_there(block: nn.Module) -> bool:
    """Whether a block has its largest matrix."""
    return max(block.parameters(), key=torch.numel).device.type != "meta"


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("memory", ["balanced", "low"])
def test_loras_come_and_go_while_weights_are_absent(
    memory: str, keeps: bool, model: Path, plain: Engine, lora: Path, want: list[str]
):
    plan = replace(PLAN, lora=replace(PLAN.lora, cache_models=keeps))
    engine = load(model, memory=memory, plan=plan)
    changed = bits(plain.generate("a cat", seed=7, loras=[(lora, 0.5)]))
    assert changed != want
    for loras, expected in (([(lora, 0.5)], changed), ([], want), ([(lora, 0.5)], changed)):
        engine.set_loras(loras)
        assert bits(engine.generate("a cat", seed=7)) == expected
    loaded = load(model, memory=memory, plan=plan, loras=[(lora, 0.5)])
    assert bits(loaded.generate("a cat", seed=7)) == changed


def test_captures_stay_where_the_weights_do(model: Path, want: list[str]):
    engine = load(model, memory="balanced", capture="replay")
    engine.warmup(buckets=(32,))
    # The network at three sizes and its refiner; in tiles the decoder is not captured.
    assert engine.counters.captures == 3 + 1
    assert bits(engine.generate("a cat", seed=7)) == want


def test_a_prompt_seen_before_reads_no_text_encoder(model: Path, monkeypatch: pytest.MonkeyPatch):
    engine = load(model, memory="balanced")
    engine.generate("a cat", seed=7)
    read: list[str] = []
    fill = engine._fuser.fill

    def noted(component: str, *rest: Any) -> None:
        read.append(component)
        fill(component, *rest)

    monkeypatch.setattr(engine._fuser, "fill", noted)
    engine.generate("a cat", seed=8)
    assert read == []
    engine.generate("a dog", seed=8)
    assert set(read) == {TEXT_ENCODER}


def test_the_plan_that_was_chosen_is_one_line_in_the_log(
    model: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "turbo.memory"):
        load(model, memory="balanced")
    lines = [line for line in caplog.messages if line.startswith("memory plan")]
    assert lines == ["memory plan balanced on cpu: text_encoder streamed, decoded in tiles"]


@pytest.mark.parametrize(("memory", "quiet"), [("fast", 0), ("balanced", 0), ("balanced", 1)])
def test_the_command_tells_a_plan_that_moves_weights_before_it_loads(
    memory: str, quiet: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan = tmp_path / "plan.yaml"
    plan.write_text(dump_plan(PLAN))
    given = ["generate", "a cat", "--model", str(model), "--memory", memory, "--device", "cpu"]
    given += ["--plan", str(plan), "-o", str(tmp_path / "a.png")]
    assert cli.main([*given, *["--quiet"] * quiet]) == 0
    line = "turbo: memory plan balanced on cpu: text_encoder streamed, decoded in tiles\n"
    assert (line in capsys.readouterr().err) == (memory == "balanced" and not quiet)


# What fits.


def with_free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("turbo.memory.free_bytes", lambda device: count)


def test_a_plan_that_cannot_fit_says_by_how_much_and_which_would(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    with_free(monkeypatch, 20_000_000)
    with pytest.raises(BadInputError) as caught:
        load(model, memory="fast")
    text = str(caught.value)
    needed = int(text.split(" needs ")[1].split()[0])
    assert f"where 20000000 are free: {needed - 20_000_000} too few" in text
    assert "memory 'low' would fit" in text
    load(model, memory="low").generate("a cat", seed=7)


def test_where_nothing_fits_other_weights_are_named(model: Path, monkeypatch: pytest.MonkeyPatch):
    with_free(monkeypatch, 1000)
    with pytest.raises(BadInputError, match=r"no memory plan would, .*; use 8-bit weights"):
        load(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "tiny"}, r"memory must be one of auto, fast, balanced, low; got 'tiny'"),
        ({"memory": "low", "capture": "replay"}, r"does not go with .* memory 'low'"),
        ({"allow_fallback": "yes"}, r"allow_fallback must be true or false, got 'yes'"),
        ({"plan": replace(PLAN, performance=Performance(enable_model_cpu_offload=True)),
          "memory": "fast"}, r"'fast' does not go with enable_model_cpu_offload"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(options: dict[str, Any], message: str, model: Path):
    with pytest.raises(BadInputError, match=message):
        load(model, **options)


# Memory runs out.


class _FailingAllocator(TorchDispatchMode):
    """Raises as an allocator does, at the n-th operation that runs inside."""

    def __init__(self, number: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.left, self.error = number, error

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error("DefaultCPUAllocator: can't allocate memory: of 8 bytes")
        return func(*args, **(kwargs or {}))


def fail_once(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: type[Exception], number: int = 3
) -> list[weakref.ref[Any]]:
    """Let the allocator fail in the first call of a method; the tensors it had been given."""
    method, failures = getattr(owner, name), [error]
    seen: list[weakref.ref[Any]] = []

    def failing(*args: Any, **options: Any) -> Any:
        if not failures:
            return method(*args, **options)
        seen.extend(weakref.ref(each) for each in args if isinstance(each, torch.Tensor))
        with _FailingAllocator(number, failures.pop()):
            return method(*args, **options)

    monkeypatch.setattr(owner, name, failing)
    return seen


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize(
    ("part", "name", "phase"),
    [
        ("text_encoder", "forward", "encoding"),
        ("transformer", "forward", "sampling"),
        ("autoencoder", "decode", "decoding"),
    ],
)
def test_memory_that_runs_out_is_an_error_with_its_phase_and_spoils_nothing(
    part: str, name: str, phase: str, error: type[Exception], model: Path, want: list[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    engine = load(model)
    seen = fail_once(monkeypatch, getattr(engine.models, part), name, error)
    with pytest.raises(OutOfMemoryError, match=r"memory ran out while .*; use memory") as caught:
        engine.generate("a cat", seed=7)
    assert caught.value.phase == phase
    del caught
    gc.collect()
    assert seen
    assert [each() for each in seen] == [None] * len(seen)
    assert bits(engine.generate("a cat", seed=7)) == want


def test_memory_that_runs_out_in_a_capture_says_so(
    model: Path, want: list[str], monkeypatch: pytest.MonkeyPatch
):
    engine = load(model, capture="replay", strict_speed=True)
    fail_once(monkeypatch, engine.models.transformer, "forward", torch.OutOfMemoryError)
    with pytest.raises(OutOfMemoryError, match="while a part was captured") as caught:
        engine.generate("a cat", seed=7)
    assert caught.value.phase == "capture"
    assert bits(engine.generate("a cat", seed=7)) == want


def test_memory_that_runs_out_in_loading_is_an_error_or_the_next_plan(
    model: Path, want: list[str], monkeypatch: pytest.MonkeyPatch
):
    for allowed in (False, True):
        with monkeypatch.context() as patched:
            fail_once(patched, LoraFuser, "fill", torch.OutOfMemoryError, number=9)
            if not allowed:
                with pytest.raises(OutOfMemoryError, match="while the model was loaded"):
                    load(model)
                continue
            engine = load(model, allow_fallback=True)
    result = engine.generate("a cat", seed=7)
    assert result.metadata[0]["memory"] == "balanced"
    assert bits(result) == want


def test_a_change_of_memory_plans_that_fails_is_made_anew(
    model: Path, want: list[str], monkeypatch: pytest.MonkeyPatch
):
    engine = load(model, memory="low")
    holding = engine._holding
    assert holding is not None
    fast = holding.named("fast")

    def gone(*_: Any) -> None:
        raise CheckpointError("the file has changed")

    with monkeypatch.context() as patched:
        patched.setattr(engine._fuser, "fill", gone)
        with pytest.raises(CheckpointError):
            engine._hold(fast)
    assert holding.now is None
    assert bits(engine.generate("a cat", seed=7)) == want
    assert holding.now is holding.made


@pytest.mark.parametrize("capture", ["eager", "replay"])
def test_one_retry_is_made_as_the_next_plan_has_it_and_the_next_picture_as_before(
    capture: str, model: Path, want: list[str], monkeypatch: pytest.MonkeyPatch
):
    engine = load(model, allow_fallback=True, capture=capture)
    engine.generate("a dog", seed=1)
    real = pipeline.run_stages
    failures = [1]

    def stages(*args: Any, **options: Any) -> Iterator[Any]:
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("no more")
        return real(*args, **options)

    monkeypatch.setattr(turbo.engine, "run_stages", stages)
    results: list[Result] = [engine.generate("a cat", seed=7) for _ in range(2)]
    assert [result.metadata[0]["memory"] for result in results] == ["balanced", "fast"]
    assert [bits(result) for result in results] == [want, want]


def test_only_one_retry_is_made(model: Path, want: list[str], monkeypatch: pytest.MonkeyPatch):
    engine = load(model, allow_fallback=True)

    def never(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(turbo.engine, "run_stages", never)
        with pytest.raises(OutOfMemoryError, match="with memory 'balanced'; use memory 'low'"):
            engine.generate("a cat", seed=7)
    assert bits(engine.generate("a cat", seed=7)) == want
    assert engine.memory.modes[TEXT_ENCODER] == RESIDENT


def fail_always(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(owner, name, never)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("work", ["generate", "warmup", "load"])
def test_allow_fallback_is_advised_where_it_is_off_and_would_help(
    work: str, allowed: bool, model: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    call: Callable[[], Any] = partial(load, model, allow_fallback=allowed)
    if work == "load":
        fail_always(monkeypatch, LoraFuser, "fill")
    else:
        engine = call()
        fail_always(monkeypatch, turbo.engine, "run_stages")
        call = engine.warmup if work == "warmup" else partial(engine.generate, "a cat")
    with pytest.raises(OutOfMemoryError) as caught:
        call()
    is_tried = allowed and work != "warmup"
    plan, lower = ("balanced", "low") if is_tried else ("fast", "balanced")
    advised = ", or allow_fallback to have it tried by itself" * (not allowed and work != "warmup")
    assert f"with memory '{plan}'; use memory '{lower}'{advised}; or use 8-bit" in str(caught.value)
    tried = [line for line in caplog.messages if "is tried" in line]
    assert len(tried) == is_tried
    for line in tried:
        assert line.endswith("with memory 'fast'; memory 'balanced' is tried (allow_fallback)")


# Host memory.


MEASURE = """
import sys
from turbo.engine import Engine
from turbo.plan import Plan, Stage
from turbo.testing import make_model

def resident(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

plan = Plan(stages=(Stage(name="only", height=32, width=32, steps=1),))
engine = Engine.from_pretrained(
    sys.argv[1], plan=plan, device="cpu", dtype="float32", memory=sys.argv[2]
)
engine.generate("a cat", seed=1)
print(resident("VmRSS"), resident("VmHWM"))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory figures")
def test_a_text_encoder_that_moves_leaves_the_hosts_memory(tmp_path: Path):
    from turbo.testing import TINY, ModelSize, make_model

    wide = {**TINY.text_encoder, "hidden_size": 512, "intermediate_size": 4096,
            "num_hidden_layers": 13}  # fmt: skip
    network = {**TINY.network, "cap_feat_dim": 512}
    size = ModelSize(network=network, text_encoder=wide, autoencoder=TINY.autoencoder)
    folder = make_model(tmp_path / "model", size)
    encoder = 12 * 4 * (3 * 512 * 4096)  # bytes of its large matrices in float32: 302 MB
    figures = {}
    for memory in ("fast", "balanced"):
        command = [sys.executable, "-c", MEASURE, str(folder), memory]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        figures[memory] = [int(each) for each in out.split()]
    (held, peak), (less, lower_peak) = figures["fast"], figures["balanced"]
    assert held - less > 0.8 * encoder
    assert peak - lower_peak > 0.7 * encoder


def test_progress_comes_part_by_part_though_parts_load_side_by_side(model: Path):
    seen: list[tuple[str, int, int]] = []
    load(model, on_progress=lambda *told: seen.append(told))
    parts = [part for part, _ in itertools.groupby(name for name, _, _ in seen)]
    assert sorted(parts) == [AUTOENCODER, NETWORK, TEXT_ENCODER]
    for part in parts:
        counts = [(done, total) for name, done, total in seen if name == part]
        assert counts == [(done, len(counts)) for done in range(1, len(counts) + 1)]


# Reading.


@pytest.mark.parametrize("keeps", [True, False])
def test_a_lora_file_is_read_once_for_each_turn_or_not_again(
    keeps: bool, model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turbo.engine, "choose_memory", lambda *_, **__: ALL_STREAMED)
    engine = load(model, plan=replace(PLAN, lora=replace(PLAN.lora, cache_models=keeps)))
    engine.set_loras([(lora, 0.5)])
    read: list[Path] = []

    def noted(path: Path, **options: Any) -> Any:
        read.append(path)
        return read_lora(path, **options)

    monkeypatch.setattr("turbo.fusing.read_lora", noted)
    engine.generate("a cat", seed=7)
    # The encoder, the caption's refiner, the network's stages, the decoder.
    assert len(read) == (0 if keeps else 4)
    holding = engine._holding
    assert holding is not None
    read.clear()
    holding.use(RESIDENT_PLAN)
    assert len(read) == (0 if keeps else 1)


def loading_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("turbo-load")]


def test_ctrl_c_ends_all_parts_that_load_at_their_next_run_of_rows(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    reading, interrupted = threading.Barrier(3), threading.Event()
    after: list[str] = []
    read = Checkpoint._read

    def slow(checkpoint: Checkpoint, *args: Any, **options: Any) -> Any:
        values = read(checkpoint, *args, **options)  # which raises once the stop is asked for
        if interrupted.is_set():
            after.append(checkpoint.component)
        elif reading.wait() == 0:
            interrupted.set()
            signal.raise_signal(signal.SIGINT)
        interrupted.wait()
        while checkpoint.stop is not None and not checkpoint.stop._asked.is_set():
            time.sleep(0.001)
        return values

    monkeypatch.setattr(Checkpoint, "_read", slow)
    with pytest.raises(KeyboardInterrupt):
        load(model)
    assert after == []
    assert loading_threads() == []


def test_an_error_in_one_part_ends_the_others(model: Path, monkeypatch: pytest.MonkeyPatch):
    read, reading, ended = Checkpoint._read, threading.Barrier(3), []

    def failing(checkpoint: Checkpoint, *args: Any, **options: Any) -> Any:
        reading.wait()  # or a part that has not begun when another fails never reads at all
        if checkpoint.component == AUTOENCODER:
            raise CheckpointError("is damaged")
        assert checkpoint.stop is not None
        while not checkpoint.stop._asked.is_set():
            time.sleep(0.001)
        ended.append(checkpoint.component)
        return read(checkpoint, *args, **options)

    monkeypatch.setattr(Checkpoint, "_read", failing)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(model)
    assert sorted(ended) == [NETWORK, TEXT_ENCODER]


def test_threads_that_load_queue_their_work_on_the_callers_stream(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    stream, current = object(), threading.local()

    @contextlib.contextmanager
    def on(wanted: object) -> Iterator[None]:
        current.stream = wanted
        yield
        current.stream = None

    # As on a GPU, where each thread has a current stream of its own.
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    on_stream = _on_stream_of_caller(torch.device("cuda"))
    monkeypatch.setattr(placement, "_on_stream_of_caller", lambda device: on_stream)
    seen: list[tuple[str, object]] = []
    fill = LoraFuser.fill

    def noted(fuser: LoraFuser, component: str, *args: Any) -> None:
        seen.append((threading.current_thread().name[:10], current.stream))
        fill(fuser, component, *args)

    monkeypatch.setattr(LoraFuser, "fill", noted)
    load(model)
    assert seen == [("turbo-load", stream)] * 3
